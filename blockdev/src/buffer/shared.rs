//! Memory that somebody else may change while we look at it.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::AlignedBuf;

/// A window of memory shared with a guest (or with nobody, see [`SharedBuf::heap`]).
///
/// Its bytes are only ever copied in or out through raw pointers, never borrowed, because the
/// guest may write them at any time. The window keeps its mapping alive for as long as it, or
/// an operation that it was lent to, exists.
#[derive(Clone)]
pub struct SharedBuf {
    start: NonNull<u8>,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is accessed through raw pointer copies only, and `owner` keeps it mapped.
unsafe impl Send for SharedBuf {}
// SAFETY: as above; concurrent copies may see torn values, which callers must expect.
unsafe impl Sync for SharedBuf {}

impl SharedBuf {
    /// A window of `len` bytes at `start` that stays mapped readable and writable while `owner`
    /// lives.
    ///
    /// # Safety
    /// `start` must be valid for reads and writes of `len` bytes until the last clone of `owner`
    /// is dropped, and no Rust reference may point into it.
    pub unsafe fn from_raw(start: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { start, len, owner }
    }

    /// A window over fresh zeroed memory, aligned as [`AlignedBuf`] is: for command-line tools
    /// and tests.
    pub fn heap(len: usize) -> Self {
        Self::from(AlignedBuf::zeroed(len))
    }

    /// The buffer that this was made from, when nobody else has a window on it any more.
    ///
    /// # Errors
    /// The window itself, when somebody has, or when it is a part only or of other memory.
    pub fn into_buf(self) -> Result<AlignedBuf, Self> {
        let Self { start, len, owner } = self;
        let owner = match owner.downcast::<AlignedBuf>() {
            Ok(owner) if owner.address() == start.as_ptr() && owner.len() == len => owner,
            Ok(owner) => return Err(Self { start, len, owner }),
            Err(owner) => return Err(Self { start, len, owner }),
        };
        Arc::try_unwrap(owner).map_err(|owner| Self { start, len, owner })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the first byte, for the kernel and for alignment checks.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The part `range` of this window.
    ///
    /// # Panics
    /// If the range does not lie inside the window.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {}", self.len);
        // SAFETY: the offset lies inside the allocation, or one past its end.
        let start = unsafe { self.start.add(range.start) };
        Self { start, len: range.end - range.start, owner: Arc::clone(&self.owner) }
    }

    /// Copies bytes from `offset` of the window into `to`.
    ///
    /// # Panics
    /// If the bytes do not lie inside the window.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) {
        self.check(offset, to.len());
        // SAFETY: checked above; `to` is ours and cannot overlap memory nobody borrows.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr().add(offset), to.as_mut_ptr(), to.len()) }
    }

    /// Copies `from` into the window at `offset`.
    ///
    /// # Panics
    /// If the bytes do not lie inside the window.
    pub fn write_at(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: checked above; `from` is borrowed memory, which the window never is.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr().add(offset), from.len()) }
    }

    /// Sets `len` bytes from `offset` to zero.
    ///
    /// # Panics
    /// If the bytes do not lie inside the window.
    pub fn zero_at(&self, offset: usize, len: usize) {
        self.check(offset, len);
        // SAFETY: checked above.
        unsafe { ptr::write_bytes(self.start.as_ptr().add(offset), 0, len) }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a window of {}",
            self.len
        );
    }
}

impl From<AlignedBuf> for SharedBuf {
    /// A window over all of a buffer.
    fn from(mut buf: AlignedBuf) -> Self {
        let start = NonNull::from(&mut buf[..]).cast();
        let len = buf.len();
        // SAFETY: the buffer moves into the owner; its heap memory stays where it is, and
        // nothing else can reach it there.
        unsafe { Self::from_raw(start, len, Arc::new(buf)) }
    }
}

impl fmt::Debug for SharedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBuf").field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_from_its_only_window() {
        let shared = SharedBuf::from(AlignedBuf::from_slice(b"abcd"));
        let part = shared.slice(1..3);
        let shared = shared.into_buf().expect_err("somebody has a part of it");
        shared.write_at(1, b"BC");
        assert!(part.into_buf().is_err(), "a part");
        assert_eq!(&shared.into_buf().expect("the only window")[..], b"aBCd");
        let first = SharedBuf::heap(4).slice(0..2);
        assert!(first.into_buf().is_err(), "a part, and the only window");
    }
}
