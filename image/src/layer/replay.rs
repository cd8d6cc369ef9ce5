//! Follows the log from a checkpoint: which records are believed.
//!
//! A record is believed when its index block is whole, belongs to this layer, carries the nonce
//! in force, follows the record before it in number and chain, and every data block has the
//! checksum that the index states. The first place where one of these fails is the end of the
//! log: what lies beyond was never reported durable (docs/format-layer.md, "Recovery").

use super::header::Header;
use super::layout::{FIRST_SEGMENT_BLOCK, size_max};
use super::load::Reader;
use super::position::{Advance, LANES, Lane, LogPosition};
use super::record::{DATA_BLOCKS_MAX, Index, Run};
use super::segments::Segments;
use super::tuning::{Tuning, breaks};
use crate::error::ImageError;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Bytes read ahead along each lane of the log.
const WINDOW_BYTES: u64 = 1 << 20;

/// A record that is believed.
pub(super) struct Replayed {
    /// Its runs and the place of each one's first data block.
    pub(super) runs: Vec<(Run, u32)>,
    /// How it moves the position on.
    pub(super) end: Advance,
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
    /// Bytes that are read at least.
    ahead: u64,
    /// What was read ahead along each lane.
    windows: [Window; LANES],
}

/// Bytes of the file from `at`.
struct Window {
    bytes: AlignedBuf,
    at: u64,
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
        let windows = std::array::from_fn(|_| Window { bytes: AlignedBuf::zeroed(0), at: 0 });
        let ahead = WINDOW_BYTES;
        Self { reader, header, tuning, segments_max, disk_end_max, position, ahead, windows }
    }

    /// The same where the log has most likely ended: nothing is read ahead until a record is found.
    pub(super) fn expecting_its_end(self) -> Self {
        Self { ahead: 0, ..self }
    }

    /// The next record, or `None` at the end of the log.
    pub(super) async fn next(&mut self) -> Result<Option<Replayed>, ImageError> {
        // Where a record would have fitted it may have been written, or not: its length decided.
        let here = self.position.lanes().map(|(number, lane)| (number, lane.segment, lane.block));
        let next = self.position.lanes().map(|(number, lane)| (number, lane.next_segment, 0));
        for (number, segment, block) in here.chain(next) {
            if block < self.header.segment_blocks
                && let Some(found) = self.try_at(number, segment, block).await?
            {
                self.ahead = WINDOW_BYTES;
                self.position.advance(&found.end);
                self.position.follow(&found.runs);
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn try_at(
        &mut self,
        number: usize,
        segment: u32,
        block: u32,
    ) -> Result<Option<Replayed>, ImageError> {
        if segment >= self.segments_max {
            return Ok(None);
        }
        let place = FIRST_SEGMENT_BLOCK + segment * self.header.segment_blocks + block;
        let offset = u64::from(place) * BLOCK_SIZE;
        let Ok((index, chain)) = Index::decode(self.bytes(number, offset, BLOCK_SIZE).await?) else {
            return Ok(None);
        };
        if !self.follows(&index, number, segment, block) {
            return Ok(None);
        }
        let data = self.bytes(number, offset + BLOCK_SIZE, u64::from(index.data_blocks) * BLOCK_SIZE).await?;
        let sums = data.chunks_exact(BLOCK_BYTES).map(crc32fast::hash);
        let whole = index.checksums.iter().copied().eq(sums.take(index.checksums.len()));
        if !whole && !breaks!(self.tuning, RecoveryIgnoresData) {
            return Ok(None);
        }
        let next_segment = index.next_segment;
        let mut end = Advance {
            number,
            lane: Lane { segment, block: block + 1 + index.data_blocks, next_segment },
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
    fn follows(&self, index: &Index, number: usize, segment: u32, block: u32) -> bool {
        // All records of a segment agree on where the log goes on after it, and it is elsewhere.
        let goes_on = self.position.lane(number).is_some_and(|lane| match segment == lane.segment {
            true => index.next_segment == lane.next_segment,
            false => index.next_segment != segment,
        });
        let chained = index.nonce == self.position.nonce && index.previous == self.position.chain;
        index.layer_id == self.header.layer_id
            && index.sequence == self.position.sequence + 1
            && (chained || breaks!(self.tuning, RecoveryIgnoresChain))
            && index.lane == number
            && goes_on
            && self.opens_lanes(&index.runs)
            && index.next_segment < self.segments_max
            && index.runs.iter().all(|run| run.disk_end() <= self.disk_end_max)
            && block + 1 + index.data_blocks <= self.header.segment_blocks
    }

    /// Whether the lanes that a record opens can be opened.
    fn opens_lanes(&self, runs: &[Run]) -> bool {
        let mut position = self.position;
        runs.iter().all(|run| match *run {
            Run::Lane { number, lane } => {
                let can_open = position.can_open(number, lane)
                    && lane.segments().into_iter().all(|segment| segment < self.segments_max);
                if can_open {
                    position.open(number, lane);
                }
                can_open
            }
            _ => true,
        })
    }

    /// Bytes of the file along a lane, from its window or a new one that starts there.
    async fn bytes(&mut self, number: usize, offset: u64, len: u64) -> Result<&[u8], ImageError> {
        assert!(len <= u64::from(DATA_BLOCKS_MAX) * BLOCK_SIZE);
        let window = &mut self.windows[number];
        if offset < window.at || offset + len > window.at + window.bytes.len() as u64 {
            window.bytes = self.reader.read(offset, len.max(self.ahead)).await?;
            window.at = offset;
        }
        let start = (offset - window.at) as usize;
        Ok(&window.bytes[start..start + len as usize])
    }
}
