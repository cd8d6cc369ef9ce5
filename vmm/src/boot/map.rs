//! Where what the firmware of a real machine would have left lies in memory, and the map of it that the guest gets.

use crate::machine::memory;

/// Global descriptor table of the first processor.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, then its list of modules, then its memory map.
pub const START_INFO: u64 = 0x6000;
/// The list of modules.
pub const MODULES: u64 = START_INFO + 0x100;
/// The memory map.
pub const PVH_MEMORY_MAP: u64 = START_INFO + 0x200;
/// Linux: the zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// The stack that the first processor starts with.
pub const STACK_TOP: u64 = 0x8ff0;
/// One page map, one table of pointers, four directories: 24 KiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The most that it may have, its final NUL included.
pub const CMDLINE_BYTES_MAX: usize = 0x1_0000;
/// The end of the memory below the hole of the legacy devices; on a PC some data of the BIOS follow.
const LOW_END: u64 = 0x9_fc00;
/// Where a BIOS would be: the ACPI tables, the root pointer first, which is looked for here.
pub const ACPI: u64 = 0xe_0000;
/// Where a processor in real mode starts, and where a BIOS would be entered to start again.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The end of the ACPI tables at most, and the first address for a kernel.
pub const HIGH_START: u64 = 0x10_0000;

/// What a stretch of memory is for, as e820 and PVH number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The guest's to use.
    Ram = 1,
    /// Not to touch.
    Reserved = 2,
}

/// A stretch of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Its use.
    pub kind: Kind,
}

/// The map that the guest gets of a machine with so much RAM.
pub fn stretches(memory_bytes: u64) -> Vec<Stretch> {
    let stretch = |start, end, kind| Stretch { start, bytes: end - start, kind };
    let mut map = vec![stretch(0, LOW_END, Kind::Ram), stretch(ACPI, HIGH_START, Kind::Reserved)];
    for (start, bytes) in memory::ranges(memory_bytes) {
        map.push(stretch(start.max(HIGH_START), start + bytes, Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_in_order_and_has_all_ram_but_the_hole() {
        for memory in [4 << 20, 3 << 30, (3 << 30) + 4096, 64 << 30] {
            let map = stretches(memory);
            assert!(map.windows(2).all(|two| two[0].start + two[0].bytes <= two[1].start));
            let ram = map.iter().filter(|s| s.kind == Kind::Ram).map(|s| s.bytes).sum::<u64>();
            assert_eq!(ram, memory - (HIGH_START - LOW_END));
        }
    }
}
