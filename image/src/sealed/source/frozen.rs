//! A frozen layer: what its map holds, over what lies below.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::try_join_all;

use super::{Content, Source, SourceBytes, SourceRun};
use crate::below::read_aligned;
use crate::error::ImageError;
use crate::layer::frozen::{FrozenRun, Holds, blocks_of};
use crate::layer::{Layer, Tuning, open_file};
use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_SIZE;

/// Reads in flight, at most.
const DEPTH: usize = 64;

/// Memory for the map of a layer that is opened here, in bytes.
const MAP_CACHE_BYTES: u64 = 1 << 20;

/// A layer that nobody writes any more. What lies below it is not looked at: it is the base.
pub struct FrozenSource<E: Engine> {
    layer: Arc<Layer<E>>,
    io: Io<E>,
}

impl<E: Engine> FrozenSource<E> {
    /// What `layer` holds, which is read only.
    pub fn new(layer: Arc<Layer<E>>, io: &Io<E>) -> Self {
        Self { layer, io: io.clone() }
    }

    /// What the layer in a file holds, opened for reading without what lies below it.
    ///
    /// # Errors
    /// It cannot be opened, is in use, or damaged.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
    ) -> Result<Self, ImageError> {
        let file = open_file(storage, path, OpenOptions::READ.buffered(), Lock::Shared)?;
        let tuning = Tuning { map_cache_bytes: MAP_CACHE_BYTES, ..Tuning::default() };
        let (layer, _) = Layer::open_frozen(io, path, file, tuning, false).await?;
        Ok(Self::new(layer, io))
    }

    /// What the map says of the blocks from `at` on.
    async fn run(&self, blocks: Range<u64>) -> Result<FrozenRun, ImageError> {
        loop {
            if let Some(run) = self.layer.first_run(blocks.clone()) {
                return Ok(run);
            }
            let _pins = self.layer.pin(&self.io, &(blocks.start..blocks.start + 1)).await?;
            if let Some(run) = self.layer.first_run(blocks.clone()) {
                return Ok(run);
            }
        }
    }

    async fn read_piece(&self, (at, len): (u64, usize)) -> Result<Vec<u8>, ImageError> {
        let file = self.layer.frozen_file();
        let read = read_aligned(&self.io, &file, at, len, false).await;
        let (bytes, range) = read.map_err(|error| ImageError::new(file.path(), error))?;
        Ok(bytes[range].to_vec())
    }
}

impl<E: Engine> Source for FrozenSource<E> {
    fn size(&self) -> u64 {
        self.layer.geometry().size
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        let run = self.run(at..blocks_of(self.size())).await?;
        let content = match run.holds {
            Holds::Nothing => Content::Same,
            Holds::Zero => Content::Zero,
            Holds::Place(_) => Content::Data,
        };
        Ok(SourceRun { content, count: run.count })
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        let mut pieces = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let run = self.run(at..range.end).await?;
                let Holds::Place(place) = run.holds else {
                    let why = format!("block {at} held data and does no more");
                    return Err(ImageError::corrupt(self.layer.frozen_file().path(), "map", 0, why));
                };
                pieces.push((Holds::offset(place), (run.count * BLOCK_SIZE) as usize));
                at += run.count;
            }
        }
        let mut bytes = Vec::new();
        for some in pieces.chunks(DEPTH) {
            let read = try_join_all(some.iter().map(|piece| self.read_piece(*piece))).await?;
            read.iter().for_each(|piece| bytes.extend(piece));
        }
        Ok(bytes.into())
    }
}
