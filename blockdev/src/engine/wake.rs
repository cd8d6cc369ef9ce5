//! Waking an engine's thread from others.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};

use crate::Errno;

/// The thread runs; a wake is left as a note for its next sleep.
const AWAKE: u8 = 0;
/// The thread sleeps or is about to; a wake must write to the eventfd.
const ASLEEP: u8 = 1;
/// Woken since the last sleep.
const NOTIFIED: u8 = 2;

/// How other threads reach a sleeping engine.
///
/// All decisions are taken by swaps of one atomic, so each wake either finds the thread asleep,
/// and writes to the eventfd that it sleeps on, or is found by the thread before it sleeps. A
/// wake of a thread that runs costs no system call.
#[derive(Debug)]
pub(crate) struct Notify {
    state: AtomicU8,
    /// A file that the engine may have registered was closed.
    closed: AtomicBool,
    /// Blocking, so that an io_uring read of it waits instead of failing with EAGAIN.
    eventfd: OwnedFd,
}

impl Notify {
    pub(super) fn new() -> Result<Arc<Self>, Errno> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self { state: AtomicU8::new(AWAKE), closed: AtomicBool::new(false), eventfd }))
    }

    /// Announces that the thread is about to sleep on [`Notify::eventfd`]; `false` if it was
    /// woken meanwhile and must not.
    pub(super) fn fall_asleep(&self) -> bool {
        let slept = self.state.compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if !slept {
            self.get_up();
        }
        slept
    }

    /// Takes the announcement, and any wake, back.
    pub(super) fn get_up(&self) {
        self.state.swap(AWAKE, Ordering::AcqRel);
    }

    /// Becomes readable when a sleeping thread is to be woken; the sleeper empties it.
    pub(super) fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Called when the last handle of a registered file is gone.
    pub(crate) fn file_closed(&self) {
        self.closed.store(true, Ordering::Release);
        self.notify();
    }

    /// Whether a file was closed since the last call.
    pub(super) fn take_file_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed) && self.closed.swap(false, Ordering::AcqRel)
    }

    fn notify(&self) {
        if self.state.swap(NOTIFIED, Ordering::AcqRel) != ASLEEP {
            return;
        }
        // An eventfd takes a 1 unless 2^64 - 2 wakes are unread: only EINTR can be reported.
        while rustix::io::write(&self.eventfd, &1u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }
}

impl Wake for Notify {
    fn wake(self: Arc<Self>) {
        self.notify();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.notify();
    }
}
