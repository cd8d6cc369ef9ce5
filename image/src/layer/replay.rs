//! Follows the log from a checkpoint: which records are believed.
//!
//! A record is believed when its index block is whole, belongs to this layer, carries the nonce
//! in force, follows the record before it in number and chain, and every data block has the
//! checksum that the index states. The first place where one of these fails is the end of the
//! log: what lies beyond was never reported durable (docs/format-layer.md, "Recovery").

use super::header::Header;
use super::layout::{FIRST_SEGMENT_BLOCK, size_max};
use super::load::Reader;
use super::record::{DATA_BLOCKS_MAX, Index, Run};
use super::segments::Segments;
use super::slot::LogPosition;
use super::tuning::{Tuning, breaks};
use crate::error::ImageError;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Bytes read ahead along the log.
const WINDOW_BYTES: u64 = 1 << 20;

/// A record that is believed.
pub(super) struct Replayed {
    /// Its runs and the place of each one's first data block.
    pub(super) runs: Vec<(Run, u32)>,
    /// The position after it.
    pub(super) end: LogPosition,
}

/// Walks along the log.
pub(super) struct Replay<'a, E: Engine> {
    reader: &'a Reader<'a, E>,
    header: &'a Header,
    tuning: &'a Tuning,
    segments_max: u32,
    /// Where the largest disk ends that this layer can hold.
    disk_end_max: u64,
    /// After the last record that was believed.
    pub(super) position: LogPosition,
    /// Bytes of the file from `window_at`.
    window: AlignedBuf,
    window_at: u64,
}

impl<'a, E: Engine> Replay<'a, E> {
    /// A walk that begins at `position`.
    pub(super) fn new(
        reader: &'a Reader<'a, E>,
        header: &'a Header,
        tuning: &'a Tuning,
        position: LogPosition,
    ) -> Self {
        let segments_max = Segments::count_max(header.segment_blocks);
        let disk_end_max = size_max(header.segment_blocks);
        let window = AlignedBuf::zeroed(0);
        Self { reader, header, tuning, segments_max, disk_end_max, position, window, window_at: 0 }
    }

    /// The next record, or `None` at the end of the log.
    pub(super) async fn next(&mut self) -> Result<Option<Replayed>, ImageError> {
        let LogPosition { segment, block, next_segment, .. } = self.position;
        // Where a record would have fitted it may have been written, or not: its length decided.
        for (segment, block) in [(segment, block), (next_segment, 0)] {
            if block < self.header.segment_blocks
                && let Some(found) = self.try_at(segment, block).await?
            {
                self.position = found.end;
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn try_at(&mut self, segment: u32, block: u32) -> Result<Option<Replayed>, ImageError> {
        if segment >= self.segments_max {
            return Ok(None);
        }
        let place = FIRST_SEGMENT_BLOCK + segment * self.header.segment_blocks + block;
        let offset = u64::from(place) * BLOCK_SIZE;
        let Ok((index, chain)) = Index::decode(self.bytes(offset, BLOCK_SIZE).await?) else {
            return Ok(None);
        };
        if !self.follows(&index, segment, block) {
            return Ok(None);
        }
        let data = self.bytes(offset + BLOCK_SIZE, u64::from(index.data_blocks) * BLOCK_SIZE).await?;
        let sums = data.chunks_exact(BLOCK_BYTES).map(crc32fast::hash);
        let whole = index.checksums.iter().copied().eq(sums.take(index.checksums.len()));
        if !whole && !breaks!(self.tuning, RecoveryIgnoresData) {
            return Ok(None);
        }
        let mut end = LogPosition {
            segment,
            block: block + 1 + index.data_blocks,
            next_segment: index.next_segment,
            sequence: index.sequence,
            chain,
            nonce: index.nonce,
        };
        let mut next_place = place + 1;
        let mut runs = Vec::with_capacity(index.runs.len());
        for run in index.runs {
            if let Run::CheckpointEnd { nonce, .. } = run {
                end.nonce = nonce;
            }
            runs.push((run, next_place));
            next_place += run.data_blocks();
        }
        Ok(Some(Replayed { runs, end }))
    }

    /// Whether an index block that is whole is that of the next record.
    fn follows(&self, index: &Index, segment: u32, block: u32) -> bool {
        // All records of a segment agree on where the log goes on after it, and it is elsewhere.
        let goes_on = match segment == self.position.segment {
            true => index.next_segment == self.position.next_segment,
            false => index.next_segment != segment,
        };
        let chained = index.nonce == self.position.nonce && index.previous == self.position.chain;
        index.layer_id == self.header.layer_id
            && index.sequence == self.position.sequence + 1
            && (chained || breaks!(self.tuning, RecoveryIgnoresChain))
            && goes_on
            && index.next_segment < self.segments_max
            && index.runs.iter().all(|run| run.disk_end() <= self.disk_end_max)
            && block + 1 + index.data_blocks <= self.header.segment_blocks
    }

    /// Bytes of the file, from the window or a new one that starts there.
    async fn bytes(&mut self, offset: u64, len: u64) -> Result<&[u8], ImageError> {
        assert!(len <= u64::from(DATA_BLOCKS_MAX) * BLOCK_SIZE);
        let window_end = self.window_at + self.window.len() as u64;
        if offset < self.window_at || offset + len > window_end {
            self.window = self.reader.read(offset, WINDOW_BYTES).await?;
            self.window_at = offset;
        }
        let start = (offset - self.window_at) as usize;
        Ok(&self.window[start..start + len as usize])
    }
}
