//! How fast background work may go, and whether it should stop.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::{Engine, Time};
use sapwood_blockdev::io::Io;

/// Work is let run ahead by this much time, so that it does not sleep for every small read.
const AHEAD: Duration = Duration::from_millis(20);

/// Shared between the work and whoever holds the reins: the rate may be changed, and the work stopped, while it runs.
#[derive(Debug, Default)]
pub struct Pace {
    stopped: AtomicBool,
    /// Bytes read and written in a second; 0 for no limit.
    rate: AtomicU64,
    /// Bytes read and written so far, and how many there will be; 0 where nobody knows.
    done: AtomicU64,
    expected: AtomicU64,
    /// When the work that was done is paid for.
    paid_at: Mutex<Time>,
}

impl Pace {
    /// Asks the work to stop: marking and accounting stop between two nodes, moving and scrubbing between two packs.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether it should stop.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Limits the work to so many bytes a second from now on; 0 takes the limit away.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Says how many bytes there are to be read and written in all.
    pub fn expect(&self, bytes: u64) {
        self.expected.store(bytes, Ordering::Relaxed);
    }

    /// Bytes read and written so far, and in all; 0 while that is not known.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.expected.load(Ordering::Relaxed))
    }

    /// Fails when it should stop; `path` is for the message.
    pub(super) fn go_on(&self, path: &Path) -> Result<(), ImageError> {
        if self.is_stopped() { Err(ImageError::new(path, ErrorKind::Cancelled)) } else { Ok(()) }
    }

    /// Waits until so many bytes more are within the rate.
    pub async fn spend<E: Engine>(&self, io: &Io<E>, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let now = io.now();
        let paid_at = {
            let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
            *paid_at = (*paid_at).max(now).saturating_add(cost);
            *paid_at
        };
        if paid_at > now + AHEAD {
            io.sleep_until(paid_at - AHEAD).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sapwood_blockdev::engine::BlockingEngine;
    use sapwood_blockdev::io::block_on;

    #[test]
    fn work_waits_for_its_rate_and_stops_when_told() {
        let io = Io::new(BlockingEngine::new().unwrap());
        let pace = std::sync::Arc::new(Pace::default());
        pace.set_rate(1 << 20);
        let (of_task, of_work) = (io.clone(), std::sync::Arc::clone(&pace));
        let start = io.now();
        block_on(&io, async move {
            for _ in 0..8 {
                of_work.spend(&of_task, 12_800).await;
            }
        });
        let paid_at = *pace.paid_at.lock().unwrap();
        assert!(
            paid_at - start >= Duration::from_micros(97_650),
            "100 KiB at 1 MiB a second: {:?}",
            paid_at - start
        );
        assert!(io.now() + AHEAD >= paid_at, "it waited, but for what it may run ahead");
        pace.set_rate(0);
        let (of_task, of_work) = (io.clone(), std::sync::Arc::clone(&pace));
        block_on(&io, async move { of_work.spend(&of_task, 1 << 30).await });
        assert_eq!(*pace.paid_at.lock().unwrap(), paid_at, "nothing is to be paid without a limit");
        assert_eq!(pace.progress(), (8 * 12_800 + (1 << 30), 0), "but it counts");
        pace.expect(1 << 40);
        assert_eq!(pace.progress().1, 1 << 40);
        pace.go_on(Path::new("p")).unwrap();
        pace.stop();
        assert!(matches!(pace.go_on(Path::new("p")).unwrap_err().kind, ErrorKind::Cancelled));
    }
}
