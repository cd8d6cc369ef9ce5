//! The device: what all queues of a raw image share.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sapwood_blockdev::device::{BlockDevice, DeviceError, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Alignment, FileIdentity, Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_SIZE, SECTOR_SIZE};

use super::map;
use super::queue::RawQueue;
use super::ranges::Ranges;
use crate::error::ImageError;
use crate::extent::Extent;
use crate::open::lock;

/// A raw image, open.
pub struct RawDevice<E: Engine> {
    pub(super) file: E::File,
    pub(super) alignment: Alignment,
    pub(super) ranges: Arc<Ranges>,
    read_only: bool,
    /// Size of the disk in bytes, a multiple of the sector size.
    size: AtomicU64,
    write_cache: AtomicBool,
    latched: AtomicBool,
    cannot_punch: AtomicBool,
}

impl<E: Engine> RawDevice<E> {
    /// Opens and locks `path`.
    ///
    /// # Errors
    /// When the file cannot be opened, or somebody else uses it.
    pub fn open<S: Storage<File = E::File>>(
        storage: &S,
        path: &Path,
        read_only: bool,
    ) -> Result<Arc<Self>, ImageError> {
        let options = if read_only { OpenOptions::READ } else { OpenOptions::WRITE };
        let open = |options| storage.open(path, options).map_err(|e| ImageError::open(path, e));
        let mut file = open(options)?;
        // Direct I/O could reach the cut last piece of such a file only by growing the file.
        if is_odd(&file)? {
            file = open(options.buffered())?;
        }
        lock(&file, if read_only { Lock::Shared } else { Lock::Exclusive })?;
        Ok(Arc::new(Self {
            alignment: file.alignment(),
            ranges: Arc::default(),
            read_only,
            size: AtomicU64::new(disk_size(size_of(&file)?)),
            write_cache: AtomicBool::new(true),
            latched: AtomicBool::new(false),
            cannot_punch: AtomicBool::new(false),
            file,
        }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What a range of the disk holds.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        map::extents(&self.file, range.start..range.end.min(self.size()))
    }

    /// A queue over an engine that the caller's thread already runs, and that no other queue uses.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> RawQueue<E> {
        RawQueue::new(Arc::clone(self), io)
    }

    /// Changes the size of the disk, durably. What is cut off is lost; what is added reads as
    /// zeroes.
    ///
    /// # Errors
    /// When the device is read-only, or the size is not one that the file can have.
    pub async fn resize(&self, io: &Io<E>, size: u64) -> Result<(), ImageError> {
        let path = self.path();
        if self.read_only {
            return Err(ImageError::new(path, DeviceError::ReadOnly));
        }
        check_new_size(&self.file, self.alignment, size)?;
        let truncate = Op::Truncate { file: self.file.clone(), size };
        io.run(truncate).await.result.map_err(|e| ImageError::errno(path, "resize", e))?;
        self.size.store(size, Ordering::Release);
        self.sync(io, Op::Sync { file: self.file.clone() }).await
    }

    /// What makes the file recognisable now.
    pub(crate) fn identity(&self) -> std::io::Result<FileIdentity> {
        self.file.identity()
    }

    /// Carries out a request other than a flush for the only user of the device.
    pub(crate) async fn perform(&self, io: &Io<E>, request: Request) -> Result<(), DeviceError> {
        super::slow::perform(self, io, request).await
    }

    /// Makes everything written durable, the time of modification included, by which layers over
    /// it recognise it; to be called when all queues are drained, before the last reference is dropped.
    ///
    /// # Errors
    /// When the sync, or an earlier one, failed.
    pub async fn close(&self, io: &Io<E>) -> Result<(), ImageError> {
        if self.read_only { Ok(()) } else { self.sync(io, Op::SyncAll { file: self.file.clone() }).await }
    }

    async fn sync(&self, io: &Io<E>, sync: Op<E::File>) -> Result<(), ImageError> {
        let result = io.run(sync).await.result;
        self.after_sync(result.map(drop).map_err(Into::into)).map_err(|e| ImageError::new(self.path(), e))
    }

    /// What a sync that ended in `result` means: its failure, or that of another one since it was
    /// submitted, latches the device.
    pub(super) fn after_sync(&self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if let Err(error) = result {
            self.latched.store(true, Ordering::Release);
            return Err(error);
        }
        self.check_latch()
    }

    pub(super) fn check_latch(&self) -> Result<(), DeviceError> {
        if self.latched.load(Ordering::Acquire) { Err(DeviceError::Latched) } else { Ok(()) }
    }

    /// Whether writes may be made now.
    pub(super) fn check_writable(&self) -> Result<(), DeviceError> {
        if self.read_only { Err(DeviceError::ReadOnly) } else { self.check_latch() }
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// Whether ranges must be held during writes: only where the storage cannot write a sector.
    pub(super) fn holds_ranges(&self) -> bool {
        self.alignment.offset as u64 > SECTOR_SIZE
    }

    pub(super) fn can_punch(&self) -> bool {
        !self.cannot_punch.load(Ordering::Relaxed)
    }

    pub(super) fn set_cannot_punch(&self) {
        self.cannot_punch.store(true, Ordering::Relaxed);
    }
}

impl<E: Engine> BlockDevice for RawDevice<E> {
    type Engine = E;
    type Queue = RawQueue<E>;

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            read_only: self.read_only,
            physical_block: BLOCK_SIZE as u32,
            discard_granularity: BLOCK_SIZE as u32,
        }
    }

    fn queue(self: &Arc<Self>, engine: E) -> RawQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        self.write_cache.store(enabled, Ordering::Release);
    }
}

/// Whether a file ends inside what direct I/O can address.
fn is_odd<F: StorageFile>(file: &F) -> Result<bool, ImageError> {
    let unit = file.alignment().offset as u64;
    Ok(unit > SECTOR_SIZE && size_of(file)? % unit != 0)
}

/// Refuses a size that the raw disk in `file`, opened for direct I/O by somebody else, cannot be given.
pub(crate) fn check_growth<F: StorageFile>(file: &F, size: u64) -> Result<(), ImageError> {
    let alignment = if is_odd(file)? { Alignment::NONE } else { file.alignment() };
    check_new_size(file, alignment, size)
}

fn check_new_size<F: StorageFile>(file: &F, alignment: Alignment, size: u64) -> Result<(), ImageError> {
    if file.is_device() {
        let detail = "a raw disk on a block device has the device's size";
        return Err(ImageError::invalid(file.path(), detail));
    }
    let unit = SECTOR_SIZE.max(alignment.offset as u64);
    if !size.is_multiple_of(unit) {
        let detail = format_args!("the size must be a multiple of {unit} bytes");
        return Err(ImageError::invalid(file.path(), detail));
    }
    Ok(())
}

/// The size of a disk in a file of `file_size` bytes.
pub(super) fn disk_size(file_size: u64) -> u64 {
    file_size.next_multiple_of(SECTOR_SIZE)
}

fn size_of<F: StorageFile>(file: &F) -> Result<u64, ImageError> {
    file.size().map_err(|e| ImageError::io(file.path(), "measure", e))
}
