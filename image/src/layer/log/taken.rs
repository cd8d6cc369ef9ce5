//! Parts on their way into a record, and those that were passed over for it.

use std::ops::Range;

use super::super::map::leaves_of;
use super::super::record::Run;
use super::super::waiter::Waiter;
use super::{Part, overlap};
use sapwood_blockdev::buffer::{Memory, Piece};

/// Parts taken for one record.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) runs: Vec<(Run, u32)>,
    pub(super) checksums: Vec<u32>,
    pub(super) memory: Memory,
    pub(super) waiters: Vec<(Waiter, u32)>,
    pub(super) leaves: Vec<Range<u32>>,
    pub(super) blocks: u32,
    /// When the data of each part was written, and its blocks.
    pub(super) estimates: Vec<(u64, u32)>,
    /// The record changes the nonce, so it is the last with the old one: nothing may follow in it.
    pub(super) ends_here: bool,
    /// Writes of guests that have data in it.
    pub(super) writes: u64,
    /// Blocks of the disk whose data in it is not a guest's.
    pub(super) not_of_guests: Vec<Range<u64>>,
}

impl Taken {
    /// Adds a part; where its data goes is a number of blocks so far. `now` is the layer's clock.
    pub(super) fn add(&mut self, part: Part, now: u64) {
        let at = self.blocks;
        self.count(&part);
        self.ends_here = matches!(part.run, Run::CheckpointEnd { .. });
        self.blocks += part.run.data_blocks();
        self.leaves.extend(Some(leaves_of(&part.guest_blocks())).filter(|leaves| !leaves.is_empty()));
        let absorbed = self.runs.last_mut().is_some_and(|(last, _)| last.absorb(&part.run));
        if !absorbed {
            self.runs.push((part.run, at));
        }
        if let Some((buf, sums)) = part.data {
            self.checksums.extend(sums);
            self.memory.push(Piece::Owned(buf));
            self.estimates.push((part.estimate.unwrap_or(now), part.run.data_blocks()));
        }
        self.waiters.push((part.waiter, at));
    }

    /// Whose data a part brings. The parts of one write follow one another.
    fn count(&mut self, part: &Part) {
        if part.of_guest {
            let is_same = self.waiters.last().is_some_and(|(last, _)| last.is_same(&part.waiter));
            self.writes += u64::from(!is_same);
        } else if matches!(part.run, Run::Data { .. }) {
            self.not_of_guests.push(part.guest_blocks());
        }
    }

    /// Makes places of what was counted so far: the data begins at `first`.
    pub(super) fn set_place(&mut self, first: u32) {
        self.runs.iter_mut().for_each(|(_, at)| *at += first);
        self.waiters.iter_mut().for_each(|(_, at)| *at += first);
    }
}

/// Bits of the filter below: a power of two.
const FILTER_BITS: u64 = 8192;
/// A part of more blocks is compared with every other one.
const FILTERED_BLOCKS_MAX: u64 = 64;

/// Says quickly of most parts that they have no block in common with those that were passed over.
pub(super) struct Passed {
    filter: [u64; FILTER_BITS as usize / 64],
    any_long: bool,
}

impl Default for Passed {
    fn default() -> Self {
        Self { filter: [0; FILTER_BITS as usize / 64], any_long: false }
    }
}

/// Where in the filter a block is: a word, and a bit of it.
fn bit(block: u64) -> (usize, u64) {
    let hash = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & (FILTER_BITS - 1);
    ((hash / 64) as usize, 1 << (hash % 64))
}

impl Passed {
    /// Passes a part over.
    pub(super) fn add(&mut self, part: &Part) {
        let blocks = part.guest_blocks();
        if blocks.end - blocks.start > FILTERED_BLOCKS_MAX {
            self.any_long = true;
            return;
        }
        for (word, bit) in blocks.map(bit) {
            self.filter[word] |= bit;
        }
    }

    /// Whether a part has a block in common with one of those that were passed over, which are `parts`.
    pub(super) fn overlaps<'a>(&self, part: &Part, mut parts: impl Iterator<Item = &'a Part>) -> bool {
        let blocks: Range<u64> = part.guest_blocks();
        let is_long = blocks.end - blocks.start > FILTERED_BLOCKS_MAX;
        let may = self.any_long || is_long || {
            let mut bits = blocks.clone().map(bit);
            bits.any(|(word, bit)| self.filter[word] & bit != 0)
        };
        may && parts.any(|passed| overlap(&passed.guest_blocks(), &blocks))
    }
}
