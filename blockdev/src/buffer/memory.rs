//! The scatter list of one operation.

use smallvec::SmallVec;

use super::{AlignedBuf, SharedBuf};

/// One stretch of memory in a [`Memory`].
#[derive(Debug)]
pub enum Piece {
    /// Memory of our own.
    Owned(AlignedBuf),
    /// Memory that a guest sees too.
    Shared(SharedBuf),
}

/// The memory of one read or write, in order. Up to two pieces need no allocation.
#[derive(Debug, Default)]
pub struct Memory {
    pieces: SmallVec<[Piece; 2]>,
    len: usize,
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(buf) => buf.len(),
            Self::Shared(buf) => buf.len(),
        }
    }

    /// Whether the piece has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first byte, for the kernel and for alignment checks.
    pub fn address(&self) -> *mut u8 {
        match self {
            Self::Owned(buf) => buf.address(),
            Self::Shared(buf) => buf.address(),
        }
    }
}

impl From<AlignedBuf> for Memory {
    fn from(buf: AlignedBuf) -> Self {
        let mut memory = Self::default();
        memory.push(Piece::Owned(buf));
        memory
    }
}

impl From<SharedBuf> for Memory {
    fn from(buf: SharedBuf) -> Self {
        let mut memory = Self::default();
        memory.push(Piece::Shared(buf));
        memory
    }
}

impl Memory {
    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: Piece) {
        self.len += piece.len();
        self.pieces.push(piece);
    }

    /// The pieces in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The owned buffers among the pieces, in order: how a staging buffer comes back.
    pub fn into_owned(self) -> impl Iterator<Item = AlignedBuf> {
        self.pieces.into_iter().filter_map(|piece| match piece {
            Piece::Owned(buf) => Some(buf),
            Piece::Shared(_) => None,
        })
    }

    /// The single owned buffer this memory was made from.
    ///
    /// # Panics
    /// If it is not exactly one owned piece.
    pub fn into_buf(self) -> AlignedBuf {
        let mut bufs = self.into_owned();
        let buf = bufs.next().expect("one owned piece");
        assert!(bufs.next().is_none(), "one owned piece");
        buf
    }

    /// Whether every piece starts and ends on a multiple of `alignment` bytes (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.pieces.iter().all(|piece| (piece.address().addr() | piece.len()) & mask == 0)
    }

    /// A view of `len` shared bytes from `offset`, for an operation on a part of a request.
    ///
    /// # Panics
    /// If the range lies outside, or touches an owned piece (which has one owner only).
    #[must_use]
    pub fn share(&self, offset: usize, len: usize) -> Self {
        let mut part = Self::default();
        self.for_each(offset, len, |piece, at, n, _| match piece {
            Piece::Shared(buf) => part.push(Piece::Shared(buf.slice(at..at + n))),
            Piece::Owned(_) => panic!("an owned buffer cannot be shared"),
        });
        part
    }

    /// Copies bytes from `offset` into `to`.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) {
        self.for_each(offset, to.len(), |piece, at, n, done| match piece {
            Piece::Owned(buf) => to[done..done + n].copy_from_slice(&buf[at..at + n]),
            Piece::Shared(buf) => buf.read_at(at, &mut to[done..done + n]),
        });
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn write_at(&mut self, offset: usize, from: &[u8]) {
        self.for_each_mut(offset, from.len(), |piece, at, n, done| match piece {
            Piece::Owned(buf) => buf[at..at + n].copy_from_slice(&from[done..done + n]),
            Piece::Shared(buf) => buf.write_at(at, &from[done..done + n]),
        });
    }

    /// Sets `len` bytes from `offset` to zero.
    ///
    /// # Panics
    /// If the range lies outside.
    pub fn zero_at(&mut self, offset: usize, len: usize) {
        self.for_each_mut(offset, len, |piece, at, n, _| match piece {
            Piece::Owned(buf) => buf[at..at + n].fill(0),
            Piece::Shared(buf) => buf.zero_at(at, n),
        });
    }

    /// Calls `f(piece, start in piece, length, bytes done before)` over a byte range.
    fn for_each(&self, offset: usize, len: usize, mut f: impl FnMut(&Piece, usize, usize, usize)) {
        self.check(offset, len);
        let (mut skip, mut done) = (offset, 0);
        for piece in &self.pieces {
            let n = piece.len().saturating_sub(skip).min(len - done);
            if n > 0 {
                f(piece, skip, n, done);
                done += n;
            }
            skip = skip.saturating_sub(piece.len());
        }
    }

    fn for_each_mut(
        &mut self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(&mut Piece, usize, usize, usize),
    ) {
        self.check(offset, len);
        let (mut skip, mut done) = (offset, 0);
        for piece in &mut self.pieces {
            let n = piece.len().saturating_sub(skip).min(len - done);
            if n > 0 {
                f(piece, skip, n, done);
                done += n;
            }
            skip = skip.saturating_sub(piece.len());
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset, "{len} bytes at {offset} of {}", self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_pieces() {
        let mut memory = Memory::from(AlignedBuf::from_slice(b"abcd"));
        memory.push(Piece::Shared(SharedBuf::heap(4)));
        memory.write_at(3, b"XYZ");
        let mut out = [0; 6];
        memory.read_at(1, &mut out);
        assert_eq!(&out, b"bcXYZ\0");
        memory.zero_at(2, 2);
        memory.read_at(0, &mut out);
        assert_eq!(&out, b"ab\0\0YZ");
        let part = memory.share(5, 2);
        let mut two = [0; 2];
        part.read_at(0, &mut two);
        assert_eq!(&two, b"Z\0");
    }

    #[test]
    #[should_panic(expected = "5 bytes at 4 of 8")]
    fn range_outside_is_refused() {
        Memory::from(AlignedBuf::zeroed(8)).read_at(4, &mut [0; 5]);
    }

    #[test]
    fn alignment_looks_at_address_and_length() {
        assert!(Memory::from(SharedBuf::heap(8192)).is_aligned(4096));
        assert!(!Memory::from(SharedBuf::heap(8192).slice(512..1024)).is_aligned(4096));
        assert!(Memory::from(SharedBuf::heap(8192).slice(512..1024)).is_aligned(512));
    }
}
