//! A sealed disk of other packs: of an archive, or of a store on its way into one.

use std::ops::Range;
use std::sync::Arc;

use super::{Content, Source, SourceBytes, SourceRun};
use crate::error::ImageError;
use crate::sealed::cursor::{Cursor, FANOUT_BITS};
use crate::sealed::hash::Hash;
use crate::sealed::node::{blocks_below, height_of};
use crate::sealed::packs::{Packs, Root};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// A tree, and a base that it shares subtrees with.
pub struct TreeSource<E: Engine> {
    packs: Arc<Packs<E>>,
    io: Io<E>,
    root: Root,
    tree: Cursor<E>,
    base: Option<Cursor<E>>,
}

impl<E: Engine> TreeSource<E> {
    /// The disk `root` in `packs`. Where it is as `base`, which is the base of the seal and lies in packs of its own, it is not read.
    pub fn new(packs: &Arc<Packs<E>>, io: &Io<E>, root: Root, base: Option<(&Arc<Packs<E>>, Root)>) -> Self {
        Self {
            packs: Arc::clone(packs),
            io: io.clone(),
            root,
            tree: Cursor::new(Arc::clone(packs), io, root),
            base: base.map(|(packs, root)| Cursor::new(Arc::clone(packs), io, root)),
        }
    }

    /// The same, for an increment.
    pub(in crate::sealed) fn reading_places(self) -> Self {
        Self { tree: self.tree.reading_places(), ..self }
    }

    /// What a subtree holds, where that is one thing: the same as the base's, zeroes, or one block.
    async fn content(&mut self, level: u32, index: u64) -> Result<Option<Content>, ImageError> {
        let Some(child) = self.tree.child(level, index).await? else { return Ok(None) };
        if child.hash.is_zero() {
            return Ok(Some(Content::Zero));
        }
        if let Some(base) = &mut self.base {
            let below = base.child(level, index).await?;
            if below.is_some_and(|below| below.hash == child.hash) {
                return Ok(Some(Content::Same));
            }
        }
        Ok((level == 0).then_some(Content::Data))
    }
}

impl<E: Engine> Source for TreeSource<E> {
    fn size(&self) -> u64 {
        self.root.size
    }

    fn expected(&self) -> Option<Hash> {
        Some(self.root.hash())
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        let blocks = self.root.blocks();
        let starts = |level: &u32| at.is_multiple_of(blocks_below(*level));
        let mut level = (0..=height_of(blocks)).take_while(starts).last().unwrap_or(0);
        loop {
            if let Some(content) = self.content(level, at >> (level * FANOUT_BITS)).await? {
                return Ok(SourceRun { content, count: blocks_below(level).min(blocks - at) });
            }
            level = level.saturating_sub(1);
        }
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        let mut bytes = Vec::new();
        for at in ranges.iter().cloned().flatten() {
            let child = self.tree.child(0, at).await?.expect("blocks lie below every top");
            bytes.extend_from_slice(self.packs.block(&self.io, &child.hash, child.place).await?.bytes());
        }
        let before = ranges.first().map_or(0, |range| range.start);
        self.tree.forget_before(before);
        if let Some(base) = &mut self.base {
            base.forget_before(before);
        }
        Ok(bytes.into())
    }
}
