//! What the supervisor waits for: children, signals, and the clock.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Why the machine is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// By a signal.
    ByUser,
    /// Its time is over.
    ByTimeout,
}

/// What came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The descriptor with this index can be read, or has ended.
    Ready(usize),
    /// The machine is to end. It comes once; see [`Events::asked`].
    Asked,
    /// A signal came after that: at once.
    Insisted,
    /// The limit of this wait is over.
    Late,
}

/// Everything that can happen.
pub struct Events {
    /// A byte for each signal.
    signals: UnixStream,
    deadline: Option<Instant>,
    asked: Option<Asked>,
}

impl Events {
    /// Takes signals from now on, and lets time run out after `timeout`.
    pub fn new(timeout: Option<Duration>) -> io::Result<Self> {
        let (signals, sender) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            pipe::register(signal, sender.try_clone()?)?;
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Ok(Self { signals, deadline, asked: None })
    }

    /// Whether the machine is to end, and why.
    pub fn asked(&self) -> Option<Asked> {
        self.asked
    }

    /// Waits until one of `watched` is ready or something else happens, at the latest at `limit`.
    pub fn wait(&mut self, watched: &[BorrowedFd<'_>], limit: Option<Instant>) -> io::Result<Wake> {
        loop {
            if let Some(wake) = self.happened(limit)? {
                return Ok(wake);
            }
            if let Some(index) = self.poll(watched, limit)? {
                return Ok(Wake::Ready(index));
            }
        }
    }

    /// A signal that has come, or a time that is over.
    fn happened(&mut self, limit: Option<Instant>) -> io::Result<Option<Wake>> {
        let now = Instant::now();
        let over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        match self.signals.read(&mut [0]) {
            Ok(_) if self.asked.is_some() => return Ok(Some(Wake::Insisted)),
            Ok(_) => {
                self.asked = Some(Asked::ByUser);
                return Ok(Some(Wake::Asked));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        if self.asked.is_none() && over(self.deadline) {
            self.asked = Some(Asked::ByTimeout);
            return Ok(Some(Wake::Asked));
        }
        Ok(over(limit).then_some(Wake::Late))
    }

    /// Waits until anything is ready; the index of the first of `watched` that is.
    fn poll(&self, watched: &[BorrowedFd<'_>], limit: Option<Instant>) -> io::Result<Option<usize>> {
        let deadline = self.deadline.filter(|_| self.asked.is_none());
        let next = [deadline, limit].into_iter().flatten().min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds: Vec<PollFd<'_>> = watched.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        fds.push(PollFd::new(&self.signals, PollFlags::IN));
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        Ok(fds[..watched.len()].iter().position(|fd| !fd.revents().is_empty()))
    }
}
