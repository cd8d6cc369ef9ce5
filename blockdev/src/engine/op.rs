//! Operations: what an engine is asked to do.

use std::path::PathBuf;

use crate::buffer::Memory;
use crate::units::FileOffset;

/// A read or write: `memory` against the file from `offset`, of which the first `done` bytes
/// have been moved already.
#[derive(Debug)]
pub struct Transfer<F> {
    /// The file.
    pub file: F,
    /// Where in the file the first byte of `memory` belongs.
    pub offset: FileOffset,
    /// The memory lent for the duration.
    pub memory: Memory,
    /// Bytes moved by earlier attempts: the engine starts that far into `memory` and `offset`.
    pub done: usize,
    /// Bytes that this attempt moves at most, as if the kernel moved no more: a multiple of the file's alignment and not 0, or `usize::MAX`.
    pub at_most: usize,
}

impl<F> Transfer<F> {
    /// All of `memory` against the file from `offset`.
    pub fn new(file: F, offset: FileOffset, memory: impl Into<Memory>) -> Self {
        Self { file, offset, memory: memory.into(), done: 0, at_most: usize::MAX }
    }

    /// Bytes that this attempt is to move.
    pub fn wanted(&self) -> usize {
        (self.memory.len() - self.done).min(self.at_most)
    }
}

/// An operation on storage. It owns what it lends to the kernel until it comes back.
#[derive(Debug)]
pub enum Op<F> {
    /// Reads; a result of 0 bytes means end of file.
    Read(Transfer<F>),
    /// Writes.
    Write(Transfer<F>),
    /// Makes all writes to the file that completed before this was submitted durable, with the
    /// metadata needed to read them (fdatasync(2)).
    Sync {
        /// The file.
        file: F,
    },
    /// The same, with all metadata, the time of modification included (fsync(2)).
    SyncAll {
        /// The file.
        file: F,
    },
    /// Allocates space without changing the size beyond `offset + len` or the contents
    /// (fallocate(2), mode 0: the file grows to the range's end if it is shorter).
    Allocate {
        /// The file.
        file: F,
        /// Start of the range.
        offset: FileOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Gives the range's space back; it reads as zeroes afterwards (fallocate(2),
    /// FALLOC_FL_PUNCH_HOLE: on a device a write of zeroes that may unmap, where it offers one).
    /// EOPNOTSUPP where that cannot be done without writing the zeroes out.
    Punch {
        /// The file.
        file: F,
        /// Start of the range.
        offset: FileOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Gives the range's space back; what it reads as afterwards is undefined (BLKDISCARD on a
    /// device, as [`Op::Punch`] on a file). EOPNOTSUPP where that is not possible.
    Discard {
        /// The file.
        file: F,
        /// Start of the range.
        offset: FileOffset,
        /// Length in bytes.
        len: u64,
    },
    /// Sets the file's size (ftruncate(2)).
    Truncate {
        /// The file.
        file: F,
        /// The new size in bytes.
        size: u64,
    },
    /// Renames a file over another (rename(2)).
    Rename {
        /// The old name.
        from: PathBuf,
        /// The new name.
        to: PathBuf,
    },
    /// Removes a name (unlink(2)).
    Unlink {
        /// The name.
        path: PathBuf,
    },
    /// Makes the names in a directory durable (fsync(2) on it).
    SyncDirectory {
        /// The directory.
        path: PathBuf,
    },
}

impl<F> Op<F> {
    /// A read of `memory.len()` bytes.
    pub fn read(file: F, offset: FileOffset, memory: impl Into<Memory>) -> Self {
        Self::Read(Transfer::new(file, offset, memory))
    }

    /// A write of all of `memory`.
    pub fn write(file: F, offset: FileOffset, memory: impl Into<Memory>) -> Self {
        Self::Write(Transfer::new(file, offset, memory))
    }

    /// The memory that a read or write had borrowed.
    pub fn into_memory(self) -> Option<Memory> {
        match self {
            Self::Read(transfer) | Self::Write(transfer) => Some(transfer.memory),
            _ => None,
        }
    }
}
