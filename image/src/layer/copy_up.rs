//! Copying up: what a layer reads from below becomes its own.
//!
//! A block is read from below, which does not change, and appended like a write, but only if the
//! layer still holds nothing of it and no writer is at it: check and append happen under one lock,
//! so that in the log a copy never follows what a guest has written meanwhile. A block that a
//! writer is at is looked at again when that writer has ended, since its write may fail.

use std::ops::Range;
use std::sync::Arc;

use super::base::Below;
use super::core::Core;
use super::driver::Driver;
use super::log::Part;
use super::node::Entry;
use super::read::complain;
use super::record::Run;
use super::tuning::breaks;
use super::waiter::{Result, Ticket, Waiter};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// What is to be done about a block that the layer does not hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing: it reads the same over the new base.
    None,
    /// It becomes a zero entry.
    Zero,
    /// It is copied.
    Data,
}

impl Core {
    pub(super) fn is_writer_at(&self, blocks: &Range<u64>) -> bool {
        self.log.is_writing(blocks) || self.is_merging(blocks)
    }

    fn may_copy(&self, blocks: &Range<u64>) -> bool {
        let is_absent = |block| self.map.lookup(block) == Ok(Entry::ABSENT);
        breaks!(self.tuning, CopyUpOverWriter) || blocks.clone().all(is_absent) && !self.is_writer_at(blocks)
    }
}

impl<E: Engine> Driver<E> {
    /// Copies up those of `blocks` of which the layer holds nothing and that would read differently
    /// over `new` than they do over `old`.
    pub(super) async fn copy_up(&self, blocks: Range<u64>, old: &Below<E>, new: &Below<E>) -> Result {
        let mut todo = vec![blocks];
        while !todo.is_empty() {
            let mut busy = Vec::new();
            for range in todo {
                // Held until the copies count, so that they can be looked up and appended.
                let _pins = self.pin(&range).await?;
                let runs = self.layer.runs(&self.io, range).await.map_err(|error| complain(&error))?;
                for run in runs.into_iter().filter(|run| run.entry == Entry::ABSENT) {
                    self.copy_absent(run.start..run.start + run.count, old, new, &mut busy).await?;
                }
            }
            let gone = |core: &Core| !busy.iter().any(|blocks| core.is_writer_at(blocks));
            self.until(|core| core.latched.is_some() || gone(core)).await;
            todo = busy;
        }
        Ok(())
    }

    async fn copy_absent(
        &self,
        blocks: Range<u64>,
        old: &Below<E>,
        new: &Below<E>,
        busy: &mut Vec<Range<u64>>,
    ) -> Result {
        // What lies beyond the end of the disk is never read, and zeroed when the disk grows.
        let size = self.layer.core().size;
        let bytes = blocks.start * BLOCK_SIZE..(blocks.end * BLOCK_SIZE).min(size);
        if bytes.is_empty() {
            return Ok(());
        }
        let before = old.read(&self.io, bytes.clone()).await?;
        let after = new.read(&self.io, bytes.clone()).await?;
        let need = |(before, after): (&[u8], &[u8])| match () {
            () if before == after => Need::None,
            () if before.iter().all(|&byte| byte == 0) => Need::Zero,
            () => Need::Data,
        };
        let needs: Vec<Need> = before.chunks(BLOCK_BYTES).zip(after.chunks(BLOCK_BYTES)).map(need).collect();
        let unit = self.layer.part_blocks_max() as usize;
        let ticket = Arc::new(Ticket::default());
        let mut at = 0;
        for group in needs.chunk_by(|a, b| a == b).flat_map(|group| group.chunks(unit)) {
            let start = blocks.start + at as u64;
            let target = start..start + group.len() as u64;
            let count = group.len() as u32;
            let waiter = Waiter::Ticket(Arc::clone(&ticket));
            let part = match group[0] {
                Need::None => None,
                Need::Zero => Some(Part::index_only(Run::Zero { start, count }, waiter)),
                Need::Data => {
                    let from =
                        &before[at * BLOCK_BYTES..((at + group.len()) * BLOCK_BYTES).min(before.len())];
                    let mut buf = self.staging(group.len());
                    buf[..from.len()].copy_from_slice(from);
                    buf[from.len()..].fill(0);
                    let part = Part::data(Run::Data { start, count }, buf, waiter);
                    Some(Part { of_guest: false, ..part })
                }
            };
            at += group.len();
            let Some(part) = part else { continue };
            let mut core = self.layer.core();
            if core.may_copy(&target) {
                core.append(part);
            } else {
                busy.push(target);
            }
        }
        self.wait(&ticket).await.map(drop)
    }
}
