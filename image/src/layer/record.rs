//! Records: one sequential write each, an index block and the data blocks it describes.
//!
//! The index block holds the runs (which guest blocks, in order), a checksum of each data block,
//! and the chain that ties it to the record before it. It is encoded once, when the record gets
//! its place in the log, and believed on recovery only through [`Index::decode`].

use std::ops::Range;

use super::layout::{Damage, LayerId, SIZE_MAX, damage};
use super::node::Entry;
use super::position::{LANES, Lane};
use crate::bytes::{array, checksum, get_u16, get_u32, get_u64, put};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, SECTOR_SIZE};

const MAGIC: [u8; 8] = *b"SAPWRECD";
const R_LAYER_ID: usize = 8;
const R_NONCE: usize = R_LAYER_ID + 16;
const R_SEQUENCE: usize = R_NONCE + 8;
const R_PREVIOUS: usize = R_SEQUENCE + 8;
const R_STANDS_FOR: usize = R_PREVIOUS + 4;
const R_KIND: usize = R_STANDS_FOR + 4;
const R_LANE: usize = R_KIND + 2;
const R_DATA_BLOCKS: usize = R_LANE + 2;
const R_NEXT_SEGMENT: usize = R_DATA_BLOCKS + 4;
const R_RUN_COUNT: usize = R_NEXT_SEGMENT + 4;
const R_RUNS: usize = R_RUN_COUNT + 4;
const R_CHECKSUM: usize = BLOCK_BYTES - 4;

/// Bytes of one run: start (56 bits) and kind (8 bits), then an operand (64 bits).
const RUN_BYTES: usize = 16;
const SUM_BYTES: usize = 4;
/// Room for runs and checksums.
const INDEX_BYTES: usize = R_CHECKSUM - R_RUNS;
/// Most data blocks in a record: 1 MiB.
pub(super) const DATA_BLOCKS_MAX: u32 = 256;

const KIND_NORMAL: u16 = 0;
const KIND_VOID: u16 = 1;
const START_BITS: u32 = 56;
const START_MASK: u64 = (1 << START_BITS) - 1;

/// What one run of a record says. Runs take effect in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// `count` guest blocks from `start`; their contents are the record's next `count` data blocks.
    Data { start: u64, count: u32 },
    /// The guest blocks read as zeroes.
    Zero { start: u64, count: u32 },
    /// The guest blocks are no longer mapped: they read as what lies below.
    Absent { start: u64, count: u32 },
    /// The next `count` data blocks hold map nodes.
    Nodes { count: u32 },
    /// The disk has `bytes` bytes from here on.
    Size { bytes: u64 },
    /// Every node of checkpoint `generation` has been written; records after this one carry `nonce`.
    CheckpointEnd { generation: u64, nonce: u64 },
    /// The log has one lane more, in segments where nothing has been written yet.
    Lane { number: usize, lane: Lane },
    /// The log has its main lane only from here on.
    LanesClosed,
}

impl Run {
    /// Data blocks that belong to this run.
    pub(super) fn data_blocks(&self) -> u32 {
        match *self {
            Self::Data { count, .. } | Self::Nodes { count } => count,
            _ => 0,
        }
    }

    /// The run that gives blocks an entry, which is zero or absent.
    pub(super) fn uniform(blocks: Range<u64>, entry: Entry) -> Self {
        let (start, count) = (blocks.start, (blocks.end - blocks.start) as u32);
        if entry == Entry::ZERO { Self::Zero { start, count } } else { Self::Absent { start, count } }
    }

    /// What the run says of `count` of its guest blocks from `start`.
    pub(super) fn part(&self, start: u64, count: u32) -> Self {
        match self {
            Self::Data { .. } => Self::Data { start, count },
            Self::Zero { .. } => Self::Zero { start, count },
            Self::Absent { .. } => Self::Absent { start, count },
            other => *other,
        }
    }

    /// Whether it changes what the disk is, rather than how it is kept.
    pub(super) fn changes_disk(&self) -> bool {
        matches!(self, Self::Data { .. } | Self::Zero { .. } | Self::Absent { .. } | Self::Size { .. })
    }

    /// First byte of the disk behind everything that the run speaks of.
    pub(super) fn disk_end(&self) -> u64 {
        match *self {
            Self::Data { start, count } | Self::Zero { start, count } | Self::Absent { start, count } => {
                (start + u64::from(count)) * BLOCK_SIZE
            }
            Self::Size { bytes } => bytes,
            Self::Nodes { .. } | Self::CheckpointEnd { .. } | Self::Lane { .. } | Self::LanesClosed => 0,
        }
    }

    fn encode(&self, out: &mut [u8]) {
        let (kind, start, operand) = match *self {
            Self::Data { start, count } => (1u64, start, u64::from(count)),
            Self::Zero { start, count } => (2, start, u64::from(count)),
            Self::Absent { start, count } => (3, start, u64::from(count)),
            Self::Nodes { count } => (4, 0, u64::from(count)),
            Self::Size { bytes } => (5, bytes, 0),
            Self::CheckpointEnd { generation, nonce } => (6, generation, nonce),
            Self::Lane { number, lane } => {
                (7, number as u64, u64::from(lane.segment) | u64::from(lane.next_segment) << 32)
            }
            Self::LanesClosed => (8, 0, 0),
        };
        assert!(start <= START_MASK, "a run's start has 56 bits");
        put(out, 0, &(start | kind << START_BITS).to_le_bytes());
        put(out, 8, &operand.to_le_bytes());
    }

    fn decode(b: &[u8], at: usize) -> Result<Self, Damage> {
        let word = get_u64(b, at);
        let (kind, start, operand) = (word >> START_BITS, word & START_MASK, get_u64(b, at + 8));
        let blocks_max = SIZE_MAX / BLOCK_SIZE;
        let count = u32::try_from(operand).unwrap_or(0);
        let in_range = start <= blocks_max && u64::from(count) <= blocks_max - start && count > 0;
        match kind {
            1 if in_range => Ok(Self::Data { start, count }),
            2 if in_range => Ok(Self::Zero { start, count }),
            3 if in_range => Ok(Self::Absent { start, count }),
            4 if count > 0 => Ok(Self::Nodes { count }),
            5 if start <= SIZE_MAX && start.is_multiple_of(SECTOR_SIZE) => Ok(Self::Size { bytes: start }),
            6 => Ok(Self::CheckpointEnd { generation: start, nonce: operand }),
            7 if (1..LANES as u64).contains(&start) => {
                let lane = Lane { segment: operand as u32, block: 0, next_segment: (operand >> 32) as u32 };
                Ok(Self::Lane { number: start as usize, lane })
            }
            8 => Ok(Self::LanesClosed),
            _ => Err(damage("record.run", at, format!("kind {kind}, start {start}, operand {operand}"))),
        }
    }

    /// Extends this run by `next` when both say the same of neighbouring blocks.
    pub(super) fn absorb(&mut self, next: &Self) -> bool {
        match (self, *next) {
            (Self::Data { start, count }, Self::Data { start: s, count: c })
            | (Self::Zero { start, count }, Self::Zero { start: s, count: c })
            | (Self::Absent { start, count }, Self::Absent { start: s, count: c })
                if *start + u64::from(*count) == s && count.checked_add(c).is_some() =>
            {
                *count += c;
                true
            }
            (Self::Nodes { count }, Self::Nodes { count: c }) => {
                *count += c;
                true
            }
            _ => false,
        }
    }
}

/// Whether an index block has room for this many runs and checksums.
pub(super) fn fits(runs: usize, data_blocks: u32) -> bool {
    data_blocks <= DATA_BLOCKS_MAX && runs * RUN_BYTES + data_blocks as usize * SUM_BYTES <= INDEX_BYTES
}

/// The contents of an index block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) layer_id: LayerId,
    pub(super) nonce: u64,
    pub(super) sequence: u64,
    /// Chain value of the record before.
    pub(super) previous: u32,
    /// `Some` for a void record, which takes the place of one that failed: the chain value of
    /// that one, on which the record after it may build.
    pub(super) stands_for: Option<u32>,
    /// Data blocks that follow; a void record skips as many.
    pub(super) data_blocks: u32,
    /// The lane of the log that it is in.
    pub(super) lane: usize,
    pub(super) next_segment: u32,
    pub(super) runs: Vec<Run>,
    pub(super) checksums: Vec<u32>,
}

impl Index {
    /// Writes the index into `b`, one zeroed block, and returns its chain value.
    pub(super) fn encode(&self, b: &mut [u8]) -> u32 {
        assert!(fits(self.runs.len(), self.checksums.len() as u32), "the log keeps records within bounds");
        put(b, 0, &MAGIC);
        put(b, R_LAYER_ID, &self.layer_id);
        put(b, R_NONCE, &self.nonce.to_le_bytes());
        put(b, R_SEQUENCE, &self.sequence.to_le_bytes());
        put(b, R_PREVIOUS, &self.previous.to_le_bytes());
        put(b, R_STANDS_FOR, &self.stands_for.unwrap_or(0).to_le_bytes());
        let kind = if self.stands_for.is_some() { KIND_VOID } else { KIND_NORMAL };
        put(b, R_KIND, &kind.to_le_bytes());
        put(b, R_LANE, &(self.lane as u16).to_le_bytes());
        put(b, R_DATA_BLOCKS, &self.data_blocks.to_le_bytes());
        put(b, R_NEXT_SEGMENT, &self.next_segment.to_le_bytes());
        put(b, R_RUN_COUNT, &(self.runs.len() as u32).to_le_bytes());
        let mut at = R_RUNS;
        for run in &self.runs {
            run.encode(&mut b[at..at + RUN_BYTES]);
            at += RUN_BYTES;
        }
        for sum in &self.checksums {
            put(b, at, &sum.to_le_bytes());
            at += SUM_BYTES;
        }
        let sum = checksum(&[&b[..R_CHECKSUM]]);
        put(b, R_CHECKSUM, &sum.to_le_bytes());
        self.stands_for.unwrap_or(sum)
    }

    /// Reads an index block. Anything that is not wholly one is refused, with the reason.
    pub(super) fn decode(b: &[u8]) -> Result<(Self, u32), Damage> {
        if b.len() < BLOCK_BYTES || array::<8>(b, 0) != MAGIC {
            return Err(damage("record.magic", 0, "there is no record here"));
        }
        let sum = checksum(&[&b[..R_CHECKSUM]]);
        if sum != get_u32(b, R_CHECKSUM) {
            return Err(damage("record.checksum", R_CHECKSUM, "it does not match"));
        }
        let stands_for = match get_u16(b, R_KIND) {
            KIND_NORMAL => None,
            KIND_VOID => Some(get_u32(b, R_STANDS_FOR)),
            other => return Err(damage("record.kind", R_KIND, other)),
        };
        let data_blocks = get_u32(b, R_DATA_BLOCKS);
        let run_count = get_u32(b, R_RUN_COUNT) as usize;
        let sums = if stands_for.is_some() { 0 } else { data_blocks };
        if data_blocks > DATA_BLOCKS_MAX || run_count > INDEX_BYTES / RUN_BYTES || !fits(run_count, sums) {
            return Err(damage(
                "record.run_count",
                R_RUN_COUNT,
                format!("{run_count} runs, {data_blocks} blocks"),
            ));
        }
        if stands_for.is_some() && run_count > 0 {
            return Err(damage("record.run_count", R_RUN_COUNT, "a void record says nothing"));
        }
        let runs: Vec<Run> =
            (0..run_count).map(|i| Run::decode(b, R_RUNS + i * RUN_BYTES)).collect::<Result<_, _>>()?;
        if runs.iter().map(|run| u64::from(run.data_blocks())).sum::<u64>() != u64::from(sums) {
            return Err(damage("record.data_blocks", R_DATA_BLOCKS, "the runs name another number"));
        }
        let sums_at = R_RUNS + run_count * RUN_BYTES;
        let index = Self {
            layer_id: array(b, R_LAYER_ID),
            nonce: get_u64(b, R_NONCE),
            sequence: get_u64(b, R_SEQUENCE),
            previous: get_u32(b, R_PREVIOUS),
            stands_for,
            data_blocks,
            lane: usize::from(get_u16(b, R_LANE)),
            next_segment: get_u32(b, R_NEXT_SEGMENT),
            runs,
            checksums: (0..sums as usize).map(|i| get_u32(b, sums_at + i * SUM_BYTES)).collect(),
        };
        Ok((index, stands_for.unwrap_or(sum)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_blocks_differ_in_the_checksum_that_data_blocks_have() {
        let sum = |sequence| {
            let index = Index {
                layer_id: [7; 16],
                nonce: 1,
                sequence,
                previous: 2,
                stands_for: None,
                data_blocks: 0,
                lane: 0,
                next_segment: 3,
                runs: vec![Run::Size { bytes: 512 }],
                checksums: Vec::new(),
            };
            let mut block = vec![0; BLOCK_BYTES];
            index.encode(&mut block);
            crc32fast::hash(&block)
        };
        assert_ne!(sum(1), sum(2));
    }
}
