//! Which blocks the store may have already: an index of bounded size in memory. It may miss a block, so that this is stored
//! once more, and never says that a block is where it is not.
//!
//! It rests on neighbourhood: files that are equal lie in equal order on many disks, and so in packs. A *container* is some
//! consecutive pages of a pack's entries, a few hundred blocks that were stored one after the other. The index knows which
//! container a block is in for few blocks of all packs, chosen by bits of their hashes (`hooks`), and for all blocks of the
//! containers that were used last (`recent`). Whoever seals takes a *segment* of the disk at a time and asks which containers
//! its blocks name ([`DedupIndex::wanted`]). It reads those from the packs, and gives them to the index, which looks for every
//! block of the segment in them ([`DedupIndex::take`]).
//!
//! Seals use it through `sealing`: several at once, each with what it stores itself apart until that is published.
//!
//! Invariants:
//! - all memory of the index together stays within its budget;
//! - a block is found in a container as it was read, by its whole hash;
//! - a withdrawn pack is not wanted.

mod hooks;
mod lookup;
mod marks;
mod recent;
mod sealing;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ops::Range;

use self::hooks::Hooks;
pub use self::lookup::Lookup;
use self::recent::Recent;
pub use self::sealing::{BoundedDedup, SharedDedup};
use super::entries::{Entry, PAGE_ENTRIES_MAX};

/// Blocks of a disk that are best looked up together.
pub const SEGMENT_BLOCKS: usize = 1024;
/// Pages of entries in a container.
pub const CONTAINER_PAGES: u32 = 4;
/// Entries in a container, at most.
pub const CONTAINER_ENTRIES_MAX: usize = CONTAINER_PAGES as usize * PAGE_ENTRIES_MAX;
/// Containers that are read for one segment, at most.
const WANTED_MAX: usize = 128;
/// Unique bytes in the store for which there is one byte of the index: 64 MiB for 1 TiB.
const UNIQUE_PER_BYTE: u64 = 1 << 14;
/// Parts of the budget that are for hooks, and of how many.
const HOOK_PARTS: usize = 5;
const PARTS: usize = 8;

/// Pages of a pack's entries that are read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Container {
    /// The pack's number.
    pub pack: u32,
    /// Its number in the pack: the first page is [`CONTAINER_PAGES`] times as much.
    pub number: u32,
}

impl Container {
    /// The one that has page `page` of the entries of a pack.
    pub fn of_page(pack: u32, page: u32) -> Self {
        Self { pack, number: page / CONTAINER_PAGES }
    }

    /// Its pages. The pack may end before them.
    pub fn pages(self) -> Range<u32> {
        let first = self.number.saturating_mul(CONTAINER_PAGES);
        first..first.saturating_add(CONTAINER_PAGES)
    }

    fn next(self) -> Self {
        Self { number: self.number.saturating_add(1), ..self }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct DedupIndex {
    budget: usize,
    hooks: Hooks,
    recent: Recent,
}

impl DedupIndex {
    /// An empty index that takes at most `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let hook_bytes = budget / PARTS * HOOK_PARTS;
        let recent = Recent::new(budget - hook_bytes);
        let index = Self { budget, hooks: Hooks::new(hook_bytes), recent };
        index.assert_budget();
        index
    }

    /// The budget for a store of so many bytes of unique blocks: 64 MiB for 1 TiB, and at least `floor`.
    pub fn budget_for(unique_bytes: u64, floor: usize) -> usize {
        usize::try_from(unique_bytes / UNIQUE_PER_BYTE).unwrap_or(usize::MAX).max(floor)
    }

    /// Changes the budget. Hooks are kept as far as they fit: while they move, the old table is there beside the new one.
    pub fn set_budget(&mut self, budget: usize) {
        let hook_bytes = budget / PARTS * HOOK_PARTS;
        self.budget = budget;
        self.recent = Recent::new(0);
        self.hooks.resize(hook_bytes);
        self.recent = Recent::new(budget - hook_bytes);
        self.assert_budget();
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.hooks.bytes() + self.recent.bytes()
    }

    fn assert_budget(&self) {
        assert!(self.bytes() <= self.budget, "the dedup index is within its budget");
    }

    /// The containers that the blocks of a segment name, as far as they have not been found: those that most blocks name
    /// first, and those that follow where blocks were found near the end of one. None that was given out for this segment
    /// before, and no more than [`WANTED_MAX`] for all of it: hashes can be made that name containers in vain.
    pub fn wanted(&mut self, lookup: &mut Lookup) -> Vec<Container> {
        let find = |hash: &_| self.recent.find(hash).or_else(|| self.hooks.find(hash));
        let mut named: Vec<Container> = lookup.left().filter_map(find).collect();
        named.extend(lookup.following());
        named.sort_unstable();
        let same = |a: &Container, b: &Container| a == b;
        let mut counted: Vec<(usize, Container)> =
            named.chunk_by(same).map(|same| (same.len(), same[0])).collect();
        counted.sort_by_key(|(count, container)| (Reverse(*count), *container));
        let mut wanted: Vec<Container> = counted.into_iter().map(|(_, container)| container).collect();
        wanted.retain(|container| lookup.ask(*container));
        wanted
    }

    /// Looks for the blocks of a segment in a container that was wanted, whose entries are as its pages have them.
    pub fn take(&mut self, lookup: &mut Lookup, container: Container, entries: &[Entry]) {
        if lookup.search(container, entries) {
            self.recent.insert(container, entries);
        }
        self.assert_budget();
    }

    /// Takes in a block that was stored: `page` is the page of the pack's entries that it will be in.
    pub fn insert(&mut self, entry: &Entry, page: u32) {
        self.insert_old(entry, page);
        self.recent.append(Container::of_page(entry.place.pack(), page), entry);
        self.assert_budget();
    }

    /// Takes in a block of a pack that is older: it is known if it is a hook.
    pub fn insert_old(&mut self, entry: &Entry, page: u32) {
        self.hooks.insert(&entry.hash, Container::of_page(entry.place.pack(), page));
    }

    /// Takes in the hooks of another index.
    fn absorb(&mut self, other: Self) {
        self.hooks.absorb(other.hooks);
        self.assert_budget();
    }

    /// Whether the table of hooks will soon be full.
    fn is_crowded(&self) -> bool {
        self.hooks.is_crowded()
    }

    /// Forgets all that lies in these packs.
    pub fn withdraw(&mut self, packs: &BTreeSet<u32>) {
        self.hooks.withdraw(packs);
        self.recent.withdraw(packs);
    }
}
