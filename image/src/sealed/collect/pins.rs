//! What work in progress holds against a collection.
//!
//! Seals, imports and clones refer to content that no root of the catalog reaches yet, and a root that they build upon may
//! be deleted meanwhile. So each of them takes a [`Pin`] before it begins, and keeps to four rules:
//! - it names the roots that it builds upon or copies, which are in the catalog, or pinned, at that moment;
//! - it says so [before](Pin::begin_pack) it makes a pack of its own;
//! - before it refers to content that the look-up for duplicates found in a pack, it [holds](Pin::hold) the pack. When that is
//!   refused, the pack is being collected, or is gone, or is somebody else's and not published, so that it may never be there:
//!   the content counts as not found;
//! - it gives the pin up when its root and its packs are in the catalog, and [`Pins::published`] was told of them, or when it
//!   has failed.
//!
//! And the collection keeps to two: it withdraws packs before it marks, only such as nobody holds; and it asks for the
//! pinned roots after it has asked the catalog for roots. From its withdrawal until then, roots stay listed though their pin has ended.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sealed::hash::Hash;
use crate::sealed::packs::Root;
use crate::sealed::place::Place;

/// All pins of a store.
#[derive(Debug, Default)]
pub struct Pins(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    held: HashMap<u64, Held>,
    next: u64,
    /// Packs that are in the catalog.
    published: BTreeSet<u32>,
    /// Those of them that nobody may begin to refer to.
    withdrawn: BTreeSet<u32>,
    is_collecting: bool,
    /// Roots of pins that have ended, while somebody wants to know.
    ended: Option<HashSet<Key>>,
}

/// A root, as something to compare.
type Key = (u64, Hash, Place);

impl State {
    fn is_free(&self, pack: u32) -> bool {
        self.published.contains(&pack) && !self.withdrawn.contains(&pack)
    }
}

/// What one pin holds.
#[derive(Debug, Default)]
struct Held {
    /// Its own packs included.
    packs: BTreeSet<u32>,
    roots: HashSet<Key>,
}

fn key(root: &Root) -> Key {
    (root.size, root.tree.hash, root.tree.place)
}

fn root((size, hash, place): &Key) -> Root {
    Root { size: *size, tree: crate::sealed::node::Child { hash: *hash, place: *place } }
}

impl Pins {
    /// Begins work that builds upon these roots.
    pub fn pin(self: &Arc<Self>, roots: &[Root]) -> Pin {
        let mut state = self.state();
        state.next += 1;
        let id = state.next;
        state.held.insert(id, Held { packs: BTreeSet::new(), roots: roots.iter().map(key).collect() });
        Pin { pins: Arc::clone(self), id }
    }

    /// Says that packs are in the catalog: from now on everybody may refer to them. When a store is opened these are all of its
    /// packs; then those of each publication, before its pin ends.
    pub fn published(&self, packs: impl IntoIterator<Item = u32>) {
        self.state().published.extend(packs);
    }

    /// How many pins there are.
    pub fn count(&self) -> usize {
        self.state().held.len()
    }

    /// Begins a collection: there is one at a time.
    pub(in crate::sealed) fn collect(self: &Arc<Self>) -> Option<Collecting> {
        let was_collecting = std::mem::replace(&mut self.state().is_collecting, true);
        (!was_collecting).then(|| Collecting { pins: Arc::clone(self), withdrawn: BTreeSet::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one piece of work holds, until it is dropped.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Pins>,
    id: u64,
}

impl Pin {
    /// Says that this work makes a pack, whose number is new: it alone may refer to it until it is
    /// [published](Pins::published), and it is held as long as the pin lives.
    pub fn begin_pack(&self, pack: u32) {
        self.held(&mut self.pins.state()).packs.insert(pack);
    }

    /// Holds a pack, so that it stays as long as the pin does: false when it is being collected, is gone, or is not published
    /// and not this work's own, and must not be referred to.
    #[must_use = "what is not held must not be referred to"]
    pub fn hold(&self, pack: u32) -> bool {
        let mut state = self.pins.state();
        let is_free = state.is_free(pack);
        let packs = &mut self.held(&mut state).packs;
        if is_free {
            packs.insert(pack);
        }
        // What is held is never withdrawn.
        packs.contains(&pack)
    }

    /// Whether [`hold`](Self::hold) would hold a pack now.
    pub fn may_hold(&self, pack: u32) -> bool {
        let mut state = self.pins.state();
        state.is_free(pack) || self.held(&mut state).packs.contains(&pack)
    }

    /// Pins one more root, which is in the catalog or pinned.
    pub fn add(&self, root: &Root) {
        self.held(&mut self.pins.state()).roots.insert(key(root));
    }

    fn held<'a>(&self, state: &'a mut State) -> &'a mut Held {
        state.held.get_mut(&self.id).expect("a pin is listed as long as it lives")
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.pins.state();
        let held = state.held.remove(&self.id);
        if let (Some(held), Some(ended)) = (held, &mut state.ended) {
            ended.extend(held.roots);
        }
    }
}

/// The collection's side. Dropping it gives back what was withdrawn.
#[derive(Debug)]
pub(in crate::sealed) struct Collecting {
    pins: Arc<Pins>,
    withdrawn: BTreeSet<u32>,
}

impl Collecting {
    /// Withdraws those packs that nobody holds, and begins to remember pinned roots: the packs that are held.
    pub(in crate::sealed) fn withdraw(&mut self, packs: &[u32]) -> Vec<u32> {
        let mut state = self.pins.state();
        state.ended.get_or_insert_default();
        let is_held = |pack: &u32| state.held.values().any(|held| held.packs.contains(pack));
        let (held, free): (Vec<u32>, Vec<u32>) = packs.iter().partition(|pack| is_held(pack));
        state.withdrawn.extend(&free);
        self.withdrawn.extend(free);
        held
    }

    /// What it has withdrawn.
    pub(super) fn withdrawn(&self) -> impl Iterator<Item = u32> {
        self.withdrawn.iter().copied()
    }

    /// Every root that was pinned at any time since the withdrawal. From here on they are not remembered.
    pub(super) fn pinned(&mut self) -> Vec<Root> {
        let mut state = self.pins.state();
        let mut roots = state.ended.take().unwrap_or_default();
        roots.extend(state.held.values().flat_map(|held| &held.roots));
        roots.iter().map(root).collect()
    }

    /// Gives a pack back.
    pub(super) fn release(&mut self, pack: u32) {
        if self.withdrawn.remove(&pack) {
            self.pins.state().withdrawn.remove(&pack);
        }
    }

    /// Gives everything back.
    pub(super) fn release_all(&mut self) {
        let withdrawn = std::mem::take(&mut self.withdrawn);
        self.pins.state().withdrawn.retain(|pack| !withdrawn.contains(pack));
    }

    /// What is withdrawn still is gone for good, and these packs are in the catalog in its place.
    pub(in crate::sealed) fn finish(self, written: impl IntoIterator<Item = u32>) {
        let mut state = self.pins.state();
        state.published.retain(|pack| !self.withdrawn.contains(pack));
        state.published.extend(written);
        // Dropping the rest forgets that they were withdrawn: they are not published any more.
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        let mut state = self.pins.state();
        state.withdrawn.retain(|pack| !self.withdrawn.contains(pack));
        state.ended = None;
        state.is_collecting = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::node::Child;

    fn some_root(n: u8) -> Root {
        Root { size: 4096, tree: Child { hash: Hash([n; 32]), place: Place::NONE } }
    }

    #[test]
    fn a_pack_is_held_or_withdrawn_and_never_both() {
        let pins = Arc::new(Pins::default());
        pins.published(1..=5);
        let pin = pins.pin(&[]);
        assert!(pin.hold(1));
        let mut collecting = pins.collect().unwrap();
        assert!(pins.collect().is_none(), "one at a time");
        assert_eq!(collecting.withdraw(&[1, 2, 3]), [1]);
        assert!(pin.hold(1) && !pin.hold(2) && !pin.hold(3) && pin.hold(4));
        assert!(pin.may_hold(1) && !pin.may_hold(2) && pin.may_hold(5));
        collecting.release(3);
        assert!(pin.hold(3));
        drop(pin);
        assert_eq!(collecting.withdraw(&[1]), [0; 0], "its holder has ended");
        assert_eq!(collecting.withdrawn().collect::<Vec<_>>(), [1, 2]);
        let pin = pins.pin(&[]);
        assert!(!pin.hold(1));
        drop(collecting);
        assert!(pin.hold(1) && pin.hold(2), "it was given up");
        let mut collecting = pins.collect().unwrap();
        assert!(collecting.withdraw(&[5]).is_empty(), "nobody has held it");
        collecting.finish([6]);
        assert!(!pin.hold(5), "it is gone");
        assert!(pin.hold(6), "and this one came in its place");
        assert_eq!(pins.state().withdrawn.len(), 0, "and nothing is kept of it");
        assert_eq!(pins.state().published.len(), 5);
        assert!(pins.collect().is_some());
    }

    #[test]
    fn a_pack_is_its_makers_until_it_is_published() {
        let pins = Arc::new(Pins::default());
        let (maker, other) = (pins.pin(&[]), pins.pin(&[]));
        maker.begin_pack(1);
        maker.begin_pack(2);
        assert!(maker.hold(1) && !other.hold(1) && !other.may_hold(1));
        pins.published([1]);
        assert!(maker.hold(1) && other.hold(1) && !other.hold(2));
        let mut collecting = pins.collect().unwrap();
        drop(other);
        assert_eq!(
            collecting.withdraw(&[1]),
            [1],
            "its maker may refer to it until its root is in the catalog"
        );
        drop(maker);
        assert!(collecting.withdraw(&[1]).is_empty());
        assert!(!pins.pin(&[]).hold(2), "its maker has failed");
    }

    #[test]
    fn roots_stay_listed_from_the_withdrawal_until_they_are_asked_for() {
        let pins = Arc::new(Pins::default());
        drop(pins.pin(&[some_root(1)]));
        let mut collecting = pins.collect().unwrap();
        drop(pins.pin(&[some_root(2)]));
        let earlier = pins.pin(&[some_root(3)]);
        collecting.withdraw(&[]);
        drop(earlier);
        let lasting = pins.pin(&[some_root(4)]);
        lasting.add(&some_root(5));
        let mut roots: Vec<u8> = collecting.pinned().iter().map(|root| root.tree.hash.0[0]).collect();
        roots.sort_unstable();
        assert_eq!(roots, [3, 4, 5]);
        assert_eq!(pins.count(), 1);
        drop(lasting);
        assert!(collecting.pinned().is_empty());
    }
}
