//! Operations as blocking system calls, and what both host engines know about the kernel's rules.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use libc::iovec;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::ioctl::{Opcode, Setter};

use super::{Op, Transfer};
use crate::Errno;
use crate::storage::{HostFile, StorageFile};

/// Bytes that one read or write moves at most: the kernel's own `MAX_RW_COUNT`
/// (include/linux/fs.h), which is `INT_MAX` rounded down to a page. The rest is a short transfer.
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;

/// Pieces that one vectored call takes at most: `UIO_MAXIOV` (include/uapi/linux/uio.h).
const PIECES_MAX: usize = 1024;

/// What the kernel need not be asked for: the outcome of an operation decided by its arguments.
pub(super) fn foregone(op: &Op<HostFile>) -> Option<Result<usize, Errno>> {
    match op {
        // io_uring reads an offset of all ones as "the file position"; preadv refuses them all.
        Op::Read(transfer) | Op::Write(transfer) => {
            let end = transfer.offset.0.checked_add(transfer.memory.len() as u64);
            let fits = end.is_some_and(|end| i64::try_from(end).is_ok());
            (!fits).then_some(Err(Errno::INVAL))
        }
        // Devices refuse fallocate(2) with mode 0, but all their space is there.
        Op::Allocate { file, offset, len } if file.is_device() => {
            let size = file.size().unwrap_or(0);
            let fits = offset.0.checked_add(*len).is_some_and(|end| end <= size);
            Some(if fits { Ok(0) } else { Err(Errno::NOSPC) })
        }
        _ => None,
    }
}

/// Fills `iovecs` with the memory that `transfer` has still to move, as much of it as one call
/// takes.
pub(super) fn gather(transfer: &Transfer<HostFile>, iovecs: &mut Vec<iovec>) {
    iovecs.clear();
    let most = TRANSFER_BYTES_MAX.min(transfer.at_most);
    // Less than the alignment would end as nothing, which is the end of a file.
    assert!(
        transfer.at_most == usize::MAX
            || transfer.at_most > 0 && transfer.at_most.is_multiple_of(transfer.file.alignment().offset),
        "a transfer of {} bytes at most",
        transfer.at_most
    );
    let mut skip = transfer.done;
    let mut total = 0;
    for piece in transfer.memory.pieces() {
        let n = piece.len().saturating_sub(skip).min(most - total);
        if n > 0 {
            if iovecs.len() == PIECES_MAX {
                break;
            }
            let start = piece.address().wrapping_add(skip);
            iovecs.push(iovec { iov_base: start.cast(), iov_len: n });
            total += n;
        }
        skip = skip.saturating_sub(piece.len());
    }
    if total < transfer.memory.len() - transfer.done {
        trim(iovecs, total % transfer.file.alignment().offset);
    }
}

/// Cuts `excess` bytes off the end, so that what follows starts aligned.
fn trim(iovecs: &mut Vec<iovec>, mut excess: usize) {
    while excess > 0 {
        let Some(last) = iovecs.last_mut() else { return };
        let cut = last.iov_len.min(excess);
        last.iov_len -= cut;
        excess -= cut;
        if last.iov_len == 0 {
            iovecs.pop();
        }
    }
}

/// Performs an operation on the calling thread; `scratch` is only there to be reused.
pub(super) fn perform(op: &Op<HostFile>, scratch: &mut Vec<iovec>) -> Result<usize, Errno> {
    if let Some(result) = foregone(op) {
        return result;
    }
    match op {
        Op::Read(transfer) => {
            gather(transfer, scratch);
            vectored(libc::preadv64, transfer, scratch)
        }
        Op::Write(transfer) => {
            gather(transfer, scratch);
            vectored(libc::pwritev64, transfer, scratch)
        }
        Op::Sync { file } => done(rustix::fs::fdatasync(file)),
        Op::SyncAll { file } => done(rustix::fs::fsync(file)),
        Op::Allocate { file, offset, len } => {
            done(rustix::fs::fallocate(file, FallocateFlags::empty(), offset.0, *len))
        }
        Op::Discard { file, offset, len } if file.is_device() => discard(file, offset.0, *len),
        Op::Punch { file, offset, len } | Op::Discard { file, offset, len } => {
            done(rustix::fs::fallocate(file, PUNCH, offset.0, *len))
        }
        Op::Truncate { file, size } => done(rustix::fs::ftruncate(file, *size)),
        Op::Rename { from, to } => done(rustix::fs::rename(from, to)),
        Op::Unlink { path } => done(rustix::fs::unlink(path)),
        Op::SyncDirectory { path } => done(rustix::fs::fsync(open_directory(path)?)),
    }
}

/// Flags of [`Op::Punch`]. On a block device the kernel zeroes the range with
/// `BLKDEV_ZERO_NOFALLBACK`: it discards with zeroes or fails with EOPNOTSUPP (block/fops.c).
pub(super) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// `BLKDISCARD` of linux/fs.h, `_IO(0x12, 119)`; its argument is the range's start and length.
const BLKDISCARD: Opcode = rustix::ioctl::opcode::none(0x12, 119);

/// Tells a device that the contents of a range are not needed.
fn discard(file: &HostFile, offset: u64, len: u64) -> Result<usize, Errno> {
    // SAFETY: BLKDISCARD reads two integers of 64 bits from its argument and writes nothing.
    let request = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]) };
    // SAFETY: the request is the one that it claims to be, see above.
    done(unsafe { rustix::ioctl::ioctl(file, request) })
}

/// Opens a directory to sync it.
pub(super) fn open_directory(path: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn done(result: Result<(), Errno>) -> Result<usize, Errno> {
    result.map(|()| 0)
}

type Vectored = unsafe extern "C" fn(i32, *const iovec, i32, i64) -> isize;

fn vectored(call: Vectored, transfer: &Transfer<HostFile>, iovecs: &[iovec]) -> Result<usize, Errno> {
    let fd: BorrowedFd<'_> = transfer.file.as_fd();
    let offset = i64::try_from(transfer.offset.0 + transfer.done as u64).or(Err(Errno::INVAL))?;
    let count = i32::try_from(iovecs.len()).or(Err(Errno::INVAL))?;
    // SAFETY: each iovec lies inside memory that `transfer` owns or keeps mapped, and to which
    // no Rust reference exists while we borrow the transfer; the call ends before the borrow.
    let moved = unsafe { call(fd.as_raw_fd(), iovecs.as_ptr(), count, offset) };
    usize::try_from(moved).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}
