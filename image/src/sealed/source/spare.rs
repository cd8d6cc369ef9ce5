//! Buffers of segments that are used again.

use sapwood_blockdev::buffer::{AlignedBuf, SharedBuf};

use super::SourceBytes;
use crate::sealed::seal::SEGMENT_BLOCKS;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Bytes of a segment, and of each buffer.
const SEGMENT_BYTES: usize = (SEGMENT_BLOCKS * BLOCK_SIZE) as usize;
/// Buffers kept for the next reads.
const SPARE: usize = 4;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Spare(Vec<AlignedBuf>);

impl Spare {
    /// A buffer of so many bytes or more.
    pub(super) fn take(&mut self, bytes: usize) -> SharedBuf {
        let spare = self.0.pop().filter(|buffer| buffer.len() >= bytes);
        spare.unwrap_or_else(|| AlignedBuf::zeroed(bytes.max(SEGMENT_BYTES))).into()
    }

    /// Keeps a buffer that nobody needs.
    pub(super) fn keep(&mut self, buffer: Option<AlignedBuf>) {
        self.0.extend(buffer.filter(|_| self.0.len() < SPARE));
    }
}

/// The first `len` bytes of a buffer that was read into.
pub(super) fn bytes_of(buffer: SharedBuf, len: usize) -> SourceBytes {
    match buffer.into_buf() {
        Ok(buffer) => SourceBytes::of_buffer(buffer, len),
        Err(shared) => {
            let mut copy = vec![0; len];
            shared.read_at(0, &mut copy);
            copy.into()
        }
    }
}
