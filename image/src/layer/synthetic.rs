//! Large layers for tests and the bench, made in seconds: a disk whose start is mapped densely, each block
//! to a place of its own far from its neighbours', as after long random writing. The map is whole and
//! real; the data is holes, which read as zeroes, but for a few blocks that can be recognised.
//!
//! Only with the cargo feature `synthetic`. Stored forms come from the modules that own them.

use std::path::Path;

use super::create::create;
use super::header::Header;
use super::layout::{FIRST_SEGMENT_BLOCK, HEAD_BYTES, LayerId};
use super::load::Reader;
use super::node::{
    BRANCH_LEAVES, Entry, LEAF_ENTRIES, NODE_ALIGNMENT, NodeRef, USAGE_SEGMENTS, Usage, encode_branch,
    encode_leaf, encode_root, encode_usage,
};
use super::position::{Lane, LogPosition};
use super::record::{Index, Run};
use super::slot::{Slot, SlotState, slot_offset};
use super::{CreateLayer, open_file};
use crate::error::ImageError;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};

/// Blocks of a record of data, its index block included: so many runs fit.
const RECORD_BLOCKS: u64 = 128;
/// Data blocks of a record of nodes.
const NODE_BLOCKS: usize = 255;
/// Neighbouring blocks of the disk lie so many places apart, modulo their number.
const STRIDE: u64 = 0x9e37_79b1;
/// Blocks with contents.
const MARKS: u64 = 64;

/// What a synthetic layer is to be.
#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    /// Guest-visible size in bytes.
    pub size: u64,
    /// Bytes mapped from the start of the disk: a power of two from 1 GiB.
    pub mapped: u64,
    /// The records of the data are there, so that a check finds nothing wrong: 1/127 of the data's size.
    /// Without them the file holds little more than the map.
    pub records: bool,
}

impl Synthetic {
    fn blocks(&self) -> u64 {
        self.mapped / BLOCK_SIZE
    }

    /// The blocks of the disk with contents.
    pub fn marked(&self) -> impl Iterator<Item = u64> {
        let step = self.blocks() / MARKS;
        (0..MARKS).map(move |mark| mark * step)
    }

    /// What a block of the disk holds.
    pub fn contents(&self, block: u64) -> Vec<u8> {
        let is_marked = block < self.blocks() && block.is_multiple_of(self.blocks() / MARKS);
        let word = if is_marked { (block + 1).to_le_bytes() } else { [0; 8] };
        word.repeat(BLOCK_BYTES / 8)
    }
}

/// Makes a layer at `path`, where no file is.
///
/// # Errors
/// As for [`create`]; what the storage says.
///
/// # Panics
/// If `mapped` is not as it should be.
pub async fn synthesize<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    options: &Synthetic,
) -> Result<(), ImageError> {
    assert!(options.mapped.is_power_of_two() && options.mapped >= 1 << 30, "see `Synthetic::mapped`");
    let layer = CreateLayer { size: Some(options.size), ..CreateLayer::default() };
    create(storage, io, path, &layer).await?;
    let file = open_file(storage, path, OpenOptions::WRITE, Lock::Exclusive)?;
    let reader = Reader { io, file: &file, path };
    let start = reader.read(0, HEAD_BYTES).await?;
    let header = Header::decode(&start).map_err(|damage| reader.error(0, damage))?;
    let SlotState::Valid(slot) = Slot::decode(&start[slot_offset(1).0 as usize..], &header) else {
        unreachable!("made above")
    };
    let segment_blocks = u64::from(header.segment_blocks);
    let records = segment_blocks / RECORD_BLOCKS;
    let per_segment = records * (RECORD_BLOCKS - 1);
    let data_segments = options.blocks().div_ceil(per_segment);
    let maker = Maker {
        reader,
        options: *options,
        layer_id: header.layer_id,
        segment_blocks,
        per_segment,
        data_segments,
        log: LogPosition::new(slot.log.main(), data_segments * records, slot.log.chain, slot.log.nonce),
        place: FIRST_SEGMENT_BLOCK + (data_segments * segment_blocks) as u32,
        chunk: Vec::new(),
    };
    maker.run(slot).await
}

struct Maker<'a, E: Engine> {
    reader: Reader<'a, E>,
    options: Synthetic,
    layer_id: LayerId,
    segment_blocks: u64,
    /// Data blocks of a segment.
    per_segment: u64,
    data_segments: u64,
    /// After the last record.
    log: LogPosition,
    /// Where the next record of nodes begins.
    place: u32,
    /// The nodes of that record.
    chunk: Vec<u8>,
}

impl<E: Engine> Maker<'_, E> {
    /// The block of the file that holds data block number `number` of the log.
    fn data_place(&self, number: u64) -> u32 {
        let (segment, rest) = (number / self.per_segment, number % self.per_segment);
        let (record, rest) = (rest / (RECORD_BLOCKS - 1), rest % (RECORD_BLOCKS - 1));
        let inside = segment * self.segment_blocks + record * RECORD_BLOCKS + 1 + rest;
        FIRST_SEGMENT_BLOCK + inside as u32
    }

    /// The place of a block of the disk.
    fn place_of(&self, block: u64) -> u32 {
        self.data_place(block.wrapping_mul(inverse(STRIDE)) % self.options.blocks())
    }

    /// The block of the disk that lies at data block number `number` of the log.
    fn block_at(&self, number: u64) -> u64 {
        number.wrapping_mul(STRIDE) % self.options.blocks()
    }

    async fn run(mut self, slot: Slot) -> Result<(), ImageError> {
        for block in self.options.marked() {
            let contents = self.options.contents(block);
            self.write(self.place_of(block), &contents).await?;
        }
        if self.options.records {
            self.write_records().await?;
        }
        let (root, root_len) = self.write_map().await?;
        let segments = (u64::from(self.place - FIRST_SEGMENT_BLOCK)).div_ceil(self.segment_blocks) as u32;
        let file_blocks = u64::from(FIRST_SEGMENT_BLOCK) + u64::from(segments) * self.segment_blocks;
        let truncate = Op::Truncate { file: self.reader.file.clone(), size: file_blocks * BLOCK_SIZE };
        self.finish(self.reader.io.run(truncate).await.result.map(drop))?;
        let lane = Lane { segment: segments, block: 0, next_segment: segments + 1 };
        let log = LogPosition::new(lane, self.log.sequence, self.log.chain, self.log.nonce);
        // As after a clean stop: both slots name one map.
        for generation in [2, 3] {
            let slot = Slot { generation, log, root: FileOffset(root), root_len, clean: true, ..slot };
            self.write((slot_offset(generation).0 / BLOCK_SIZE) as u32, &slot.encode()).await?;
        }
        let sync = Op::Sync { file: self.reader.file.clone() };
        self.finish(self.reader.io.run(sync).await.result.map(drop))
    }

    fn finish(&self, result: Result<(), sapwood_blockdev::Errno>) -> Result<(), ImageError> {
        result.map_err(|errno| ImageError::errno(self.reader.path, "write", errno))
    }

    async fn write(&self, place: u32, bytes: &[u8]) -> Result<(), ImageError> {
        let offset = FileOffset(u64::from(place) * BLOCK_SIZE);
        let write = Op::write(self.reader.file.clone(), offset, AlignedBuf::from_slice(bytes));
        self.finish(self.reader.io.run(write).await.result.map(drop))
    }

    /// The next record's index block: after the last one, at the end of the log.
    fn index(&mut self, next_segment: u32, runs: Vec<Run>, checksums: Vec<u32>) -> Vec<u8> {
        self.log.sequence += 1;
        let index = Index {
            layer_id: self.layer_id,
            nonce: self.log.nonce,
            sequence: self.log.sequence,
            previous: self.log.chain,
            stands_for: None,
            data_blocks: checksums.len() as u32,
            lane: 0,
            next_segment,
            runs,
            checksums,
        };
        let mut block = vec![0; BLOCK_BYTES];
        self.log.chain = index.encode(&mut block);
        block
    }

    /// The index blocks of all data.
    async fn write_records(&mut self) -> Result<(), ImageError> {
        let end = self.log.sequence;
        self.log.sequence = 0;
        let (blocks, zero) = (self.options.blocks(), crc32fast::hash(&[0; BLOCK_BYTES]));
        for first in (0..blocks).step_by(RECORD_BLOCKS as usize - 1) {
            let held: Vec<u64> =
                (first..blocks.min(first + RECORD_BLOCKS - 1)).map(|number| self.block_at(number)).collect();
            let runs = held.iter().map(|&start| Run::Data { start, count: 1 }).collect();
            let sum = |&block: &u64| match block.is_multiple_of(blocks / MARKS) {
                true => crc32fast::hash(&self.options.contents(block)),
                false => zero,
            };
            let sums = held.iter().map(sum).collect();
            let next_segment = (first / self.per_segment) as u32 + 1;
            let block = self.index(next_segment, runs, sums);
            self.write(self.data_place(first) - 1, &block).await?;
        }
        self.log.sequence = end;
        Ok(())
    }

    /// All nodes: those of usage, which checkpoints store as they change, lie scattered among the leaves.
    async fn write_map(&mut self) -> Result<(u64, u32), ImageError> {
        let leaf_count = (self.options.blocks() / LEAF_ENTRIES as u64) as u32;
        let whole_groups = self.data_segments as usize / USAGE_SEGMENTS;
        let (mut usage, mut branches) = (Vec::new(), Vec::new());
        let mut leaf_bytes = vec![0; self.data_segments as usize];
        let mut refs = [NodeRef::ABSENT; BRANCH_LEAVES];
        for leaf in 0..leaf_count {
            let first = u64::from(leaf) * LEAF_ENTRIES as u64;
            let entries = std::array::from_fn(|i| Entry(self.place_of(first + i as u64)));
            let node = self.put(&encode_leaf(leaf, &entries)).await?;
            let (offset, len) = node.stored().expect("it was stored");
            let segment = (offset / BLOCK_SIZE - u64::from(FIRST_SEGMENT_BLOCK)) / self.segment_blocks;
            leaf_bytes.resize(leaf_bytes.len().max(segment as usize + 1), 0);
            leaf_bytes[segment as usize] += len as u32;
            let index = leaf as usize % BRANCH_LEAVES;
            refs[index] = node;
            if index + 1 == BRANCH_LEAVES {
                let branch = branches.len() as u32;
                branches.push(self.put(&encode_branch(branch, &refs)).await?);
            }
            while usage.len() < (leaf as usize + 1) * whole_groups / leaf_count as usize {
                usage.push(self.put_usage(usage.len(), &leaf_bytes).await?);
            }
        }
        while usage.len() * USAGE_SEGMENTS < leaf_bytes.len() {
            usage.push(self.put_usage(usage.len(), &leaf_bytes).await?);
        }
        let root = encode_root(&branches, &usage);
        let node = self.put(&root).await?;
        self.flush().await?;
        Ok((node.stored().expect("it was stored").0, root.len() as u32))
    }

    /// Usage node `group`; of the segments that hold nodes, `leaf_bytes` says how many of leaves.
    async fn put_usage(&mut self, group: usize, leaf_bytes: &[u32]) -> Result<NodeRef, ImageError> {
        let usage = |i| {
            let segment = group * USAGE_SEGMENTS + i;
            let live = self.options.blocks().saturating_sub(segment as u64 * self.per_segment);
            let live_blocks = live.min(self.per_segment) as u32;
            let leaf_bytes = leaf_bytes.get(segment).copied().unwrap_or(0);
            let written = if live_blocks > 0 || leaf_bytes > 0 { segment as u64 + 1 } else { 0 };
            Usage { live_blocks, leaf_bytes, written }
        };
        let node = encode_usage(group as u32, &std::array::from_fn(usage));
        self.put(&node).await
    }

    /// Packs a node, and writes the record before it when that is full.
    async fn put(&mut self, node: &[u8]) -> Result<NodeRef, ImageError> {
        if self.chunk.len() + node.len() > NODE_BLOCKS * BLOCK_BYTES {
            self.flush().await?;
        }
        let offset = u64::from(self.place + 1) * BLOCK_SIZE + self.chunk.len() as u64;
        self.chunk.extend_from_slice(node);
        self.chunk.resize(self.chunk.len().next_multiple_of(NODE_ALIGNMENT), 0);
        Ok(NodeRef::new(offset, node.len()))
    }

    async fn flush(&mut self) -> Result<(), ImageError> {
        let mut data = std::mem::take(&mut self.chunk);
        data.resize(data.len().next_multiple_of(BLOCK_BYTES), 0);
        let sums: Vec<u32> = data.chunks_exact(BLOCK_BYTES).map(crc32fast::hash).collect();
        let segment = u64::from(self.place - FIRST_SEGMENT_BLOCK) / self.segment_blocks;
        let runs = vec![Run::Nodes { count: sums.len() as u32 }];
        let mut record = self.index(segment as u32 + 1, runs, sums);
        record.extend(data);
        self.write(self.place, &record).await?;
        self.place += 1 + NODE_BLOCKS as u32;
        Ok(())
    }
}

/// The odd number that times `odd` is 1, modulo 2^64 and so modulo every smaller power of two.
const fn inverse(odd: u64) -> u64 {
    // Newton's method: each step doubles the bits that are right, which are three at first.
    let mut x = odd;
    let mut bits = 3;
    while bits < 64 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        bits *= 2;
    }
    x
}
