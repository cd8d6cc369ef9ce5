//! Extents: what a range of a disk holds, without reading it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored bytes, which may happen to be zero.
    Data,
    /// Stored bytes that have to be decompressed.
    Compressed,
    /// Known to read as zeroes without reading: a hole of a raw file, zeroed blocks of a layer.
    Zero,
    /// No file of the chain says anything about it: reads as zeroes.
    Absent,
}

/// A stretch of a disk whose bytes are all of one kind and come from one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes, above zero.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
    /// How many files down the answer comes from: 0 is the file that was opened.
    pub depth: u32,
    /// Where in `file` the bytes lie, if they lie there as they are, in this order.
    pub offset: Option<u64>,
    /// The file that answers; `None` when no file does ([`ExtentKind::Absent`]).
    pub file: Option<Arc<Path>>,
}

impl Extent {
    /// The bytes of the disk that this describes.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }

    /// Appends `next` to `extents`, joined to the last one when it goes on where that ends.
    ///
    /// # Panics
    /// If `next` does not start where the last one ends: extents have no gaps.
    pub fn push_to(extents: &mut Vec<Self>, next: Self) {
        if let Some(last) = extents.last_mut() {
            assert_eq!(last.start + last.len, next.start, "extents have no gaps");
            if last.goes_on_in(&next) {
                last.len += next.len;
                return;
            }
        }
        extents.push(next);
    }

    fn goes_on_in(&self, next: &Self) -> bool {
        self.kind == next.kind
            && self.depth == next.depth
            && self.file == next.file
            && self.offset.map(|offset| offset + self.len) == next.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join_when_the_file_goes_on() {
        let extent = |start, offset| Extent {
            start,
            len: 10,
            kind: ExtentKind::Data,
            depth: 0,
            offset: Some(offset),
            file: None,
        };
        let mut extents = Vec::new();
        for next in [extent(0, 100), extent(10, 110), extent(20, 200)] {
            Extent::push_to(&mut extents, next);
        }
        assert_eq!(extents.iter().map(Extent::range).collect::<Vec<_>>(), [0..20, 20..30]);
    }
}
