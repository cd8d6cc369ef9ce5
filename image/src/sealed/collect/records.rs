//! The records of one pack in rising order, in large reads, each byte once.

use std::ops::Range;
use std::sync::Arc;

use super::pace::Pace;
use crate::error::ImageError;
use crate::sealed::pack::Pack;
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
    chunk: Vec<u8>,
    /// Where the chunk lies in the pack.
    range: Range<u64>,
    /// Bytes read so far.
    pub(super) bytes_read: u64,
}

impl<E: Engine> Records<E> {
    pub(super) fn new(io: &Io<E>, pack: &Pack<E::File>, pace: &Arc<Pace>) -> Self {
        let (io, pack, pace) = (io.clone(), pack.clone(), Arc::clone(pace));
        Self { io, pack, pace, chunk: Vec::new(), range: 0..0, bytes_read: 0 }
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
            self.keep_from(start);
            let most = least.max((start + CHUNK_LEN).min(records_end));
            if self.read_to(most).await.is_err() {
                // One bad sector must not take its neighbours along.
                self.read_to(least).await?;
            }
        }
        let from = (offset - self.range.start) as usize;
        Ok(&self.chunk[from..from + (end - offset) as usize])
    }

    /// Forgets what lies before a byte, and everything when that byte was not read.
    fn keep_from(&mut self, start: u64) {
        if (self.range.start..self.range.end).contains(&start) {
            self.chunk.drain(..(start - self.range.start) as usize);
            self.range.start = start;
        } else {
            self.chunk.clear();
            self.range = start..start;
        }
    }

    async fn read_to(&mut self, end: u64) -> Result<(), ImageError> {
        let range = self.range.end..end;
        self.pace.spend(&self.io, range.end - range.start).await;
        let bytes = self.pack.read_blocks(&self.io, range.clone()).await?;
        self.chunk.extend(&bytes[..]);
        self.bytes_read += range.end - range.start;
        self.range.end = end;
        Ok(())
    }
}
