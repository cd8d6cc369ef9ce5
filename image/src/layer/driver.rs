//! Does a layer's jobs on one thread's reactor.
//!
//! Whoever has an interest in progress pumps: queues when they are polled, tasks when they wait.
//! A finished job pumps again, so that the log keeps moving without anybody else; a queue that has
//! nothing outstanding stops doing so and wakes one that has, so that it can be dropped.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use super::core::Job;
use super::device::Layer;
use super::log::{Part, RecordWrite};
use super::waiter::{Result, Ticket, Waiter};
use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_BYTES, FileOffset};

/// Bytes of staging buffers of one size that a thread keeps for reuse.
const POOL_BYTES: usize = 512 << 10;

/// A thread's handle on a layer. Clones share the thread's counters and buffers.
pub(super) struct Driver<E: Engine> {
    pub(super) layer: Arc<Layer<E>>,
    pub(super) io: Io<E>,
    local: Rc<Local>,
}

struct Local {
    /// Jobs running on this reactor.
    jobs: Cell<usize>,
    /// Whether finished jobs may start further ones here.
    active: Cell<bool>,
    /// Free staging buffers by their length in blocks.
    pool: RefCell<Vec<Vec<AlignedBuf>>>,
}

impl<E: Engine> Clone for Driver<E> {
    fn clone(&self) -> Self {
        Self { layer: Arc::clone(&self.layer), io: self.io.clone(), local: Rc::clone(&self.local) }
    }
}

impl<E: Engine> Driver<E> {
    pub(super) fn new(layer: Arc<Layer<E>>, io: Io<E>) -> Self {
        let blocks_max = layer.part_blocks_max() as usize;
        let local = Local {
            jobs: Cell::new(0),
            active: Cell::new(true),
            pool: RefCell::new((0..=blocks_max).map(|_| Vec::new()).collect()),
        };
        Self { layer, io, local: Rc::new(local) }
    }

    /// Jobs running on this reactor.
    pub(super) fn jobs(&self) -> usize {
        self.local.jobs.get()
    }

    /// Whether finished jobs start further ones here.
    pub(super) fn set_active(&self, active: bool) {
        self.local.active.set(active);
    }

    /// Starts every job that can be done now.
    pub(super) fn pump(&self) {
        loop {
            let Some(job) = self.layer.core().next_job() else { return };
            self.local.jobs.set(self.local.jobs.get() + 1);
            let driver = self.clone();
            self.io.spawn(async move {
                driver.run(job).await;
                driver.local.jobs.set(driver.local.jobs.get() - 1);
                if driver.local.active.get() {
                    driver.pump();
                } else {
                    let mut core = driver.layer.core();
                    core.nudge();
                    core.wake_maintenance();
                }
            });
        }
    }

    async fn run(&self, job: Job) {
        match job {
            Job::Record(record) => {
                let (sequence, result) = self.write_record(record).await;
                self.layer.core().record_done(sequence, result, self.io.now());
            }
            Job::Void(record) => {
                let (sequence, result) = self.write_record(record).await;
                self.layer.core().void_done(sequence, result, self.io.now());
            }
            Job::Sync => {
                let result = self.io.run(Op::Sync { file: self.layer.file() }).await.result;
                self.layer.core().sync_done(result.map(drop));
            }
            Job::Reserve(ranges) => {
                let result = self.reserve(ranges).await;
                self.layer.core().reserve_done(result);
            }
        }
    }

    async fn write_record(&self, record: RecordWrite) -> (u64, std::result::Result<(), Errno>) {
        let write = Op::write(self.layer.file(), record.offset, record.memory);
        let outcome = self.io.run(write).await;
        for buf in outcome.memory.into_iter().flat_map(|memory| memory.into_owned()) {
            self.recycle(buf);
        }
        (record.sequence, outcome.result.map(drop))
    }

    /// Allocates ranges of the file; where the file system cannot, it only makes the file long
    /// enough, so that no record is written past its end.
    pub(super) async fn reserve(&self, ranges: Vec<Range<u64>>) -> std::result::Result<(), Errno> {
        for range in ranges {
            let len = range.end - range.start;
            let allocate = Op::Allocate { file: self.layer.file(), offset: FileOffset(range.start), len };
            match self.io.run(allocate).await.result {
                Ok(_) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.grow(range.end).await?,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    async fn grow(&self, size: u64) -> std::result::Result<(), Errno> {
        use sapwood_blockdev::storage::StorageFile;
        let file = self.layer.file();
        if file.size().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))? >= size {
            return Ok(());
        }
        self.io.run(Op::Truncate { file, size }).await.result.map(drop)
    }

    /// A staging buffer of `blocks` blocks with any contents.
    pub(super) fn staging(&self, blocks: usize) -> AlignedBuf {
        let pooled = self.local.pool.borrow_mut().get_mut(blocks).and_then(Vec::pop);
        pooled.unwrap_or_else(|| AlignedBuf::zeroed(blocks * BLOCK_BYTES))
    }

    fn recycle(&self, buf: AlignedBuf) {
        if let Some(free) = self.local.pool.borrow_mut().get_mut(buf.len() / BLOCK_BYTES)
            && (free.len() + 1) * buf.len() <= POOL_BYTES
        {
            free.push(buf);
        }
    }

    /// Appends parts and waits until all of them count: the places of their data.
    pub(super) async fn append(&self, parts: impl FnOnce(&Waiter) -> Vec<Part>) -> Result<Vec<u32>> {
        let ticket = Arc::new(Ticket::default());
        let parts = parts(&Waiter::Ticket(Arc::clone(&ticket)));
        {
            let mut core = self.layer.core();
            parts.into_iter().for_each(|part| core.append(part));
        }
        self.wait(&ticket).await
    }

    /// Makes everything published durable.
    pub(super) async fn flush(&self) -> Result {
        let ticket = Arc::new(Ticket::default());
        self.layer.core().flush(Waiter::Ticket(Arc::clone(&ticket)));
        self.wait(&ticket).await.map(drop)
    }

    /// Syncs the file for something that is no record.
    pub(super) async fn sync_file(&self) -> Result {
        let ticket = Arc::new(Ticket::default());
        self.layer.core().sync_file(Waiter::Ticket(Arc::clone(&ticket)));
        self.wait(&ticket).await.map(drop)
    }

    /// Waits for a ticket, keeping the log moving meanwhile.
    pub(super) async fn wait(&self, ticket: &Ticket) -> Result<Vec<u32>> {
        poll_fn(|cx| {
            // Registered before the look: whoever ends a job without going on wakes a waiter.
            let ended = ticket.poll(cx);
            if ended.is_pending() {
                self.pump();
            }
            ended
        })
        .await
    }

    /// Waits until no job runs on this reactor, and starts no more.
    pub(super) async fn retire(&self) {
        self.set_active(false);
        poll_fn(|cx| {
            if self.jobs() == 0 {
                return Poll::Ready(());
            }
            self.layer.core().maintenance_wakers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
