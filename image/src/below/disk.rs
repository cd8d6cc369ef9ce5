//! A chain as a disk: a qcow2 image, or a sealed snapshot.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, DeviceError, Geometry};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_SIZE;

use super::{Chain, ChainQueue, OpenBelow};
use crate::counts::{Counts, Hits};
use crate::error::ImageError;
use crate::extent::Extent;
use crate::format::Format;
use crate::sealed::{Hash, Packs, Root, root_hash};

/// A disk that is only read: a chain of images with nothing above it.
pub struct ChainDisk<E: Engine> {
    below: Arc<Chain<E>>,
    /// How often a frame of a sealed snapshot was in memory.
    frames: Arc<Hits>,
}

impl<E: Engine> ChainDisk<E> {
    /// Opens an image; it is shared with other readers.
    ///
    /// # Errors
    /// Those of [`Chain::open`].
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        format: Format,
        options: &OpenBelow,
    ) -> Result<Arc<Self>, ImageError> {
        let below = Chain::open(storage, io, path, format, options).await?;
        Ok(Self::over(below))
    }

    /// A sealed snapshot.
    ///
    /// # Errors
    /// Those of [`Chain::open_sealed`].
    pub fn open_sealed(packs: &Arc<Packs<E>>, root: Root) -> Result<Arc<Self>, ImageError> {
        Ok(Self::over(Chain::open_sealed(packs, root)?))
    }

    /// A chain that is open.
    pub(crate) fn over(below: Chain<E>) -> Arc<Self> {
        Arc::new(Self { below: Arc::new(below), frames: Arc::default() })
    }

    /// The chain of images.
    pub fn below(&self) -> &Chain<E> {
        &self.below
    }

    /// What was counted since it was opened: only frames.
    pub fn counts(&self) -> Counts {
        Counts { frames: self.frames.get(), ..Counts::default() }
    }

    /// By what it is known, if it is a sealed snapshot.
    pub(crate) fn root_hash(&self) -> Option<Hash> {
        self.below.sealed_root().map(|root| root_hash(root.size, &root.tree.hash))
    }

    /// A queue over an engine that the caller's thread already runs, and that no other queue uses.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> ChainQueue<E> {
        ChainQueue::new(Arc::clone(&self.below), Arc::clone(&self.frames), io)
    }

    /// Reads from byte `start` of the disk, which must not end before `buffer` does, as a task of the calling thread's reactor.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged.
    pub async fn read(&self, io: &Io<E>, start: u64, buffer: &SharedBuf) -> Result<(), ImageError> {
        let read = self.below.read(io, start, &buffer.clone().into(), &self.frames).await;
        read.map_err(|error| ImageError::new(self.below.path(), error))
    }

    /// What a range of the disk holds.
    ///
    /// # Errors
    /// Those of [`Chain::extents`].
    pub async fn extents(&self, io: &Io<E>, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        self.below.extents(io, range).await
    }

    /// Refused: images are only read.
    ///
    /// # Errors
    /// Always.
    pub async fn resize(&self, _: &Io<E>, _: u64) -> Result<(), ImageError> {
        Err(ImageError::new(self.below.path(), DeviceError::ReadOnly))
    }

    /// Nothing needs to be made durable.
    ///
    /// # Errors
    /// Never.
    pub async fn close(&self, _: &Io<E>) -> Result<(), ImageError> {
        Ok(())
    }
}

impl<E: Engine> BlockDevice for ChainDisk<E> {
    type Engine = E;
    type Queue = ChainQueue<E>;

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.below.size(),
            read_only: true,
            physical_block: BLOCK_SIZE as u32,
            discard_granularity: BLOCK_SIZE as u32,
        }
    }

    fn queue(self: &Arc<Self>, engine: E) -> ChainQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, _: bool) {}
}
