//! The end of an engine: nothing that the kernel may still write to is freed.

use std::time::Duration;

use super::super::{STALL_PAUSE, monotonic_now};
use super::{Slot, UringEngine};

/// How long the end of an engine waits for the kernel to finish or cancel what is in flight.
pub(super) const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

impl UringEngine {
    /// Drops what the kernel has not been given yet.
    fn forget_pending(&mut self) {
        for entry in self.pending.drain(..) {
            self.slots.remove(entry.get_user_data() as usize);
        }
    }

    /// Asks the kernel to cancel everything, which it can for polls and for what has not reached
    /// a device, and waits. Whether nothing is left in flight.
    fn drain(&mut self) -> bool {
        let deadline = monotonic_now() + DRAIN_TIME_MAX;
        let mut done = Vec::new();
        let keys: Vec<usize> =
            self.slots.iter().filter(|(_, slot)| !matches!(slot, Slot::Cancel)).map(|(key, _)| key).collect();
        let mut keys = keys.into_iter().peekable();
        while self.in_kernel > 0 {
            self.reap(&mut done);
            done.clear();
            while let Some(&key) = keys.peek() {
                // A key that has completed is free or a cancel of ours: nothing to cancel.
                let gone = self.slots.get(key).is_none_or(|slot| matches!(slot, Slot::Cancel));
                if !gone && (self.ring.submission().is_full() || self.cancel(key).is_none()) {
                    break;
                }
                keys.next();
            }
            if self.in_kernel == 0 {
                break;
            }
            let left = deadline.saturating_sub(monotonic_now());
            if left.is_zero() {
                return false;
            }
            if !self.ring.completion().is_empty() {
                continue;
            }
            if self.enter_and_sleep(Some(left)).is_err() {
                std::thread::sleep(STALL_PAUSE);
            }
        }
        true
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        self.forget_pending();
        if !self.drain() {
            log::error!(
                "io_uring: {} operations did not end within {DRAIN_TIME_MAX:?}; leaking their memory",
                self.in_kernel
            );
            std::mem::forget(std::mem::take(&mut self.slots));
        }
        // Closing the ring lets go of the files too, but later, on a kernel thread.
        if self.features.fixed_files
            && let Err(error) = self.ring.submitter().unregister_files()
        {
            log::warn!("io_uring: cannot unregister files: {error}");
        }
    }
}
