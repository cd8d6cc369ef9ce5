//! The engine seam: every byte that reaches a disk goes through [`Engine`].
//!
//! An engine belongs to one thread. Operations are submitted with a token, start at the next
//! [`Engine::collect`], and come back with what they borrowed. An engine may return short
//! transfers, EINTR and EAGAIN as the kernel does: [`Io`](crate::io::Io) deals with them in one
//! place for all engines.

mod op;

pub use op::{Op, Transfer};

use std::time::Duration;

use crate::Errno;
use crate::storage::StorageFile;

/// Time since an arbitrary start that does not change while the process lives.
pub type Time = Duration;

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
