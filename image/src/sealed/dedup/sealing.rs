//! The dedup index as seals use it: several at once, each with what it stores itself apart.
//!
//! All seals ask one index about the packs that are published, [`SharedDedup`]. What a seal stores it alone knows, until its
//! packs are in the catalog: another one that referred to them would lose data if this one failed.
//!
//! Memory of one seal, beside the shared index: an index of its own, of 1 MiB at first, and more while its hooks need it (8 bytes
//! for 64 blocks that it stores), up to the budget of the shared one; the entries of the pack that it writes, 5 MiB at most; and the
//! places of 131,072 of its nodes, about 8 MiB.
//!
//! Invariants:
//! - no lock is held while anything is read;
//! - a place is answered when its pack is held by the seal's pin, and in no other case.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quick_cache::unsync::Cache;

use super::{Container, DedupIndex, Lookup};
use crate::error::ImageError;
use crate::sealed::collect::Pin;
use crate::sealed::entries::Entry;
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::known::{Dedup, Found};
use crate::sealed::packs::Packs;
use crate::sealed::place::Place;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// What the index of a seal's own blocks begins with, in bytes.
const OWN_BUDGET: usize = 1 << 20;
/// Pages of entries that are remembered of the pack that is written, at most: of 127 entries of 40 bytes.
const OPEN_PAGES_MAX: usize = 1024;
/// Nodes of a seal that are remembered; others may be stored again.
const NODES_MAX: usize = 1 << 17;

/// The dedup index of a store, for all its seals. It knows packs that are published.
#[derive(Debug)]
pub struct SharedDedup(Mutex<DedupIndex>);

impl SharedDedup {
    /// An index that knows nothing, and takes at most `budget` bytes.
    pub fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(DedupIndex::new(budget))))
    }

    fn index(&self) -> MutexGuard<'_, DedupIndex> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.index().bytes()
    }

    /// Bytes that it may take.
    pub fn budget(&self) -> usize {
        self.index().budget
    }

    /// Changes the budget (see [`DedupIndex::budget_for`]).
    pub fn set_budget(&self, budget: usize) {
        self.index().set_budget(budget);
    }

    /// Forgets packs that were dropped.
    pub fn withdraw(&self, packs: &BTreeSet<u32>) {
        self.index().withdraw(packs);
    }

    /// Takes in the hooks of a pack that is published: of all packs when a store is opened, and of those that a collection has
    /// made. Its pages of entries are read, 64 at a time. A pack of nodes holds nothing to learn.
    ///
    /// # Errors
    /// When the pack cannot be read. What was read counts: nothing else must be done about it.
    pub async fn learn_pack<E: Engine>(
        &self,
        io: &Io<E>,
        packs: &Packs<E>,
        number: u32,
    ) -> Result<(), ImageError> {
        let pack = packs.pack(io, number).await?;
        if pack.kind() != PackKind::Data {
            return Ok(());
        }
        let learn = |page, entries: Vec<Entry>| {
            let mut index = self.index();
            entries.iter().for_each(|entry| index.insert_old(entry, page));
        };
        pack.each_page(io, 0..u32::MAX, learn).await
    }
}

/// What a seal has stored and nobody else may know.
#[derive(Debug)]
struct Own {
    index: DedupIndex,
    /// Its packs of data that are not published.
    packs: BTreeSet<u32>,
    /// The pack that is written, or none.
    open: u32,
    /// Its last pages of entries, the first of which has this number.
    pages: VecDeque<Vec<Entry>>,
    first: u32,
}

impl Own {
    fn new(budget_max: usize) -> Self {
        let index = DedupIndex::new(OWN_BUDGET.min(budget_max));
        Self { index, packs: BTreeSet::new(), open: 0, pages: VecDeque::new(), first: 0 }
    }

    fn insert(&mut self, entry: &Entry, page: u32, budget_max: impl Fn() -> usize) {
        let pack = entry.place.pack();
        if pack != self.open {
            // One pack of data is written at a time, so the one before is whole, and can be read.
            (self.open, self.first) = (pack, page);
            self.pages.clear();
            self.packs.insert(pack);
        }
        let Some(at) = page.checked_sub(self.first) else { return };
        while self.pages.len() <= at as usize {
            self.pages.push_back(Vec::new());
        }
        self.pages[at as usize].push(*entry);
        while self.pages.len() > OPEN_PAGES_MAX {
            self.pages.pop_front();
            self.first += 1;
        }
        if self.index.is_crowded() {
            let budget = (self.index.budget * 2).min(budget_max());
            if budget > self.index.budget {
                self.index.set_budget(budget);
            }
        }
        self.index.insert(entry, page);
    }

    /// What it remembers of a container of the pack that is written.
    fn remembered(&self, container: Container) -> Vec<Entry> {
        let pages = (self.first..).zip(&self.pages);
        let pages = pages.filter(|(page, _)| container.pages().contains(page));
        pages.flat_map(|(_, entries)| entries).copied().collect()
    }
}

/// What one seal finds: in the shared index, and of what it has stored itself. See the module's documentation.
#[derive(Debug)]
pub struct BoundedDedup {
    shared: Arc<SharedDedup>,
    pin: Arc<Pin>,
    lookup: Lookup,
    own: Own,
    nodes: Cache<Hash, Place>,
    /// Packs that are held, and those that were refused for this segment.
    held: BTreeSet<u32>,
    refused: BTreeSet<u32>,
    containers_read: u64,
}

impl BoundedDedup {
    /// For a seal that has this pin, and [says](Pin::begin_pack) which packs it makes.
    pub fn new(shared: &Arc<SharedDedup>, pin: &Arc<Pin>) -> Self {
        Self {
            own: Own::new(shared.index().budget),
            shared: Arc::clone(shared),
            pin: Arc::clone(pin),
            lookup: Lookup::default(),
            nodes: Cache::new(NODES_MAX),
            held: BTreeSet::new(),
            refused: BTreeSet::new(),
            containers_read: 0,
        }
    }

    /// The seal's packs are in the catalog, and its pin lives still: from now on all seals may find what it has stored. Whoever
    /// drops this instead forgets it.
    pub fn publish(&mut self) {
        let budget_max = self.shared.index().budget;
        let own = std::mem::replace(&mut self.own, Own::new(budget_max));
        self.shared.index().absorb(own.index);
    }

    /// Containers that were read so far.
    pub fn containers_read(&self) -> u64 {
        self.containers_read
    }

    /// Bytes that it takes, beside the places of nodes.
    pub fn bytes(&self) -> usize {
        let pages = self.own.pages.iter().map(|page| page.capacity() * size_of::<Entry>());
        self.own.index.bytes() + pages.sum::<usize>()
    }

    /// Looks for the blocks of the segment in a container. What cannot be read is passed over.
    async fn search<E: Engine>(&mut self, io: &Io<E>, packs: &Packs<E>, container: Container) {
        // One that may not be referred to could hide another copy.
        if !self.pin.may_hold(container.pack) {
            return;
        }
        let entries = if container.pack == self.own.open {
            self.own.remembered(container)
        } else {
            self.containers_read += 1;
            let Ok(pack) = packs.pack(io, container.pack).await else { return };
            let Ok(entries) = pack.entries_in(io, container.pages()).await else { return };
            entries
        };
        if self.own.packs.contains(&container.pack) {
            self.own.index.take(&mut self.lookup, container, &entries);
        } else {
            self.shared.index().take(&mut self.lookup, container, &entries);
        }
    }

    fn hold(&mut self, pack: u32) -> bool {
        if self.held.contains(&pack) {
            return true;
        }
        if self.refused.contains(&pack) {
            return false;
        }
        let is_held = self.pin.hold(pack);
        let packs = if is_held { &mut self.held } else { &mut self.refused };
        packs.insert(pack);
        is_held
    }
}

impl<E: Engine> Dedup<E> for BoundedDedup {
    async fn look_ahead(&mut self, io: &Io<E>, packs: &Packs<E>, hashes: &[Hash]) -> Result<(), ImageError> {
        self.lookup.begin(hashes);
        self.refused.clear();
        loop {
            let mut wanted = self.own.index.wanted(&mut self.lookup);
            wanted.extend(self.shared.index().wanted(&mut self.lookup));
            if wanted.is_empty() {
                return Ok(());
            }
            for container in wanted {
                self.search(io, packs, container).await;
            }
        }
    }

    fn find(&mut self, hash: &Hash) -> Option<Found> {
        let place = self.lookup.find(hash)?;
        self.hold(place.pack()).then_some(Found::Sure(place))
    }

    fn insert(&mut self, hash: Hash, place: Place, page: u32) {
        let shared = &self.shared;
        self.own.insert(&Entry { hash, place }, page, || shared.index().budget);
    }

    fn find_node(&mut self, hash: &Hash) -> Option<Found> {
        self.nodes.get(hash).copied().map(Found::Sure)
    }

    fn insert_node(&mut self, hash: Hash, place: Place) {
        self.nodes.insert(hash, place);
    }
}

#[cfg(test)]
mod tests;
