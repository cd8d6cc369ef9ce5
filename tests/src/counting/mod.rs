//! Counts instead of times: what an engine is asked to do, and what a thread allocates. Counts are
//! the same on a busy machine.

pub mod allocator;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use sapwood_blockdev::engine::{Completion, Engine, Op, Time, WatchFd};

/// What engines that share these were asked to do.
#[derive(Debug, Default)]
pub struct Counters {
    writes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
}

/// The values of [`Counters`] at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes, each attempt at the rest of a short one included.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
}

impl Counters {
    /// The values now.
    pub fn now(&self) -> Counts {
        Counts {
            writes: self.writes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
        }
    }

    fn note<F>(&self, op: &Op<F>) {
        let (count, sum, transfer) = match op {
            Op::Write(transfer) => (&self.writes, &self.written_bytes, transfer),
            Op::Read(transfer) => (&self.reads, &self.read_bytes, transfer),
            _ => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
        sum.fetch_add((transfer.memory.len() - transfer.done) as u64, Ordering::Relaxed);
    }
}

/// An engine that counts what it passes on.
#[derive(Debug)]
pub struct CountingEngine<E> {
    inner: E,
    counters: Arc<Counters>,
}

impl<E: Engine> CountingEngine<E> {
    /// Counts what `inner` is asked to do.
    pub fn new(inner: E, counters: Arc<Counters>) -> Self {
        Self { inner, counters }
    }

    /// The engine below.
    pub fn inner(&self) -> &E {
        &self.inner
    }
}

impl<E: Engine> Engine for CountingEngine<E> {
    type File = E::File;

    fn submit(&mut self, token: u64, op: Op<E::File>) {
        self.counters.note(&op);
        self.inner.submit(token, op);
    }

    fn collect(&mut self, done: &mut Vec<Completion<E::File>>) {
        self.inner.collect(done);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.inner.wait(deadline);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn now(&self) -> Time {
        self.inner.now()
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}

impl<E: WatchFd> WatchFd for CountingEngine<E> {
    fn watch(&mut self, fd: Option<Arc<OwnedFd>>) {
        self.inner.watch(fd);
    }
}
