//! The slow paths: requests with cut blocks, and memory that direct I/O cannot reach.
//!
//! A write of a part of a block merges it with what lies there. The block is marked meanwhile,
//! from before it is read until the merged block counts; every other writer of it waits, and it
//! waits for writers that came before. Readers never wait.

use std::future::poll_fn;
use std::ops::Range;
use std::task::Poll;

use super::core::Core;
use super::driver::Driver;
use super::log::Part;
use super::map::{BRANCH_BLOCKS, by_branch};
use super::node::Entry;
use super::paging::Pins;
use super::read::complain;
use super::record::Run;
use super::tuning::breaks;
use super::waiter::{Result, Waiter};
use crate::below::read_file;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::{Command, Request};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, BlockSpan, FileOffset};

/// Reads a file into memory that the kernel cannot fill directly, and tells `waiter`.
pub(super) fn read_bounced<E: Engine>(
    driver: &Driver<E>,
    file: E::File,
    offset: FileOffset,
    may_end: bool,
    memory: Memory,
    waiter: Waiter,
) {
    let task = driver.clone();
    driver.io.spawn(async move {
        let result = read_file(&task.io, file, offset, may_end, memory).await;
        task.layer.core().end(waiter, result, 0);
    });
}

/// Reads the disk from byte `start`, loading what has to be known for it, and tells `waiter`.
pub(super) fn read<E: Engine>(driver: &Driver<E>, start: u64, mut memory: Memory, waiter: Waiter) {
    let task = driver.clone();
    driver.io.spawn(async move {
        let result = task.read_into(start, &mut memory).await;
        drop(memory);
        task.layer.core().end(waiter, result, 0);
    });
}

/// Performs a write, write-zeroes or discard of any shape, and tells `waiter`.
pub(super) fn write<E: Engine>(driver: &Driver<E>, request: Request, waiter: Waiter) {
    let task = driver.clone();
    driver.io.spawn(async move {
        let cut = match request.command {
            Command::Discard => 0,
            _ => BlockSpan::of(request.offset, request.len).cut().len() as u64,
        };
        let result = task.merge(request).await;
        let mut core = task.layer.core();
        core.counts.merged_blocks += if result.is_ok() { cut } else { 0 };
        core.end(waiter, result, 0);
    });
}

impl Core {
    /// Whether one of these blocks is under merge.
    pub(super) fn is_merging(&self, blocks: &Range<u64>) -> bool {
        self.merging.iter().any(|marked| marked.start < blocks.end && blocks.start < marked.end)
    }

    /// Marks the blocks if no other writer is in the way: nobody may be merging one of them, and
    /// what was written to those that are cut must count already.
    fn try_mark(&mut self, blocks: &Range<u64>, cut: &[u64]) -> bool {
        if breaks!(self.tuning, MergeWithoutMark) {
            return true;
        }
        let busy = self.is_merging(blocks) || cut.iter().any(|&b| self.log.is_writing(&(b..b + 1)));
        if !busy {
            self.merging.push(blocks.clone());
        }
        !busy
    }

    /// Whether blocks of one branch have an entry already, and nobody is changing that.
    fn is_uniform(&self, blocks: &Range<u64>, entry: Entry) -> bool {
        self.map.uniform_branch((blocks.start / BRANCH_BLOCKS) as u32) == Some(entry)
            && !self.log.is_writing(blocks)
    }

    fn unmark(&mut self, blocks: &Range<u64>) {
        if let Some(index) = self.merging.iter().position(|marked| marked == blocks) {
            self.merging.swap_remove(index);
        }
        self.merge_wakers.drain(..).for_each(std::task::Waker::wake);
    }
}

impl<E: Engine> Driver<E> {
    /// Performs a write, write-zeroes or discard of any shape.
    pub(super) async fn merge(&self, request: Request) -> Result {
        let span = BlockSpan::of(request.offset, request.len);
        let discard = matches!(request.command, Command::Discard);
        // A discard promises nothing about blocks that it cuts.
        let (blocks, cut) =
            if discard { (span.whole.clone(), Vec::new()) } else { (span.touched.clone(), span.cut()) };
        self.until(|core| core.latched.is_some() || core.try_mark(&blocks, &cut)).await;
        let result = self.merge_marked(&request, &span, &cut).await;
        self.layer.core().unmark(&blocks);
        result
    }

    /// Waits for something that becomes true when a merge has ended or a record was published, keeping
    /// the log moving meanwhile.
    pub(super) async fn until(&self, mut is_true: impl FnMut(&mut Core) -> bool) {
        poll_fn(|cx| {
            let mut core = self.layer.core();
            if is_true(&mut core) {
                return Poll::Ready(());
            }
            core.merge_wakers.push(cx.waker().clone());
            drop(core);
            self.pump();
            Poll::Pending
        })
        .await;
    }

    async fn merge_marked(&self, request: &Request, span: &BlockSpan, cut: &[u64]) -> Result {
        let mut merged = Vec::with_capacity(cut.len());
        for &block in cut {
            merged.push(self.merge_block(request, block).await?);
        }
        let whole = span.whole.clone();
        let data = match &request.command {
            Command::Write(memory) => self.copy_whole(request, memory, whole),
            _ => {
                self.zero(whole).await?;
                Vec::new()
            }
        };
        let cuts = cut.iter().zip(merged).map(|(&start, buf)| (Run::Data { start, count: 1 }, buf));
        let all: Vec<_> = data.into_iter().chain(cuts).collect();
        if !all.is_empty() {
            let blocks = if cut.is_empty() { &span.whole } else { &span.touched };
            // The leaves of a long run of zeroes were needed one branch at a time.
            let _pins = match &request.command {
                Command::Write(_) => vec![self.pin(blocks).await?],
                _ => {
                    let mut pins = Vec::new();
                    for &block in cut {
                        pins.push(self.pin(&(block..block + 1)).await?);
                    }
                    pins
                }
            };
            let part = |waiter: &Waiter, (run, buf)| Part::data(run, buf, waiter.clone());
            self.append(|waiter| all.into_iter().map(|p| part(waiter, p)).collect()).await?;
        }
        if !self.layer.core().write_cache {
            self.flush().await?;
        }
        Ok(())
    }

    /// Keeps the leaves of blocks in memory.
    pub(super) async fn pin(&self, blocks: &Range<u64>) -> Result<Pins<E>> {
        self.layer.pin(&self.io, blocks).await.map_err(|error| complain(&error))
    }

    /// Makes whole blocks read as zeroes.
    async fn zero(&self, blocks: Range<u64>) -> Result {
        self.set_uniform(blocks, self.layer.zero_entry()).await
    }

    /// Gives blocks an entry, which is zero or absent: one branch after the other, so that what has
    /// to be in memory for it is bounded.
    pub(super) async fn set_uniform(&self, blocks: Range<u64>, entry: Entry) -> Result {
        for part in by_branch(blocks) {
            if self.layer.core().is_uniform(&part, entry) {
                continue;
            }
            if self.layer.core().is_map_full() {
                self.checkpoint(None, false).await?;
            }
            let _pins = self.pin(&part).await?;
            let run = Run::uniform(part, entry);
            self.append(|waiter| vec![Part::index_only(run, waiter.clone())]).await?;
        }
        Ok(())
    }

    /// The block as it will be: what lies there with the request's bytes over it.
    async fn merge_block(&self, request: &Request, block: u64) -> Result<AlignedBuf> {
        let start = block * BLOCK_SIZE;
        let size = self.layer.core().size;
        let inside = start..(start + BLOCK_SIZE).min(size);
        let mut buf = self.staging(1);
        buf.fill(0);
        // The disk may have shrunk since the request was accepted.
        if !inside.is_empty() {
            let old = self.read(inside).await?;
            buf[..old.len()].copy_from_slice(&old);
        }
        let end = (request.offset.0 + request.len).min(start + BLOCK_SIZE);
        let begin = request.offset.0.max(start);
        let target = &mut buf[(begin - start) as usize..(end - start) as usize];
        match &request.command {
            Command::Write(memory) => memory.read_at((begin - request.offset.0) as usize, target),
            _ => target.fill(0),
        }
        Ok(buf)
    }

    /// Copies of the whole blocks of a write.
    fn copy_whole(&self, request: &Request, memory: &Memory, whole: Range<u64>) -> Vec<(Run, AlignedBuf)> {
        let unit = u64::from(self.layer.part_blocks_max());
        whole
            .clone()
            .step_by(unit as usize)
            .map(|start| {
                let count = unit.min(whole.end - start);
                let mut buf = self.staging(count as usize);
                memory.read_at((start * BLOCK_SIZE - request.offset.0) as usize, &mut buf);
                debug_assert_eq!(buf.len(), count as usize * BLOCK_BYTES);
                (Run::Data { start, count: count as u32 }, buf)
            })
            .collect()
    }
}
