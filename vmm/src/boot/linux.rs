//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): a bzImage, and the zero page that it is told by.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{Error as LoaderError, KernelLoader as _};
use vm_memory::{ByteValued as _, GuestAddress};

use super::map::{CMDLINE, HIGH_START, ZERO_PAGE, stretches};
use super::{BootError, Initrd, Payload, load_initrd, write_cmdline};
use crate::machine::memory::{GuestMemory, ranges};
use crate::machine::registers::Entry;

/// The first version of the protocol that says whether a kernel has a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
/// `xloadflags`: the kernel has a 64-bit entry at [`ENTRY_64`].
const XLF_KERNEL_64: u16 = 1;
/// Where that is, from the kernel's first byte.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: none that has a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// What marks a header (boot.rst, `boot_flag` and `header`).
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Where the header begins in the file.
const HEADER_OFFSET: u64 = 0x1f1;
/// `kernel_alignment` of a `vmlinux`, which has no header of its own.
const VMLINUX_ALIGNMENT: u32 = 0x20_0000;

/// Loads a bzImage of so many bytes with all that belongs to it.
pub(super) fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    kernel_bytes: u64,
    rsdp: u64,
    payload: &mut Payload,
) -> Result<Entry, BootError> {
    let header = read_header(&payload.kernel)?;
    let low_end = ranges(memory_bytes)[0].1;
    // The kernel unpacks itself from its place to the preferred one, and needs `init_size` bytes from the higher of the
    // two. Loaded at the preferred one, it has both.
    let start = header.pref_address;
    let end = start.saturating_add(kernel_bytes.max(u64::from(header.init_size)));
    if start < HIGH_START || end > low_end {
        return Err(BootError::Memory { what: "kernel", start, end });
    }
    BzImage::load(memory, Some(GuestAddress(start)), &mut payload.kernel, None).map_err(damaged)?;

    write_cmdline(memory, &payload.cmdline, (header.cmdline_size as usize).saturating_add(1))?;
    let initrd_end = low_end.min(u64::from(header.initrd_addr_max) + 1);
    let initrd = load_initrd(memory, payload.initrd.as_mut(), end, initrd_end)?;
    let header = setup_header { code32_start: start as u32, ..header };
    let zero_page = write_zero_page(memory, memory_bytes, rsdp, Some(header), initrd)?;
    Ok(Entry::Linux64 { rip: start + ENTRY_64, zero_page })
}

/// Reads the header of a bzImage, and checks that it can be started here.
fn read_header(kernel: &File) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    kernel
        .read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        .map_err(|error| BootError::Read { what: "kernel", error })?;
    if header.header != HEADER_MAGIC {
        return Err(BootError::Unknown);
    }
    if header.version < VERSION_MIN || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported(
            "it has no 64-bit entry (Linux 3.8 and later for x86-64 have one)",
        ));
    }
    Ok(header)
}

fn damaged(error: LoaderError) -> BootError {
    BootError::Damaged(error.to_string())
}

/// Writes the zero page; `header` is a bzImage's own. Returns its address.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    memory_bytes: u64,
    rsdp: u64,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
) -> Result<u64, BootError> {
    let mut page = boot_params { acpi_rsdp_addr: rsdp, ..Default::default() };
    page.hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: VMLINUX_ALIGNMENT,
        ..Default::default()
    });
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = CMDLINE as u32;
    // A list of further data would be followed; there is none.
    page.hdr.setup_data = 0;
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = initrd.start as u32;
        page.hdr.ramdisk_size = initrd.bytes as u32;
    }
    let stretches = stretches(memory_bytes);
    page.e820_entries = stretches.len() as u8;
    for (entry, stretch) in page.e820_table.iter_mut().zip(stretches) {
        *entry = boot_e820_entry { addr: stretch.start, size: stretch.bytes, r#type: stretch.kind as u32 };
    }
    let params = BootParams::new(&page, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Tables(error.to_string()))?;
    Ok(ZERO_PAGE)
}
