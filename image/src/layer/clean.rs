//! The cleaner: moves what is live out of a segment, so that the segment can be used again.
//!
//! A block is appended again like a write, but only if nobody has written it or is about to: the
//! check and the append happen under one lock, so that an old content never follows a new one in
//! the log. The segment is let go by the checkpoints that follow, as any dead one.

use std::sync::Arc;

use futures_util::future::join_all;

use super::core::Core;
use super::driver::Driver;
use super::log::Part;
use super::map::LEAF_BLOCKS;
use super::node::{BRANCH_LEAVES, NodeKind, NodeRef, packed_nodes};
use super::paging::Pins;
use super::read::complain;
use super::record::{Index, Run};
use super::waiter::{Result, Ticket, Waiter};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::units::BLOCK_BYTES;

/// Blocks appended before waiting for them: bounds what the cleaner puts before a guest's write,
/// and is enough for records that are worth a write. No part is larger.
const BATCH_BLOCKS: usize = 64;

/// A block in the segment being cleaned.
#[derive(Clone, Copy)]
struct Live {
    block: u64,
    place: u32,
    /// The checksum that its record states.
    sum: u32,
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
    /// Empties the used segment with the least in it; `false` when none is worth it. `scratch` may
    /// be empty; given again it saves making a buffer of a segment's size.
    pub(super) async fn clean_segment(&self, scratch: &mut AlignedBuf) -> Result<bool> {
        let (segment, epoch) = {
            let mut core = self.layer.core();
            let Some(segment) = core.segments.victim(core.log.published.sequence) else { return Ok(false) };
            (segment, core.segments.enter())
        };
        let result = self.empty_segment(segment, scratch).await;
        self.layer.core().segments.leave(epoch);
        result.map(|()| true)
    }

    async fn empty_segment(&self, segment: u32, scratch: &mut AlignedBuf) -> Result {
        let (start, bytes, first) = {
            let core = self.layer.core();
            (core.segments.offset(segment), core.segments.bytes(), core.segments.first_block(segment))
        };
        let mut buf = std::mem::replace(scratch, AlignedBuf::zeroed(0));
        if buf.len() as u64 != bytes {
            buf = AlignedBuf::zeroed(bytes as usize);
        }
        let outcome = self.io.run(Op::read(self.layer.file(), start, buf)).await;
        *scratch = outcome.zero_filled()?.into_buf();
        let contents = &scratch[..];
        let Found { mut blocks, nodes } = find(contents, first);
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
                skipped += self.move_blocks(&batch.live, contents, first).await?;
                batch = Batch { live: Vec::new(), _pins: Vec::new() };
            }
        }
        skipped += self.move_blocks(&batch.live, contents, first).await?;
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

    /// Appends blocks again, but for those that a writer is at; returns how many of
    /// those there are.
    async fn move_blocks(&self, blocks: &[Live], contents: &[u8], first: u32) -> Result<usize> {
        let ticket = Arc::new(Ticket::default());
        let unit = self.layer.part_blocks_max() as usize;
        let mut skipped = 0;
        let groups = blocks.chunk_by(|a, b| a.block + 1 == b.block).flat_map(|group| group.chunks(unit));
        for group in groups {
            let mut buf = self.staging(group.len());
            for (target, live) in buf.chunks_exact_mut(BLOCK_BYTES).zip(group) {
                target.copy_from_slice(live.data(contents, first));
            }
            let run = Run::Data { start: group[0].block, count: group.len() as u32 };
            let part = Part { upkeep: true, ..Part::data(run, buf, Waiter::Ticket(Arc::clone(&ticket))) };
            let range = group[0].block..group[0].block + group.len() as u64;
            let mut core = self.layer.core();
            let unchanged = group.iter().all(|live| core.is_mapped(live));
            if unchanged && !core.log.is_writing(&range) && !core.is_merging(&range) {
                core.append(part);
            } else {
                skipped += group.len();
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

/// Blocks to be moved, and their leaves.
struct Batch<E: Engine> {
    live: Vec<Live>,
    _pins: Vec<Pins<E>>,
}

/// What a segment holds that may be in use.
struct Found {
    blocks: Vec<Live>,
    nodes: Vec<StoredNode>,
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
    let mut found = Found { blocks: Vec::new(), nodes: Vec::new() };
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
    }
    found
}
