//! The records of one pack in rising order, in large reads.

use std::ops::Range;
use std::sync::Arc;

use super::pace::Pace;
use crate::error::ImageError;
use crate::sealed::pack::Pack;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Bytes read at a time.
const CHUNK_LEN: u64 = 1 << 20;

/// See the module's documentation.
pub(super) struct Records<E: Engine> {
    io: Io<E>,
    pack: Pack<E::File>,
    pace: Arc<Pace>,
    chunk: AlignedBuf,
    /// Where the chunk lies in the pack.
    range: Range<u64>,
    /// Bytes read so far.
    pub(super) bytes_read: u64,
}

impl<E: Engine> Records<E> {
    pub(super) fn new(io: &Io<E>, pack: &Pack<E::File>, pace: &Arc<Pace>) -> Self {
        let (io, pack, pace) = (io.clone(), pack.clone(), Arc::clone(pace));
        Self { io, pack, pace, chunk: AlignedBuf::zeroed(0), range: 0..0, bytes_read: 0 }
    }

    /// Up to `len` bytes from byte `offset` of the pack, as far as there are records.
    pub(super) async fn at(&mut self, offset: u64, len: usize) -> Result<&[u8], ImageError> {
        let records_end = self.pack.records_end();
        let end = (offset + len as u64).min(records_end);
        if offset >= end {
            return Err(self.pack.damaged("record", offset, &"there are no records"));
        }
        if offset < self.range.start || end > self.range.end {
            let start = offset / BLOCK_SIZE * BLOCK_SIZE;
            let least = end.next_multiple_of(BLOCK_SIZE);
            let most = least.max((start + CHUNK_LEN).min(records_end));
            if self.read(start..most).await.is_err() {
                // One bad sector must not take its neighbours along.
                self.read(start..least).await?;
            }
        }
        let from = (offset - self.range.start) as usize;
        Ok(&self.chunk[from..from + (end - offset) as usize])
    }

    async fn read(&mut self, range: Range<u64>) -> Result<(), ImageError> {
        self.range = 0..0;
        let len = range.end - range.start;
        self.pace.spend(&self.io, len).await;
        self.chunk = self.pack.read_blocks(&self.io, range.clone()).await?;
        self.bytes_read += len;
        self.range = range;
        Ok(())
    }
}
