//! Units: guest and file addresses never mix.

use std::fmt;
use std::ops::Range;

/// Bytes in a sector, the unit of virtio-blk requests (virtio 1.2, section 5.2).
pub const SECTOR_SIZE: u64 = 512;

/// Bytes in a block, the unit in which layers map, checksum and deduplicate.
pub const BLOCK_SIZE: u64 = 4096;

/// [`BLOCK_SIZE`] as a memory length.
pub const BLOCK_BYTES: usize = BLOCK_SIZE as usize;

/// A byte address on a guest-visible disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A block number on a guest-visible disk: the byte address divided by [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestBlock(pub u64);

/// A byte address in a host file or host block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileOffset(pub u64);

impl GuestOffset {
    /// The block that holds this byte.
    pub const fn block(self) -> GuestBlock {
        GuestBlock(self.0 / BLOCK_SIZE)
    }

    /// Bytes between the start of the block and this address: 0 to 4095.
    pub const fn in_block(self) -> usize {
        (self.0 % BLOCK_SIZE) as usize
    }
}

impl GuestBlock {
    /// The address of the block's first byte.
    ///
    /// # Panics
    /// If the block lies beyond 2^64 bytes.
    pub const fn offset(self) -> GuestOffset {
        GuestOffset(self.0 * BLOCK_SIZE)
    }
}

/// The blocks that a byte range touches, split into the whole ones and the cut edges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSpan {
    /// Every block touched, whole or in part.
    pub touched: Range<u64>,
    /// The blocks that lie entirely inside the range (may be empty).
    pub whole: Range<u64>,
}

impl BlockSpan {
    /// The span of `len` bytes from `start`.
    ///
    /// # Panics
    /// If `start + len` exceeds 2^64 bytes: ranges are checked against the disk size before.
    pub fn of(start: GuestOffset, len: u64) -> Self {
        let end = start.0.checked_add(len).expect("a range inside the disk");
        let touched = start.0 / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE);
        let whole_start = start.0.div_ceil(BLOCK_SIZE);
        let whole = whole_start..(end / BLOCK_SIZE).max(whole_start);
        Self { touched, whole }
    }

    /// The blocks that the range covers in part: none, one or two, in order.
    pub fn cut(&self) -> Vec<u64> {
        let (first, last) = (self.touched.start, self.touched.end.saturating_sub(1));
        let edges = if first == last { vec![first] } else { vec![first, last] };
        edges.into_iter().filter(|b| self.touched.contains(b) && !self.whole.contains(b)).collect()
    }

    /// Whether both edges fall on block boundaries.
    pub fn is_aligned(&self) -> bool {
        self.touched == self.whole
    }
}

impl FileOffset {
    /// This address moved up by `bytes`.
    ///
    /// # Panics
    /// If the sum exceeds 2^64.
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

macro_rules! display {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display!(GuestOffset, GuestBlock, FileOffset);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_splits_edges() {
        let span = BlockSpan::of(GuestOffset(4095), 4098);
        assert_eq!((span.cut(), span.touched, span.whole), (vec![0, 2], 0..3, 1..2));
        let inside = BlockSpan::of(GuestOffset(512), 512);
        assert_eq!(inside.touched, 0..1);
        assert!(inside.whole.is_empty());
        assert!(BlockSpan::of(GuestOffset(8192), 4096).is_aligned());
        assert!(BlockSpan::of(GuestOffset(8192), 0).whole.is_empty());
    }
}
