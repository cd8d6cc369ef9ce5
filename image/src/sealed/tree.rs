//! Making the tree of a disk, in the order of its blocks.
//!
//! Memory is one open node for each level. Over a base, subtrees that did not change are taken over as they are, and a
//! node that turns out to be what the base has there is not stored again. Invariant: the tree depends on what the disk
//! holds, never on how that was told.

use super::cursor::{Cursor, FANOUT_BITS};
use super::hash::Hash;
use super::node::{Child, FANOUT, Node, blocks_below, height_of};
use super::packs::Root;
use super::place::Place;
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Where new nodes go.
pub(super) trait NodeSink {
    /// Stores a node, unless it is stored already: its place.
    fn put(&mut self, node: &Node, hash: Hash) -> impl Future<Output = Result<Place, ImageError>>;
}

/// A tree being made.
pub(super) struct TreeBuilder<E: Engine> {
    size: u64,
    blocks: u64,
    height: u32,
    base: Option<Cursor<E>>,
    /// The open node of each level, from 1 on.
    open: Vec<Node>,
    /// Blocks told, without those in `same`.
    at: u64,
    /// Blocks from there on that are as in the base: they gather, so that whole subtrees are taken over.
    same: u64,
    top: Child,
}

impl<E: Engine> TreeBuilder<E> {
    /// A tree over a disk of `size` bytes, made over what a base holds.
    ///
    /// # Panics
    /// When there is no such disk.
    pub(super) fn new(size: u64, base: Option<Cursor<E>>) -> Self {
        let blocks = size.div_ceil(BLOCK_SIZE);
        let height = height_of(blocks);
        assert!(blocks <= blocks_below(height), "the size of a disk is checked before");
        Self {
            size,
            blocks,
            height,
            base,
            open: (1..=height).map(Node::zero).collect(),
            at: 0,
            same: 0,
            top: Child::ZERO,
        }
    }

    /// Nodes of the base read so far.
    pub(super) fn base_reads(&self) -> u64 {
        self.base.as_ref().map_or(0, |base| base.reads)
    }

    /// Block `index` of the base: zero past its end, and without a base.
    pub(super) async fn base_block(&mut self, index: u64) -> Result<Child, ImageError> {
        match &mut self.base {
            Some(base) => Ok(base.child(0, index).await?.expect("blocks lie below every top")),
            None => Ok(Child::ZERO),
        }
    }

    /// The next blocks are as in the base.
    pub(super) fn same(&mut self, count: u64) {
        self.same += count;
    }

    /// The next blocks are zeroes.
    pub(super) async fn zero(&mut self, count: u64, sink: &mut impl NodeSink) -> Result<(), ImageError> {
        self.take_over(sink).await?;
        self.fill(count, sink).await
    }

    /// The next block is this one.
    pub(super) async fn block(&mut self, child: Child, sink: &mut impl NodeSink) -> Result<(), ImageError> {
        self.take_over(sink).await?;
        self.set(0, child, sink).await
    }

    /// The tree, when all blocks were told.
    ///
    /// # Panics
    /// When they were not.
    pub(super) async fn finish(mut self, sink: &mut impl NodeSink) -> Result<(Root, u64), ImageError> {
        assert_eq!(self.at + self.same, self.blocks, "a tree is over a whole disk");
        let capacity = blocks_below(self.height);
        let ends_before = self.base.as_ref().is_some_and(|base| base.blocks() <= self.blocks);
        if self.same > 0 && ends_before {
            // Past both ends all is zero: the subtrees at the end are taken over whole.
            self.same += capacity - self.blocks;
        }
        self.take_over(sink).await?;
        self.fill(capacity - self.at, sink).await?;
        Ok((Root { size: self.size, tree: self.top }, self.base_reads()))
    }

    async fn fill(&mut self, mut count: u64, sink: &mut impl NodeSink) -> Result<(), ImageError> {
        while count > 0 {
            let level = self.level_that_fits(count);
            count -= blocks_below(level);
            self.set(level, Child::ZERO, sink).await?;
        }
        Ok(())
    }

    /// Takes over what is as in the base.
    async fn take_over(&mut self, sink: &mut impl NodeSink) -> Result<(), ImageError> {
        while self.same > 0 {
            let mut level = self.level_that_fits(self.same);
            let child = loop {
                let Some(base) = &mut self.base else { break Child::ZERO };
                match base.child(level, self.at >> (level * FANOUT_BITS)).await? {
                    Some(child) => break child,
                    None => level -= 1,
                }
            };
            self.same -= blocks_below(level);
            self.set(level, child, sink).await?;
        }
        Ok(())
    }

    /// The level of the largest subtree that begins here and has at most so many blocks.
    fn level_that_fits(&self, count: u64) -> u32 {
        let fits =
            |level: &u32| self.at.is_multiple_of(blocks_below(*level)) && blocks_below(*level) <= count;
        (0..=self.height).take_while(fits).last().unwrap_or(0)
    }

    /// Puts a subtree of this level where the tree goes on, and completes what it completes.
    async fn set(&mut self, level: u32, child: Child, sink: &mut impl NodeSink) -> Result<(), ImageError> {
        let start = self.at;
        self.at += blocks_below(level);
        let (mut level, mut child) = (level, child);
        while level < self.height {
            let index = (start >> (level * FANOUT_BITS)) as usize % FANOUT;
            self.open[level as usize].children[index] = child;
            level += 1;
            if index + 1 < FANOUT {
                return Ok(());
            }
            let node = std::mem::replace(&mut self.open[level as usize - 1], Node::zero(level));
            child = self.close(&node, start, sink).await?;
        }
        self.top = child;
        Ok(())
    }

    /// What stands for a complete node over block `start`.
    async fn close(
        &mut self,
        node: &Node,
        start: u64,
        sink: &mut impl NodeSink,
    ) -> Result<Child, ImageError> {
        let hash = node.hash();
        if hash.is_zero() {
            return Ok(Child::ZERO);
        }
        if let Some(base) = &mut self.base {
            let child = base.child(node.level, start >> (node.level * FANOUT_BITS)).await?;
            base.forget_before(start);
            if let Some(child) = child.filter(|child| child.hash == hash) {
                return Ok(child);
            }
        }
        Ok(Child { hash, place: sink.put(node, hash).await? })
    }
}
