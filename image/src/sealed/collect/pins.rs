//! What work in progress holds against a collection.
//!
//! Seals, imports and clones refer to content that no root of the catalog reaches yet, and a root that they build upon may
//! be deleted meanwhile. So each of them takes a [`Pin`] before it begins, and keeps to three rules:
//! - it names the roots that it builds upon or copies, which are in the catalog, or pinned, at that moment;
//! - before it refers to content that the look-up for duplicates found in a pack, and before it publishes a pack of its
//!   own, it [holds](Pin::hold) the pack. When that is refused, the pack is being collected: the content counts as not found;
//! - it gives the pin up when its root is in the catalog, or when it has failed.
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
    /// Packs that nobody may begin to refer to. Those that were dropped stay: numbers are not used again.
    withdrawn: BTreeSet<u32>,
    is_collecting: bool,
    /// Roots of pins that have ended, while somebody wants to know.
    ended: Option<HashSet<Key>>,
}

/// A root, as something to compare.
type Key = (u64, Hash, Place);

/// What one pin holds.
#[derive(Debug, Default)]
struct Held {
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

    /// How many pins there are.
    pub fn count(&self) -> usize {
        self.state().held.len()
    }

    /// Begins a collection: there is one at a time.
    pub(super) fn collect(self: &Arc<Self>) -> Option<Collecting> {
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
    /// Holds a pack, so that it stays as long as the pin does: false when it is being collected or is gone, and must not be
    /// referred to.
    #[must_use = "what is not held must not be referred to"]
    pub fn hold(&self, pack: u32) -> bool {
        let mut state = self.pins.state();
        if state.withdrawn.contains(&pack) {
            return false;
        }
        self.held(&mut state).packs.insert(pack);
        true
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
pub(super) struct Collecting {
    pins: Arc<Pins>,
    withdrawn: BTreeSet<u32>,
}

impl Collecting {
    /// Withdraws those packs that nobody holds, and begins to remember pinned roots: the packs that are held.
    pub(super) fn withdraw(&mut self, packs: &[u32]) -> Vec<u32> {
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

    /// What is withdrawn still is gone for good.
    pub(super) fn finish(mut self) {
        self.withdrawn.clear();
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
        let pin = pins.pin(&[]);
        assert!(pin.hold(1));
        let mut collecting = pins.collect().unwrap();
        assert!(pins.collect().is_none(), "one at a time");
        assert_eq!(collecting.withdraw(&[1, 2, 3]), [1]);
        assert!(pin.hold(1) && !pin.hold(2) && !pin.hold(3) && pin.hold(4));
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
        assert!(collecting.withdraw(&[5]).is_empty());
        collecting.finish();
        assert!(!pin.hold(5), "it is gone");
        assert!(pins.collect().is_some());
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
