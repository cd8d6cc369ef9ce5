//! A disk of any format: opened by name or by looks, and dispatched without `dyn`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, LockError, Storage, StorageFile};

use crate::below::{Chain, ChainDisk, ChainQueue, NO_FILE, OpenBelow};
use crate::counts::Counts;
use crate::error::{ErrorKind, ImageError};
use crate::extent::Extent;
use crate::format::Format;
use crate::layer::{Layer, LayerQueue, OpenLayer, ResolveBase, StoreBase, Tuning};
use crate::probe::probe;
use crate::raw::{RawDevice, RawQueue};
use crate::sealed::{Packs, Root};

/// How to open a disk.
#[derive(Clone, Debug, Default)]
pub struct OpenDisk {
    /// The format; `None`: what is recognised, else an error (see [`crate::probe`]).
    pub format: Option<Format>,
    /// Open for reading only; other readers may have it open too.
    pub read_only: bool,
    /// Bounds of a layer's memory, space and background work.
    pub tuning: Tuning,
    /// How to read formats that are only read.
    pub below: OpenBelow,
}

impl OpenDisk {
    /// Refuses what `format` does not do.
    fn check(&self, path: &Path, format: Format) -> Result<(), ImageError> {
        let detail = match format {
            Format::Qcow2 if !self.read_only => {
                "qcow2 images are read, not written: serve one with --readonly, or convert it to a layer first"
            }
            Format::Sealed => NO_FILE,
            Format::Raw | Format::Layer if self.below.snapshot.is_some() => {
                "only qcow2 images have snapshots inside"
            }
            _ => return Ok(()),
        };
        Err(ImageError::new(path, ErrorKind::Unsupported(detail.to_owned())))
    }
}

/// An open disk of any format.
pub enum Disk<E: Engine> {
    /// A raw image.
    Raw(Arc<RawDevice<E>>),
    /// A layer, with all that lies below it.
    Layer(Arc<Layer<E>>),
    /// A qcow2 image, with all that lies below it.
    Qcow2(Arc<ChainDisk<E>>),
    /// A sealed snapshot, or any other of a store.
    Sealed(Arc<ChainDisk<E>>),
}

/// One thread's access to a [`Disk`].
pub enum DiskQueue<E: Engine> {
    /// To a raw image.
    Raw(RawQueue<E>),
    /// To a layer.
    Layer(LayerQueue<E>),
    /// To a qcow2 image.
    Qcow2(ChainQueue<E>),
    /// To a snapshot.
    Sealed(ChainQueue<E>),
}

/// Evaluates an expression for whichever format `$disk` has.
macro_rules! dispatch {
    ($type:ident, $disk:expr, $inner:ident => $body:expr) => {
        match $disk {
            $type::Raw($inner) => $body,
            $type::Layer($inner) => $body,
            $type::Qcow2($inner) => $body,
            $type::Sealed($inner) => $body,
        }
    };
}

impl<E: Engine> Disk<E> {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, is damaged, or its format is not recognised.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: OpenDisk,
    ) -> Result<Arc<Self>, ImageError> {
        let format = match options.format {
            Some(format) => format,
            None => probe(storage, io, path).await?.format(path)?,
        };
        let read_only = options.read_only;
        options.check(path, format)?;
        Ok(Arc::new(match format {
            Format::Raw => Self::Raw(RawDevice::open(storage, path, read_only)?),
            Format::Layer => {
                let tuning = options.tuning;
                Self::Layer(Layer::open(storage, io, path, &OpenLayer { read_only, tuning }).await?)
            }
            Format::Qcow2 | Format::Sealed => {
                Self::Qcow2(ChainDisk::open(storage, io, path, format, &options.below).await?)
            }
        }))
    }

    /// A sealed snapshot, as a disk that is only read.
    ///
    /// # Errors
    /// When there can be no such disk.
    pub fn open_sealed(packs: &Arc<Packs<E>>, root: Root) -> Result<Arc<Self>, ImageError> {
        Ok(Arc::new(Self::Sealed(ChainDisk::open_sealed(packs, root)?)))
    }

    /// A snapshot of a store, whatever it is now, as a disk that is only read.
    ///
    /// # Errors
    /// It cannot be opened, is damaged, or the resolver does not know it.
    pub async fn open_in_store<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        base: &StoreBase,
        resolver: &dyn ResolveBase<E>,
    ) -> Result<Arc<Self>, ImageError> {
        let chain = Chain::open_in_store(storage, io, base, resolver).await?;
        Ok(Arc::new(Self::Sealed(ChainDisk::over(chain))))
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Layer(_) => Format::Layer,
            Self::Qcow2(_) => Format::Qcow2,
            Self::Sealed(_) => Format::Sealed,
        }
    }

    /// What was counted since it was opened; nothing is of raw disks.
    pub fn counts(&self) -> Option<Counts> {
        match self {
            Self::Raw(_) => None,
            Self::Layer(layer) => Some(layer.counts()),
            Self::Qcow2(chain) | Self::Sealed(chain) => Some(chain.counts()),
        }
    }

    /// A queue over an engine that the caller's thread already runs, and that no other queue uses.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> DiskQueue<E> {
        match &**self {
            Self::Raw(raw) => DiskQueue::Raw(raw.queue_on(io)),
            Self::Layer(layer) => DiskQueue::Layer(layer.queue_on(io)),
            Self::Qcow2(qcow2) => DiskQueue::Qcow2(qcow2.queue_on(io)),
            Self::Sealed(sealed) => DiskQueue::Sealed(sealed.queue_on(io)),
        }
    }

    /// Work in the background that the format needs, until the disk is closed: to be run on a
    /// thread of its own or spawned beside a queue.
    pub async fn maintain(self: Arc<Self>, io: Io<E>) {
        match &*self {
            Self::Raw(_) | Self::Qcow2(_) | Self::Sealed(_) => {}
            Self::Layer(layer) => Arc::clone(layer).maintain(io).await,
        }
    }

    /// Changes the size of the disk, durably.
    ///
    /// # Errors
    /// When the disk is read-only or cannot have that size.
    pub async fn resize(&self, io: &Io<E>, size: u64) -> Result<(), ImageError> {
        dispatch!(Self, self, disk => disk.resize(io, size).await)
    }

    /// Makes everything durable and leaves the image tidy. All queues are drained and dropped
    /// before; nothing is done with the disk afterwards.
    ///
    /// # Errors
    /// When that, or an earlier sync, failed.
    pub async fn close(&self, io: &Io<E>) -> Result<(), ImageError> {
        dispatch!(Self, self, disk => disk.close(io).await)
    }

    /// What a range of the disk, cut to its size, holds, in order and without gaps.
    ///
    /// # Errors
    /// When the file system cannot be asked, or tables cannot be read.
    pub async fn extents(&self, io: &Io<E>, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        let range = range.start..range.end.min(self.geometry().size);
        match self {
            Self::Raw(raw) => raw.extents(range),
            Self::Layer(layer) => layer.extents(io, range).await,
            Self::Qcow2(chain) | Self::Sealed(chain) => chain.extents(io, range).await,
        }
    }

    fn geometry(&self) -> Geometry {
        dispatch!(Self, self, disk => disk.geometry())
    }
}

impl<E: Engine> BlockDevice for Disk<E> {
    type Engine = E;
    type Queue = DiskQueue<E>;

    fn geometry(&self) -> Geometry {
        self.geometry()
    }

    fn queue(self: &Arc<Self>, engine: E) -> DiskQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        dispatch!(Self, self, disk => disk.set_write_cache(enabled));
    }
}

impl<E: Engine> DeviceQueue for DiskQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        dispatch!(Self, self, queue => queue.submit(request));
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        dispatch!(Self, self, queue => queue.poll(done));
    }

    fn wait(&mut self, deadline: Option<Time>) {
        dispatch!(Self, self, queue => queue.wait(deadline));
    }

    fn outstanding(&self) -> usize {
        dispatch!(Self, self, queue => queue.outstanding())
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        dispatch!(Self, self, queue => queue.with_engine(f))
    }
}

/// Locks a file, saying who is in the way.
pub(crate) fn lock<F: StorageFile>(file: &F, lock: Lock) -> Result<(), ImageError> {
    file.lock(lock).map_err(|error| match error {
        LockError::Held(holder) => {
            let holder = holder.unwrap_or_else(|| "another process".to_owned());
            ImageError::new(file.path(), ErrorKind::Locked { holder })
        }
        LockError::Io(source) => ImageError::io(file.path(), "lock", source),
    })
}
