//! A qcow2 image as a disk.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, DeviceError, Geometry};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_SIZE;

use super::queue::Qcow2Queue;
use crate::below::{Chain, OpenBelow};
use crate::error::ImageError;
use crate::extent::Extent;
use crate::format::Format;

/// A qcow2 image, open for reading, with all that lies below it.
pub struct Qcow2<E: Engine> {
    below: Chain<E>,
}

impl<E: Engine> Qcow2<E> {
    /// Opens an image; it is shared with other readers.
    ///
    /// # Errors
    /// Those of [`Chain::open`].
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenBelow,
    ) -> Result<Arc<Self>, ImageError> {
        let below = Chain::open(storage, io, path, Format::Qcow2, options).await?;
        Ok(Arc::new(Self { below }))
    }

    /// The chain of images.
    pub fn below(&self) -> &Chain<E> {
        &self.below
    }

    /// A queue over an engine that the caller's thread already runs, and that no other queue uses.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> Qcow2Queue<E> {
        Qcow2Queue::new(Arc::clone(self), io)
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

impl<E: Engine> BlockDevice for Qcow2<E> {
    type Engine = E;
    type Queue = Qcow2Queue<E>;

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.below.size(),
            read_only: true,
            physical_block: BLOCK_SIZE as u32,
            discard_granularity: BLOCK_SIZE as u32,
        }
    }

    fn queue(self: &Arc<Self>, engine: E) -> Qcow2Queue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, _: bool) {}
}
