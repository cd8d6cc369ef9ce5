//! Files and block devices of the host.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, Stat, StatxFlags};

use super::lock::Holder;
use super::once::{self, Note};
use super::{Alignment, FileIdentity, FileSystemSpace, Lock, LockError, OpenOptions, Storage, StorageFile};
use crate::Errno;
use crate::buffer::AlignedBuf;
use crate::engine::Notify;
use crate::units::{BLOCK_BYTES, SECTOR_SIZE};

/// Unit of `st_blocks` in bytes, whatever the file system's block size (stat(3type)).
const STAT_BLOCK_SIZE: u64 = 512;

/// How long a lock is waited for whose holder has ended.
const ENDED_HOLDER_WAIT: Duration = Duration::from_secs(10);
/// How long, when nobody is seen to hold it: it may have been given up just now, or in a PID
/// namespace, where a holder whose end was waited for is no longer shown, be as above.
const UNKNOWN_HOLDER_WAIT: Duration = Duration::from_secs(2);
/// How often it is looked at meanwhile.
const HOLDER_PAUSE: Duration = Duration::from_millis(2);

/// Who holds a device, where no process is known to.
const MOUNTED: &str = "a mount, the kernel or a program that claimed the device (lsblk tells more)";

/// File systems that cannot make holes, by their numbers (statfs(2), linux/magic.h): vfat, exFAT,
/// HFS+, 9p. Of others it is not known before it is tried; NFS, for one, can from version 4.2 on.
const WITHOUT_HOLES: [rustix::fs::FsWord; 4] = [0x4d44, 0x2011_bab0, 0x482b, 0x0102_1997];

/// The host's file systems and block devices.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostStorage;

/// An open file or block device of the host.
///
/// Clones share one open file description and with it the lock, which flock(2) ties to the
/// description: it is given up when the last clone is gone, an operation in flight holding one
/// of them. A process that dies with operations in flight keeps the lock until the kernel has
/// finished them, so a successor that has the lock sees no late write.
#[derive(Clone)]
pub struct HostFile(Arc<Inner>);

struct Inner {
    fd: OwnedFd,
    path: PathBuf,
    alignment: Alignment,
    is_device: bool,
    is_locked: AtomicBool,
    /// Engines that keep a reference to the open file description and must hear of its end.
    users: Mutex<Vec<Weak<Notify>>>,
}

/// Names an open file description without keeping it: an engine's registered-file table holds
/// these. While one exists its address is not given to another file.
#[derive(Debug)]
pub(crate) struct WeakHostFile(Weak<Inner>);

impl WeakHostFile {
    /// Whether this is the same open file description.
    pub(crate) fn is(&self, file: &HostFile) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&file.0))
    }

    /// Whether the last [`HostFile`] is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl HostFile {
    /// A name for the open file description; `notify` is told when it is closed.
    pub(crate) fn downgrade(&self, notify: &Arc<Notify>) -> WeakHostFile {
        let mut users = self.0.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|user| user.strong_count() > 0);
        users.push(Arc::downgrade(notify));
        WeakHostFile(Arc::downgrade(&self.0))
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(rustix::fs::fstat(&self.0.fd)?)
    }

    fn try_lock(&self, lock: Lock) -> Result<(), Errno> {
        let operation = match lock {
            Lock::Shared => FlockOperation::NonBlockingLockShared,
            Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        rustix::fs::flock(&self.0.fd, operation)
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostFile").field(&self.0.path).finish()
    }
}

impl Drop for Inner {
    /// Gives the lock up and tells the engines to let go of the file.
    ///
    /// The unlock is explicit because an engine may still hold the open file description in its
    /// registered-file table. No operation can be in flight: each owns a clone.
    fn drop(&mut self) {
        if *self.is_locked.get_mut()
            && let Err(error) = rustix::fs::flock(&self.fd, FlockOperation::NonBlockingUnlock)
        {
            log::warn!("{}: cannot unlock: {error}", self.path.display());
        }
        for user in self.users.get_mut().unwrap_or_else(PoisonError::into_inner) {
            if let Some(notify) = user.upgrade() {
                notify.file_closed();
            }
        }
    }
}

impl Storage for HostStorage {
    type File = HostFile;

    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<HostFile> {
        // NONBLOCK so that a FIFO somebody put there does not hang us; taken off below.
        let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        flags |= if options.write { OFlags::RDWR } else { OFlags::RDONLY };
        if options.create_new {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        if options.claim && options.write && !options.create_new && is_block_device(path) {
            // Without O_CREAT it means something for block devices only.
            flags |= OFlags::EXCL;
        }
        let fd = open_patiently(path, flags)?;
        let is_device = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            other => return Err(not_a_disk(path, other)),
        };
        let alignment = if options.direct { set_direct(&fd, path, is_device)? } else { None };
        if alignment.is_none() {
            set_flags(&fd, OFlags::empty())?;
        }
        Ok(HostFile(Arc::new(Inner {
            fd,
            path: path.to_path_buf(),
            alignment: alignment.unwrap_or(Alignment::NONE),
            is_device,
            is_locked: AtomicBool::new(false),
            users: Mutex::default(),
        })))
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        getrandom::fill(bytes).map_err(|error| match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::other(error.to_string()),
        })
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn list_directory(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let names = std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
        let mut names: Vec<_> = names.collect::<io::Result<_>>()?;
        names.sort();
        Ok(names)
    }

    fn space(&self, path: &Path) -> io::Result<Option<FileSystemSpace>> {
        let found = rustix::fs::statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Some(FileSystemSpace { total: bytes(found.f_blocks), free: bytes(found.f_bavail) }))
    }
}

fn is_block_device(path: &Path) -> bool {
    rustix::fs::stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice)
}

/// Opens `path`; as with the lock, it waits for a claim on a device that an ended process left.
fn open_patiently(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let begun = Instant::now();
    loop {
        match rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)) {
            Err(Errno::BUSY) if flags.contains(OFlags::EXCL) => {}
            opened => return Ok(opened?),
        }
        let holder = rustix::fs::stat(path).ok().and_then(|stat| Holder::of(&stat));
        if begun.elapsed() >= patience(holder.as_ref()) {
            let name = holder.map_or_else(|| MOUNTED.to_owned(), |holder| holder.name());
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, name));
        }
        std::thread::sleep(HOLDER_PAUSE);
    }
}

/// How long the holder of a lock or claim is waited for.
fn patience(holder: Option<&Holder>) -> Duration {
    match holder {
        Some(holder) if holder.has_ended() => ENDED_HOLDER_WAIT,
        Some(_) => Duration::ZERO,
        None => UNKNOWN_HOLDER_WAIT,
    }
}

fn not_a_disk(path: &Path, found: FileType) -> io::Error {
    let text = format!("{}: neither a regular file nor a block device ({found:?})", path.display());
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Replaces the status flags that open(2) set for us.
fn set_flags(fd: &OwnedFd, wanted: OFlags) -> Result<(), Errno> {
    let ours = OFlags::DIRECT | OFlags::NONBLOCK;
    let flags = rustix::fs::fcntl_getfl(fd)?.difference(ours);
    rustix::fs::fcntl_setfl(fd, flags | wanted)
}

/// Turns direct I/O on and finds the alignment it needs; `None`, with a note in the log, where
/// the file system cannot.
fn set_direct(fd: &OwnedFd, path: &Path, is_device: bool) -> io::Result<Option<Alignment>> {
    let buffered = |why: &dyn fmt::Display| {
        if once::first_time(&rustix::fs::fstat(fd)?, Note::NoDirectIo) {
            let path = path.display();
            log::info!("{path}: no direct I/O ({why}): all files there go through the page cache");
        }
        Ok(None)
    };
    let stated = stated_alignment(fd)?;
    if stated == Some(None) {
        return buffered(&"the file system says it does not support it for this file");
    }
    match set_flags(fd, OFlags::DIRECT) {
        Ok(()) => {}
        Err(error @ (Errno::INVAL | Errno::NOTSUP)) => return buffered(&error),
        Err(error) => return Err(error.into()),
    }
    let alignment = match stated.flatten() {
        Some(alignment) => alignment,
        None if is_device => {
            let block = rustix::fs::ioctl_blksszget(fd)? as usize;
            Alignment { memory: block, offset: block }
        }
        None => tried_alignment(fd),
    };
    if [alignment.memory, alignment.offset].iter().all(|n| n.is_power_of_two() && *n <= BLOCK_BYTES) {
        return Ok(Some(alignment));
    }
    set_flags(fd, OFlags::empty())?;
    buffered(&format_args!("it would need {alignment:?}, more than {BLOCK_BYTES} bytes"))
}

/// Whether a block device takes discards, by what sysfs says; a partition asks its disk.
fn discards(device: u64) -> Option<bool> {
    let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let read = |queue| std::fs::read_to_string(format!("{device}/{queue}/discard_max_bytes"));
    let bytes_max: u64 = read("queue").or_else(|_| read("../queue")).ok()?.trim().parse().ok()?;
    Some(bytes_max > 0)
}

/// What statx(2) says (`STATX_DIOALIGN`, Linux 6.1): `None` if it does not know, `Some(None)` if
/// the file cannot do direct I/O.
fn stated_alignment(fd: &OwnedFd) -> io::Result<Option<Option<Alignment>>> {
    let wanted = StatxFlags::DIOALIGN;
    let stat = match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, wanted) {
        Ok(stat) => stat,
        Err(Errno::NOSYS | Errno::PERM) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if stat.stx_mask & wanted.bits() == 0 {
        return Ok(None);
    }
    let (memory, offset) = (stat.stx_dio_mem_align as usize, stat.stx_dio_offset_align as usize);
    Ok(Some((offset != 0).then_some(Alignment { memory: memory.max(1), offset })))
}

/// Finds by reading whether sectors will do; a whole block always does. An empty file lets every
/// read pass and so proves nothing.
fn tried_alignment(fd: &OwnedFd) -> Alignment {
    let sector = SECTOR_SIZE as usize;
    let mut buf = AlignedBuf::zeroed(2 * sector);
    let n = match rustix::io::pread(fd, &mut buf[sector..], 0) {
        Ok(n) if n > 0 => sector,
        _ => BLOCK_BYTES,
    };
    Alignment { memory: n, offset: n }
}

impl StorageFile for HostFile {
    fn path(&self) -> &Path {
        &self.0.path
    }

    fn is_device(&self) -> bool {
        self.0.is_device
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    fn size(&self) -> io::Result<u64> {
        if self.0.is_device {
            // A device's st_size is 0. Nothing here uses the file position that this moves.
            return Ok(rustix::fs::seek(&self.0.fd, SeekFrom::End(0))?);
        }
        Ok(u64::try_from(self.stat()?.st_size).unwrap_or(0))
    }

    /// For a block device its size: all of it is ours.
    fn allocated(&self) -> io::Result<u64> {
        if self.0.is_device {
            return self.size();
        }
        Ok(u64::try_from(self.stat()?.st_blocks).unwrap_or(0) * STAT_BLOCK_SIZE)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if self.0.is_device {
            return Ok(Some(range));
        }
        // Nothing here uses the file position that this moves.
        let seek = |to| match rustix::fs::seek(&self.0.fd, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        };
        let start = match seek(SeekFrom::Data(range.start))? {
            Some(start) if start < range.end => start,
            _ => return Ok(None),
        };
        let end = seek(SeekFrom::Hole(start))?.unwrap_or(range.end);
        Ok(Some(start..end.min(range.end)))
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        if self.0.is_device {
            return Ok(FileIdentity { size: self.size()?, mtime_ns: 0 });
        }
        let stat = self.stat()?;
        let ns = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
        Ok(FileIdentity {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime_ns: u64::try_from(ns).unwrap_or(0),
        })
    }

    fn alignment(&self) -> Alignment {
        self.0.alignment
    }

    fn gives_space_back(&self) -> Option<bool> {
        if self.0.is_device {
            return discards(self.stat().ok()?.st_rdev);
        }
        let kind = rustix::fs::fstatfs(&self.0.fd).ok()?.f_type;
        WITHOUT_HOLES.contains(&kind).then_some(false)
    }

    fn note_no_space_back(&self) {
        if self.stat().is_ok_and(|stat| once::first_time(&stat, Note::NoSpaceBack)) {
            let what = if self.0.is_device { "the device has no discard" } else { "no hole punching" };
            log::info!("{}: unused space is kept, not given back ({what})", self.0.path.display());
        }
    }

    /// Takes, strengthens or weakens the lock (flock(2)) without waiting for a living process.
    ///
    /// Linux converts a lock by dropping it first, so another process can slip in between: a
    /// caller that strengthens a lock must look at the file again afterwards. When strengthening
    /// fails the weaker lock is taken again if it still can be.
    ///
    /// For one that has ended it waits, within a bound: the kernel lets go of such files only when
    /// the operations in flight on them are over.
    fn lock(&self, lock: Lock) -> Result<(), LockError> {
        let begun = Instant::now();
        loop {
            match self.try_lock(lock) {
                Ok(()) => {
                    self.0.is_locked.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(LockError::Io(error.into())),
            }
            let holder = self.stat().ok().and_then(|stat| Holder::of(&stat));
            if begun.elapsed() < patience(holder.as_ref()) {
                std::thread::sleep(HOLDER_PAUSE);
                continue;
            }
            let name = holder.map(|holder| holder.name());
            if lock == Lock::Exclusive && self.0.is_locked.load(Ordering::Relaxed) {
                self.try_lock(Lock::Shared).or(Err(LockError::Held(name.clone())))?;
            }
            return Err(LockError::Held(name));
        }
    }

    fn unlock(&self) -> io::Result<()> {
        self.0.is_locked.store(false, Ordering::Relaxed);
        Ok(rustix::fs::flock(&self.0.fd, FlockOperation::NonBlockingUnlock)?)
    }
}
