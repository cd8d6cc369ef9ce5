//! How long requests took: a histogram whose buckets are fine where times are short, and never wider than a sixteenth of
//! what they hold.
//!
//! Each power of two of microseconds has 16 buckets of the same width, as in HDR histograms. So every power of two of microseconds is a
//! bound between two of them, and coarser buckets with such bounds are sums of these. A bucket holds its upper bound and not its lower
//! one, which is how Prometheus counts.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Buckets of one power of two, as a power of two.
const FINE_BITS: u32 = 4;
/// Buckets of one power of two, and the parts into which the first microsecond is divided.
const FINE: u64 = 1 << FINE_BITS;
/// From 2^26 µs, which is 67 s, on all is in one bucket.
const MICROS_BITS: u32 = 26;
/// The bucket of what took longer than that.
const OVERFLOW: usize = (FINE + MICROS_BITS as u64 * FINE) as usize;
/// All buckets.
const BUCKETS: usize = OVERFLOW + 1;

/// The bucket of a time in nanoseconds.
fn bucket_of(nanos: u64) -> usize {
    // Sixteenths of a microsecond, rounded up, less one.
    let unit = (nanos.min(u64::MAX / 2) * 2).saturating_sub(1) / 125;
    let shift = (unit | FINE).ilog2() - FINE_BITS;
    let index = u64::from(shift) * FINE + (unit >> shift);
    (index as usize).min(OVERFLOW)
}

/// The longest time of a bucket in nanoseconds; none for the last one, which has no bound.
fn bound_of(bucket: usize) -> Option<u64> {
    if bucket >= OVERFLOW {
        return None;
    }
    let bucket = bucket as u64;
    let shift = (bucket / FINE).saturating_sub(1);
    let first = bucket - shift * FINE;
    Some(((first + 1) << shift) * 125 / 2)
}

/// Adds to a counter of which the calling thread is the only writer.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// A histogram that one thread writes, while others may look.
pub(super) struct Recorder {
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; BUCKETS],
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Recorder {
    /// Counts a time. Only one thread may, or else some are lost.
    pub(super) fn record(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        add(&self.counts[bucket_of(nanos)], 1);
        add(&self.sum, nanos);
        if nanos > self.max.load(Ordering::Relaxed) {
            self.max.store(nanos, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub(super) fn histogram(&self) -> Histogram {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Histogram { counts, sum: self.sum.load(Ordering::Relaxed), max: self.max.load(Ordering::Relaxed) }
    }
}

/// How many requests took how long. Plain numbers, which can be added up.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    /// In nanoseconds.
    sum: u64,
    /// In nanoseconds.
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], sum: 0, max: 0 }
    }
}

impl Histogram {
    /// How many there are.
    pub fn count(&self) -> u64 {
        total(&self.counts)
    }

    /// How long they took together.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum)
    }

    /// The longest of all. Of what [`since`](Self::since) gives it is the longest since the very beginning.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// How many took at most `micros` microseconds. Exact for powers of two up to 2^26.
    pub fn count_within(&self, micros: u64) -> u64 {
        let bucket = bucket_of(micros.saturating_mul(1000));
        total(&self.counts[..=bucket])
    }

    /// The time within which a share of all was done (0.99: all but one of a hundred); none if there are none. It is never less
    /// than the true one, and at most a sixteenth and 63 ns more.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        // Not above the number of them, whatever rounding does.
        let rank = ((share * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        for (bucket, &more) in self.counts.iter().enumerate() {
            seen = more.saturating_add(seen);
            if seen >= rank {
                let bound = bound_of(bucket).unwrap_or(self.max);
                return Some(Duration::from_nanos(bound.min(self.max)));
            }
        }
        None
    }

    /// Adds what another one has counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*theirs);
        }
        self.sum = self.sum.wrapping_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// What was counted after `earlier`, an older state of the same; all of it if it is not.
    pub fn since(&self, earlier: &Self) -> Self {
        let counts: Option<Vec<u64>> =
            self.counts.iter().zip(&earlier.counts).map(|(now, then)| now.checked_sub(*then)).collect();
        match counts {
            Some(counts) => Self { counts, sum: self.sum.wrapping_sub(earlier.sum), max: self.max },
            None => self.clone(),
        }
    }
}

/// What somebody else wrote may be any numbers.
fn total(counts: &[u64]) -> u64 {
    counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        f.debug_map().entries(counts.map(|(bucket, count)| (bound_of(bucket), count))).finish()
    }
}

/// As it is written: of buckets only those that hold something, by the longest time in nanoseconds that they can hold.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Written {
    count: u64,
    sum_us: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    buckets: Vec<(u64, u64)>,
}

fn micros(time: Option<Duration>) -> f64 {
    time.map_or(0.0, |time| time.as_nanos() as f64 / 1000.0)
}

fn nanos(micros: f64) -> u64 {
    // What is no number becomes 0, and what is too large the largest.
    (micros * 1000.0).round() as u64
}

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let buckets = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        Written {
            count: self.count(),
            sum_us: micros(Some(self.sum())),
            p50_us: micros(self.quantile(0.5)),
            p99_us: micros(self.quantile(0.99)),
            p999_us: micros(self.quantile(0.999)),
            max_us: micros(Some(self.max())),
            buckets: buckets.map(|(bucket, count)| (bound_of(bucket).unwrap_or(u64::MAX), *count)).collect(),
        }
        .serialize(to)
    }
}

impl<'de> Deserialize<'de> for Histogram {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(from)?;
        let mut histogram =
            Self { sum: nanos(written.sum_us), max: nanos(written.max_us), ..Self::default() };
        for (bound, count) in written.buckets {
            let slot = &mut histogram.counts[bucket_of(bound)];
            *slot = slot.checked_add(count).ok_or_else(|| D::Error::custom("a bucket that is too full"))?;
        }
        Ok(histogram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    fn of(times: &[u64]) -> Histogram {
        let recorder = Recorder::default();
        times.iter().for_each(|time| recorder.record(Duration::from_nanos(*time)));
        recorder.histogram()
    }

    /// Times of all magnitudes.
    fn some(state: &mut u64, count: usize) -> Vec<u64> {
        (0..count).map(|_| (random(state) >> 28) >> (random(state) % 36)).collect()
    }

    #[test]
    fn buckets_follow_each_other_without_gaps() {
        let mut next = 0;
        for bucket in 0..OVERFLOW {
            let bound = bound_of(bucket).unwrap();
            assert!(bound >= next, "{bucket}");
            assert_eq!(
                (bucket_of(next), bucket_of(bound), bucket_of(bound + 1)),
                (bucket, bucket, bucket + 1)
            );
            let width = bound - next;
            assert!(width <= next / 16 + 63, "{bucket}: {next} to {bound}");
            next = bound + 1;
        }
        assert_eq!(bound_of(OVERFLOW - 1), Some((1 << MICROS_BITS) * 1000));
        assert_eq!(bucket_of(u64::MAX), OVERFLOW);
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_times() {
        let mut state = 1;
        for round in 1..200 {
            let mut times = some(&mut state, round);
            let histogram = of(&times);
            times.sort_unstable();
            assert_eq!(histogram.count(), round as u64);
            assert_eq!(histogram.max(), Duration::from_nanos(times[round - 1]));
            assert_eq!(histogram.sum(), Duration::from_nanos(times.iter().sum()));
            for share in [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0] {
                let rank = ((share * round as f64).ceil() as usize).clamp(1, round);
                let (exact, found) = (times[rank - 1], histogram.quantile(share).unwrap().as_nanos() as u64);
                let is_close = exact > (1 << MICROS_BITS) * 1000 || found <= exact + exact / 16 + 63;
                assert!(found >= exact && is_close, "{share} of {round}: {found} for {exact}");
            }
            for power in 0..=MICROS_BITS {
                let exact = times.iter().filter(|time| **time <= 1000 << power).count() as u64;
                assert_eq!(histogram.count_within(1 << power), exact, "2^{power} µs");
            }
        }
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn histograms_add_up_and_are_told_apart() {
        let mut state = 2;
        for _ in 0..50 {
            let (first, second) = (some(&mut state, 100), some(&mut state, 70));
            let both = of(&[first.as_slice(), &second].concat());
            let mut merged = of(&first);
            merged.merge(&of(&second));
            assert_eq!(merged, both);
            let later = both.since(&of(&first));
            assert_eq!((&later.counts, later.sum), (&of(&second).counts, of(&second).sum));
            assert_eq!(of(&first).since(&both), of(&first), "of another one");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let histogram = of(&some(&mut 3, 1000));
        let written = serde_json::to_string(&histogram).unwrap();
        let read: Histogram = serde_json::from_str(&written).unwrap();
        assert_eq!(read, histogram);
        let written: serde_json::Value = serde_json::from_str(&written).unwrap();
        assert_eq!(written["count"], 1000);
        assert_eq!(written["p99-us"], histogram.quantile(0.99).unwrap().as_nanos() as f64 / 1000.0);
        let full = serde_json::json!({
            "count": 0, "sum-us": 0.0, "p50-us": 0.0, "p99-us": 0.0, "p999-us": 0.0, "max-us": 0.0,
            "buckets": [[1, u64::MAX], [1, 1]],
        });
        assert!(serde_json::from_value::<Histogram>(full).is_err());
    }
}
