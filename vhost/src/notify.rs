//! Kick, call and error descriptors (vhost-user: SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR).
//!
//! They come from the frontend and may be anything. None blocks a queue's thread, unless the
//! frontend fills its own counter, and makes it blocking, just between the look and the write: it
//! then holds up its own queue, and the orderly end of this server.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};

/// The descriptor that the driver signals when it has made requests available.
#[derive(Clone, Debug)]
pub(crate) struct Kick(Arc<OwnedFd>);

impl Kick {
    /// Takes the descriptor. Only this side reads it, so it can be made non-blocking.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let flags = fcntl_getfl(&file)?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(file.into())))
    }

    /// For an engine to watch.
    pub(crate) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Empties the counter. False when the descriptor is of no use: it would be readable for ever.
    pub(crate) fn clear(&self) -> bool {
        // Whoever shares the open file can have made it block again.
        if poll(&mut [PollFd::new(&*self.0, PollFlags::IN)], Some(&Timespec::default())) == Ok(0) {
            return true;
        }
        match read(&*self.0, &mut [0; 8]) {
            Ok(n) => n > 0,
            Err(error) => matches!(error, Errno::AGAIN | Errno::INTR),
        }
    }
}

/// A descriptor to signal the frontend or the guest with.
#[derive(Debug)]
struct Signal {
    file: File,
    /// The open file is shared with the frontend, which may want to block on it: ask first.
    may_block: bool,
}

/// A place for such a descriptor, which may change while the queue runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notifier(Arc<Mutex<Option<Signal>>>);

impl Notifier {
    /// Sets or takes away the descriptor.
    pub(crate) fn set(&self, file: Option<File>) {
        let signal = file.map(|file| Signal {
            may_block: !fcntl_getfl(&file).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)),
            file,
        });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = signal;
    }

    /// Signals. A counter that is full has been signalled.
    pub(crate) fn signal(&self) {
        let signal = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Signal { file, may_block }) = &*signal else { return };
        if *may_block {
            let mut fds = [PollFd::new(file, PollFlags::OUT)];
            if poll(&mut fds, Some(&Timespec::default())) != Ok(1) {
                return;
            }
        }
        match write(file, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => log::warn!("cannot signal the frontend: {error}"),
        }
    }
}

/// Counts what goes wrong and lets it be logged at the 1st, 2nd, 4th, 8th ... time: a guest
/// cannot fill the log.
#[derive(Debug, Default)]
pub(crate) struct Complaints(u64);

impl Complaints {
    /// Notes one more; gives the number if it is to be logged.
    pub(crate) fn count(&mut self) -> Option<u64> {
        self.0 += 1;
        self.0.is_power_of_two().then_some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::unix::net::UnixStream;

    fn blocking_counter() -> File {
        File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn kicks_are_cleared_without_blocking() {
        let file = blocking_counter();
        let kick = Kick::new(file.try_clone().unwrap()).unwrap();
        assert!(kick.clear(), "nothing to clear");
        write(&file, &3u64.to_ne_bytes()).unwrap();
        assert!(kick.clear());
        assert_eq!(read(&file, &mut [0; 8]), Err(Errno::AGAIN), "cleared");
    }

    #[test]
    fn a_descriptor_at_its_end_is_no_kick() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(!Kick::new(File::from(OwnedFd::from(ours))).unwrap().clear());
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let file = blocking_counter();
        let notifier = Notifier::default();
        notifier.signal();
        notifier.set(Some(file.try_clone().unwrap()));
        write(&file, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        notifier.signal();
        let mut counter = [0; 8];
        read(&file, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), u64::MAX - 1);
    }

    #[test]
    fn complaints_are_rationed() {
        let mut complaints = Complaints::default();
        let logged: Vec<u64> = (0..100).filter_map(|_| complaints.count()).collect();
        assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64]);
    }
}
