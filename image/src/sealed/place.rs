//! Where a block or node may be found.

use std::fmt;

/// A pack is no longer than this, in bytes.
pub const PACK_BYTES_MAX: u64 = 1 << (OFFSET_BITS + OFFSET_SHIFT);

/// Offsets of records are multiples of this power of two.
const OFFSET_SHIFT: u32 = 5;
const OFFSET_BITS: u32 = 23;
/// Lengths of records are counted in units of this power of two, rounded up.
const LEN_SHIFT: u32 = 10;
const LEN_BITS: u32 = 8;
const INDEX_BITS: u32 = 5;
const PACK_BITS: u32 = 28;
const _: () = assert!(OFFSET_BITS + LEN_BITS + INDEX_BITS + PACK_BITS == u64::BITS);

const INDEX_AT: u32 = LEN_BITS;
const OFFSET_AT: u32 = INDEX_AT + INDEX_BITS;
const PACK_AT: u32 = OFFSET_AT + OFFSET_BITS;

/// Records start at multiples of this, in bytes.
pub(super) const RECORD_ALIGNMENT: usize = 1 << OFFSET_SHIFT;

/// Which pack, which record in it, and which block of the record: 8 bytes. It is a hint: what is there counts
/// when it has the hash that was asked for.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(u64);

impl Place {
    /// Nowhere that is known.
    pub const NONE: Self = Self(0);
    /// The largest number of a pack. They begin with 1.
    pub const PACK_MAX: u32 = (1 << PACK_BITS) - 1;
    /// The longest record in bytes.
    pub const LEN_MAX: usize = ((1 << LEN_BITS) - 1) << LEN_SHIFT;

    /// Block `index` of the record of `len` bytes that starts at byte `offset` of a pack.
    ///
    /// # Panics
    /// When there can be no such place: whoever makes records keeps to the bounds.
    pub fn new(pack: u32, offset: u64, len: usize, index: usize) -> Self {
        assert!(pack > 0 && pack <= Self::PACK_MAX, "packs have numbers from 1 on");
        assert!(
            offset.is_multiple_of(RECORD_ALIGNMENT as u64) && offset < PACK_BYTES_MAX,
            "offset of a record"
        );
        assert!(len > 0 && len <= Self::LEN_MAX && index < 1 << INDEX_BITS, "bounds of a record");
        let units = len.div_ceil(1 << LEN_SHIFT) as u64;
        Self(
            u64::from(pack) << PACK_AT
                | (offset >> OFFSET_SHIFT) << OFFSET_AT
                | (index as u64) << INDEX_AT
                | units,
        )
    }

    /// The stored form.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// From the stored form: any bits are a place, if maybe one where nothing is.
    pub fn from_bits(bits: u64) -> Self {
        if bits >> PACK_AT == 0 || bits & ((1 << LEN_BITS) - 1) == 0 { Self::NONE } else { Self(bits) }
    }

    /// Whether it says nothing.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// The number of the pack.
    pub fn pack(self) -> u32 {
        (self.0 >> PACK_AT) as u32
    }

    /// The first byte of the record in the pack.
    pub fn offset(self) -> u64 {
        (self.0 >> OFFSET_AT & ((1 << OFFSET_BITS) - 1)) << OFFSET_SHIFT
    }

    /// Bytes from there that hold the whole record: its length, rounded up.
    pub fn read_len(self) -> usize {
        ((self.0 & ((1 << LEN_BITS) - 1)) as usize) << LEN_SHIFT
    }

    /// Which block of the record.
    pub fn index(self) -> usize {
        (self.0 >> INDEX_AT & ((1 << INDEX_BITS) - 1)) as usize
    }

    /// The same record's block with another index.
    #[must_use]
    pub fn with_index(self, index: usize) -> Self {
        assert!(index < 1 << INDEX_BITS, "bounds of a record");
        Self(self.0 & !(((1 << INDEX_BITS) - 1) << INDEX_AT) | (index as u64) << INDEX_AT)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({}:{:#x}+{}[{}])", self.pack(), self.offset(), self.read_len(), self.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_says_what_it_was_made_of() {
        let last = PACK_BYTES_MAX - RECORD_ALIGNMENT as u64;
        for (pack, offset, len, index) in
            [(1, 4096, 1, 0), (Place::PACK_MAX, last, Place::LEN_MAX, 31), (77, 32, 1025, 5)]
        {
            let place = Place::from_bits(Place::new(pack, offset, len, index).to_bits());
            assert_eq!((place.pack(), place.offset(), place.index()), (pack, offset, index));
            assert!(place.read_len() >= len && place.read_len() < len + 1024);
            assert_eq!(place.with_index(3).index(), 3);
            assert_eq!(place.with_index(index), place);
        }
        assert!(Place::from_bits(7).is_none(), "no pack");
        assert!(Place::from_bits(1 << PACK_AT).is_none(), "no length");
    }
}
