//! Shedding: what a layer holds and what lies below it shows as well is let go.
//!
//! The reverse of copying up. A block is compared with what lies below, which does not change, and an
//! *absent* run is appended for it, but only if the map still says of it what it said before the
//! comparison and no writer is at it: check and append happen under one lock, so that in the log the run
//! never follows what a guest has written meanwhile. A block that a writer is at stays.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use futures_util::future::join_all;

use super::base::Below;
use super::core::Core;
use super::driver::Driver;
use super::extents::MapRun;
use super::log::Part;
use super::node::Entry;
use super::read::complain;
use super::record::Run;
use super::tuning::breaks;
use super::waiter::{Result, Ticket, Waiter};
use crate::side::{BATCH, CHUNK_LEN, WINDOW_LEN, cut};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// What the map says of the `n`th block of a run.
fn entry_at(run: &MapRun, n: u64) -> Entry {
    match run.entry.place() {
        Some(place) => Entry(place + n as u32),
        None => run.entry,
    }
}

impl Core {
    fn may_shed(&self, run: &MapRun) -> bool {
        let blocks = run.start..run.start + run.count;
        let is_same = |n| self.map.lookup(run.start + n) == Ok(entry_at(run, n));
        breaks!(self.tuning, ShedOverWriter) || (0..run.count).all(is_same) && !self.is_writer_at(&blocks)
    }
}

impl<E: Engine> Driver<E> {
    /// Lets go of what the layer holds and `below` shows as well, beside its queues. Breaks off where
    /// `progress`, called with the bytes of disk done, does.
    pub(super) async fn shed(
        &self,
        below: &Below<E>,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result {
        let size = self.layer.core().size;
        for window in cut(0..size, WINDOW_LEN) {
            // Keeps a place from being used again: a block that has it later is the same block.
            let epoch = self.layer.core().segments.enter();
            let shed = self.shed_window(window.clone(), below).await;
            self.layer.core().segments.leave(epoch);
            shed?;
            if progress(window.end).is_break() {
                break;
            }
        }
        Ok(())
    }

    async fn shed_window(&self, window: Range<u64>, below: &Below<E>) -> Result {
        let blocks = window.start / BLOCK_SIZE..window.end.div_ceil(BLOCK_SIZE);
        let runs = self.layer.runs(&self.io, blocks).await.map_err(|error| complain(&error))?;
        let held = runs.iter().filter(|run| run.entry != Entry::ABSENT);
        let chunks: Vec<MapRun> = held
            .flat_map(|run| {
                cut(0..run.count, CHUNK_LEN / BLOCK_SIZE).map(|part| MapRun {
                    start: run.start + part.start,
                    count: part.end - part.start,
                    entry: entry_at(run, part.start),
                })
            })
            .collect();
        for batch in chunks.chunks(BATCH) {
            let ended = join_all(batch.iter().map(|run| self.shed_run(run, below))).await;
            ended.into_iter().collect::<Result<Vec<()>>>()?;
        }
        Ok(())
    }

    async fn shed_run(&self, run: &MapRun, below: &Below<E>) -> Result {
        let size = self.layer.core().size;
        let bytes = run.start * BLOCK_SIZE..((run.start + run.count) * BLOCK_SIZE).min(size);
        if bytes.is_empty() {
            return Ok(());
        }
        let (mine, theirs) = (self.read(bytes.clone()).await?, below.read(&self.io, bytes).await?);
        let equal: Vec<bool> =
            mine.chunks(BLOCK_BYTES).zip(theirs.chunks(BLOCK_BYTES)).map(|(a, b)| a == b).collect();
        // Held until the runs count, so that they can be looked up and appended.
        let _pins = self.pin(&(run.start..run.start + run.count)).await?;
        let ticket = Arc::new(Ticket::default());
        let mut at = 0;
        for group in equal.chunk_by(|a, b| a == b) {
            let count = group.len() as u64;
            let part = MapRun { start: run.start + at, count, entry: entry_at(run, at) };
            at += count;
            let mut core = self.layer.core();
            if group[0] && core.may_shed(&part) {
                let absent = Run::Absent { start: part.start, count: count as u32 };
                core.append(Part::index_only(absent, Waiter::Ticket(Arc::clone(&ticket))));
            }
        }
        self.wait(&ticket).await.map(drop)
    }
}
