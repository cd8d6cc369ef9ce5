//! The hooks: few blocks of all packs, and which containers they are in.
//!
//! A block can be a hook when the lowest [`SAMPLE_BITS`] bits of one part of its hash are zero; another part is its mark.
//! When the table is full, half of the hooks are given up, by one more bit of their marks (*thinning*); from then on such
//! blocks are no hooks. Where there is no place for a hook though the table is not full, somebody made hashes to that
//! end, and another hook is given up for it.

use std::collections::BTreeSet;

use super::Container;
use super::marks::{Marks, USABLE_EIGHTHS};
use crate::sealed::hash::Hash;

/// One block in so many (a power of two) can be a hook.
const SAMPLE_BITS: u32 = 6;
/// Bits of a container's number in its pack; the rest of 32 is for the pack's slot.
const NUMBER_BITS: u32 = 10;
const SLOTS_MAX: usize = (1 << (32 - NUMBER_BITS)) - 1;
/// The slots of packs take one part in so many of the memory.
const PACK_PART: usize = 64;

/// The hooks of all packs.
#[derive(Debug)]
pub(super) struct Hooks {
    /// Values: a pack's slot plus one, and a container's number in the pack.
    marks: Marks,
    /// The number of the pack in each slot; 0 is none.
    packs: Vec<u32>,
    /// How many bits of a mark must be zero.
    thin: u32,
    /// Hooks in the table.
    count: usize,
}

impl Hooks {
    /// No hooks, in at most `budget` bytes.
    pub(super) fn new(budget: usize) -> Self {
        let packs = (budget / PACK_PART / size_of::<u32>()).min(SLOTS_MAX);
        let marks = Marks::new(budget - packs * size_of::<u32>());
        Self { marks, packs: vec![0; packs], thin: 0, count: 0 }
    }

    /// Moves all hooks into a table of at most `budget` bytes.
    pub(super) fn resize(&mut self, budget: usize) {
        let old = std::mem::replace(self, Self::new(budget));
        self.thin = old.thin;
        self.absorb(old);
    }

    /// Takes in other hooks.
    pub(super) fn absorb(&mut self, other: Self) {
        for (mark, value) in other.marks.into_values() {
            let (slot, number) = slot_and_number(value);
            self.put(mark, Container { pack: other.packs[slot], number });
        }
    }

    /// Whether seven eighths of the hooks for which there is memory are there.
    pub(super) fn is_crowded(&self) -> bool {
        self.count >= self.marks.places() / 8 * USABLE_EIGHTHS / 8 * 7
    }

    /// Bytes that they take.
    pub(super) fn bytes(&self) -> usize {
        self.marks.bytes() + self.packs.capacity() * size_of::<u32>()
    }

    /// Takes in a block of a container, if it is a hook.
    pub(super) fn insert(&mut self, hash: &Hash, container: Container) {
        if let Some(mark) = sample(hash) {
            self.put(mark, container);
        }
    }

    fn put(&mut self, mark: u32, container: Container) {
        if container.number >> NUMBER_BITS != 0 || self.marks.places() == 0 {
            return;
        }
        while keeps(mark, self.thin) {
            let Some(slot) = self.slot_of(container.pack) else { return };
            let value = (slot as u32 + 1) << NUMBER_BITS | container.number;
            let is_full = self.count >= self.marks.places() / 8 * USABLE_EIGHTHS;
            let before = self.marks.put(mark, value, |_| true);
            let before = if is_full { before } else { before.or_else(|| self.marks.replace(mark, value)) };
            if let Some(before) = before {
                self.count += usize::from(before == 0);
                return;
            }
            self.thin += 1;
            let thin = self.thin;
            self.count -= self.marks.forget(|mark, _| !keeps(mark, thin));
        }
    }

    /// The container that a block names, if it is a hook.
    pub(super) fn find(&self, hash: &Hash) -> Option<Container> {
        let mark = sample(hash).filter(|mark| keeps(*mark, self.thin))?;
        let (slot, number) = slot_and_number(self.marks.find(mark, |_| true)?);
        Some(Container { pack: self.packs[slot], number })
    }

    /// Forgets the hooks of packs.
    pub(super) fn withdraw(&mut self, packs: &BTreeSet<u32>) {
        let lost: Vec<bool> = self.packs.iter().map(|pack| packs.contains(pack)).collect();
        self.count -= self.marks.forget(|_, value| lost[slot_and_number(value).0]);
        self.packs.iter_mut().filter(|pack| packs.contains(pack)).for_each(|pack| *pack = 0);
    }

    /// The slot of a pack; a new one if it has none. None when all are taken.
    fn slot_of(&mut self, pack: u32) -> Option<usize> {
        let position = |number| self.packs.iter().position(|pack| *pack == number);
        let slot = position(pack).or_else(|| position(0))?;
        self.packs[slot] = pack;
        Some(slot)
    }
}

/// The mark of a block that can be a hook.
fn sample(hash: &Hash) -> Option<u32> {
    let [.., a, b, c, d, e, f, g, h] = hash.0;
    let sampled = u32::from_le_bytes([a, b, c, d]).trailing_zeros() >= SAMPLE_BITS;
    sampled.then_some(u32::from_le_bytes([e, f, g, h]))
}

fn keeps(mark: u32, thin: u32) -> bool {
    mark.trailing_zeros() >= thin
}

fn slot_and_number(value: u32) -> (usize, u32) {
    ((value >> NUMBER_BITS) as usize - 1, value & ((1 << NUMBER_BITS) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: usize = 64 << 10;

    /// The `i`-th block that can be a hook.
    fn hook(i: u32) -> Hash {
        let mut hash = Hash([1; 32]);
        hash.0[24..28].copy_from_slice(&(1u32 << SAMPLE_BITS).to_le_bytes());
        hash.0[28..].copy_from_slice(&i.wrapping_mul(0x85EB_CA6B).to_le_bytes());
        hash
    }

    fn container(i: u32) -> Container {
        Container { pack: 1 + i / 1000, number: i % 1000 }
    }

    /// How many of the first blocks are found; each that is must be right.
    fn found(hooks: &Hooks, count: u32) -> usize {
        let found = (0..count).filter_map(|i| Some((i, hooks.find(&hook(i))?)));
        found.map(|(i, found)| assert_eq!(found, container(i))).count()
    }

    #[test]
    fn one_block_in_64_is_a_hook() {
        let hashes = (0..64_000u32).map(|i| Hash(blake3::hash(&i.to_le_bytes()).into()));
        let sampled = hashes.filter(|hash| sample(hash).is_some()).count();
        assert!((900..1100).contains(&sampled), "{sampled}");
    }

    #[test]
    fn a_full_table_is_thinned_and_never_wrong() {
        let mut hooks = Hooks::new(BUDGET);
        let places = hooks.marks.places() as u32;
        let fits = places / 16 * 13;
        (0..fits).for_each(|i| hooks.insert(&hook(i), container(i)));
        assert_eq!((found(&hooks, fits), hooks.thin), (fits as usize, 0), "it is not full before");
        let many = places * 3;
        (fits..many).for_each(|i| hooks.insert(&hook(i), container(i)));
        let left = found(&hooks, many);
        assert_eq!(left, hooks.count);
        assert!(left as u32 > places * 4 / 10 && hooks.thin == 2, "{left} of {places}, {}", hooks.thin);
        assert!(hooks.bytes() <= BUDGET);
    }

    #[test]
    fn made_hashes_push_out_each_other_and_nobody_else() {
        let mut hooks = Hooks::new(BUDGET);
        (0..1000).for_each(|i| hooks.insert(&hook(i), container(i)));
        let made = |i: u32| {
            let mut hash = hook(0);
            hash.0[28..].copy_from_slice(&(77_000_000 + i).to_le_bytes());
            hash
        };
        let begin = hooks.count;
        (0..4000).for_each(|i| hooks.insert(&made(i), container(i)));
        assert!(hooks.count > begin && hooks.thin == 0);
        assert!(found(&hooks, 1000) > 990);
    }

    #[test]
    fn hooks_move_to_a_larger_table_and_to_a_smaller_one() {
        let mut hooks = Hooks::new(BUDGET);
        (0..5000).for_each(|i| hooks.insert(&hook(i), container(i)));
        hooks.resize(4 * BUDGET);
        assert_eq!((found(&hooks, 5000), hooks.count), (5000, 5000));
        hooks.resize(BUDGET / 4);
        assert!(hooks.bytes() <= BUDGET / 4);
        let left = found(&hooks, 5000);
        assert!(left == hooks.count && (800..2048).contains(&left), "{left}");
        hooks.resize(0);
        hooks.insert(&hook(1), container(1));
        assert_eq!((found(&hooks, 5000), hooks.bytes()), (0, 0));
    }

    #[test]
    fn a_block_that_moved_is_found_where_it_is() {
        let mut hooks = Hooks::new(4096);
        hooks.insert(&hook(1), container(1));
        hooks.insert(&hook(1), container(2500));
        assert_eq!((hooks.find(&hook(1)), hooks.count), (Some(container(2500)), 1));
    }

    #[test]
    fn withdrawn_packs_are_forgotten_and_their_slots_used_again() {
        let mut hooks = Hooks::new(BUDGET);
        let slots = hooks.packs.len() as u32;
        for round in 0..3 {
            let numbers = (1..=slots).map(|i| i + round * slots);
            numbers.clone().for_each(|pack| hooks.insert(&hook(pack), Container { pack, number: 0 }));
            assert_eq!(hooks.count as u32, slots);
            hooks.insert(&hook(0), Container { pack: 1 << 27, number: 0 });
            assert_eq!(hooks.count as u32, slots, "no slot is left for one more");
            hooks.withdraw(&numbers.skip(1).collect());
            assert_eq!(hooks.count, 1);
            hooks.withdraw(&BTreeSet::from([1 + round * slots]));
            assert_eq!(hooks.count, 0);
        }
    }
}
