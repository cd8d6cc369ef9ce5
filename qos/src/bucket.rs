//! A token bucket that is exact.
//!
//! Tokens flow in at a rate, up to the bucket's capacity, and work takes them out. Levels are kept in billionths of a token: in a
//! nanosecond a rate of so many tokens a second brings just as many of those. So no remainder is ever lost, in whatever steps time
//! goes on, and after days the bucket has let through what the rate says, to the token.

use std::time::Duration;

/// Billionths of a token in one.
pub(crate) const NANO: i128 = 1_000_000_000;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    /// Tokens for each second, at least one.
    rate: u64,
    /// Of these and all below: billionths of tokens.
    capacity: i128,
    /// Below zero after work that took more than there was.
    level: i128,
    /// When the level was that.
    at: Duration,
}

impl Bucket {
    /// A full bucket; `capacity` in billionths of tokens.
    pub(crate) fn new(rate: u64, capacity: i128, now: Duration) -> Self {
        Self { rate: rate.max(1), capacity, level: capacity, at: now }
    }

    fn refill(&mut self, now: Duration) {
        let Some(elapsed) = now.checked_sub(self.at) else { return };
        // Of 2^94 nanoseconds and 2^64 tokens the product would not fit: but such a bucket is full.
        let brought = (elapsed.as_nanos() as i128).saturating_mul(self.rate.into());
        self.level = self.level.saturating_add(brought).min(self.capacity);
        self.at = now;
    }

    /// From when on work may begin: when nothing is owed. What it takes may be more than there is; who comes next waits for
    /// that. So work of any size gets through a bucket of any size, and whoever wakes late loses nothing until the bucket is full.
    pub(crate) fn ready_at(&mut self, now: Duration) -> Duration {
        self.refill(now);
        if self.level >= 0 {
            return now;
        }
        let wait = self.level.unsigned_abs().div_ceil(self.rate.into());
        // Centuries are for ever.
        self.at.saturating_add(Duration::from_nanos(wait.try_into().unwrap_or(u64::MAX)))
    }

    /// Takes `cost` out, which may leave a debt.
    pub(crate) fn take(&mut self, cost: i128) {
        self.level = self.level.saturating_sub(cost);
    }

    /// Goes on with another rate and capacity. What was saved stays, as far as it fits; a debt is paid off in the time that it
    /// would have taken before, or sooner if the new rate is higher: so a change neither floods nor stalls.
    pub(crate) fn change(&mut self, rate: u64, capacity: i128, now: Duration) {
        self.refill(now);
        let rate = rate.max(1);
        if self.level < 0 {
            let same_time = self.level.saturating_mul(rate.into()) / i128::from(self.rate);
            self.level = self.level.max(same_time);
        }
        self.level = self.level.min(capacity);
        (self.rate, self.capacity) = (rate, capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    const SECOND: u64 = 1_000_000_000;

    fn at(ns: u64) -> Duration {
        Duration::from_nanos(ns)
    }

    /// Takes one token after the other as soon as it may, until `end`: when each was taken. Looks at the bucket at odd moments, too.
    fn drive(bucket: &mut Bucket, mut now: u64, end: u64, state: &mut u64) -> Vec<u64> {
        let mut taken = Vec::new();
        loop {
            let ready = bucket.ready_at(at(now)).as_nanos() as u64;
            if ready > now && random(state).is_multiple_of(2) {
                now += random(state) % (ready - now) + 1;
                continue;
            }
            now = ready;
            if now >= end {
                return taken;
            }
            bucket.take(NANO);
            taken.push(now);
        }
    }

    #[test]
    fn what_is_let_through_is_the_rate_to_the_token_after_days() {
        // 7 tokens a second for three days, in steps that divide nothing.
        let (rate, days) = (7, 3 * 86_400);
        let mut bucket = Bucket::new(rate, 0, at(0));
        let taken = drive(&mut bucket, 0, days * SECOND, &mut 1);
        assert_eq!(taken.len() as u64, rate * days);
    }

    #[test]
    fn no_window_lets_more_through_than_rate_and_capacity() {
        for seed in 0..50 {
            let mut state = seed;
            let rate = 1 + random(&mut state) % 100_000;
            let capacity = 1 + random(&mut state) % 100;
            let mut bucket = Bucket::new(rate, capacity as i128 * NANO, at(0));
            let taken = drive(&mut bucket, 0, SECOND * 2000 / rate, &mut state);
            for (i, from) in taken.iter().enumerate() {
                for (j, to) in taken.iter().enumerate().skip(i) {
                    let most = u128::from(to - from) * u128::from(rate) / NANO as u128 + u128::from(capacity);
                    assert!((j - i) as u128 <= most, "seed {seed}: {i}..={j}: {most}");
                }
            }
        }
    }

    #[test]
    fn work_larger_than_the_bucket_leaves_a_debt() {
        let mut bucket = Bucket::new(100, 10 * NANO, at(0));
        assert_eq!(bucket.ready_at(at(0)), at(0));
        bucket.take(1000 * NANO);
        assert_eq!(bucket.ready_at(at(0)), at(9_900_000_000));
        assert_eq!(bucket.ready_at(at(9_899_999_999)), at(9_900_000_000));
        assert_eq!(bucket.ready_at(at(9_900_000_000)), at(9_900_000_000));
    }

    #[test]
    fn a_change_neither_stalls_nor_floods() {
        let mut bucket = Bucket::new(1_000_000, 1_000 * NANO, at(0));
        bucket.take(2_001_000 * NANO);
        // Two seconds of debt stay two seconds at a rate of one, and become less at a higher rate.
        bucket.change(1, NANO, at(0));
        assert_eq!(bucket.ready_at(at(0)), at(2_000_000_000));
        bucket.change(1_000, NANO, at(0));
        assert_eq!(bucket.ready_at(at(0)), at(2_000_000));
        // What was saved for a large bucket does not flood a small one.
        let mut bucket = Bucket::new(1_000, 5_000 * NANO, at(0));
        bucket.change(1_000, 2 * NANO, at(0));
        bucket.take(3 * NANO);
        assert_eq!(bucket.ready_at(at(0)), at(1_000_000));
    }

    #[test]
    fn a_clock_that_stands_or_jumps_far_is_no_harm() {
        let mut bucket = Bucket::new(u64::MAX, i128::MAX / 2, Duration::MAX);
        bucket.take(i128::MAX);
        assert_eq!(bucket.ready_at(at(0)), Duration::MAX);
        let mut bucket = Bucket::new(1, NANO, at(0));
        bucket.take(i128::MAX);
        assert_eq!(bucket.ready_at(at(5)), at(5).saturating_add(at(u64::MAX)));
        // Further than a clock of nanoseconds goes: what was owed is paid.
        let mut bucket = Bucket::new(1, NANO, at(0));
        bucket.take(1_000 * NANO);
        assert_eq!(bucket.ready_at(Duration::MAX), Duration::MAX);
    }
}
