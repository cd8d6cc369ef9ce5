//! What the firmware of a real machine would have left in memory: the kernel, the initial file system, the command line,
//! the tables that describe the machine.
//!
//! A kernel is a bzImage, entered by the 64-bit Linux boot protocol, or an ELF file: one with a PVH note is entered
//! through that (32-bit), any other one at its entry point as a `vmlinux`. All of it is loaded from files that may be
//! hostile: every address is checked, and nothing grows with what a file says.

pub mod acpi;
pub mod elf;
pub mod linux;
pub mod map;
pub mod pvh;

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use linux_loader::loader::elf::PvhBootCapability;
use vm_memory::{Bytes as _, GuestAddress};

use crate::layout::RESET_PORT;
use crate::machine::memory::{GuestMemory, ranges};
use crate::machine::registers::Entry;
use map::{CMDLINE, CMDLINE_BYTES_MAX, HIGH_START, RESET_VECTOR};

/// No kernel is larger (Linux's own linker script allows 1 GiB with everything in it).
pub const KERNEL_BYTES_MAX: u64 = 1 << 30;
/// What an initial file system begins and ends at.
const PAGE_BYTES: u64 = 4096;

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Reading a file.
    #[error("reading the {what}: {error}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// What happened.
        error: io::Error,
    },
    /// A file of another kind.
    #[error("the kernel is neither a bzImage nor a 64-bit ELF file")]
    Unknown,
    /// A kernel with impossible contents.
    #[error("the kernel is damaged: {0}")]
    Damaged(String),
    /// A kernel that is entered in another way.
    #[error("the kernel cannot be started: {0}")]
    Unsupported(&'static str),
    /// A kernel that is too large for any machine.
    #[error("the kernel has {0} bytes, more than {KERNEL_BYTES_MAX}")]
    KernelSize(u64),
    /// A kernel or initrd that is too large for this one.
    #[error(
        "the {what} needs memory from {start:#x} to {end:#x}, which the machine does not have: give it more"
    )]
    Memory {
        /// Kernel or initrd.
        what: &'static str,
        /// First address.
        start: u64,
        /// The address behind it.
        end: u64,
    },
    /// No room for the initrd.
    #[error(
        "the initrd of {bytes} bytes does not fit between the kernel's end at {low:#x} and {high:#x}: give the machine more memory"
    )]
    Initrd {
        /// Its length.
        bytes: u64,
        /// Where the kernel's memory ends.
        low: u64,
        /// Where it must end.
        high: u64,
    },
    /// A command line that is too long.
    #[error("the kernel's command line has {bytes} bytes, more than the {max} that it can have")]
    CmdlineSize {
        /// Its length.
        bytes: usize,
        /// What the kernel or the place for it allows.
        max: usize,
    },
    /// A command line with a NUL in it.
    #[error("the kernel's command line has a NUL in it")]
    CmdlineNul,
    /// The tables: a mistake of ours, as the machine's size is checked before.
    #[error("writing the guest's tables: {0}")]
    Tables(String),
}

/// What to start.
#[derive(Debug)]
pub struct Payload {
    /// A bzImage or an ELF file.
    pub kernel: File,
    /// The initial file system.
    pub initrd: Option<File>,
    /// The command line.
    pub cmdline: String,
}

/// A stretch of guest memory that holds the initrd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Loads all of it into memory; says where the first processor starts.
///
/// # Errors
/// A file cannot be read, is damaged, or does not fit.
pub fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    cpus: u8,
    payload: &mut Payload,
) -> Result<Entry, BootError> {
    let rsdp = acpi::write(memory, cpus)?;
    write_reset_code(memory)?;
    let low_end = ranges(memory_bytes)[0].1;
    let mut magic = [0; 4];
    let kernel_read = |error| BootError::Read { what: "kernel", error };
    let bytes = payload.kernel.metadata().map_err(kernel_read)?.len();
    if bytes > KERNEL_BYTES_MAX {
        return Err(BootError::KernelSize(bytes));
    }
    payload.kernel.read_exact_at(&mut magic, 0).map_err(kernel_read)?;
    if magic != *b"\x7fELF" {
        return linux::load(memory, memory_bytes, bytes, rsdp, payload);
    }
    let loaded = elf::load(memory, low_end, &mut payload.kernel)?;
    write_cmdline(memory, &payload.cmdline, CMDLINE_BYTES_MAX)?;
    let initrd = load_initrd(memory, payload.initrd.as_mut(), loaded.kernel_end, low_end)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            let start_info = pvh::write(memory, memory_bytes, rsdp, initrd)?;
            let eip = u32::try_from(entry.0).map_err(|_| BootError::Damaged("its PVH entry".to_owned()))?;
            Ok(Entry::Pvh { eip, start_info })
        }
        _ => {
            let zero_page = linux::write_zero_page(memory, memory_bytes, rsdp, None, initrd)?;
            Ok(Entry::Linux64 { rip: loaded.kernel_load.0, zero_page })
        }
    }
}

/// What there is of a BIOS: code in real mode that resets the machine. Linux jumps to it to start again, because on a
/// hardware-reduced machine without EFI it does not use the reset register itself (`reboot_init` in its
/// arch/x86/kernel/reboot.c).
fn write_reset_code(memory: &GuestMemory) -> Result<(), BootError> {
    let [low, high] = (RESET_PORT as u16).to_le_bytes();
    let code = [
        0xba,
        low,
        high, //                mov dx, RESET_PORT
        0xb0,
        acpi::RESET_VALUE, //        mov al, RESET_VALUE
        0xee,              //                           out dx, al
        0xfa,
        0xf4,
        0xeb,
        0xfc, //     1:  cli; hlt; jmp 1b
    ];
    memory
        .write_slice(&code, GuestAddress(RESET_VECTOR))
        .map_err(|error| BootError::Tables(error.to_string()))
}

/// Writes the command line to its place; `max` counts the NUL at its end.
fn write_cmdline(memory: &GuestMemory, cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.min(CMDLINE_BYTES_MAX) - 1;
    if cmdline.len() > max {
        return Err(BootError::CmdlineSize { bytes: cmdline.len(), max });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(|error| BootError::Tables(error.to_string()))
}

/// Puts the initrd as high as it can go between the kernel's memory and `high`.
fn load_initrd(
    memory: &GuestMemory,
    file: Option<&mut File>,
    low: u64,
    high: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(file) = file else { return Ok(None) };
    let failed = |error| BootError::Read { what: "initrd", error };
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    if bytes == 0 {
        return Ok(None);
    }
    let low = low.max(HIGH_START).next_multiple_of(PAGE_BYTES);
    let start = high.checked_sub(bytes).map(|start| start & !(PAGE_BYTES - 1));
    let start = start.filter(|start| *start >= low).ok_or(BootError::Initrd { bytes, low, high })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, bytes as usize)
        .map_err(|error| failed(io::Error::other(error)))?;
    Ok(Some(Initrd { start, bytes }))
}

#[cfg(test)]
mod tests;
