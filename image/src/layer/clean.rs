//! The cleaner: moves what is live out of a segment, so that the segment can be used again.
//!
//! A block is appended again like a write, but only if nobody has written it or is about to: the
//! check and the append happen under one lock, so that an old content never follows a new one in
//! the log. The segment is let go by the checkpoints that follow, as any dead one.

use std::sync::Arc;

use futures_util::future::join_all;

use super::age;
use super::core::Core;
use super::driver::Driver;
use super::log::Part;
use super::map::LEAF_BLOCKS;
use super::node::{BRANCH_LEAVES, NodeKind, NodeRef, packed_nodes};
use super::paging::Pins;
use super::read::complain;
use super::record::{Index, Run};
use super::segments::Candidate;
use super::waiter::{Result, Ticket, Waiter};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::units::{BLOCK_BYTES, FileOffset};

/// Blocks appended before waiting for them: bounds what the cleaner puts before a guest's write,
/// and is enough for records that are worth a write. No part is larger.
const BATCH_BLOCKS: usize = 128;
/// Segments that are chosen at once: to look at all of them takes a while.
const CHOICE: usize = 16;
/// Segments looked at under one lock.
const LOOK: u32 = 4096;

/// A block that is to be appended again.
#[derive(Clone, Copy)]
pub(super) struct Live {
    pub(super) block: u64,
    pub(super) place: u32,
    /// The checksum that its record states.
    pub(super) sum: u32,
}

impl Live {
    /// Its data in its segment's `contents`, which begin at block `first`.
    fn data<'a>(&self, contents: &'a [u8], first: u32) -> &'a [u8] {
        let at = (self.place - first) as usize * BLOCK_BYTES;
        &contents[at..at + BLOCK_BYTES]
    }

    fn is_whole(&self, contents: &[u8], first: u32) -> bool {
        crc32fast::hash(self.data(contents, first)) == self.sum
    }
}

impl<E: Engine> Driver<E> {
    /// The segments that are best emptied, the best first.
    pub(super) fn choose_victims(&self) -> Vec<u32> {
        let mut best: Vec<Candidate> = Vec::new();
        let count = self.layer.core().segments.count();
        for start in (0..count).step_by(LOOK as usize) {
            {
                let core = self.layer.core();
                let (published, now) = (core.log.published.sequence, core.log.traffic.guest);
                best.extend(core.segments.candidates(start..start.saturating_add(LOOK), published, now));
            }
            best.sort_unstable_by(|a, b| a.decline.total_cmp(&b.decline));
            best.truncate(CHOICE);
        }
        best.into_iter().map(|candidate| candidate.segment).collect()
    }

    /// Empties a segment, if that is still worth it; says whether it was. With `split`, blocks before that one
    /// and the others go into lanes of their own, whatever their age. `scratch` may be empty; given again
    /// it saves making a buffer of a segment's size.
    pub(super) async fn clean_segment(
        &self,
        segment: u32,
        split: Option<u64>,
        scratch: &mut AlignedBuf,
    ) -> Result<bool> {
        let victim = {
            let mut core = self.layer.core();
            if !core.segments.is_candidate(segment, core.log.published.sequence) {
                return Ok(false);
            }
            Victim { split, ..Victim::new(&mut core, segment) }
        };
        let result = self.empty_segment(&victim, scratch).await;
        self.layer.core().segments.leave(victim.epoch);
        result.map(|()| true)
    }

    async fn empty_segment(&self, victim: &Victim, scratch: &mut AlignedBuf) -> Result {
        let Victim { segment, start, bytes, first, .. } = *victim;
        let mut buf = std::mem::replace(scratch, AlignedBuf::zeroed(0));
        if buf.len() as u64 != bytes {
            buf = AlignedBuf::zeroed(bytes as usize);
        }
        let outcome = self.io.run(Op::read(self.layer.file(), start, buf)).await;
        *scratch = outcome.zero_filled()?.into_buf();
        let contents = &scratch[..];
        let Found { mut blocks, nodes, .. } = find(contents, first);
        // In the order of the disk, so that what was scattered becomes sequential again.
        blocks.sort_unstable_by_key(|live| live.block);
        let mut damaged = false;
        let mut skipped = 0;
        let mut batch = Batch { live: Vec::new(), _pins: Vec::new() };
        for candidates in blocks.chunks(BATCH_BLOCKS) {
            batch._pins.extend(self.pin_each(candidates).await?);
            for live in self.still_mapped(candidates) {
                match live.is_whole(contents, first) {
                    true => batch.live.push(live),
                    false => damaged = true,
                }
            }
            if batch.live.len() >= BATCH_BLOCKS {
                skipped += self.move_blocks(&batch.live, contents, victim).await?;
                batch = Batch { live: Vec::new(), _pins: Vec::new() };
            }
        }
        skipped += self.move_blocks(&batch.live, contents, victim).await?;
        drop(batch);
        for node in nodes {
            self.renew(node, start.0).await?;
        }
        self.judge(segment, skipped == 0, damaged);
        Ok(())
    }

    /// Leaves a segment alone from now on that could not be emptied: data in it is damaged, and to
    /// append it again would give it a checksum that hides the damage; or no record speaks of it.
    fn judge(&self, segment: u32, is_final: bool, damaged: bool) {
        let mut core = self.layer.core();
        let left = core.segments.live_blocks_in(segment);
        if damaged || (is_final && left > 0) {
            let (path, offset) = (self.layer.path().display(), core.segments.offset(segment).0);
            log::error!("{path}: damaged data in the segment at offset {offset:#x}; check the layer");
            core.segments.pin(segment);
        } else if is_final && core.segments.note_emptied(segment) {
            core.wake_maintenance();
        }
    }

    /// Keeps the leaves of blocks, which are in order, in memory.
    async fn pin_each(&self, blocks: &[Live]) -> Result<Vec<Pins<E>>> {
        let leaves = blocks.chunk_by(|a, b| a.block / LEAF_BLOCKS == b.block / LEAF_BLOCKS);
        let ranges: Vec<_> = leaves.map(|of_leaf| of_leaf[0].block..of_leaf[0].block + 1).collect();
        join_all(ranges.iter().map(|range| self.pin(range))).await.into_iter().collect()
    }

    /// Those blocks that the map still refers to. Their leaves are pinned.
    fn still_mapped(&self, batch: &[Live]) -> Vec<Live> {
        let core = self.layer.core();
        batch.iter().filter(|live| core.is_mapped(live)).copied().collect()
    }

    /// Moves blocks out of a segment; returns how many had to be left.
    async fn move_blocks(&self, blocks: &[Live], contents: &[u8], victim: &Victim) -> Result<usize> {
        let data = |live: &Live| live.data(contents, victim.first);
        let skipped = self.append_again(blocks, data, |block| victim.lane_of(block), victim.written).await?;
        self.layer.core().pay(victim.gain(blocks.len()));
        Ok(skipped)
    }

    /// Appends blocks again, but for those that a writer is at; returns how many of
    /// those there are. Their leaves are pinned, and their data, which was written at `written`, is known
    /// to be whole.
    pub(super) async fn append_again<'a>(
        &self,
        blocks: &[Live],
        data: impl Fn(&Live) -> &'a [u8],
        lane: impl Fn(u64) -> usize,
        written: u64,
    ) -> Result<usize> {
        let ticket = Arc::new(Ticket::default());
        let unit = self.layer.part_blocks_max() as usize;
        let mut skipped = 0;
        let joins = |a: &Live, b: &Live| a.block + 1 == b.block && lane(a.block) == lane(b.block);
        let groups = blocks.chunk_by(joins).flat_map(|group| group.chunks(unit));
        let parts = groups.map(|group| {
            let mut buf = self.staging(group.len());
            for (target, live) in buf.chunks_exact_mut(BLOCK_BYTES).zip(group) {
                target.copy_from_slice(data(live));
            }
            let run = Run::Data { start: group[0].block, count: group.len() as u32 };
            let waiter = Waiter::Ticket(Arc::clone(&ticket));
            let (lane, estimate) = (lane(group[0].block), Some(written));
            (group, Part { upkeep: true, of_guest: false, lane, estimate, ..Part::data(run, buf, waiter) })
        });
        let parts: Vec<_> = parts.collect();
        {
            // All at once, so that they go into one record.
            let mut core = self.layer.core();
            for (group, part) in parts {
                let range = group[0].block..group[0].block + group.len() as u64;
                let unchanged = group.iter().all(|live| core.is_mapped(live));
                if unchanged && !core.log.is_writing(&range) && !core.is_merging(&range) {
                    core.append(part);
                } else {
                    skipped += group.len();
                }
            }
        }
        self.wait(&ticket).await?;
        Ok(skipped)
    }

    /// Makes a node part of the next checkpoint if the map still refers to this copy of it.
    async fn renew(&self, node: StoredNode, start: u64) -> Result {
        let offset = start + node.at as u64;
        let is_here = |reference: NodeRef| reference.stored().is_some_and(|(at, _)| at == offset);
        match node.kind {
            NodeKind::Root => {
                let mut core = self.layer.core();
                if core.root.len > 0 && core.root.offset.0 == offset {
                    core.map.dirty_root();
                }
            }
            NodeKind::Usage => self.layer.core().segments.dirty_usage_at(node.index, offset),
            NodeKind::Branch => {
                if !is_here(self.layer.core().map.root_ref(node.index)) {
                    return Ok(());
                }
                let renewed = self.layer.with_branch(&self.io, node.index, |core| {
                    if is_here(core.map.root_ref(node.index)) {
                        core.map.dirty_branch(node.index);
                    }
                });
                renewed.await.map_err(|error| complain(&error))?;
            }
            NodeKind::LeafRuns | NodeKind::LeafDense => {
                let branch = node.index / BRANCH_LEAVES as u32;
                let is_current = move |core: &mut Core| core.map.reference(node.index).is_ok_and(is_here);
                let current = self.layer.with_branch(&self.io, branch, is_current).await;
                if current.map_err(|error| complain(&error))? {
                    let block = u64::from(node.index) * LEAF_BLOCKS;
                    let _pins = self.pin(&(block..block + 1)).await?;
                    let mut core = self.layer.core();
                    if is_current(&mut core) {
                        core.map.dirty_leaf(node.index);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Core {
    /// Whether the map, whose leaf is in memory, refers to a block where the cleaner found it.
    fn is_mapped(&self, live: &Live) -> bool {
        self.map.lookup(live.block).is_ok_and(|entry| entry.place() == Some(live.place))
    }
}

/// A segment being emptied.
#[derive(Clone, Copy)]
struct Victim {
    segment: u32,
    /// Where it lies: offset, length, and first block.
    start: FileOffset,
    bytes: u64,
    first: u32,
    /// Blocks of it that are in use when it is begun, and that are not.
    live_blocks: u32,
    dead_blocks: u32,
    /// When its data was written, and where it goes for that.
    written: u64,
    lane: usize,
    /// Where it is divided instead.
    split: Option<u64>,
    /// Protects it while it is read.
    epoch: u64,
}

impl Victim {
    fn new(core: &mut Core, segment: u32) -> Self {
        let (now, live) = (core.log.traffic.guest, core.segments.live_blocks());
        let written = core.segments.written(segment);
        let live_blocks = core.segments.live_blocks_in(segment);
        Self {
            segment,
            start: core.segments.offset(segment),
            bytes: core.segments.bytes(),
            first: core.segments.first_block(segment),
            live_blocks,
            dead_blocks: core.segments.segment_blocks().saturating_sub(live_blocks),
            written,
            lane: age::lane_of_moved(written, now, live),
            split: None,
            epoch: core.segments.enter(),
        }
    }

    /// The lane for one of its blocks.
    fn lane_of(&self, block: u64) -> usize {
        self.split.map_or(self.lane, |split| age::lane_of_split(block, split))
    }

    /// What is gained by moving so many of its blocks.
    fn gain(&self, moved: usize) -> i64 {
        (moved as u64 * u64::from(self.dead_blocks) / u64::from(self.live_blocks.max(1))) as i64
    }
}

/// Blocks to be moved, and their leaves.
struct Batch<E: Engine> {
    live: Vec<Live>,
    _pins: Vec<Pins<E>>,
}

/// What a segment holds that may be in use.
struct Found {
    blocks: Vec<Live>,
    nodes: Vec<StoredNode>,
    /// Its first block that no record covers.
    end: usize,
}

/// A node in the segment being cleaned.
#[derive(Clone, Copy)]
struct StoredNode {
    /// Byte of the segment at which it begins.
    at: usize,
    kind: NodeKind,
    index: u32,
}

/// Everything in the records of a segment whose contents these are and which begins at block `first`.
fn find(contents: &[u8], first: u32) -> Found {
    let mut found = Found { blocks: Vec::new(), nodes: Vec::new(), end: 0 };
    let blocks = contents.len() / BLOCK_BYTES;
    let mut at = 0;
    while at < blocks {
        let Ok((index, _)) = Index::decode(&contents[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES]) else {
            break;
        };
        let mut inside = at + 1;
        let mut sums = index.checksums.iter().copied();
        for run in &index.runs {
            let end = inside + run.data_blocks() as usize;
            if end > blocks {
                return found;
            }
            match *run {
                Run::Data { start, .. } => {
                    let places = (start..).zip(first + inside as u32..first + end as u32);
                    let live = places.zip(&mut sums).map(|((block, place), sum)| Live { block, place, sum });
                    found.blocks.extend(live);
                }
                Run::Nodes { .. } => {
                    (&mut sums).take(end - inside).for_each(drop);
                    let bytes = &contents[inside * BLOCK_BYTES..end * BLOCK_BYTES];
                    let here = packed_nodes(bytes).into_iter();
                    found.nodes.extend(here.map(|(skip, kind, index, _)| StoredNode {
                        at: inside * BLOCK_BYTES + skip,
                        kind,
                        index,
                    }));
                }
                _ => {}
            }
            inside = end;
        }
        at += 1 + index.data_blocks as usize;
        found.end = at;
    }
    found
}

/// How many blocks at the beginning of a segment, of whose contents these are the first, are what its
/// records say.
pub(super) fn whole_blocks(contents: &[u8]) -> u32 {
    let found = find(contents, 0);
    let damaged = found.blocks.iter().filter(|live| !live.is_whole(contents, 0)).map(|live| live.place);
    damaged.min().unwrap_or(u32::MAX).min(found.end as u32)
}
