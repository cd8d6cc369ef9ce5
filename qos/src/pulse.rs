//! Whether guests ask for anything, as work in the background wants to know.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sapwood_blockdev::engine::Time;

/// How long guests count as busy after a request, when it was looked.
const BUSY: Time = Time::from_millis(100);

/// Whether guests ask for anything. A request costs a look at what seldom changes: it is marked twice in [`BUSY`], and only while
/// there is work in the background.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    is_marked: AtomicBool,
    /// Until when guests are busy, in nanoseconds, as far as was looked.
    busy_until: AtomicU64,
}

impl Pulse {
    /// A guest asks for something.
    pub(crate) fn mark(&self) {
        if !self.is_marked.load(Ordering::Relaxed) {
            self.is_marked.store(true, Ordering::Relaxed);
        }
    }

    /// Whether one has since that was asked last, or for [`BUSY`] after.
    pub(crate) fn is_busy(&self, now: Time) -> bool {
        let nanos = |time: Time| time.as_nanos().try_into().unwrap_or(u64::MAX);
        // Whoever sees no mark sees until when that was taken to last; a mark that is lost between the two is within it.
        if self.is_marked.load(Ordering::Acquire) {
            if self.busy_until.load(Ordering::Relaxed) < nanos(now + BUSY / 2) {
                self.busy_until.store(nanos(now + BUSY), Ordering::Relaxed);
                self.is_marked.store(false, Ordering::Release);
            }
            return true;
        }
        nanos(now) < self.busy_until.load(Ordering::Relaxed)
    }
}
