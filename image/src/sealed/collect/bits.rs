//! A bit for each entry of every pack.

use std::collections::HashMap;

/// See the module's documentation. A pack takes no memory before its first bit is set.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits(HashMap<u32, Box<[u64]>>);

impl Bits {
    /// Sets the bit of entry `number` of a pack with so many `entries`: whether it was not set before.
    ///
    /// # Panics
    /// When there is no such entry: numbers come from the pack's table.
    pub(super) fn set(&mut self, pack: u32, number: u32, entries: u32) -> bool {
        assert!(number < entries, "entry {number} of {entries} in pack {pack}");
        let words = self.0.entry(pack).or_insert_with(|| vec![0; entries.div_ceil(64) as usize].into());
        let word = &mut words[number as usize / 64];
        let bit = 1 << (number % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// Whether it is set.
    pub(super) fn is_set(&self, pack: u32, number: u32) -> bool {
        let word = self.0.get(&pack).and_then(|words| words.get(number as usize / 64));
        word.is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Clears all of them.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Bytes that the bits take.
    pub(super) fn bytes(&self) -> usize {
        self.0.values().map(|words| words.len() * 8).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_apart_and_take_what_they_need() {
        let mut bits = Bits::default();
        assert!(bits.set(7, 0, 130) && bits.set(7, 129, 130) && bits.set(8, 64, 65));
        assert!(!bits.set(7, 129, 130), "it was set before");
        assert!(bits.is_set(7, 129) && bits.is_set(8, 64));
        assert!(!bits.is_set(7, 128) && !bits.is_set(8, 0) && !bits.is_set(9, 0) && !bits.is_set(8, 4000));
        assert_eq!(bits.bytes(), 5 * 8, "a bit for each entry");
        bits.clear();
        assert!(!bits.is_set(7, 0));
    }
}
