//! Where the bytes of a range are: through the layer, its base, and what lies below that.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;

use super::base::{Base, Below};
use super::core::Core;
use super::device::Layer;
use super::driver::Driver;
use super::node::Entry;
use super::paging::device_error;
use super::waiter::Result;
use crate::error::ImageError;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// A stretch of a range that is read in one operation, or zeroed.
pub(super) struct ReadPart<F> {
    /// Bytes of the disk.
    pub(super) range: Range<u64>,
    /// Where they are; `None`: they are zeroes.
    pub(super) source: Option<Source<F>>,
}

/// Where bytes are.
pub(super) struct Source<F> {
    pub(super) file: F,
    pub(super) offset: FileOffset,
    /// The file may end inside the stretch; what lies beyond reads as zeroes (raw bases). A layer
    /// that ends before a block it maps is damaged.
    pub(super) may_end: bool,
}

impl<F: StorageFile> Source<F> {
    /// Whether the file can be read from here straight into `memory`.
    pub(super) fn reaches(&self, memory: &Memory) -> bool {
        let alignment = self.file.alignment();
        (self.offset.0 | memory.len() as u64).is_multiple_of(alignment.offset as u64)
            && memory.is_aligned(alignment.memory)
    }
}

/// What has to be loaded before a range can be looked up.
pub(super) struct Miss<E: Engine> {
    /// In the map of this layer,
    layer: Arc<Layer<E>>,
    /// the leaves of these blocks.
    blocks: Range<u64>,
}

impl<E: Engine> Layer<E> {
    /// Finds the bytes of `range`, which must lie inside the disk. Returns the epoch that protects
    /// the places found, to be left when they have been read.
    pub(super) fn plan(
        self: &Arc<Self>,
        range: Range<u64>,
        parts: &mut Vec<ReadPart<E::File>>,
    ) -> std::result::Result<u64, Miss<E>> {
        let mut core = self.core();
        let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        let mut missed = None;
        let found = core.map.for_each_run(blocks.clone(), |start, count, entry| {
            let first = start * BLOCK_SIZE;
            let part = first.max(range.start)..(first + count * BLOCK_SIZE).min(range.end);
            match entry.place() {
                Some(place) => {
                    let offset = Core::file_offset(place).plus(part.start - first);
                    let source = Source { file: self.file(), offset, may_end: false };
                    push(parts, ReadPart { range: part, source: Some(source) });
                }
                None if entry == Entry::ZERO => push(parts, ReadPart { range: part, source: None }),
                None if missed.is_none() => missed = self.below().plan(part, parts).err(),
                None => {}
            }
        });
        if found.is_err() {
            missed = Some(Miss { layer: Arc::clone(self), blocks });
        }
        match missed {
            Some(miss) => {
                parts.clear();
                Err(miss)
            }
            None => Ok(core.segments.enter()),
        }
    }
}

impl<E: Engine> Below<E> {
    /// Finds the bytes of `range`.
    fn plan(
        &self,
        range: Range<u64>,
        parts: &mut Vec<ReadPart<E::File>>,
    ) -> std::result::Result<(), Miss<E>> {
        let end = self.base.as_ref().map_or(0, Base::size);
        let inside = range.start.min(end)..range.end.min(end);
        match &self.base {
            _ if inside.is_empty() => {}
            Some(Base::Raw { file, .. }) => {
                let source = Source { file: file.clone(), offset: FileOffset(inside.start), may_end: true };
                push(parts, ReadPart { range: inside.clone(), source: Some(source) });
            }
            // A base is never written, so nothing there needs its epoch.
            Some(Base::Layer(layer)) => {
                let epoch = layer.plan(inside.clone(), parts)?;
                layer.core().segments.leave(epoch);
            }
            None => {}
        }
        let rest = range.start.max(inside.end)..range.end;
        if !rest.is_empty() {
            push(parts, ReadPart { range: rest, source: None });
        }
        Ok(())
    }

    /// Reads `range`; what nothing says anything about reads as zeroes.
    pub(super) async fn read(&self, io: &Io<E>, range: Range<u64>) -> Result<AlignedBuf> {
        let (_, parts) = loaded(io, |parts| self.plan(range.clone(), parts)).await?;
        read_parts(io, range, parts).await
    }
}

/// Plans a read, loading what is missing.
async fn loaded<E: Engine, T>(
    io: &Io<E>,
    mut plan: impl FnMut(&mut Vec<ReadPart<E::File>>) -> std::result::Result<T, Miss<E>>,
) -> Result<(T, Vec<ReadPart<E::File>>)> {
    let mut pins = Vec::new();
    loop {
        let mut parts = Vec::new();
        match plan(&mut parts) {
            Ok(planned) => return Ok((planned, parts)),
            Err(miss) => {
                let pinned = miss.layer.pin(io, &miss.blocks).await;
                pins.push(pinned.map_err(|error| complain(&error))?);
            }
        }
    }
}

/// Says in the log what a guest cannot be told.
pub(super) fn complain(error: &ImageError) -> DeviceError {
    log::error!("{error}");
    device_error(error)
}

/// Appends a part, joined to the one before where the file goes on.
fn push<F: StorageFile>(parts: &mut Vec<ReadPart<F>>, next: ReadPart<F>) {
    if let Some(last) = parts.last_mut() {
        let len = last.range.end - last.range.start;
        let joins = match (&last.source, &next.source) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                a.offset.plus(len) == b.offset && a.may_end == b.may_end && a.file.path() == b.file.path()
            }
            _ => false,
        };
        if joins && last.range.end == next.range.start {
            last.range.end = next.range.end;
            return;
        }
    }
    parts.push(next);
}

impl<E: Engine> Driver<E> {
    /// Reads `range` of the disk into a buffer of its own.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<AlignedBuf> {
        let (epoch, parts) = loaded(&self.io, |parts| self.layer.plan(range.clone(), parts)).await?;
        let result = read_parts(&self.io, range, parts).await;
        self.layer.core().segments.leave(epoch);
        result
    }

    /// Reads the disk from byte `start` into shared memory, loading what has to be known for it.
    pub(super) async fn read_into(&self, start: u64, memory: &mut Memory) -> Result {
        let range = start..start + memory.len() as u64;
        let (epoch, parts) = loaded(&self.io, |parts| self.layer.plan(range.clone(), parts)).await?;
        let mut reads = Vec::with_capacity(parts.len());
        for part in parts {
            let at = (part.range.start - start) as usize;
            let len = (part.range.end - part.range.start) as usize;
            match part.source {
                None => memory.zero_at(at, len),
                Some(source) => reads.push(read_part(&self.io, source, memory.share(at, len))),
            }
        }
        let results = join_all(reads).await;
        self.layer.core().segments.leave(epoch);
        results.into_iter().collect()
    }
}

/// Reads one part into memory, directly where that can be.
async fn read_part<E: Engine>(io: &Io<E>, source: Source<E::File>, mut memory: Memory) -> Result {
    if source.reaches(&memory) {
        let (may_end, wanted) = (source.may_end, memory.len());
        let outcome = io.run(Op::read(source.file, source.offset, memory)).await;
        return match outcome.result {
            Ok(read) if read < wanted && !may_end => Err(DeviceError::Corrupt),
            _ => outcome.zero_filled().map(drop).map_err(DeviceError::from),
        };
    }
    let bytes = read_source(io, source, memory.len()).await?;
    memory.write_at(0, &bytes);
    Ok(())
}

/// Reads the parts of `range` into one buffer.
async fn read_parts<E: Engine>(
    io: &Io<E>,
    range: Range<u64>,
    parts: Vec<ReadPart<E::File>>,
) -> Result<AlignedBuf> {
    let mut memory = Memory::from(AlignedBuf::zeroed((range.end - range.start) as usize));
    for part in parts {
        let at = (part.range.start - range.start) as usize;
        let len = (part.range.end - part.range.start) as usize;
        let Some(source) = part.source else { continue };
        memory.write_at(at, &read_source(io, source, len).await?);
    }
    Ok(memory.into_buf())
}

/// Reads `len` bytes of a file, aligned as the file needs it.
pub(super) async fn read_source<E: Engine>(
    io: &Io<E>,
    source: Source<E::File>,
    len: usize,
) -> Result<Vec<u8>> {
    let alignment = source.file.alignment().offset as u64;
    let start = source.offset.0 / alignment * alignment;
    let end = (source.offset.0 + len as u64).next_multiple_of(alignment);
    let buf = AlignedBuf::zeroed((end - start) as usize);
    let outcome = io.run(Op::read(source.file, FileOffset(start), buf)).await;
    let skip = (source.offset.0 - start) as usize;
    if !source.may_end && outcome.result.is_ok_and(|read| read < skip + len) {
        return Err(DeviceError::Corrupt);
    }
    let buf = outcome.zero_filled()?.into_buf();
    Ok(buf[skip..skip + len].to_vec())
}
