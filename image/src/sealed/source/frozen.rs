//! A frozen layer: what its map holds, over what lies below.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::try_join_all;

use super::spare::{Spare, bytes_of};
use super::{Content, Source, SourceBytes, SourceRun};
use crate::below::read_file;
use crate::error::ImageError;
use crate::layer::frozen::{FrozenRun, Holds, blocks_of};
use crate::layer::{Layer, Tuning, open_file};
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Reads in flight, at most.
const DEPTH: usize = 64;

/// Memory for the map of a layer that is opened here, in bytes.
const MAP_CACHE_BYTES: u64 = 1 << 20;

/// A layer that nobody writes any more. What lies below it is not looked at: it is the base.
pub struct FrozenSource<E: Engine> {
    layer: Arc<Layer<E>>,
    io: Io<E>,
    spare: Spare,
}

impl<E: Engine> FrozenSource<E> {
    /// What `layer` holds, which is read only.
    pub fn new(layer: Arc<Layer<E>>, io: &Io<E>) -> Self {
        Self { layer, io: io.clone(), spare: Spare::default() }
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

    async fn read_piece(&self, (at, memory): (u64, SharedBuf)) -> Result<(), ImageError> {
        let file = self.layer.frozen_file();
        let read = read_file(&self.io, file.clone(), FileOffset(at), false, memory.into()).await;
        read.map_err(|error| ImageError::new(file.path(), error))
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
        let len = ranges.iter().map(|range| (range.end - range.start) * BLOCK_SIZE).sum::<u64>() as usize;
        let (buffer, mut pieces, mut done) = (self.spare.take(len), Vec::new(), 0);
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let run = self.run(at..range.end).await?;
                let Holds::Place(place) = run.holds else {
                    let why = format!("block {at} held data and does no more");
                    return Err(ImageError::corrupt(self.layer.frozen_file().path(), "map", 0, why));
                };
                let bytes = (run.count * BLOCK_SIZE) as usize;
                pieces.push((Holds::offset(place), buffer.slice(done..done + bytes)));
                (at, done) = (at + run.count, done + bytes);
            }
        }
        let mut pieces = pieces.into_iter();
        while pieces.len() > 0 {
            try_join_all(pieces.by_ref().take(DEPTH).map(|piece| self.read_piece(piece))).await?;
        }
        Ok(bytes_of(buffer, len))
    }

    fn take_back(&mut self, bytes: SourceBytes) {
        self.spare.keep(bytes.into_buffer());
    }
}
