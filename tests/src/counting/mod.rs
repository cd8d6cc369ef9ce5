//! Counts instead of times: what an engine is asked to do, which files are opened, and what a thread allocates. Counts are
//! the same on a busy machine.

pub mod allocator;

use std::ffi::OsString;
use std::io;
use std::ops::Sub;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use sapwood_blockdev::engine::{Completion, Engine, Op, Time, WatchFd};
use sapwood_blockdev::storage::{HostFile, HostStorage, OpenOptions, Storage};

/// What engines and storages that share these were asked to do.
#[derive(Debug, Default)]
pub struct Counters {
    writes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    opens: AtomicU64,
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
    /// Files that were opened or made.
    pub opens: u64,
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            writes: self.writes - before.writes,
            written_bytes: self.written_bytes - before.written_bytes,
            reads: self.reads - before.reads,
            read_bytes: self.read_bytes - before.read_bytes,
            opens: self.opens - before.opens,
        }
    }
}

impl Counters {
    /// The values now.
    pub fn now(&self) -> Counts {
        Counts {
            writes: self.writes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            opens: self.opens.load(Ordering::Relaxed),
        }
    }

    fn note<F>(&self, op: &Op<F>) {
        let (count, sum, transfer) = match op {
            Op::Write(transfer) => (&self.writes, &self.written_bytes, transfer),
            Op::Read(transfer) => (&self.reads, &self.read_bytes, transfer),
            _ => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
        sum.fetch_add(transfer.wanted() as u64, Ordering::Relaxed);
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

/// The host's files, counting how often one is opened.
#[derive(Clone, Debug)]
pub struct CountingStorage(pub Arc<Counters>);

impl Storage for CountingStorage {
    type File = HostFile;

    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<HostFile> {
        self.0.opens.fetch_add(1, Ordering::Relaxed);
        HostStorage.open(path, options)
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        HostStorage.random(bytes)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        HostStorage.create_directory(path)
    }

    fn list_directory(&self, path: &Path) -> io::Result<Vec<OsString>> {
        HostStorage.list_directory(path)
    }
}
