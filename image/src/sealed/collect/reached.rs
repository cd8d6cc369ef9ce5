//! What damage means: which blocks of which roots cannot be read.

use std::ops::Range;

use super::bits::Bits;
use super::finder::{Locate, Spot};
use super::scrub::Scrub;
use super::walk::{Visit, walk};
use crate::error::ImageError;
use crate::sealed::packs::Root;
use sapwood_blockdev::engine::Engine;

/// Ranges listed of a root; the last one reaches over the rest.
const RANGES_MAX: usize = 1000;

/// What a root has lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Ranges of blocks, in order, at most a thousand: when there are more, the last one reaches from the first to the end of
    /// the last of those, and `is_exact` is false.
    pub ranges: Vec<Range<u64>>,
    /// Blocks in all ranges.
    pub blocks: u64,
    /// Whether nothing else lies in the ranges.
    pub is_exact: bool,
    /// Why the first of them cannot be read.
    pub why: String,
}

impl<E: Engine, L: Locate<E>> Scrub<E, L> {
    /// Walks over the trees of roots: for each, what of it cannot be read, if anything. Every node is read once, of however many
    /// roots, but for those above damage. Blocks are not read again: those in records that were found to be damaged count as lost, unless
    /// they are elsewhere, too, and so do those that are nowhere.
    ///
    /// # Errors
    /// When the work was stopped.
    pub async fn roots(&mut self, roots: &[Root]) -> Result<Vec<Option<Lost>>, ImageError> {
        let mut whole = Bits::default();
        let mut all = Vec::with_capacity(roots.len());
        for root in roots {
            let mut visit = Reaching { whole: &mut whole, below: Vec::new(), lost: None };
            walk(&mut self.finder, root, &mut visit).await?;
            all.push(visit.lost);
        }
        Ok(all)
    }
}

struct Reaching<'a> {
    /// Nodes, and blocks, below which nothing is lost.
    whole: &'a mut Bits,
    /// For each node on the way down, whether something below it is lost.
    below: Vec<bool>,
    lost: Option<Lost>,
}

impl Visit for Reaching<'_> {
    fn enter(&mut self, spot: &Spot) -> bool {
        let is_new = !self.whole.is_set(spot.pack(), spot.number);
        if is_new {
            self.below.push(false);
        }
        is_new
    }

    fn leave(&mut self, spot: &Spot) {
        let is_lost = self.below.pop().expect("it was entered");
        if !is_lost {
            self.whole.set(spot.pack(), spot.number, spot.entries);
        } else if let Some(above) = self.below.last_mut() {
            *above = true;
        }
    }

    fn block(&mut self, _: &Spot) {}

    fn lost(&mut self, blocks: Range<u64>, error: ImageError) -> Result<(), ImageError> {
        if let Some(above) = self.below.last_mut() {
            *above = true;
        }
        if blocks.is_empty() {
            return Ok(());
        }
        let lost = self.lost.get_or_insert_with(|| Lost {
            is_exact: true,
            why: error.to_string(),
            ..Lost::default()
        });
        lost.blocks += blocks.end - blocks.start;
        let is_full = lost.ranges.len() == RANGES_MAX;
        match lost.ranges.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            Some(last) if is_full => {
                last.end = blocks.end;
                lost.is_exact = false;
            }
            _ => lost.ranges.push(blocks),
        }
        Ok(())
    }
}
