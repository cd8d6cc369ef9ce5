//! How the machine ended: the first to say so is right, and wakes whoever waits for it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Ending;
use crate::event::Event;
use crate::run::Error;

/// Shared by all that can end the machine. Clones are the same one.
#[derive(Clone)]
pub struct Verdict {
    shared: Arc<Shared>,
}

struct Shared {
    said: AtomicBool,
    first: Mutex<Option<Result<Ending, Error>>>,
    event: Event,
}

impl Verdict {
    /// The machine runs.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new() -> io::Result<Self> {
        let shared = Shared { said: AtomicBool::new(false), first: Mutex::new(None), event: Event::new()? };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The machine ends so, unless it has ended otherwise before.
    pub fn end(&self, verdict: Result<Ending, Error>) {
        let mut first = self.shared.first.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.said.swap(true, Ordering::AcqRel) {
            log::debug!("the machine has ended already; now also: {verdict:?}");
            return;
        }
        *first = Some(verdict);
        self.shared.event.signal();
    }

    /// Whether it has ended.
    pub fn said(&self) -> bool {
        self.shared.said.load(Ordering::Acquire)
    }

    /// Readable from the end on; nobody reads it empty.
    pub fn event(&self) -> &Event {
        &self.shared.event
    }

    /// Keep this on a thread of the machine: the machine ends when the thread panics, and does not go on without it.
    pub fn on_panic(&self) -> OnPanic {
        OnPanic(self.clone())
    }

    /// How it ended; once.
    pub fn take(&self) -> Option<Result<Ending, Error>> {
        self.shared.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// See [`Verdict::on_panic`].
pub struct OnPanic(Verdict);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::Thread));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_ends_the_machine() {
        let verdict = Verdict::new().unwrap();
        let on_panic = verdict.on_panic();
        std::thread::spawn(move || {
            let _on_panic = on_panic;
            panic!("a mistake of ours");
        })
        .join()
        .unwrap_err();
        assert!(matches!(verdict.take(), Some(Err(Error::Thread))));
    }

    #[test]
    fn the_first_is_right() {
        let verdict = Verdict::new().unwrap();
        assert!(!verdict.said());
        assert!(!verdict.event().clear());
        verdict.clone().end(Ok(Ending::Reboot));
        verdict.end(Ok(Ending::Crash));
        assert!(verdict.said());
        assert!(verdict.event().clear());
        assert!(matches!(verdict.take(), Some(Ok(Ending::Reboot))));
    }
}
