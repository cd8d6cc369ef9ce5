//! What the map says of the file's blocks, in little memory: a bit for each block that is mapped, and for
//! each segment a sum over its mapped blocks, each with its guest block.
//!
//! The records of a segment state the guest blocks, too. If they make the same sum, they speak of the same
//! pairs of block and guest block: a summand is a keyed mixture of both, and nobody knows the key before.

use super::super::layout::FIRST_SEGMENT_BLOCK;

/// Mapped blocks of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// How many; a block that two entries share counts twice.
    pub(super) blocks: u32,
    sum: u64,
}

impl Held {
    /// Adds a block by its [`tag`](Places::tag).
    pub(super) fn add(&mut self, tag: u64) {
        self.blocks += 1;
        self.sum = self.sum.wrapping_add(tag);
    }
}

/// See the module's documentation.
pub(super) struct Places {
    key: u64,
    segment_blocks: u32,
    /// A bit for each block of the segments.
    mapped: Vec<u64>,
    segments: Vec<Held>,
}

impl Places {
    /// `count` segments to which nothing is mapped. `key` is random.
    pub(super) fn new(key: u64, count: u32, segment_blocks: u32) -> Self {
        let blocks = u64::from(count) * u64::from(segment_blocks);
        Self {
            key,
            segment_blocks,
            mapped: vec![0; blocks.div_ceil(64) as usize],
            segments: vec![Held::default(); count as usize],
        }
    }

    /// The segment of a place, and the block there.
    pub(super) fn split(&self, place: u32) -> (u32, u32) {
        let block = place - FIRST_SEGMENT_BLOCK;
        (block / self.segment_blocks, block % self.segment_blocks)
    }

    /// The opposite of [`split`](Self::split).
    pub(super) fn join(&self, segment: u32, inside: u32) -> u32 {
        FIRST_SEGMENT_BLOCK + segment * self.segment_blocks + inside
    }

    /// Takes an entry of the map.
    pub(super) fn add(&mut self, place: u32, block: u64) {
        let bit = place - FIRST_SEGMENT_BLOCK;
        self.mapped[bit as usize / 64] |= 1 << (bit % 64);
        let tag = self.tag(place, block);
        let (segment, _) = self.split(place);
        self.segments[segment as usize].add(tag);
    }

    /// Whether an entry names a block of a segment.
    pub(super) fn is_mapped(&self, segment: u32, inside: u32) -> bool {
        let bit = self.join(segment, inside) - FIRST_SEGMENT_BLOCK;
        self.mapped[bit as usize / 64] >> (bit % 64) & 1 == 1
    }

    /// What is mapped to a segment.
    pub(super) fn held(&self, segment: u32) -> Held {
        self.segments[segment as usize]
    }

    /// Entries with a place.
    pub(super) fn mapped_blocks(&self) -> u64 {
        self.segments.iter().map(|held| u64::from(held.blocks)).sum()
    }

    /// What an entry adds to the sum of its segment.
    pub(super) fn tag(&self, place: u32, block: u64) -> u64 {
        mix(mix(self.key ^ u64::from(place)) ^ self.key.rotate_left(32) ^ block)
    }
}

/// The last steps of splitmix64 (Steele, Lea, Flood 2014).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_tell_exchanged_blocks_and_shared_ones() {
        let held = |entries: &[(u32, u64)]| {
            let mut places = Places::new(7, 2, 16);
            entries.iter().for_each(|&(place, block)| places.add(place, block));
            (places.held(0), places.held(1))
        };
        let right = held(&[(16, 5), (17, 6), (40, 7)]);
        assert_eq!(right, held(&[(17, 6), (40, 7), (16, 5)]));
        assert_ne!(right.0, held(&[(16, 6), (17, 5), (40, 7)]).0);
        assert_ne!(right.0, held(&[(16, 5), (16, 6), (40, 7)]).0);
        assert_eq!(right.1.blocks, 1);
    }
}
