//! What the supervisor waits for: children, signals, and the clock.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::flag;
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

/// Whether a signal or the time asks for the end, for work that does not wait.
#[derive(Clone, Debug, Default)]
pub struct Interruption {
    signal: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Interruption {
    /// Whether it has come.
    pub fn has_come(&self) -> bool {
        self.signal.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }
}

/// Everything that can happen.
pub struct Events {
    /// A byte for each signal.
    signals: UnixStream,
    /// The same for SIGHUP. It never insists: when a terminal closes, both the kernel and the shell send it.
    hangups: UnixStream,
    /// A signal has come at all.
    signal: Arc<AtomicBool>,
    deadline: Option<Instant>,
    asked: Option<Asked>,
}

impl Events {
    /// Takes signals from now on, and lets time run out after `timeout`.
    pub fn new(timeout: Option<Duration>) -> io::Result<Self> {
        let (signals, sender) = UnixStream::pair()?;
        let (hangups, of_hangups) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        hangups.set_nonblocking(true)?;
        let signal_came = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT] {
            flag::register(signal, Arc::clone(&signal_came))?;
            let sender = if signal == SIGHUP { &of_hangups } else { &sender };
            pipe::register(signal, sender.try_clone()?)?;
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Ok(Self { signals, hangups, signal: signal_came, deadline, asked: None })
    }

    /// Whether the machine is to end, and why.
    pub fn asked(&self) -> Option<Asked> {
        self.asked
    }

    /// The same for work that does not wait.
    pub fn interruption(&self) -> Interruption {
        Interruption { signal: Arc::clone(&self.signal), deadline: self.deadline }
    }

    /// Looks whether the machine is to end, without waiting.
    pub fn has_happened(&mut self) -> io::Result<bool> {
        self.happened(None)?;
        Ok(self.asked.is_some())
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
        let (hangup, signal) = (came(&mut self.hangups)?, came(&mut self.signals)?);
        if (hangup || signal) && self.asked.is_none() {
            self.asked = Some(Asked::ByUser);
            return Ok(Some(Wake::Asked));
        }
        if signal {
            return Ok(Some(Wake::Insisted));
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
        fds.extend([&self.signals, &self.hangups].map(|signals| PollFd::new(signals, PollFlags::IN)));
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        Ok(fds[..watched.len()].iter().position(|fd| !fd.revents().is_empty()))
    }
}

/// Takes a signal, if one has come.
fn came(signals: &mut UnixStream) -> io::Result<bool> {
    match signals.read(&mut [0]) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
