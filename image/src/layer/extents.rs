//! What a range of a layer's disk holds, without reading it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::base::Below;
use super::core::Core;
use super::device::Layer;
use super::map::by_branch;
use super::node::Entry;
use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Blocks whose entries are one uniform value, or rising places.
#[derive(Clone, Copy, Debug)]
pub(super) struct MapRun {
    pub(super) start: u64,
    pub(super) count: u64,
    /// The first block's.
    pub(super) entry: Entry,
}

impl<E: Engine> Layer<E> {
    /// What `range` of the disk, in bytes, holds, through all bases. Cut off at the disk's end.
    ///
    /// # Errors
    /// When the map cannot be read, or a raw base cannot say where its holes are.
    pub async fn extents(self: &Arc<Self>, io: &Io<E>, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        let mut out = Vec::new();
        self.extents_at(io, range, 0, &mut out).await?;
        Ok(out)
    }

    /// As [`Layer::extents`], for a layer that lies `depth` files down; appends to `out`.
    async fn extents_at(
        self: &Arc<Self>,
        io: &Io<E>,
        range: Range<u64>,
        depth: u32,
        out: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        let size = self.core().size;
        let range = range.start.min(size)..range.end.min(size);
        if range.is_empty() {
            return Ok(());
        }
        let (file, below): (Arc<Path>, _) = (self.path().into(), self.below());
        let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        for MapRun { start, count, entry } in self.runs(io, blocks).await? {
            let first = start * BLOCK_SIZE;
            let part = first.max(range.start)..(first + count * BLOCK_SIZE).min(range.end);
            let (kind, offset) = match entry.place() {
                Some(place) => (ExtentKind::Data, Some(Core::file_offset(place).0 + part.start - first)),
                None if entry == Entry::ZERO => (ExtentKind::Zero, None),
                None => {
                    below.extents_at(io, part, depth + 1, out).await?;
                    continue;
                }
            };
            let len = part.end - part.start;
            let file = Some(Arc::clone(&file));
            Extent::push_to(out, Extent { start: part.start, len, kind, depth, offset, file });
        }
        Ok(())
    }

    /// What the map of this layer alone says of blocks. Memory is needed for all of them.
    pub(super) async fn runs(
        self: &Arc<Self>,
        io: &Io<E>,
        blocks: Range<u64>,
    ) -> Result<Vec<MapRun>, ImageError> {
        let mut runs = Vec::new();
        for blocks in by_branch(blocks) {
            let mut pins = None;
            loop {
                let known = runs.len();
                let add = |start, count, entry| runs.push(MapRun { start, count, entry });
                let found = self.core().map.for_each_run(blocks.clone(), add);
                if found.is_ok() {
                    break;
                }
                debug_assert!(pins.is_none(), "what is pinned is found");
                runs.truncate(known);
                pins = Some(self.pin(io, &blocks).await?);
            }
        }
        Ok(runs)
    }
}

impl<E: Engine> Below<E> {
    /// What lies below the layer in `range`.
    pub(super) async fn extents(
        &self,
        io: &Io<E>,
        range: Range<u64>,
        out: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        self.extents_at(io, range, 1, out).await
    }

    async fn extents_at(
        &self,
        io: &Io<E>,
        range: Range<u64>,
        depth: u32,
        out: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        let inside = self.inside(&range);
        if let Some(layer) = &self.open {
            Box::pin(layer.extents_at(io, inside.clone(), depth, out)).await?;
        } else if let Some(chain) = &self.chain {
            chain.extents_below(io, inside.clone(), depth, out).await?;
        }
        if inside.end < range.end {
            let (start, len) = (inside.end, range.end - inside.end);
            let absent = Extent { start, len, kind: ExtentKind::Absent, depth: 0, offset: None, file: None };
            Extent::push_to(out, absent);
        }
        Ok(())
    }
}
