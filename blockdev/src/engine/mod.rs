//! The engine seam: every byte that reaches a disk goes through [`Engine`].
//!
//! An engine belongs to one thread. Operations are submitted with a token, start at the next
//! [`Engine::collect`], and come back with what they borrowed. An engine may return short
//! transfers, EINTR and EAGAIN as the kernel does: [`Io`](crate::io::Io) deals with them in one
//! place for all engines.
//!
//! Two engines work on the host's files: [`UringEngine`] and, where the kernel has no io_uring
//! or does not let us use it, [`BlockingEngine`]. They pass the same contract tests
//! (`tests/engine_contract/main.rs`). The simulated one lives with the simulator.

mod blocking;
mod op;
mod perform;
mod probe;
mod uring;
mod wake;

pub use blocking::BlockingEngine;
pub use op::{Op, Transfer};
pub use probe::Features;
pub use uring::{UringEngine, UringOptions};
pub(crate) use wake::Notify;

use std::time::Duration;

use crate::Errno;
use crate::storage::StorageFile;

/// Time since an arbitrary start that does not change while the process lives.
pub type Time = Duration;

/// How long a thread rests when the kernel is short of memory for the next operation.
const STALL_PAUSE: Duration = Duration::from_millis(1);

/// What a host engine has done since it was made: tests assert efficiency by these numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// System calls made: io_uring_enter(2), or the blocking engine's calls. Registrations and
    /// wakes by other threads are not counted.
    pub enters: u64,
    /// Operations submitted.
    pub submitted: u64,
    /// Operations collected.
    pub completed: u64,
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion<F> {
    /// What the operation was submitted with.
    pub token: u64,
    /// Bytes moved by a read or write (which may be fewer than asked); 0 for all others.
    pub result: Result<usize, Errno>,
    /// The operation, with the memory it had borrowed.
    pub op: Op<F>,
}

/// Moves bytes between memory and files, asynchronously, for one thread.
pub trait Engine: 'static {
    /// The files it works on.
    type File: StorageFile;

    /// Accepts an operation. It starts at the latest with the next [`collect`](Self::collect) or
    /// [`wait`](Self::wait); the blocking engine performs it here. Never fails: errors arrive as
    /// completions. Operations in flight are unordered.
    fn submit(&mut self, token: u64, op: Op<Self::File>);

    /// Starts what was submitted and appends everything finished to `done`, without blocking.
    fn collect(&mut self, done: &mut Vec<Completion<Self::File>>);

    /// Blocks until an operation has finished, the waker was used, a watched event has come or
    /// `deadline` has passed. May return early.
    fn wait(&mut self, deadline: Option<Time>);

    /// Operations submitted and not yet collected.
    fn in_flight(&self) -> usize;

    /// Now.
    fn now(&self) -> Time;

    /// A waker that makes this engine's `wait` return, from any thread; a wake before the wait
    /// is not lost.
    fn waker(&self) -> std::task::Waker;
}

/// An engine that can also sleep on a file descriptor, such as a virtqueue's kick eventfd.
pub trait WatchFd: Engine {
    /// From now on [`Engine::wait`] also returns while `fd` is readable; the caller empties it.
    /// Replaces the descriptor watched before; `None` ends the watch.
    fn watch(&mut self, fd: Option<std::sync::Arc<std::os::fd::OwnedFd>>);
}

/// What the host's engines take for now: CLOCK_MONOTONIC, the same in all threads.
pub fn monotonic_now() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs().try_into().unwrap_or(0))
}
