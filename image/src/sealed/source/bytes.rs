//! What was read of a source.

use std::fmt;
use std::ops::{Deref, DerefMut};

use sapwood_blockdev::buffer::AlignedBuf;

/// Bytes of blocks, in memory of either kind.
pub struct SourceBytes(Kind);

enum Kind {
    List(Vec<u8>),
    /// The start of a buffer.
    Buffer(AlignedBuf, usize),
}

impl SourceBytes {
    /// The first `len` bytes of a buffer.
    ///
    /// # Panics
    /// When it is shorter.
    pub fn of_buffer(buffer: AlignedBuf, len: usize) -> Self {
        assert!(len <= buffer.len(), "bytes of the buffer");
        Self(Kind::Buffer(buffer, len))
    }

    /// The buffer, if there is one.
    pub fn into_buffer(self) -> Option<AlignedBuf> {
        match self.0 {
            Kind::Buffer(buffer, _) => Some(buffer),
            Kind::List(_) => None,
        }
    }

    /// These bytes and then others.
    pub(in crate::sealed) fn and(self, more: &[u8]) -> Self {
        match self.0 {
            _ if more.is_empty() => self,
            Kind::List(mut list) => {
                list.extend_from_slice(more);
                list.into()
            }
            Kind::Buffer(..) => [&self[..], more].concat().into(),
        }
    }
}

impl From<Vec<u8>> for SourceBytes {
    fn from(list: Vec<u8>) -> Self {
        Self(Kind::List(list))
    }
}

impl Deref for SourceBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Kind::List(list) => list,
            Kind::Buffer(buffer, len) => &buffer[..*len],
        }
    }
}

impl DerefMut for SourceBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Kind::List(list) => list,
            Kind::Buffer(buffer, len) => &mut buffer[..*len],
        }
    }
}

impl fmt::Debug for SourceBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceBytes").field("len", &self.len()).finish()
    }
}
