//! What other threads may ask of a server.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, write};

use super::channel;

/// The connection of the running session.
#[derive(Debug, Default)]
struct Session {
    stream: Option<UnixStream>,
    /// Where messages to the frontend go, if it wants any.
    channel: Option<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Control {
    stopping: AtomicBool,
    wake: OwnedFd,
    session: Mutex<Session>,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { stopping: AtomicBool::new(false), wake, session: Mutex::default() })
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Readable once the server is to stop.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    pub(super) fn stop(&self) {
        let session = self.session();
        self.stopping.store(true, Ordering::Release);
        if let Err(error) = write(&self.wake, &1u64.to_ne_bytes()) {
            log::error!("waking the server: {error}");
        }
        shut_down(&session);
    }

    /// Waits until `fd` is readable (or broken); false if the server is to stop.
    pub(super) fn readable(&self, fd: impl AsFd) -> bool {
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("waiting for the frontend: {error}");
                    return false;
                }
                Ok(_) => return !self.stopping(),
            }
        }
    }

    pub(super) fn begin(&self, stream: UnixStream) {
        let mut session = self.session();
        *session = Session { stream: Some(stream), channel: None };
        if self.stopping() {
            shut_down(&session);
        }
    }

    pub(super) fn set_channel(&self, channel: OwnedFd) {
        self.session().channel = Some(channel);
    }

    pub(super) fn end(&self) {
        *self.session() = Session::default();
    }

    pub(super) fn is_connected(&self) -> bool {
        self.session().stream.is_some()
    }

    pub(super) fn config_changed(&self) {
        let session = self.session();
        let Some(channel) = &session.channel else { return };
        if let Err(error) = channel::send_config_changed(channel) {
            log::warn!("telling the frontend of a changed configuration: {error}");
        }
    }
}

/// Makes reads and writes of the connection return, also those that wait.
fn shut_down(session: &Session) {
    if let Some(stream) = &session.stream {
        // It fails when the frontend has gone already.
        drop(stream.shutdown(Shutdown::Both));
    }
}
