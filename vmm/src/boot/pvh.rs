//! What a guest that is entered through PVH is told (Xen's docs/misc/pvh.pandoc and
//! public/arch-x86/hvm/start_info.h, version 1).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::map::{CMDLINE, MODULES, PVH_MEMORY_MAP, START_INFO, stretches};
use super::{BootError, Initrd};
use crate::machine::memory::GuestMemory;

/// The version that has the memory map.
const VERSION: u32 = 1;

/// Writes the start info with its lists. Returns its address.
pub(super) fn write(
    memory: &GuestMemory,
    memory_bytes: u64,
    rsdp: u64,
    initrd: Option<Initrd>,
) -> Result<u32, BootError> {
    let map: Vec<_> = stretches(memory_bytes)
        .into_iter()
        .map(|s| hvm_memmap_table_entry { addr: s.start, size: s.bytes, type_: s.kind as u32, reserved: 0 })
        .collect();
    let modules: Vec<_> = initrd
        .into_iter()
        .map(|initrd| hvm_modlist_entry { paddr: initrd.start, size: initrd.bytes, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(PVH_MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Tables(error.to_string()))?;
    Ok(START_INFO as u32)
}
