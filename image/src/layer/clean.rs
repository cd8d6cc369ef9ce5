//! The cleaner: moves what is live out of a segment, so that the segment can be used again.
//!
//! A block is appended again like a write, but only if nobody has written it or is about to: the
//! check and the append happen under one lock, so that an old content never follows a new one in
//! the log. The segment is let go by the checkpoints that follow, as any dead one.

use std::sync::Arc;

use super::driver::Driver;
use super::log::Part;
use super::record::{Index, Run};
use super::waiter::{Result, Ticket, Waiter};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::units::BLOCK_BYTES;

/// Blocks appended before waiting for them: bounds what the cleaner puts before a guest's write,
/// and is enough for records that are worth a write. No part is larger.
const BATCH_BLOCKS: usize = 64;

/// A live block in the segment being cleaned.
#[derive(Clone, Copy)]
struct Live {
    block: u64,
    place: u32,
}

impl Live {
    /// The checksum of its data in its segment's `contents`, which begin at block `first`.
    fn checksum(&self, contents: &[u8], first: u32) -> u32 {
        let at = (self.place - first) as usize * BLOCK_BYTES;
        crc32fast::hash(&contents[at..at + BLOCK_BYTES])
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
        let Some(mut live) = self.live_blocks(contents, segment) else { return Ok(()) };
        live.sort_unstable_by_key(|live| live.block);
        let unit = self.layer.part_blocks_max() as usize;
        let neighbours = |a: &Live, b: &Live| a.block + 1 == b.block;
        let groups: Vec<&[Live]> = live.chunk_by(neighbours).flat_map(|group| group.chunks(unit)).collect();
        let mut rest = &groups[..];
        while !rest.is_empty() {
            let mut blocks = 0;
            let fits = |group: &&&[Live]| {
                blocks += group.len();
                blocks <= BATCH_BLOCKS
            };
            let (batch, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.move_groups(batch, contents, first).await?;
            rest = after;
        }
        let core = &mut *self.layer.core();
        let range = start.0..start.0 + bytes;
        core.map.dirty_nodes_in(|offset| range.contains(&offset));
        if range.contains(&core.root.offset.0) {
            core.map.dirty_root();
        }
        Ok(())
    }

    /// The blocks of a segment that the map refers to, by the records in it. `None` when some of
    /// them cannot be found, or are not what their record says: such a segment is left alone, since
    /// to move a damaged block would give it a checksum that hides the damage.
    fn live_blocks(&self, contents: &[u8], segment: u32) -> Option<Vec<Live>> {
        let mut live = Vec::new();
        let mut at = 0;
        let blocks = contents.len() / BLOCK_BYTES;
        let mut core = self.layer.core();
        let first = core.segments.first_block(segment);
        while at < blocks {
            let Ok((index, _)) = Index::decode(&contents[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES]) else {
                break;
            };
            let sums = |place: u32| index.checksums.get((place - first) as usize - at - 1);
            let mut place = first + at as u32 + 1;
            for run in &index.runs {
                if let Run::Data { start, count } = *run {
                    let each = (0..count).map(|i| Live { block: start + u64::from(i), place: place + i });
                    let mapped = each.filter(|l| core.map.lookup(l.block).place() == Some(l.place));
                    live.extend(mapped.filter(|l| sums(l.place) == Some(&l.checksum(contents, first))));
                }
                place += run.data_blocks();
            }
            at += 1 + index.data_blocks as usize;
        }
        if live.len() as u64 == u64::from(core.segments.live_blocks_in(segment)) {
            return Some(live);
        }
        let (path, offset) = (self.layer.path().display(), core.segments.offset(segment).0);
        log::error!("{path}: damaged data in the segment at offset {offset:#x}; check the layer");
        core.segments.pin(segment);
        None
    }

    /// Appends groups of neighbouring blocks again, but for those that a writer is at.
    async fn move_groups(&self, groups: &[&[Live]], contents: &[u8], first: u32) -> Result {
        let ticket = Arc::new(Ticket::default());
        for group in groups {
            let mut buf = self.staging(group.len());
            for (target, live) in buf.chunks_exact_mut(BLOCK_BYTES).zip(*group) {
                let at = (live.place - first) as usize * BLOCK_BYTES;
                target.copy_from_slice(&contents[at..at + BLOCK_BYTES]);
            }
            let run = Run::Data { start: group[0].block, count: group.len() as u32 };
            let part = Part::data(run, buf, Waiter::Ticket(Arc::clone(&ticket)));
            let blocks = group[0].block..group[0].block + group.len() as u64;
            let mut core = self.layer.core();
            let unchanged = group.iter().all(|l| core.map.lookup(l.block).place() == Some(l.place));
            if unchanged && !core.log.is_writing(&blocks) && !core.is_merging(&blocks) {
                core.append(part);
            }
        }
        self.wait(&ticket).await.map(drop)
    }
}
