//! The containers that were used last, or are being written: which of them a block may be in.
//!
//! Of each block 32 bits are kept, its mark, and the slot of its container with the slot's *age*. A slot that gets another
//! container gets another age, which makes the marks of the old one invalid; their places are used again one by one.

use std::collections::BTreeSet;

use super::marks::{Marks, USABLE_EIGHTHS};
use super::{CONTAINER_ENTRIES_MAX, Container};
use crate::sealed::entries::Entry;
use crate::sealed::hash::Hash;

/// Memory of one slot with the marks of a full container, so that there is a place for nearly all.
const SLOT_BYTES: usize = size_of::<Slot>() + CONTAINER_ENTRIES_MAX * size_of::<u64>() * 8 / USABLE_EIGHTHS;
/// Bits of an age; the rest of 32 is for the slot.
const AGE_BITS: u32 = 12;
const AGE_MAX: u32 = (1 << AGE_BITS) - 1;
const SLOTS_MAX: usize = 1 << (32 - AGE_BITS);

/// A container, or none: that of pack 0.
#[derive(Clone, Copy, Debug)]
struct Slot {
    container: Container,
    /// From 1 on. It comes again after [`AGE_MAX`] containers: a mark that is as old names a wrong container, which is
    /// read in vain.
    age: u32,
    /// The time of its last use.
    used: u64,
}

const NO_CONTAINER: Container = Container { pack: 0, number: 0 };

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Recent {
    slots: Vec<Slot>,
    /// Values: slot and age.
    marks: Marks,
    /// Counts uses.
    time: u64,
    /// The slot that was used last: that of the next block, too, while blocks are written.
    last: usize,
}

impl Recent {
    /// None, in at most `budget` bytes.
    pub(super) fn new(budget: usize) -> Self {
        let slots = (budget / SLOT_BYTES).min(SLOTS_MAX);
        let empty = Slot { container: NO_CONTAINER, age: 1, used: 0 };
        let marks = if slots == 0 { 0 } else { budget - slots * size_of::<Slot>() };
        Self { slots: vec![empty; slots], marks: Marks::new(marks), time: 0, last: 0 }
    }

    /// Bytes that they take.
    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.marks.bytes()
    }

    fn position(&self, container: Container) -> Option<usize> {
        let is_it = |slot: &Slot| slot.container == container;
        let last = self.slots.get(self.last).filter(|slot| is_it(slot)).map(|_| self.last);
        last.or_else(|| self.slots.iter().position(is_it))
    }

    /// Takes in a container that was used, in place of the one that was used before all others.
    pub(super) fn insert(&mut self, container: Container, entries: &[Entry]) {
        let known = self.position(container).is_some();
        let Some(slot) = self.take_slot(container) else { return };
        if !known {
            entries.iter().take(CONTAINER_ENTRIES_MAX).for_each(|entry| self.add(slot, &entry.hash));
        }
    }

    /// Adds a block to a container that is being written.
    pub(super) fn append(&mut self, container: Container, entry: &Entry) {
        if let Some(slot) = self.take_slot(container) {
            self.add(slot, &entry.hash);
        }
    }

    /// The slot of a container, else the one to be given up for it; used now.
    fn take_slot(&mut self, container: Container) -> Option<usize> {
        self.time += 1;
        let oldest = || (0..self.slots.len()).min_by_key(|slot| self.slots[*slot].used);
        let slot = self.position(container).or_else(oldest)?;
        if self.slots[slot].container != container {
            self.clear(slot);
            self.slots[slot].container = container;
        }
        self.slots[slot].used = self.time;
        self.last = slot;
        Some(slot)
    }

    fn clear(&mut self, slot: usize) {
        let age = self.slots[slot].age % AGE_MAX + 1;
        self.slots[slot] = Slot { container: NO_CONTAINER, age, used: 0 };
    }

    /// A mark that has no place is left out.
    fn add(&mut self, slot: usize, hash: &Hash) {
        let value = (slot as u32) << AGE_BITS | self.slots[slot].age;
        let slots = &self.slots;
        self.marks.put(mark(hash), value, |value| is_valid(slots, value));
    }

    /// The container that a block may be in.
    pub(super) fn find(&self, hash: &Hash) -> Option<Container> {
        let value = self.marks.find(mark(hash), |value| is_valid(&self.slots, value))?;
        Some(self.slots[(value >> AGE_BITS) as usize].container)
    }

    /// Forgets the containers of packs.
    pub(super) fn withdraw(&mut self, packs: &BTreeSet<u32>) {
        for slot in 0..self.slots.len() {
            if packs.contains(&self.slots[slot].container.pack) {
                self.clear(slot);
            }
        }
    }
}

fn is_valid(slots: &[Slot], value: u32) -> bool {
    let slot = &slots[(value >> AGE_BITS) as usize];
    slot.age == value & AGE_MAX && slot.container != NO_CONTAINER
}

fn mark(hash: &Hash) -> u32 {
    (hash.prefix() >> 32) as u32
}
