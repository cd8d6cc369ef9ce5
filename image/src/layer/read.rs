//! Where the bytes of a range are: in the layer, or below it.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::{join, join_all};

use super::base::Below;
use super::core::Core;
use super::device::Layer;
use super::driver::Driver;
use super::node::Entry;
use super::paging::device_error;
use super::waiter::Result;
use crate::below::{Held, Piece, SealedPart, Source, push, read_file};
use crate::counts::Hits;
use crate::error::ImageError;
use sapwood_blockdev::buffer::{AlignedBuf, Memory, SharedBuf};
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Nodes of the layer's map have to be loaded before a range can be looked up.
struct Unloaded;

impl<E: Engine> Layer<E> {
    /// Calls `f` for the stretches of `range`, which must lie inside the disk, with where they are in the
    /// layer, or `None` where it says nothing: what lies below at that moment belongs to the answer, so
    /// `f`, which is called under the lock, is to ask for it. Returns the epoch that protects the places found, to be
    /// left when they have been read.
    fn look_up(
        &self,
        range: &Range<u64>,
        is_counted: bool,
        mut f: impl FnMut(Range<u64>, Option<Source<E::File>>),
    ) -> std::result::Result<u64, Unloaded> {
        let mut core = self.core();
        let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        let found = core.map.for_each_run(blocks, |start, count, entry| {
            let first = start * BLOCK_SIZE;
            let part = first.max(range.start)..(first + count * BLOCK_SIZE).min(range.end);
            let source = match entry.place() {
                Some(place) => {
                    let offset = Core::file_offset(place).plus(part.start - first);
                    Some(Source::File { file: self.file(), offset, may_end: false })
                }
                None => (entry == Entry::ZERO).then_some(Source::Zero),
            };
            f(part, source);
        });
        if is_counted {
            core.counts.map.count(found.is_ok());
        }
        found.map_err(|_| Unloaded)?;
        Ok(core.segments.enter())
    }

    /// Finds the bytes of `range`, which must lie inside the disk, in memory alone, for a request. Returns the epoch that
    /// protects the places found, to be left when they have been read, as `leases` are to be dropped then;
    /// `None` when something has to be loaded first.
    pub(super) fn plan(
        &self,
        range: Range<u64>,
        pieces: &mut Vec<Piece<E::File>>,
        leases: &mut Vec<Lease<E>>,
    ) -> Option<u64> {
        let mut is_known = true;
        let epoch = self.look_up(&range, true, |range, source| match source {
            Some(source) => push(pieces, Piece { range, source }),
            None => is_known = is_known && self.below().plan(range, pieces, leases),
        });
        match epoch {
            Ok(epoch) if is_known => return Some(epoch),
            Ok(epoch) => self.core().segments.leave(epoch),
            Err(Unloaded) => {}
        }
        pieces.clear();
        leases.clear();
        None
    }

    /// As [`Layer::plan`], for a layer over this one, under that one's lock; says whether it is all known.
    fn lend(
        self: &Arc<Self>,
        range: Range<u64>,
        pieces: &mut Vec<Piece<E::File>>,
        leases: &mut Vec<Lease<E>>,
    ) -> bool {
        let mut is_known = true;
        let epoch = self.look_up(&range, false, |range, source| match source {
            Some(source) => push(pieces, Piece { range, source }),
            None => is_known = is_known && self.below().plan(range, pieces, leases),
        });
        let Ok(epoch) = epoch else { return false };
        leases.push(Lease { layer: Arc::clone(self), epoch });
        is_known
    }

    /// Fills `memory` with a part of a sealed snapshot below, if all of that is in memory: says whether it was.
    pub(super) fn read_cached(&self, part: SealedPart, memory: &mut Memory) -> bool {
        self.below().chain.as_ref().is_some_and(|chain| chain.read_cached(part, memory, &self.frames))
    }

    /// Reads the disk from byte `start` into shared memory, loading what has to be known for it; counts in `frames`.
    async fn read_into(
        self: &Arc<Self>,
        io: &Io<E>,
        start: u64,
        memory: &mut Memory,
        frames: &Hits,
    ) -> Result {
        let range = start..start + memory.len() as u64;
        let mut pins = Vec::new();
        let (epoch, parts, below) = loop {
            let (mut parts, mut below) = (Vec::new(), None);
            let epoch = self.look_up(&range, false, |range, source| {
                if source.is_none() {
                    below.get_or_insert_with(|| self.below());
                }
                parts.push((range, source));
            });
            if let Ok(epoch) = epoch {
                break (epoch, parts, below);
            }
            let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
            pins.push(self.pin(io, &blocks).await.map_err(|error| complain(&error))?);
        };
        let (mut here, mut beneath) = (Vec::new(), Vec::new());
        for (part, source) in parts {
            let (at, len) = ((part.start - start) as usize, (part.end - part.start) as usize);
            match source {
                Some(Source::File { file, offset, may_end }) => {
                    here.push(read_file(io, file, offset, may_end, memory.share(at, len)));
                }
                Some(_) => memory.zero_at(at, len),
                None => {
                    let reads = below.iter().map(|below: &Arc<Below<E>>| {
                        below.read_into(io, part.start, memory.share(at, len), frames)
                    });
                    beneath.extend(reads);
                }
            }
        }
        let (here, beneath) = join(join_all(here), join_all(beneath)).await;
        self.core().segments.leave(epoch);
        here.into_iter().chain(beneath).collect()
    }
}

/// Keeps what was looked up in a layer that lies below another, and is still open for writing, where it is.
pub(super) struct Lease<E: Engine> {
    layer: Arc<Layer<E>>,
    epoch: u64,
}

impl<E: Engine> Drop for Lease<E> {
    fn drop(&mut self) {
        self.layer.core().segments.leave(self.epoch);
    }
}

impl<E: Engine> Below<E> {
    /// The part of `range` that something lies below.
    pub(super) fn inside(&self, range: &Range<u64>) -> Range<u64> {
        let end = match &self.open {
            Some(layer) => layer.core().size,
            None => self.chain.as_ref().map_or(0, |chain| chain.size()),
        };
        range.start..range.end.min(end).max(range.start)
    }

    /// Finds the bytes of `range` in memory alone; says whether they are all known.
    fn plan(&self, range: Range<u64>, pieces: &mut Vec<Piece<E::File>>, leases: &mut Vec<Lease<E>>) -> bool {
        let inside = self.inside(&range);
        let is_known = match (&self.open, &self.chain) {
            _ if inside.is_empty() => true,
            (Some(layer), _) => layer.lend(inside.clone(), pieces, leases),
            (None, Some(chain)) => chain.plan(inside.clone(), &Held::default(), pieces).is_ok(),
            (None, None) => true,
        };
        if is_known && inside.end < range.end {
            push(pieces, Piece { range: inside.end..range.end, source: Source::Zero });
        }
        is_known
    }

    /// Reads from byte `start` into shared memory; what nothing says anything about reads as zeroes.
    async fn read_into(&self, io: &Io<E>, start: u64, mut memory: Memory, frames: &Hits) -> Result {
        let inside = self.inside(&(start..start + memory.len() as u64));
        let len = (inside.end - inside.start) as usize;
        memory.zero_at(len, memory.len() - len);
        let mut memory = memory.share(0, len);
        match (&self.open, &self.chain) {
            _ if len == 0 => Ok(()),
            (Some(layer), _) => Box::pin(layer.read_into(io, start, &mut memory, frames)).await,
            (None, Some(chain)) => chain.read(io, start, &memory, frames).await,
            (None, None) => Ok(()),
        }
    }

    /// Reads `range`; what nothing says anything about reads as zeroes.
    pub(super) async fn read(&self, io: &Io<E>, range: Range<u64>) -> Result<AlignedBuf> {
        let shared = SharedBuf::heap((range.end - range.start) as usize);
        // Nobody's request.
        self.read_into(io, range.start, shared.clone().into(), &Hits::default()).await?;
        Ok(copy(&shared))
    }
}

/// What was read, in a buffer of its own.
fn copy(shared: &SharedBuf) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(shared.len());
    shared.read_at(0, &mut buf);
    buf
}

/// Says in the log what a guest cannot be told.
pub(super) fn complain(error: &ImageError) -> DeviceError {
    log::error!("{error}");
    device_error(error)
}

impl<E: Engine> Driver<E> {
    /// Reads `range` of the disk into a buffer of its own.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<AlignedBuf> {
        let shared = SharedBuf::heap((range.end - range.start) as usize);
        self.read_into(range.start, &mut shared.clone().into()).await?;
        Ok(copy(&shared))
    }

    /// Reads the disk from byte `start` into shared memory, loading what has to be known for it.
    pub(super) async fn read_into(&self, start: u64, memory: &mut Memory) -> Result {
        self.layer.read_into(&self.io, start, memory, &self.layer.frames).await
    }
}
