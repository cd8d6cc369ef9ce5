//! Kernels as they should be, and hostile ones.

use super::*;

use std::io::Write as _;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::ByteValued as _;

use crate::machine::memory;
use map::{ACPI, MODULES, PVH_MEMORY_MAP, START_INFO, ZERO_PAGE};

const MEMORY: u64 = 64 << 20;
const PREFERRED: u64 = 0x100_0000;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A bzImage of two setup sectors and two pages of kernel.
fn bzimage(change: impl FnOnce(&mut setup_header)) -> File {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020c,
        loadflags: 1,
        xloadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        pref_address: PREFERRED,
        init_size: 16 << 20,
        relocatable_kernel: 1,
        setup_data: 0xbad,
        ..Default::default()
    };
    change(&mut header);
    let mut bytes = vec![0; 1024];
    bytes[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    bytes.extend([0x5a; 8192]);
    file(&bytes)
}

/// An ELF file with one segment at 1 MiB, and a note if there is to be one.
fn elf(note: bool, change: impl FnOnce(&mut Vec<u8>)) -> File {
    const BODY: usize = 64 + 2 * 56;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(BODY, 0);
    let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &[2, 0]);
    let segments = [(1u32, 0x10_0000u64, 32u64, 8192u64), (if note { 4 } else { 0 }, 0, 20, 20)];
    for (index, (kind, address, in_file, in_memory)) in segments.into_iter().enumerate() {
        let start = 64 + index * 56;
        put(start, &kind.to_le_bytes());
        put(start + 8, &(BODY as u64).to_le_bytes());
        put(start + 24, &address.to_le_bytes());
        put(start + 32, &in_file.to_le_bytes());
        put(start + 40, &in_memory.to_le_bytes());
    }
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0014, 0x5a, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    change(&mut bytes);
    file(&bytes)
}

fn load_with(kernel: File, initrd: Option<&[u8]>, cmdline: &str) -> (GuestMemory, Result<Entry, BootError>) {
    let memory = memory::create(MEMORY).unwrap();
    let mut payload = Payload { kernel, initrd: initrd.map(file), cmdline: cmdline.to_owned() };
    let entry = load(&memory, MEMORY, 2, &mut payload);
    (memory, entry)
}

fn read<T: vm_memory::ByteValued>(memory: &GuestMemory, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_bzimage_with_all_that_belongs_to_it() {
    let (memory, entry) = load_with(bzimage(|_| ()), Some(&[7; 5000]), "console=ttyS0");
    assert_eq!(entry.unwrap(), Entry::Linux64 { rip: PREFERRED + 0x200, zero_page: ZERO_PAGE });
    assert_eq!(read::<u8>(&memory, PREFERRED), 0x5a);
    let mut page = boot_params::default();
    memory.read_slice(page.as_mut_slice(), GuestAddress(ZERO_PAGE)).unwrap();
    let header = page.hdr;
    let (image, size, setup_data, cmdline) =
        (header.ramdisk_image, header.ramdisk_size, header.setup_data, header.cmd_line_ptr);
    assert_eq!((u64::from(image), size, setup_data), (MEMORY - 8192, 5000, 0));
    assert_eq!(read::<u8>(&memory, u64::from(image) + 4999), 7);
    assert_eq!(read::<[u8; 14]>(&memory, u64::from(cmdline)), *b"console=ttyS0\0");
    let (rsdp, entries) = (page.acpi_rsdp_addr, page.e820_entries);
    assert_eq!((rsdp, entries), (ACPI, 3));
    assert_eq!(read::<[u8; 8]>(&memory, ACPI), *b"RSD PTR ");
}

#[test]
fn a_pvh_kernel() {
    let (memory, entry) = load_with(elf(true, |_| ()), Some(&[7; 4096]), "x");
    assert_eq!(entry.unwrap(), Entry::Pvh { eip: 0x10_0014, start_info: START_INFO as u32 });
    let words: [u32; 14] = read(&memory, START_INFO);
    assert_eq!(words[..4], [0x336e_c578, 1, 0, 1]);
    assert_eq!([words[4], words[6], words[8]].map(u64::from), [MODULES, CMDLINE, ACPI]);
    assert_eq!([words[10], words[12]].map(u64::from), [PVH_MEMORY_MAP, 3]);
    assert_eq!(read::<[u64; 2]>(&memory, MODULES), [MEMORY - 4096, 4096]);
    assert_eq!(read::<[u64; 3]>(&memory, PVH_MEMORY_MAP), [0, 0x9_fc00, 1]);
}

#[test]
fn an_elf_kernel_without_a_note() {
    let (memory, entry) = load_with(elf(false, |_| ()), None, "x");
    assert_eq!(entry.unwrap(), Entry::Linux64 { rip: 0x10_0000, zero_page: ZERO_PAGE });
    assert_eq!(read::<u32>(&memory, ZERO_PAGE + 0x202), u32::from_le_bytes(*b"HdrS"));
}

#[track_caller]
fn fails(kernel: File, message: &str) {
    let error = load_with(kernel, None, "").1.unwrap_err().to_string();
    assert!(error.contains(message), "{error}");
}

#[test]
fn hostile_bzimages() {
    fails(file(b"no kernel at all").try_clone().unwrap(), "reading the kernel");
    fails(file(&[0; 4096]), "neither a bzImage nor");
    fails(bzimage(|h| h.version = 0x20b), "no 64-bit entry");
    fails(bzimage(|h| h.xloadflags = 0), "no 64-bit entry");
    fails(bzimage(|h| h.loadflags = 0), "damaged");
    fails(bzimage(|h| h.setup_sects = 255), "damaged");
    fails(bzimage(|h| h.pref_address = ZERO_PAGE), "does not have");
    fails(bzimage(|h| h.pref_address = u64::MAX), "does not have");
    fails(bzimage(|h| h.init_size = u32::MAX), "does not have");
    let large = bzimage(|_| ());
    large.set_len(KERNEL_BYTES_MAX + 1).unwrap();
    fails(large, "more than 1073741824");
    let (_, entry) = load_with(bzimage(|h| h.initrd_addr_max = 0x180_0000), Some(&[7; 4096]), "");
    assert!(matches!(entry, Err(BootError::Initrd { .. })));
    let (_, entry) = load_with(bzimage(|h| h.cmdline_size = 4), None, "12345");
    assert!(matches!(entry, Err(BootError::CmdlineSize { bytes: 5, max: 4 })));
    let (_, entry) = load_with(bzimage(|_| ()), None, "1\0");
    assert!(matches!(entry, Err(BootError::CmdlineNul)));
}

#[test]
fn hostile_elf_files() {
    let put = |offset: usize, value: u64| {
        move |bytes: &mut Vec<u8>| bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes())
    };
    let segment = 64;
    fails(elf(true, |bytes| bytes[4] = 1), "neither a bzImage nor");
    fails(elf(true, |bytes| bytes[5] = 2), "damaged");
    fails(elf(true, |bytes| bytes[56] = 65), "65 segments");
    fails(elf(true, |bytes| bytes.truncate(100)), "reading the kernel");
    fails(elf(true, put(32, u64::MAX)), "program headers");
    fails(elf(true, put(32, 1)), "damaged");
    fails(elf(true, put(24, 0)), "damaged");
    fails(elf(true, put(segment + 8, u64::MAX)), "nowhere in the file");
    fails(elf(true, put(segment + 8, 1 << 40)), "damaged");
    fails(elf(true, put(segment + 24, ZERO_PAGE)), "does not have");
    fails(elf(true, put(segment + 24, u64::MAX)), "does not have");
    fails(elf(true, put(segment + 32, u64::MAX)), "nowhere in the file");
    fails(elf(true, put(segment + 32, 1 << 20)), "more bytes in the file");
    fails(elf(true, put(segment + 40, u64::MAX)), "does not have");
    fails(elf(true, put(segment + 56 + 32, 1 << 20)), "notes are too long");
}
