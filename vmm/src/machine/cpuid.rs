//! What the CPUID instruction tells each processor: what KVM supports, with the topology put right: one package of
//! as many cores as there are processors, each with one thread.
//!
//! The leaves are described in Intel's Software Developer's Manual, volume 2, "CPUID" and in AMD's Architecture
//! Programmer's Manual, volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: virtual machine extensions (Intel). A guest of a guest is nobody's business here.
const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: the APIC timer counts to a value of the time stamp counter.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX (AMD): the logical processors of a package are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX (AMD): secure virtual machines.
const SVM: u32 = 1 << 2;
/// Performance counters: the host's are the host's.
const PERFORMANCE_LEAF: u32 = 0xa;
/// Extended topology, in its two versions.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];

/// One processor among the machine's.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    /// Its number, which is its APIC ID as well.
    pub id: u8,
    /// How many there are.
    pub cpus: u8,
    /// Whether KVM emulates the deadline mode of the APIC's timer.
    pub tsc_deadline: bool,
}

impl Processor {
    /// Bits of an APIC ID that number the cores of the package.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }

    /// The table for this processor, from what KVM supports.
    pub fn table(self, supported: &CpuId) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
        for leaf in TOPOLOGY_LEAVES {
            let found = entries.len();
            entries.retain(|entry| entry.function != leaf);
            if entries.len() < found {
                entries.extend(self.topology(leaf));
            }
        }
        entries.iter_mut().for_each(|entry| self.adapt(entry));
        CpuId::from_entries(&entries)
    }

    /// The levels of leaf 0xb or 0x1f: threads, cores, the end.
    fn topology(self, leaf: u32) -> [kvm_cpuid_entry2; 3] {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let level = |index, shift, processors, kind| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: u32::from(self.id),
            ..Default::default()
        };
        [level(0, 0, 1, THREADS), level(1, self.core_bits(), u32::from(self.cpus), CORES), level(2, 0, 0, 0)]
    }

    fn adapt(self, entry: &mut kvm_cpuid_entry2) {
        let (id, cpus) = (u32::from(self.id), u32::from(self.cpus));
        let shared = (1 << self.core_bits()) - 1;
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | cpus << 16 | id << 24;
                entry.ecx = (entry.ecx & !VMX) | HYPERVISOR;
                set(&mut entry.ecx, TSC_DEADLINE, self.tsc_deadline);
                set(&mut entry.edx, HTT, cpus > 1);
            }
            // Caches: which processors share one, and how many cores there are (minus one).
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { shared } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | shared << 26;
            }
            PERFORMANCE_LEAF => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                entry.ecx &= !SVM;
                if entry.ecx & CMP_LEGACY != 0 || cpus > 1 {
                    set(&mut entry.ecx, CMP_LEGACY, cpus > 1);
                }
            }
            // Cores (minus one), and the bits of an APIC ID that number them.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | self.core_bits() << 12,
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { shared } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14;
            }
            // The APIC ID, the core's number with one thread each, node 0 of 1.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ..Default::default() }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_processor_finds_itself() {
        let supported =
            [entry(1, 0, 0), entry(4, 3, 0x63), entry(0xb, 0, 9), entry(0xb, 7, 9), entry(0x8000_001e, 0, 9)];
        let supported = CpuId::from_entries(&supported).unwrap();
        let table = Processor { id: 2, cpus: 3, tsc_deadline: true }.table(&supported).unwrap();
        assert_eq!(find(&table, 1, 0).ebx >> 16, 0x0203);
        assert_eq!(find(&table, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!(find(&table, 1, 0).edx, HTT);
        assert_eq!(find(&table, 4, 3).eax, 0x63 | 3 << 14 | 3 << 26);
        let cores = find(&table, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!(find(&table, 0xb, 2).ecx, 2, "the list of levels ends");
        assert_eq!(table.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
        assert!(table.as_slice().iter().all(|e| e.function != 0x1f), "only what KVM supports");
        assert_eq!(find(&table, 0x8000_001e, 0).eax, 2);
    }

    #[test]
    fn one_processor_alone() {
        let supported = CpuId::from_entries(&[entry(1, 0, 0), entry(0x8000_0008, 0, 0)]).unwrap();
        let table = Processor { id: 0, cpus: 1, tsc_deadline: false }.table(&supported).unwrap();
        assert_eq!(find(&table, 1, 0).ecx, HYPERVISOR);
        assert_eq!(find(&table, 1, 0).edx, 0);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0);
    }
}
