//! Something that a thread waits for: an event file descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// Readable from its signal on until it is cleared.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// One that has not happened.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// It happens.
    pub fn signal(&self) {
        // The call fails only where the counter is at its end, and it is readable then too.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// It has not happened. Returns whether it had.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
