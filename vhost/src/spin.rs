//! Polling before sleeping.
//!
//! Going to sleep and being woken costs several microseconds and a context switch; so a thread
//! that was busy looks around for a while first. How long adapts, as KVM's halt polling does: an
//! idle time, polling included, that turned out shorter than the limit doubles it, a longer one
//! halves it, so an idle disk soon costs nothing. With a single CPU nobody could bring work
//! meanwhile: never.
//!
//! Guest and storage have different habits: a guest's next request often comes within
//! microseconds of an answer, while a disk takes its time. So there is a [`Spin`] for each.

use std::time::Duration;

use sapwood_blockdev::engine::Time;

/// The first step up from not polling.
const STEP_MIN: Duration = Duration::from_micros(5);

/// Decides how long to poll.
#[derive(Debug)]
pub(crate) struct Spin {
    limit: Duration,
    budget: Duration,
    idle_since: Option<Time>,
}

impl Spin {
    /// Polling for `limit` at most.
    pub(crate) fn new(limit: Duration) -> Self {
        let single = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        let limit = if single { Duration::ZERO } else { limit };
        Self { limit, budget: Duration::ZERO, idle_since: None }
    }

    /// There was work.
    pub(crate) fn busy(&mut self) {
        self.idle_since = None;
    }

    /// There was none: whether to look again rather than sleep.
    pub(crate) fn again(&mut self, now: impl FnOnce() -> Time) -> bool {
        if self.budget.is_zero() {
            return false;
        }
        let now = now();
        now.saturating_sub(*self.idle_since.get_or_insert(now)) < self.budget
    }

    /// The thread slept from `begin` to `end`.
    pub(crate) fn slept(&mut self, begin: Time, end: Time) {
        let idle = end.saturating_sub(self.idle_since.take().unwrap_or(begin));
        self.budget = if idle < self.limit {
            (self.budget * 2).clamp(STEP_MIN, self.limit.max(STEP_MIN))
        } else if self.budget > STEP_MIN {
            self.budget / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_grows_with_short_sleeps_and_fades() {
        let us = Duration::from_micros;
        let mut spin = Spin { limit: us(50), budget: us(0), idle_since: None };
        assert!(!spin.again(|| us(0)));
        spin.slept(us(0), us(10));
        assert!(spin.again(|| us(100)));
        assert!(spin.again(|| us(104)));
        assert!(!spin.again(|| us(105)));
        for _ in 0..10 {
            spin.slept(us(200), us(210));
            spin.busy();
        }
        assert_eq!(spin.budget, us(50));
        for _ in 0..5 {
            spin.slept(us(1000), us(2000));
        }
        assert!(!spin.again(|| us(0)));
    }

    #[test]
    fn polling_in_vain_counts_as_idle() {
        let us = Duration::from_micros;
        let mut spin = Spin { limit: us(50), budget: us(50), idle_since: None };
        assert!(spin.again(|| us(0)));
        assert!(!spin.again(|| us(50)));
        spin.slept(us(50), us(60));
        assert_eq!(spin.budget, us(25), "60 µs are more than polling could have bridged");
    }
}
