//! The engine for hosts without io_uring, and for small tools: system calls that block.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use libc::iovec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::perform::perform;
use super::{Completion, Engine, EngineStats, Notify, Op, Time, WatchFd, monotonic_now};
use crate::Errno;
use crate::storage::HostFile;

/// Performs each operation when it is submitted, with preadv(2), pwritev(2), fdatasync(2) and so
/// on; the next [`Engine::collect`] reports it.
#[derive(Debug)]
pub struct BlockingEngine {
    finished: Vec<Completion<HostFile>>,
    notify: Arc<Notify>,
    watched: Option<Arc<OwnedFd>>,
    scratch: Vec<iovec>,
    stats: EngineStats,
}

// SAFETY: `scratch` alone is not `Send`, for its addresses: they are filled in and used within one
// operation, under a mutable borrow, and mean nothing between two.
#[allow(unsafe_code)]
unsafe impl Send for BlockingEngine {}

impl BlockingEngine {
    /// An engine for the calling thread.
    ///
    /// # Errors
    /// What eventfd(2) says.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            finished: Vec::new(),
            notify: Notify::new()?,
            watched: None,
            scratch: Vec::new(),
            stats: EngineStats::default(),
        })
    }

    /// What the engine has done so far.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Sleeps until one of the descriptors is readable, and empties the waker's.
    fn sleep(&mut self, timeout: Option<Time>) {
        let timeout = timeout.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        let eventfd = self.notify.eventfd();
        let waker = PollFd::from_borrowed_fd(eventfd, PollFlags::IN);
        let watched = self.watched.as_deref().map(|fd| PollFd::new(fd, PollFlags::IN));
        let count = 1 + usize::from(watched.is_some());
        let mut fds = [waker.clone(), watched.unwrap_or(waker)];
        self.stats.enters += 1;
        match poll(&mut fds[..count], timeout.as_ref()) {
            Ok(_) if fds[0].revents().contains(PollFlags::IN) => {
                self.stats.enters += 1;
                // It is readable and we are its only reader: this does not block.
                let _ = rustix::io::read(eventfd, &mut [0; 8]);
            }
            Ok(_) | Err(Errno::INTR) => {}
            // Out of memory, or a descriptor the caller closed: never spin on it.
            Err(error) => {
                log::error!("poll: {error}");
                std::thread::sleep(super::STALL_PAUSE);
            }
        }
    }
}

impl Engine for BlockingEngine {
    type File = HostFile;

    fn submit(&mut self, token: u64, op: Op<HostFile>) {
        self.stats.submitted += 1;
        self.stats.enters += 1;
        let result = perform(&op, &mut self.scratch);
        self.finished.push(Completion { token, result, op });
    }

    fn collect(&mut self, done: &mut Vec<Completion<HostFile>>) {
        self.stats.completed += self.finished.len() as u64;
        done.append(&mut self.finished);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        if !self.finished.is_empty() {
            return;
        }
        let timeout = deadline.map(|deadline| deadline.saturating_sub(self.now()));
        if timeout.is_some_and(|t| t.is_zero()) || !self.notify.fall_asleep() {
            return;
        }
        self.sleep(timeout);
        self.notify.get_up();
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn now(&self) -> Time {
        monotonic_now()
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.notify))
    }
}

impl WatchFd for BlockingEngine {
    fn watch(&mut self, fd: Option<Arc<OwnedFd>>) {
        self.watched = fd;
    }
}
