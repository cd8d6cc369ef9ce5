//! The ACPI tables: how many processors there are, where the interrupt controller is, what is not on the PCI bus, and how to
//! power off and reset. They describe a hardware-reduced machine (ACPI 6.5, section 4.1): one without the fixed
//! hardware that would need a power management timer and a system control interrupt.
//!
//! PCI devices have message-signalled interrupts only, so that there is no `_PRT`. They are configured through the ports of
//! mechanism 1, so that there is no MCFG table.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes as _, GuestAddress};

use super::BootError;
use super::map::{ACPI, RESET_VECTOR};
use crate::layout::{
    IOAPIC, LAPIC, PCI_CONFIG_PORTS, PCI_WINDOW, PVPANIC_PORT, RESET_PORT, SERIAL_IRQ, SERIAL_PORTS,
    SLEEP_PORTS,
};

const OEM: [u8; 6] = *b"SAPWD ";
const OEM_TABLE: [u8; 8] = *b"SAPWDVMM";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGNMENT: usize = 16;
/// A table's header (ACPI 6.5, section 5.2.6).
const HEADER_BYTES: u32 = 36;
/// The revision from which on integers of the DSDT have 64 bits.
const DSDT_REVISION: u8 = 6;

/// IA-PC boot architecture flags (ACPI 6.5, section 5.2.9.3). There is neither an 8042 nor VGA nor a CMOS clock; the
/// legacy device is COM1.
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// What `_S5` says to write for powering off (`SLP_TYP`); the sleep control register takes it (section 4.8.3.7).
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What is written to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Writes the tables; returns the address of the root pointer.
pub(super) fn write(memory: &super::GuestMemory, cpus: u8) -> Result<u64, BootError> {
    let tables = tables(cpus);
    assert!(ACPI + tables.len() as u64 <= RESET_VECTOR, "the tables of 255 processors have 3 KiB");
    let failed = |error: vm_memory::GuestMemoryError| BootError::Tables(error.to_string());
    memory.write_slice(&tables, GuestAddress(ACPI)).map_err(failed)?;
    Ok(ACPI)
}

/// All tables as they lie in memory from [`ACPI`] on: the root pointer first, then what it points to.
fn tables(cpus: u8) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, &dsdt());
    let fadt = append(&mut bytes, &fadt(dsdt));
    let madt = append(&mut bytes, &madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut bytes, &xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

/// Appends a table; returns its address.
fn append(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let address = ACPI + bytes.len() as u64;
    table.to_aml_bytes(bytes as &mut dyn AmlSink);
    address
}

/// The fixed description (section 5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    let register = |port: u64| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = register(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_PORTS.start);
    fadt.sleep_status_reg = register(SLEEP_PORTS.start + 1);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

/// The interrupt controllers (section 5.2.12). Lines of the I/O APIC have the numbers of the ISA interrupts, which is what is
/// assumed where no override says otherwise.
fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LAPIC as u32));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    madt
}

/// The description in AML: the PCI bus, COM1, pvpanic, and `_S5`.
fn dsdt() -> impl Aml {
    let mut aml = Vec::new();
    let serial = serial();
    let panic = panic_device();
    let bus = pci();
    aml.extend_from_slice(&Scope::raw("\\_SB_".into(), [bus, serial, panic].concat()));
    Name::new("\\_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8])).to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table
}

fn bytes(device: &Device<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    device.to_aml_bytes(&mut bytes);
    bytes
}

/// The host bridge: bus 0, the window of the devices' memory, and all ports but those of its configuration.
fn pci() -> Vec<u8> {
    let (first, after) = (PCI_CONFIG_PORTS.start as u16, PCI_CONFIG_PORTS.end as u16);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW.start as u32,
        (PCI_WINDOW.end - 1) as u32,
        None,
    );
    let resources = ResourceTemplate::new(vec![
        &AddressSpace::<u16>::new_bus_number(0, 0),
        &IO::new(first, first, 1, (after - first) as u8),
        &AddressSpace::<u16>::new_io(0, first - 1, None),
        &AddressSpace::<u16>::new_io(after, u16::MAX, None),
        &window,
    ])
    .into_bytes();
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let (port, count) = (SERIAL_PORTS.start as u16, (SERIAL_PORTS.end - SERIAL_PORTS.start) as u8);
    let resources = ResourceTemplate::new(vec![
        &IO::new(port, port, 1, count),
        &Interrupt::new(true, true, false, false, SERIAL_IRQ),
    ])
    .into_bytes();
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// QEMU's docs/specs/pvpanic.rst: the driver finds the device by this name.
fn panic_device() -> Vec<u8> {
    /// Present, enabled, shown, functioning (section 6.3.7).
    const STATUS: u8 = 0xf;
    let port = PVPANIC_PORT as u16;
    let resources = ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]).into_bytes();
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &STATUS),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// AML that is there already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Lets resources outlive what they are made of.
trait IntoBytes {
    fn into_bytes(self) -> Raw;
}

impl IntoBytes for ResourceTemplate<'_> {
    fn into_bytes(self) -> Raw {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Raw(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn table(tables: &[u8], address: u64) -> &[u8] {
        let table = &tables[(address - ACPI) as usize..];
        let table = &table[..u32_at(table, 4) as usize];
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "the checksum");
        table
    }

    #[test]
    fn every_table_is_found_from_the_root() {
        let tables = tables(2);
        assert_eq!(&tables[..8], b"RSD PTR ");
        let xsdt = table(&tables, u64_at(&tables, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
        let fadt = table(&tables, u64_at(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let dsdt = table(&tables, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let madt = table(&tables, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], madt.len()), (&b"APIC"[..], 44 + 2 * 8 + 12));
    }

    #[test]
    fn the_tables_of_the_largest_machine_have_room() {
        assert!(ACPI + tables(u8::MAX).len() as u64 <= RESET_VECTOR);
    }
}
