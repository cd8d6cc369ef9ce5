//! What differs between two sealed disks, by their trees alone.

use std::ops::Range;

use super::cursor::{FANOUT_BITS, load_node};
use super::node::{Child, FANOUT, blocks_below, height_of};
use super::packs::{Packs, Root};
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// What a comparison took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffStats {
    /// Nodes read, of both trees.
    pub nodes_read: u64,
    /// Blocks that differ.
    pub blocks: u64,
}

/// Finds the blocks in which `new` differs from `old`, and gives them to `changed` in order, joined where they meet. Where one
/// disk is longer, the other reads as zeroes. Equal subtrees are not looked into, and no data is read.
///
/// # Errors
/// When a node cannot be read.
pub async fn diff<E: Engine>(
    packs: &Packs<E>,
    io: &Io<E>,
    old: &Root,
    new: &Root,
    changed: impl FnMut(Range<u64>),
) -> Result<DiffStats, ImageError> {
    let height = height_of(old.blocks()).max(height_of(new.blocks()));
    let sides = [(old, height_of(old.blocks())), (new, height_of(new.blocks()))];
    let end = old.blocks().max(new.blocks());
    let mut walk = Walk { packs, io, sides, end, changed, open: None, stats: DiffStats::default() };
    walk.run(height).await?;
    if let Some(last) = walk.open.take() {
        (walk.changed)(last);
    }
    Ok(walk.stats)
}

/// A stretch where the trees differ, at one level of both.
struct Pair {
    level: u32,
    index: u64,
    children: [Child; 2],
}

struct Walk<'a, E: Engine, F> {
    packs: &'a Packs<E>,
    io: &'a Io<E>,
    sides: [(&'a Root, u32); 2],
    /// Blocks of the longer disk.
    end: u64,
    changed: F,
    /// A range that may go on.
    open: Option<Range<u64>>,
    stats: DiffStats,
}

impl<E: Engine, F: FnMut(Range<u64>)> Walk<'_, E, F> {
    /// Walks down both trees; what is to be looked into is not more than 16 pairs for each level.
    async fn run(&mut self, height: u32) -> Result<(), ImageError> {
        let top = Pair { level: height, index: 0, children: self.sides.map(|(root, _)| root.tree) };
        let mut stack = vec![top];
        while let Some(pair) = stack.pop() {
            let heights = self.sides.map(|(_, height)| height);
            let is_top = |side: usize| pair.index == 0 && pair.level > heights[side];
            let comparable = !is_top(0) && !is_top(1) || is_top(0) && is_top(1) && heights[0] == heights[1];
            if comparable && pair.children[0].hash == pair.children[1].hash {
                continue;
            }
            if pair.level == 0 {
                self.differs(pair.index);
                continue;
            }
            let below = [self.below(&pair, 0).await?, self.below(&pair, 1).await?];
            for i in (0..FANOUT).rev() {
                let index = (pair.index << FANOUT_BITS) + i as u64;
                let children = [below[0][i], below[1][i]];
                let level = pair.level - 1;
                let goes_on = index * blocks_below(level) < self.end;
                if goes_on && children != [Child::ZERO; 2] {
                    stack.push(Pair { level, index, children });
                }
            }
        }
        Ok(())
    }

    /// The children of one side of a pair. Over its top a tree goes on with nodes of which only the first child is not zero.
    async fn below(&mut self, pair: &Pair, side: usize) -> Result<[Child; FANOUT], ImageError> {
        let child = &pair.children[side];
        let mut children = [Child::ZERO; FANOUT];
        if pair.index == 0 && pair.level > self.sides[side].1 {
            children[0] = *child;
        } else if !child.hash.is_zero() {
            self.stats.nodes_read += 1;
            children = load_node(self.packs, self.io, child, pair.level).await?.children;
        }
        Ok(children)
    }

    fn differs(&mut self, block: u64) {
        self.stats.blocks += 1;
        match &mut self.open {
            Some(open) if open.end == block => open.end += 1,
            open => {
                if let Some(done) = open.replace(block..block + 1) {
                    (self.changed)(done);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;
    use std::sync::Arc;

    use super::*;
    use crate::sealed::trial::{Draw, Model, Trial};
    use sapwood_blockdev::io::block_on;
    use sapwood_blockdev::units::BLOCK_SIZE;

    fn changed(trial: &Trial, old: Root, new: Root) -> (Vec<Range<u64>>, DiffStats) {
        let (io, packs) = (trial.io.clone(), Arc::clone(&trial.packs));
        block_on(&trial.io, async move {
            let mut ranges = Vec::new();
            let stats = diff(&packs, &io, &old, &new, |range| ranges.push(range)).await.unwrap();
            (ranges, stats)
        })
    }

    /// The same, block by block.
    fn compared(old: &Model, new: &Model) -> Vec<Range<u64>> {
        let bytes = |model: &Model, at: usize| match at < model.blocks.len() {
            true => model.bytes(at),
            false => vec![0; BLOCK_SIZE as usize],
        };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for at in 0..old.blocks.len().max(new.blocks.len()) {
            if bytes(old, at) != bytes(new, at) {
                match ranges.last_mut().filter(|last| last.end == at as u64) {
                    Some(last) => last.end += 1,
                    None => ranges.push(at as u64..at as u64 + 1),
                }
            }
        }
        ranges
    }

    #[test]
    fn it_finds_what_differs_and_nothing_else() {
        let mut shapes = [0; 3];
        for seed in 0..80 {
            let (mut draw, mut trial) = (Draw(seed), Trial::new());
            let old = Model::draw(&mut draw);
            let new = old.next(&mut draw);
            let old_root = trial.seal(old.whole(&mut draw), None).root;
            let new_root = trial.seal(new.changes(&old, &mut draw), Some(old_root)).root;
            let wanted = compared(&old, &new);
            let (ranges, stats) = changed(&trial, old_root, new_root);
            assert_eq!(ranges, wanted, "seed {seed}");
            assert_eq!(stats.blocks, wanted.iter().map(|range| range.end - range.start).sum::<u64>());
            let heights = height_of(old_root.blocks()) + height_of(new_root.blocks());
            assert!(stats.nodes_read <= (stats.blocks + 1) * u64::from(heights), "{stats:?}");
            assert_eq!(changed(&trial, new_root, old_root).0, wanted, "the other way round");
            let shape = match old.blocks.len().cmp(&new.blocks.len()) {
                Ordering::Less => 0,
                Ordering::Equal => 1,
                Ordering::Greater => 2,
            };
            shapes[shape] += usize::from(!wanted.is_empty());
        }
        assert!(shapes.iter().all(|count| *count > 0), "longer, shorter, as long: {shapes:?}");
    }

    #[test]
    fn it_reads_only_the_way_to_what_changed() {
        let mut trial = Trial::new();
        let mut model = Model { size: 70_000 * BLOCK_SIZE, blocks: (1..=70_000).collect() };
        let old = trial.seal(model.whole(&mut Draw(0)), None).root;
        assert_eq!(changed(&trial, old, old), (Vec::new(), DiffStats::default()));
        model.blocks[40_000] = 0;
        model.blocks[40_001] = 5_000_000;
        let new = trial.seal(model.whole(&mut Draw(0)), None).root;
        let (ranges, stats) = changed(&trial, old, new);
        assert_eq!((ranges.len(), ranges[0].clone()), (1, 40_000..40_002));
        assert_eq!(stats, DiffStats { nodes_read: 2 * 5, blocks: 2 });
    }
}
