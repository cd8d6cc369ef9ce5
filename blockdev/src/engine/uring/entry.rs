//! Operations as submission queue entries.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use libc::iovec;

use super::super::perform::{PUNCH, gather, open_directory};
use super::super::{Op, Transfer};
use crate::Errno;
use crate::storage::HostFile;

/// What an operation in flight lends to the kernel besides its [`Memory`](crate::buffer::Memory).
/// All of it lies on the heap, so it may be moved meanwhile.
#[allow(dead_code, reason = "held for the kernel, not read")]
pub(super) enum Lent {
    Nothing,
    /// The scatter list of a vectored transfer; goes back to the engine's pool.
    Pieces(Vec<iovec>),
    /// A name, and the new one of a rename.
    Names(CString, Option<CString>),
    /// The directory to sync.
    Directory(OwnedFd),
}

/// Vectors for scatter lists, reused.
#[derive(Default)]
pub(super) struct Pool {
    scratch: Vec<iovec>,
    idle: Vec<Vec<iovec>>,
}

/// Idle vectors kept: as many as a busy queue has operations in flight.
const IDLE_MAX: usize = 256;

impl Pool {
    pub(super) fn give_back(&mut self, lent: Lent) {
        if let Lent::Pieces(vec) = lent
            && self.idle.len() < IDLE_MAX
        {
            self.idle.push(vec);
        }
    }

    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// For the blocking fall-backs.
    pub(super) fn scratch(&mut self) -> &mut Vec<iovec> {
        &mut self.scratch
    }
}

/// How the kernel finds a file: by its place in the table of registered files, or by descriptor.
fn on(file: &HostFile, registered: Option<usize>, entry: impl FnOnce(Fd) -> Entry) -> Entry {
    match registered {
        Some(index) => entry(Fd(index as i32)).flags(Flags::FIXED_FILE),
        None => entry(Fd(file.as_fd().as_raw_fd())),
    }
}

/// The file of an operation that has one.
pub(super) fn file(op: &Op<HostFile>) -> Option<&HostFile> {
    match op {
        Op::Read(transfer) | Op::Write(transfer) => Some(&transfer.file),
        Op::Sync { file }
        | Op::SyncAll { file }
        | Op::Allocate { file, .. }
        | Op::Punch { file, .. }
        | Op::Discard { file, .. }
        | Op::Truncate { file, .. } => Some(file),
        Op::Rename { .. } | Op::Unlink { .. } | Op::SyncDirectory { .. } => None,
    }
}

/// The entry for `op`, and what must live until it completes. `registered` is the index of
/// [`file()`].
///
/// # Errors
/// What keeps the operation from being started: a name with a zero byte, a directory that
/// cannot be opened.
pub(super) fn build(
    op: &Op<HostFile>,
    registered: Option<usize>,
    pool: &mut Pool,
) -> Result<(Entry, Lent), Errno> {
    let plain = |entry: Entry| Ok((entry, Lent::Nothing));
    match op {
        Op::Read(t) => Ok(transfer(t, false, registered, pool)),
        Op::Write(t) => Ok(transfer(t, true, registered, pool)),
        Op::Sync { file } => {
            plain(on(file, registered, |fd| opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()))
        }
        Op::SyncAll { file } => plain(on(file, registered, |fd| opcode::Fsync::new(fd).build())),
        Op::Allocate { file, offset, len } => {
            plain(on(file, registered, |fd| opcode::Fallocate::new(fd, *len).offset(offset.0).build()))
        }
        Op::Punch { file, offset, len } | Op::Discard { file, offset, len } => {
            plain(on(file, registered, |fd| {
                opcode::Fallocate::new(fd, *len).offset(offset.0).mode(PUNCH.bits() as i32).build()
            }))
        }
        Op::Truncate { file, size } => {
            plain(on(file, registered, |fd| opcode::Ftruncate::new(fd, *size).build()))
        }
        Op::Rename { from, to } => {
            let (from, to) = (name(from)?, name(to)?);
            let here = Fd(libc::AT_FDCWD);
            let entry = opcode::RenameAt::new(here, from.as_ptr(), here, to.as_ptr()).build();
            Ok((entry, Lent::Names(from, Some(to))))
        }
        Op::Unlink { path } => {
            let path = name(path)?;
            let entry = opcode::UnlinkAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
            Ok((entry, Lent::Names(path, None)))
        }
        Op::SyncDirectory { path } => {
            // Opening may read the directory's inode and so block; the sync itself does not.
            let directory = open_directory(path)?;
            let entry = opcode::Fsync::new(Fd(directory.as_raw_fd())).build();
            Ok((entry, Lent::Directory(directory)))
        }
    }
}

fn name(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).or(Err(Errno::INVAL))
}

fn transfer(
    transfer: &Transfer<HostFile>,
    is_write: bool,
    registered: Option<usize>,
    pool: &mut Pool,
) -> (Entry, Lent) {
    let offset = transfer.offset.0 + transfer.done as u64;
    gather(transfer, &mut pool.scratch);
    if let [] | [_] = pool.scratch[..] {
        let (start, len) = match pool.scratch.first() {
            Some(piece) => (piece.iov_base.cast::<u8>(), piece.iov_len as u32),
            None => (std::ptr::null_mut(), 0),
        };
        let entry = on(&transfer.file, registered, |fd| {
            if is_write {
                opcode::Write::new(fd, start, len).offset(offset).build()
            } else {
                opcode::Read::new(fd, start, len).offset(offset).build()
            }
        });
        return (entry, Lent::Nothing);
    }
    let next = pool.idle.pop().unwrap_or_default();
    let pieces = std::mem::replace(&mut pool.scratch, next);
    let (start, len) = (pieces.as_ptr(), pieces.len() as u32);
    let entry = on(&transfer.file, registered, |fd| {
        if is_write {
            opcode::Writev::new(fd, start, len).offset(offset).build()
        } else {
            opcode::Readv::new(fd, start, len).offset(offset).build()
        }
    });
    (entry, Lent::Pieces(pieces))
}
