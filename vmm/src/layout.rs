//! Where things lie in the guest's physical memory and among its ports.
//!
//! RAM is below [`RAM_LOW_END`] and from 4 GiB on; between the two lie the devices.

use std::ops::Range;

/// The end of the RAM below 4 GiB.
pub const RAM_LOW_END: u64 = 0xc000_0000;
/// Where the RAM goes on that does not fit below [`RAM_LOW_END`].
pub const RAM_HIGH_START: u64 = 1 << 32;

/// Memory of PCI devices (their BARs).
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2): address and data.
pub const PCI_CONFIG_PORTS: Range<u64> = 0xcf8..0xd00;

/// The I/O APIC, where KVM has it.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs, where KVM has them.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors for real mode.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One more, for its identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The first serial port (COM1) and its interrupt.
pub const SERIAL_PORTS: Range<u64> = 0x3f8..0x400;
/// Interrupt line of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt lines of the I/O APIC; interrupts of PCI devices are messages and have numbers from here on.
pub const IOAPIC_LINES: u32 = 24;

/// The pvpanic device (QEMU's docs/specs/pvpanic): the guest writes here when its kernel panics.
pub const PVPANIC_PORT: u64 = 0x505;
/// ACPI sleep control and sleep status registers, for powering off (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_PORTS: Range<u64> = 0x600..0x602;
/// The ACPI reset register.
pub const RESET_PORT: u64 = 0x604;
