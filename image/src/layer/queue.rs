//! A thread's queue on a layer: the fast paths.
//!
//! - Read: one look at the map, then straight into the guest's memory.
//! - Write of whole blocks: one copy into staging, then the log.
//! - Everything else (cut blocks, memory that direct I/O cannot reach, nodes of the map that are not
//!   in memory, long runs of zeroes) goes to `merge`.

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::Layer;
use super::driver::Driver;
use super::log::Part;
use super::map::BRANCH_BLOCKS;
use super::merge;
use super::read::Lease;
use super::record::Run;
use super::waiter::{Result, Waiter};
use crate::below::{Piece, Source, reaches};
use sapwood_blockdev::buffer::Memory;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::{Engine, Op, Time};
use sapwood_blockdev::io::{Io, Outcome};
use sapwood_blockdev::units::{BLOCK_BYTES, BlockSpan, SECTOR_SIZE};
use slab::Slab;

/// A request that was accepted and not yet reported.
struct Pending<E: Engine> {
    tag: u64,
    /// Parts of it still under way.
    remaining: usize,
    result: Result,
    /// The epoch of its look-up, for reads.
    epoch: Option<u64>,
    /// What it looked up in a layer below that is still open.
    leases: Vec<Lease<E>>,
}

/// See the module's documentation. Made by [`Layer::queue_on`].
pub struct LayerQueue<E: Engine> {
    driver: Driver<E>,
    port: usize,
    pending: Slab<Pending<E>>,
    /// Writes held back while too much waits for the log.
    held: VecDeque<Request>,
    /// Scratch, kept for its capacity.
    parts: Vec<Piece<E::File>>,
    leases: Vec<Lease<E>>,
    staged: Vec<Part>,
    finished: Vec<(u64, Outcome)>,
    inbox: Vec<(usize, Result)>,
    epochs: Vec<u64>,
    ready: Vec<Done>,
}

impl<E: Engine> LayerQueue<E> {
    pub(super) fn new(layer: Arc<Layer<E>>, io: Io<E>) -> Self {
        let waker = io.with_engine(|engine| engine.waker());
        let port = layer.core().ports.add(waker);
        Self {
            driver: Driver::new(layer, io),
            port,
            pending: Slab::new(),
            held: VecDeque::new(),
            parts: Vec::new(),
            leases: Vec::new(),
            staged: Vec::new(),
            finished: Vec::new(),
            inbox: Vec::new(),
            epochs: Vec::new(),
            ready: Vec::new(),
        }
    }

    fn layer(&self) -> &Arc<Layer<E>> {
        &self.driver.layer
    }

    fn insert(&mut self, tag: u64, remaining: usize) -> usize {
        self.pending.insert(Pending { tag, remaining, result: Ok(()), epoch: None, leases: Vec::new() })
    }

    fn waiter(&self, key: usize) -> Waiter {
        Waiter::Request { port: self.port, key }
    }

    /// Refuses what no disk does; otherwise starts the request.
    fn start(&mut self, request: Request) -> Result {
        let is_io = !matches!(request.command, Command::Flush);
        let is_read = matches!(request.command, Command::Read(_));
        if is_io {
            let size = self.layer().core().size;
            let end = request.offset.0.checked_add(request.len).ok_or(DeviceError::OutOfRange)?;
            let aligned = (request.offset.0 | request.len).is_multiple_of(SECTOR_SIZE);
            if end > size || !aligned {
                return Err(DeviceError::OutOfRange);
            }
            if !is_read && self.layer().is_read_only() {
                return Err(DeviceError::ReadOnly);
            }
            if request.len == 0 {
                self.ready.push(Done { tag: request.tag, result: Ok(()) });
                return Ok(());
            }
        }
        match request.command {
            Command::Read(memory) => self.read(request.tag, request.offset.0, memory),
            Command::Flush => self.flush(request.tag),
            _ if self.must_hold(&request) => self.held.push_back(request),
            Command::Write(_) | Command::WriteZeroes | Command::Discard => self.write(request),
        }
        Ok(())
    }

    fn flush(&mut self, tag: u64) {
        if self.layer().is_read_only() {
            self.ready.push(Done { tag, result: Ok(()) });
            return;
        }
        let key = self.insert(tag, 1);
        let waiter = self.waiter(key);
        self.layer().core().flush(waiter);
    }

    fn read(&mut self, tag: u64, start: u64, mut memory: Memory) {
        let key = self.insert(tag, 0);
        let mut parts = std::mem::take(&mut self.parts);
        let len = memory.len();
        let range = start..start + len as u64;
        let Some(epoch) = self.driver.layer.plan(range, &mut parts, &mut self.leases) else {
            self.parts = parts;
            self.pending[key].remaining = 1;
            return merge::read(&self.driver, start, memory, self.waiter(key));
        };
        let mut remaining = 0;
        for Piece { range, source } in parts.drain(..) {
            let (at, part_len) = ((range.start - start) as usize, (range.end - range.start) as usize);
            if matches!(source, Source::Zero) {
                memory.zero_at(at, part_len);
                continue;
            }
            let whole = part_len == len;
            let mut target = if whole { std::mem::take(&mut memory) } else { memory.share(at, part_len) };
            if let Source::Sealed(part) = source
                && self.layer().read_cached(part, &mut target)
            {
                continue;
            }
            remaining += 1;
            self.read_part(key, range.start, source, target);
        }
        self.parts = parts;
        let pending = &mut self.pending[key];
        pending.remaining = remaining;
        pending.epoch = Some(epoch);
        pending.leases = std::mem::take(&mut self.leases);
        if remaining == 0 {
            self.finish(key);
        }
    }

    fn read_part(&mut self, key: usize, start: u64, source: Source<E::File>, memory: Memory) {
        match source {
            Source::File { file, offset, may_end } if reaches(&file, offset, &memory) => {
                let token = (key as u64) << 1 | u64::from(may_end);
                self.driver.io.start(token, Op::read(file, offset, memory));
            }
            Source::File { file, offset, may_end } => {
                merge::read_bounced(&self.driver, file, offset, may_end, memory, self.waiter(key));
            }
            _ => merge::read(&self.driver, start, memory, self.waiter(key)),
        }
    }

    fn write(&mut self, request: Request) {
        let span = BlockSpan::of(request.offset, request.len);
        let key = self.insert(request.tag, 1);
        let is_short = span.touched.end - span.touched.start <= BRANCH_BLOCKS;
        if span.is_aligned() && is_short {
            let mut staged = std::mem::take(&mut self.staged);
            match &request.command {
                Command::Write(memory) => self.stage(memory, span.whole.start, key, &mut staged),
                _ => {
                    let run = self.layer().zero_run(span.whole.clone());
                    staged.push(Part::index_only(run, self.waiter(key)));
                }
            }
            let appended = self.append(&span, key, &mut staged);
            staged.clear();
            self.staged = staged;
            if appended {
                return;
            }
        } else if is_short {
            let mut core = self.driver.layer.core();
            let is_known = core.can_append(&span.touched);
            core.counts.map.count(is_known);
        }
        merge::write(&self.driver, request, self.waiter(key));
    }

    /// Appends what was staged, unless one of the blocks is under merge.
    fn append(&mut self, span: &BlockSpan, key: usize, staged: &mut Vec<Part>) -> bool {
        let mut core = self.driver.layer.core();
        let is_known = core.can_append(&span.touched);
        core.counts.map.count(is_known);
        if !is_known || core.is_merging(&span.touched) {
            return false;
        }
        self.pending[key].remaining = staged.len();
        staged.drain(..).for_each(|part| core.append(part));
        true
    }

    /// Copies a write into staging: the guest may change its memory from now on.
    fn stage(&self, memory: &Memory, first_block: u64, key: usize, staged: &mut Vec<Part>) {
        let blocks = memory.len() / BLOCK_BYTES;
        let unit = self.layer().part_blocks_max() as usize;
        for at in (0..blocks).step_by(unit) {
            let count = unit.min(blocks - at);
            let mut buf = self.driver.staging(count);
            memory.read_at(at * BLOCK_BYTES, &mut buf);
            let run = Run::Data { start: first_block + at as u64, count: count as u32 };
            staged.push(Part::data(run, buf, self.waiter(key)));
        }
    }

    /// One part of a request has ended.
    fn part_ended(&mut self, key: usize, result: Result) {
        let pending = &mut self.pending[key];
        pending.remaining -= 1;
        if result.is_err() {
            pending.result = result;
        }
        if pending.remaining == 0 {
            self.finish(key);
        }
    }

    fn finish(&mut self, key: usize) {
        let pending = self.pending.remove(key);
        self.epochs.extend(pending.epoch);
        self.ready.push(Done { tag: pending.tag, result: pending.result });
    }

    /// A read that went straight to the guest's memory has ended.
    fn read_ended(&mut self, token: u64, outcome: Outcome) {
        let (key, may_end) = ((token >> 1) as usize, token & 1 == 1);
        let wanted = outcome.memory.as_ref().map_or(0, Memory::len);
        let result = match outcome.result {
            Ok(read) if read < wanted && !may_end => Err(DeviceError::Corrupt),
            Ok(read) if read < wanted => outcome.zero_filled().map(drop).map_err(DeviceError::from),
            other => other.map(drop).map_err(DeviceError::from),
        };
        self.part_ended(key, result);
    }

    /// Takes what has ended; says whether there was anything.
    fn collect(&mut self) -> bool {
        let mut finished = std::mem::take(&mut self.finished);
        self.driver.io.poll(&mut finished);
        let mut inbox = std::mem::take(&mut self.inbox);
        {
            let mut core = self.driver.layer.core();
            core.ports.swap_inbox(self.port, &mut inbox);
            self.epochs.drain(..).for_each(|epoch| core.segments.leave(epoch));
        }
        let any = !finished.is_empty() || !inbox.is_empty();
        for (token, outcome) in finished.drain(..) {
            self.read_ended(token, outcome);
        }
        for (key, result) in inbox.drain(..) {
            self.part_ended(key, result);
        }
        self.finished = finished;
        self.inbox = inbox;
        any
    }

    /// Whether a write has to wait. What frees space does not wait for space.
    fn must_hold(&self, request: &Request) -> bool {
        let data = matches!(request.command, Command::Write(_));
        self.layer().core().hold(self.port, data)
    }

    /// Starts writes that were held back; says whether there were any.
    fn release_held(&mut self) -> bool {
        let held = self.held.len();
        while let Some(request) = self.held.pop_front() {
            if self.must_hold(&request) {
                self.held.push_front(request);
                break;
            }
            self.write(request);
        }
        self.held.len() < held
    }

    /// Whether this queue has an interest in the layer's progress.
    fn is_active(&self) -> bool {
        !self.pending.is_empty() || !self.held.is_empty()
    }
}

impl<E: Engine> DeviceQueue for LayerQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        let tag = request.tag;
        if let Err(error) = self.start(request) {
            self.ready.push(Done { tag, result: Err(error) });
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        // Ends only after `collect` has found the inbox empty.
        self.layer().core().ports.attend(self.port);
        loop {
            self.driver.set_active(self.is_active());
            if self.is_active() {
                self.driver.pump();
            }
            let collected = self.collect();
            let released = self.release_held();
            if !collected && !released {
                break;
            }
        }
        if !self.epochs.is_empty() {
            let mut core = self.driver.layer.core();
            self.epochs.drain(..).for_each(|epoch| core.segments.leave(epoch));
        }
        self.driver.set_active(self.is_active());
        done.append(&mut self.ready);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.driver.io.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.pending.len() + self.held.len() + self.ready.len() + self.driver.jobs()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        self.driver.io.with_engine(f)
    }
}

impl<E: Engine> Drop for LayerQueue<E> {
    fn drop(&mut self) {
        let mut core = self.driver.layer.core();
        core.ports.close(self.port);
    }
}
