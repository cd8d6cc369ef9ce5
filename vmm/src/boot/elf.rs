//! ELF kernels: the file's headers are checked here, then linux-loader loads its segments and finds the PVH note.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader as _, KernelLoaderResult};

use super::BootError;
use super::map::HIGH_START;
use crate::machine::memory::GuestMemory;

/// A kernel has a handful of segments.
const SEGMENTS_MAX: u16 = 64;
/// The notes of a kernel are a few hundred bytes; the loader reads them one by one.
const NOTES_BYTES_MAX: u64 = 1 << 16;

// ELF-64 Object File Format 1.5: offsets in the header, and in a program header.
const HEADER_BYTES: usize = 64;
const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const PROGRAM_HEADERS: usize = 32;
const PROGRAM_HEADER_COUNT: usize = 56;
const PROGRAM_HEADER_BYTES: usize = 56;
const SEGMENT_OFFSET: usize = 8;
const SEGMENT_ADDRESS: usize = 24;
const SEGMENT_FILE_BYTES: usize = 32;
const SEGMENT_MEMORY_BYTES: usize = 40;
const TYPE_LOAD: u32 = 1;
const TYPE_NOTE: u32 = 4;

/// Loads the segments into memory between the first MiB and `low_end`.
///
/// # Errors
/// The file is damaged, no 64-bit one, or does not fit.
pub fn load(memory: &GuestMemory, low_end: u64, file: &mut File) -> Result<KernelLoaderResult, BootError> {
    check(low_end, file)?;
    Elf::load(memory, None, file, Some(vm_memory::GuestAddress(HIGH_START)))
        .map_err(|error| BootError::Damaged(error.to_string()))
}

/// Checks what the loader takes from the file as it stands.
fn check(low_end: u64, file: &File) -> Result<(), BootError> {
    let read = |bytes: &mut [u8], offset: u64| {
        file.read_exact_at(bytes, offset).map_err(|error| BootError::Read { what: "kernel", error })
    };
    let mut header = [0; HEADER_BYTES];
    read(&mut header, 0)?;
    if header[CLASS] != CLASS_64 {
        return Err(BootError::Unknown);
    }
    let count = u16::from_le_bytes([header[PROGRAM_HEADER_COUNT], header[PROGRAM_HEADER_COUNT + 1]]);
    if count > SEGMENTS_MAX {
        return Err(BootError::Damaged(format!("{count} segments, more than {SEGMENTS_MAX}")));
    }
    let first = number(&header, PROGRAM_HEADERS);
    for index in 0..u64::from(count) {
        let mut segment = [0; PROGRAM_HEADER_BYTES];
        let offset = first.checked_add(index * PROGRAM_HEADER_BYTES as u64);
        let offset = offset.filter(|offset| *offset <= i64::MAX as u64);
        read(&mut segment, offset.ok_or_else(|| BootError::Damaged("its program headers".to_owned()))?)?;
        check_segment(index, &segment, low_end)?;
    }
    Ok(())
}

fn check_segment(index: u64, segment: &[u8; PROGRAM_HEADER_BYTES], low_end: u64) -> Result<(), BootError> {
    let kind = u32::from_le_bytes([segment[0], segment[1], segment[2], segment[3]]);
    let in_file = number(segment, SEGMENT_FILE_BYTES);
    let in_memory = number(segment, SEGMENT_MEMORY_BYTES);
    let damaged = |what: &str| Err(BootError::Damaged(format!("segment {index}: {what}")));
    if number(segment, SEGMENT_OFFSET).checked_add(in_file).is_none_or(|end| end > i64::MAX as u64) {
        return damaged("it lies nowhere in the file");
    }
    match kind {
        TYPE_NOTE if in_file > NOTES_BYTES_MAX => damaged("its notes are too long"),
        TYPE_LOAD if in_file > in_memory => damaged("it has more bytes in the file than in memory"),
        TYPE_LOAD if in_memory > 0 => {
            let start = number(segment, SEGMENT_ADDRESS);
            let end = start.saturating_add(in_memory);
            if start < HIGH_START || end > low_end {
                return Err(BootError::Memory { what: "kernel", start, end });
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A little-endian number of eight bytes.
fn number(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes[offset..offset + 8].first_chunk().expect("eight bytes were taken");
    u64::from_le_bytes(*bytes)
}
