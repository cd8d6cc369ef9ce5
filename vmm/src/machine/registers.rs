//! The state in which processors start: 64-bit mode for the Linux boot protocol, 32-bit protected mode for PVH.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes as _, GuestAddress};

use super::MachineError;
use super::memory::GuestMemory;
use crate::boot::map::{GDT, PAGE_TABLES, STACK_TOP};

/// Where the first processor starts, and in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode with an identity map of the first 4 GiB; RSI holds the address of the zero page (Linux's
    /// Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux64 {
        /// The first instruction.
        rip: u64,
        /// The zero page.
        zero_page: u64,
    },
    /// 32-bit protected mode without paging; EBX holds the address of the start info (Xen's docs/misc/pvh.pandoc).
    Pvh {
        /// The first instruction.
        eip: u32,
        /// `hvm_start_info`.
        start_info: u32,
    },
}

// Bits of CR0, CR4 and EFER (Intel's Software Developer's Manual, volume 3, section 2.5 and 2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS_ONE: u64 = 1 << 1;

// The model-specific registers that a processor does not have right after a reset as an operating system expects them.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, and write-back where none says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Selectors of the GDT that the boot protocols ask for.
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TASK: u16 = 0x20;

// Page table bits: present and writable; a large page.
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE_TABLE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// 4 GiB are mapped.
const MAPPED_GIB: u64 = 4;

/// What all processors need, whichever one starts.
pub(super) fn set_up(vcpu: &VcpuFd) -> Result<(), MachineError> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let wanted =
        [msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS), msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];
    let msrs = Msrs::from_entries(&wanted).map_err(MachineError::Cpuid)?;
    let taken = vcpu.set_msrs(&msrs).map_err(MachineError::kvm("setting registers"))?;
    if let Some(refused) = wanted.get(taken) {
        return Err(MachineError::Msr(refused.index));
    }
    // As after FNINIT: all exceptions masked (volume 1, section 8.1.5); MXCSR likewise (section 10.2.3).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(MachineError::kvm("setting up the floating point unit"))?;
    set_up_local_interrupts(vcpu)
}

/// LINT0 takes the legacy interrupt controller, LINT1 the NMI, as firmware leaves them.
fn set_up_local_interrupts(vcpu: &VcpuFd) -> Result<(), MachineError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const DELIVERY_NMI: u32 = 4 << 8;
    const DELIVERY_EXTINT: u32 = 7 << 8;
    let mut lapic = vcpu.get_lapic().map_err(MachineError::kvm("reading the local APIC"))?;
    for (register, mode) in [(LINT0, DELIVERY_EXTINT), (LINT1, DELIVERY_NMI)] {
        for (byte, value) in lapic.regs[register..].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(MachineError::kvm("setting the local APIC"))
}

/// Makes a processor start at `entry`.
pub(crate) fn enter(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), MachineError> {
    let mut sregs = vcpu.get_sregs().map_err(MachineError::kvm("reading registers"))?;
    let regs = match entry {
        Entry::Linux64 { rip, zero_page } => {
            long_mode(&mut sregs, memory);
            kvm_regs {
                rip,
                rsi: zero_page,
                rsp: STACK_TOP,
                rbp: STACK_TOP,
                rflags: RFLAGS_ONE,
                ..Default::default()
            }
        }
        Entry::Pvh { eip, start_info } => {
            protected_mode(&mut sregs, memory);
            let (rip, rbx) = (u64::from(eip), u64::from(start_info));
            kvm_regs { rip, rbx, rflags: RFLAGS_ONE, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(MachineError::kvm("setting registers"))?;
    vcpu.set_regs(&regs).map_err(MachineError::kvm("setting registers"))
}

/// A segment and its descriptor (volume 3, section 3.4.5): `flags` are the bits 40 to 55 of it.
fn segment(selector: u16, flags: u16, base: u32, limit: u32) -> kvm_segment {
    let bit = |n: u16| (flags >> n & 1) as u8;
    kvm_segment {
        base: u64::from(base),
        limit,
        selector,
        type_: (flags & 0xf) as u8,
        s: bit(4),
        dpl: (flags >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

/// The descriptor as it stands in the GDT.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let (limit, base) = (u64::from(limit), segment.base);
    let low = limit & 0xffff | (base & 0xff_ffff) << 16;
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    low | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52 | (base >> 24 & 0xff) << 56
}

/// Loads the segments, and writes the table that they come from.
fn segments(sregs: &mut kvm_sregs, memory: &GuestMemory, code: kvm_segment) {
    let data = segment(SELECTOR_DATA, 0xc093, 0, 0xffff_ffff);
    let task = segment(SELECTOR_TASK, 0x008b, 0, 0x67);
    (sregs.cs, sregs.tr) = (code, task);
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data;
    }
    // Two null entries: the selectors that the Linux boot protocol asks for begin at 0x10.
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (entry, value) in (0u64..).zip(table) {
        write(memory, GDT + 8 * entry, value);
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, (8 * table.len() - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
}

fn protected_mode(sregs: &mut kvm_sregs, memory: &GuestMemory) {
    segments(sregs, memory, segment(SELECTOR_CODE, 0xc09b, 0, 0xffff_ffff));
    (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0);
}

fn long_mode(sregs: &mut kvm_sregs, memory: &GuestMemory) {
    segments(sregs, memory, segment(SELECTOR_CODE, 0xa09b, 0, 0xffff_ffff));
    let pointers = PAGE_TABLES + PAGE_TABLE_BYTES;
    write(memory, PAGE_TABLES, pointers | PAGE_PRESENT_WRITABLE);
    let directories = pointers + PAGE_TABLE_BYTES;
    for gib in 0..MAPPED_GIB {
        write(memory, pointers + 8 * gib, (directories + gib * PAGE_TABLE_BYTES) | PAGE_PRESENT_WRITABLE);
    }
    for page in 0..MAPPED_GIB * 512 {
        write(memory, directories + 8 * page, (page * LARGE_PAGE_BYTES) | PAGE_PRESENT_WRITABLE | PAGE_LARGE);
    }
    sregs.cr3 = PAGE_TABLES;
    (sregs.cr0, sregs.cr4) = (CR0_PE | CR0_ET | CR0_PG, CR4_PAE);
    sregs.efer = EFER_LME | EFER_LMA;
}

fn write(memory: &GuestMemory, address: u64, value: u64) {
    memory.write_obj(value, GuestAddress(address)).expect("the first MiB is always there");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_as_the_processor_reads_them() {
        assert_eq!(descriptor(&segment(SELECTOR_CODE, 0xa09b, 0, 0xffff_ffff)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(SELECTOR_CODE, 0xc09b, 0, 0xffff_ffff)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(SELECTOR_DATA, 0xc093, 0, 0xffff_ffff)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(SELECTOR_TASK, 0x008b, 0x1234_5678, 0x67)), 0x1200_8b34_5678_0067);
    }
}
