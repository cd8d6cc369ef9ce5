//! The io_uring engine.
//!
//! - Operations wait in a queue until the next collect or wait, which submits them in one batch:
//!   one io_uring_enter(2) for as many as the submission queue takes, none when there is nothing
//!   to submit and the ring shows nothing to process.
//! - The kernel is given at most as many operations as the completion queue holds, so that it
//!   cannot overflow; the rest wait with us.
//! - Each operation lives in a slot of a slab, with all the memory that it lends to the kernel,
//!   until its completion has been seen. Dropping the engine cancels what can be cancelled and
//!   waits; if the kernel does not finish in `drain::DRAIN_TIME_MAX` the memory is leaked.
//! - A sleeping thread is woken through an eventfd on which the ring keeps a read, and by a
//!   one-shot poll of the watched descriptor; both are armed only when the thread goes to sleep.
//!   (MSG_RING would need a ring in every thread that wakes, and would keep this one alive.)
#![allow(unsafe_code)]

mod drain;
mod entry;
mod files;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode};
use slab::Slab;

use super::perform::{foregone, perform};
use super::probe::{self, Features};
use super::{Completion, Engine, EngineStats, Notify, Op, STALL_PAUSE, Time, WatchFd, monotonic_now};
use crate::Errno;
use crate::storage::{HostFile, StorageFile};
use entry::{Lent, Pool};
use files::FileTable;

/// Completion queue entries kept for the engine's own operations: the wake, the watch, cancels.
const RESERVE: usize = 16;

/// How an io_uring engine is made.
#[derive(Clone, Copy, Debug)]
pub struct UringOptions {
    /// Entries of the submission queue: the largest batch of one system call. A power of two.
    pub entries: u32,
    /// Entries of the completion queue: operations that the kernel has at a time, others wait in
    /// the engine. At least 32; a power of two.
    pub in_flight: u32,
    /// Files that may be registered at a time; operations on others work, a little slower.
    pub files: u32,
    /// What may be used of what the kernel offers.
    pub allowed: Features,
}

impl Default for UringOptions {
    fn default() -> Self {
        Self { entries: 256, in_flight: 1024, files: 64, allowed: Features::ALL }
    }
}

/// What the kernel works on for us, under the slot's key as its user data.
enum Slot {
    /// An operation of the engine's user.
    Operation { token: u64, op: Op<HostFile>, lent: Lent },
    /// The read of the wake eventfd and where its counter goes.
    Wake(#[allow(dead_code, reason = "held for the kernel, not read")] Box<[u8; 8]>),
    /// A poll of a watched descriptor.
    Watch(#[allow(dead_code, reason = "held for the kernel, not read")] Arc<OwnedFd>),
    /// The cancelling of another slot.
    Cancel,
}

/// An engine on io_uring, for the thread that made it.
pub struct UringEngine {
    ring: IoUring,
    features: Features,
    slots: Slab<Slot>,
    /// Entries not yet in the submission queue.
    pending: VecDeque<Entry>,
    /// Entries given to the submission queue whose completions have not been seen.
    in_kernel: usize,
    /// Operations submitted and not collected: in `slots` and in `finished`.
    operations: usize,
    /// Operations that ended without the kernel's ring.
    finished: Vec<Completion<HostFile>>,
    files: FileTable,
    pool: Pool,
    notify: Arc<Notify>,
    wake_armed: bool,
    watched: Option<Arc<OwnedFd>>,
    /// The slot of the poll on `watched`.
    watch_armed: Option<usize>,
    stats: EngineStats,
    /// SINGLE_ISSUER ties the ring to the thread that made it.
    _not_send: PhantomData<*const ()>,
}

impl UringEngine {
    /// An engine for the calling thread with the default options.
    ///
    /// # Errors
    /// As [`UringEngine::with_options`].
    pub fn new() -> io::Result<Self> {
        Self::with_options(&UringOptions::default())
    }

    /// An engine for the calling thread.
    ///
    /// # Errors
    /// `Unsupported` where io_uring is older than Linux 5.11; ENOSYS or EPERM where there is none
    /// or it is forbidden (seccomp, the `kernel.io_uring_disabled` sysctl); ENOMEM. The
    /// [`BlockingEngine`](super::BlockingEngine) then serves.
    pub fn with_options(options: &UringOptions) -> io::Result<Self> {
        let (ring, features) = probe::build(options)?;
        let notify = Notify::new()?;
        let table = if features.fixed_files { options.files as usize } else { 0 };
        Ok(Self {
            ring,
            features,
            slots: Slab::new(),
            pending: VecDeque::new(),
            in_kernel: 0,
            operations: 0,
            finished: Vec::new(),
            files: FileTable::new(table, Arc::clone(&notify)),
            pool: Pool::default(),
            notify,
            wake_armed: false,
            watched: None,
            watch_armed: None,
            stats: EngineStats::default(),
            _not_send: PhantomData,
        })
    }

    /// What of io_uring is in use.
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the engine has done so far.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Operations that the kernel may have at a time.
    fn in_kernel_max(&self) -> usize {
        self.ring.params().cq_entries() as usize - RESERVE
    }

    /// Moves entries into the submission queue while there is room.
    fn fill(&mut self) {
        let room = self.in_kernel_max().saturating_sub(self.in_kernel);
        let mut queue = self.ring.submission();
        for _ in 0..room.min(queue.capacity() - queue.len()) {
            let Some(entry) = self.pending.pop_front() else { break };
            // SAFETY: the entry's pointers lead to memory on the heap or of a mapping, which its
            // slot owns until the completion is seen (or leaks, see `drain`).
            let pushed = unsafe { queue.push(&entry) };
            assert!(pushed.is_ok(), "the submission queue has room");
            self.in_kernel += 1;
        }
    }

    /// Whether an enter would submit something or make completions visible.
    fn needs_enter(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// One system call: submits the submission queue and makes finished work visible, without
    /// blocking. Returns how many entries the kernel took.
    ///
    /// # Errors
    /// As io_uring_enter(2); the entries not taken stay queued.
    fn enter(&mut self) -> Result<usize, Errno> {
        self.stats.enters += 1;
        let queued = self.ring.submission().len() as u32;
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument is passed, and the entries are valid as `fill` says.
        let taken = unsafe { self.ring.submitter().enter::<()>(queued, 0, flags, None) };
        taken.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// The same, and blocks until something has finished or `timeout` has passed.
    ///
    /// # Errors
    /// As io_uring_enter(2): TIME when `timeout` has passed.
    fn enter_and_sleep(&mut self, timeout: Option<Duration>) -> Result<(), Errno> {
        self.stats.enters += 1;
        let timeout = timeout.map(|t| Timespec::new().sec(t.as_secs()).nsec(t.subsec_nanos()));
        let mut args = SubmitArgs::new();
        if let Some(timeout) = &timeout {
            args = args.timespec(timeout);
        }
        let taken = self.ring.submitter().submit_with_args(1, &args);
        taken.map(drop).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Takes completions out of the ring and appends those of operations to `done`.
    fn reap(&mut self, done: &mut Vec<Completion<HostFile>>) {
        for event in self.ring.completion() {
            let key = event.user_data() as usize;
            self.in_kernel -= 1;
            match self.slots.remove(key) {
                Slot::Operation { token, op, lent } => {
                    self.pool.give_back(lent);
                    let result = result_of(&op, event.result());
                    done.push(Completion { token, result, op });
                    self.operations -= 1;
                    self.stats.completed += 1;
                }
                Slot::Wake(_) => self.wake_armed = false,
                Slot::Watch(_) if self.watch_armed == Some(key) => self.watch_armed = None,
                Slot::Watch(_) | Slot::Cancel => {}
            }
        }
    }

    /// Gives the kernel everything it may have; what then is left in the submission queue can go
    /// with the next enter.
    fn start_all(&mut self) {
        self.fill();
        while !self.pending.is_empty() && self.in_kernel < self.in_kernel_max() {
            let taken = self.enter();
            if !went_well(&taken) || taken == Ok(0) {
                return;
            }
            self.fill();
        }
    }

    /// Queues an operation of the engine itself ahead of all others; `None` if the kernel is short
    /// of memory.
    fn push_own(&mut self, slot: Slot, entry: Entry) -> Option<usize> {
        if self.ring.submission().is_full() {
            self.enter().ok();
        }
        let vacant = self.slots.vacant_entry();
        let key = vacant.key();
        let entry = entry.user_data(key as u64);
        // SAFETY: as in `fill`: what the entry points to is owned by the slot.
        unsafe { self.ring.submission().push(&entry) }.ok()?;
        vacant.insert(slot);
        self.in_kernel += 1;
        Some(key)
    }

    /// Puts the read of the wake eventfd and the poll of the watched descriptor into the ring;
    /// `false` if they cannot be: then the thread must not sleep.
    fn arm(&mut self) -> bool {
        if !self.wake_armed {
            let mut counter = Box::new([0; 8]);
            let eventfd = Fd(self.notify.eventfd().as_raw_fd());
            let entry = opcode::Read::new(eventfd, counter.as_mut_ptr(), 8).build();
            if self.push_own(Slot::Wake(counter), entry).is_none() {
                return false;
            }
            self.wake_armed = true;
        }
        if self.watch_armed.is_none()
            && let Some(fd) = &self.watched
        {
            let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN as u32).build();
            self.watch_armed = self.push_own(Slot::Watch(Arc::clone(fd)), entry);
            return self.watch_armed.is_some();
        }
        true
    }

    fn cancel(&mut self, key: usize) -> Option<usize> {
        self.push_own(Slot::Cancel, opcode::AsyncCancel::new(key as u64).build())
    }

    /// Ends an operation that the ring is not asked for.
    fn finish(&mut self, token: u64, op: Op<HostFile>, result: Result<usize, Errno>) {
        self.finished.push(Completion { token, result, op });
    }

    /// Whether the ring can do it; else it is a blocking call.
    fn is_offered(&self, op: &Op<HostFile>) -> bool {
        match op {
            Op::Rename { .. } | Op::Unlink { .. } => self.features.names,
            Op::Truncate { .. } => self.features.truncate,
            // The ring has no ioctl(2), and a command of its own for this only from Linux 6.12 on.
            Op::Discard { file, .. } => !file.is_device(),
            _ => true,
        }
    }
}

/// Whether an enter got as far as it could: being interrupted or timed out are no failures.
/// `false`: the kernel is short of memory, which passes.
///
/// # Panics
/// On every other error: the ring or its entries would be wrong, which is our own doing.
fn went_well<T>(entered: &Result<T, Errno>) -> bool {
    match entered {
        Ok(_) | Err(Errno::INTR | Errno::TIME) => true,
        Err(Errno::AGAIN | Errno::BUSY | Errno::NOMEM) => false,
        Err(errno) => panic!("io_uring_enter: {errno}"),
    }
}

/// The result that a completion queue entry stands for.
fn result_of(op: &Op<HostFile>, code: i32) -> Result<usize, Errno> {
    match (usize::try_from(code), op) {
        (Ok(moved), Op::Read(_) | Op::Write(_)) => Ok(moved),
        (Ok(_), _) => Ok(0),
        (Err(_), _) => Err(Errno::from_raw_os_error(-code)),
    }
}

impl Engine for UringEngine {
    type File = HostFile;

    fn submit(&mut self, token: u64, op: Op<HostFile>) {
        self.stats.submitted += 1;
        self.operations += 1;
        if let Some(result) = foregone(&op) {
            return self.finish(token, op, result);
        }
        if !self.is_offered(&op) {
            let result = perform(&op, self.pool.scratch());
            return self.finish(token, op, result);
        }
        let registered = entry::file(&op).and_then(|file| self.files.index(&self.ring, file));
        match entry::build(&op, registered, &mut self.pool) {
            Ok((entry, lent)) => {
                let key = self.slots.insert(Slot::Operation { token, op, lent });
                self.pending.push_back(entry.user_data(key as u64));
            }
            Err(errno) => self.finish(token, op, Err(errno)),
        }
    }

    fn collect(&mut self, done: &mut Vec<Completion<HostFile>>) {
        if self.notify.take_file_closed() {
            self.files.sweep(&self.ring);
        }
        self.operations -= self.finished.len();
        self.stats.completed += self.finished.len() as u64;
        done.append(&mut self.finished);
        self.reap(done);
        loop {
            self.fill();
            if !self.needs_enter() {
                return;
            }
            let taken = self.enter();
            self.reap(done);
            if !went_well(&taken) || taken == Ok(0) || self.pending.is_empty() {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        let timeout = deadline.map(|deadline| deadline.saturating_sub(self.now()));
        let may_sleep = self.finished.is_empty()
            && self.ring.completion().is_empty()
            && !timeout.is_some_and(|t| t.is_zero())
            && self.notify.fall_asleep();
        let armed = may_sleep && self.arm();
        self.start_all();
        let entered = if armed {
            self.enter_and_sleep(timeout)
        } else if self.needs_enter() {
            self.enter().map(drop)
        } else {
            Ok(())
        };
        if may_sleep {
            self.notify.get_up();
            if !went_well(&entered) || !armed {
                std::thread::sleep(STALL_PAUSE);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.operations
    }

    fn now(&self) -> Time {
        monotonic_now()
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.notify))
    }
}

impl WatchFd for UringEngine {
    fn watch(&mut self, fd: Option<Arc<OwnedFd>>) {
        let same = match (&fd, &self.watched) {
            (Some(new), Some(old)) => Arc::ptr_eq(new, old),
            _ => false,
        };
        if !same && let Some(key) = self.watch_armed.take() {
            // If the cancel cannot be queued the poll stays until it fires or the engine ends.
            self.cancel(key);
        }
        self.watched = fd;
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("operations", &self.operations)
            .field("in_kernel", &self.in_kernel)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// The engine in one line, for a log.
impl fmt::Display for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameters = self.ring.params();
        let (entries, in_flight) = (parameters.sq_entries(), parameters.cq_entries());
        write!(f, "io_uring, {entries} entries, {in_flight} in flight: {}", self.features)
    }
}
