//! What one sealer looks for: the blocks of a segment, and what was found of them.

use std::collections::BTreeSet;

use super::{CONTAINER_ENTRIES_MAX, Container, WANTED_MAX};
use crate::sealed::entries::Entry;
use crate::sealed::hash::Hash;
use crate::sealed::place::Place;

/// A block that was found among the last entries of a container, one part in so many, makes the next one wanted.
const END_PART: usize = 4;

/// The blocks of a segment, and where they are. One for each disk that is read: where a segment ends in a container, the
/// next one may go on.
#[derive(Debug, Default)]
pub struct Lookup {
    /// In the order of their hashes, each once; no place where one was not found.
    blocks: Vec<(Hash, Place)>,
    /// What was given out for this segment.
    asked: BTreeSet<Container>,
    /// What may go on where blocks were found.
    following: BTreeSet<Container>,
}

impl Lookup {
    /// Goes on to the next segment. Zeroes are no blocks.
    pub fn begin(&mut self, segment: &[Hash]) {
        self.blocks.clear();
        let blocks = segment.iter().filter(|hash| !hash.is_zero());
        self.blocks.extend(blocks.map(|hash| (*hash, Place::NONE)));
        self.blocks.sort_unstable();
        self.blocks.dedup();
        self.asked.clear();
    }

    /// Where a block of the segment is, as far as it was found.
    pub fn find(&self, hash: &Hash) -> Option<Place> {
        let at = self.position(hash)?;
        Some(self.blocks[at].1).filter(|place| !place.is_none())
    }

    fn position(&self, hash: &Hash) -> Option<usize> {
        self.blocks.binary_search_by(|(known, _)| known.cmp(hash)).ok()
    }

    /// The blocks that were not found.
    pub(super) fn left(&self) -> impl Iterator<Item = &Hash> {
        self.blocks.iter().filter(|(_, place)| place.is_none()).map(|(hash, _)| hash)
    }

    /// The containers that may go on where blocks were found, if there are blocks to be found.
    pub(super) fn following(&mut self) -> BTreeSet<Container> {
        if self.left().next().is_none() {
            return BTreeSet::new();
        }
        std::mem::take(&mut self.following)
    }

    /// Whether a container may be given out: it was not for this segment before, nor were [`WANTED_MAX`].
    pub(super) fn ask(&mut self, container: Container) -> bool {
        self.asked.len() < WANTED_MAX && self.asked.insert(container)
    }

    /// Looks for the blocks among these entries; whether any was found.
    pub(super) fn search(&mut self, container: Container, entries: &[Entry]) -> bool {
        let mut any = false;
        for (i, entry) in entries.iter().enumerate() {
            let Some(at) = self.position(&entry.hash) else { continue };
            any = true;
            if self.blocks[at].1.is_none() {
                self.blocks[at].1 = entry.place;
            }
            if entries.len() - i <= CONTAINER_ENTRIES_MAX / END_PART {
                self.following.insert(container.next());
            }
        }
        any
    }
}
