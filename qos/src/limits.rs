//! What a disk, or a group of disks, may do in a second.
//!
//! Names and meanings are those of QEMU's throttle options (docs/throttle.txt there) where it has them: `iops` and `bps` for
//! reads, writes and both, each with a burst rate (`-max`) and the time for which a disk that was idle may keep that up
//! (`-max-length`), and `iops-size`, by which one large request counts as several. Unlike there a burst lasts exactly as long as it says,
//! and limits of both and of one direction may be set together.

use std::num::NonZeroU64;
use std::time::Duration;

use crate::arbiter::{WEIGHT_DEFAULT, WEIGHT_MAX};
use crate::bucket::{Bucket, NANO};

/// What may be done at once: as much as comes in this time. A thread that wakes so late loses nothing.
const GRAIN: Duration = Duration::from_millis(2);
/// What was left undone for so long is made up for, at a rate that is higher by one part in [`CATCH_UP`]: so a longer stall costs nothing in
/// the long run, and no window of 100 ms lets through 4 % more than it should.
const SAVED: Duration = Duration::from_millis(10);
/// See [`SAVED`].
const CATCH_UP: u64 = 64;
/// The largest rate, each second (as in QEMU).
pub const RATE_MAX: u64 = 1_000_000_000_000_000;
/// The longest burst.
pub const BURST_MAX: Duration = Duration::from_secs(86_400);

/// In which direction a request moves data. Discards and zeroes are writes that move none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// What a request counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// In which direction.
    pub direction: Direction,
    /// Bytes that it moves.
    pub bytes: u64,
}

/// So much a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run; from 1 to [`RATE_MAX`].
    pub per_second: u64,
    /// For a while, after doing less.
    pub burst: Option<Burst>,
}

/// A higher rate for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    /// Not less than the rate in the long run.
    pub per_second: u64,
    /// For how long, after idling long enough; up to [`BURST_MAX`].
    pub length: Duration,
}

/// All limits of a disk or group; by default there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub iops_total: Option<Rate>,
    /// Of these, reads.
    pub iops_read: Option<Rate>,
    /// Of these, writes.
    pub iops_write: Option<Rate>,
    /// Bytes.
    pub bps_total: Option<Rate>,
    /// Of these, read.
    pub bps_read: Option<Rate>,
    /// Of these, written.
    pub bps_write: Option<Rate>,
    /// A request of more bytes counts as several: its bytes divided by this, exactly.
    pub iops_size: Option<NonZeroU64>,
}

/// Why limits are none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// A rate.
    #[error("{name}: {value} each second: give 1 to {RATE_MAX}, or none for no limit")]
    Rate {
        /// Which.
        name: &'static str,
        /// What was given.
        value: u64,
    },
    /// A burst rate.
    #[error("{name}-max: {burst} is less than {name}, which is {rate}: a burst is faster")]
    Burst {
        /// Of which rate.
        name: &'static str,
        /// What was given.
        burst: u64,
        /// The rate.
        rate: u64,
    },
    /// The length of a burst.
    #[error("{name}-max-length: {length:?}: give up to a day, and not nothing")]
    Length {
        /// Of which rate.
        name: &'static str,
        /// What was given.
        length: Duration,
    },
    /// A burst without a rate in the long run.
    #[error("{name}-max without {name}: a burst is more than a limit for a while; give that, too")]
    Alone {
        /// Of which rate.
        name: &'static str,
    },
    /// A length without a burst.
    #[error("{name}-max-length without {name}-max: give the rate of the burst, too")]
    NoBurst {
        /// Of which rate.
        name: &'static str,
    },
    /// A weight.
    #[error("weight: {value}: give 1 to {WEIGHT_MAX}; it is {WEIGHT_DEFAULT} if none is given")]
    Weight {
        /// What was given.
        value: u64,
    },
    /// A name that there is not.
    #[error("{name}: there are {known}")]
    Unknown {
        /// What was given.
        name: String,
        /// What there is.
        known: String,
    },
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Requests,
    Bytes,
}

impl Limits {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.each().all(|(.., rate)| rate.is_none())
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// The first such.
    pub fn check(&self) -> Result<(), LimitError> {
        for (name, .., rate) in self.each() {
            let Some(Rate { per_second: rate, burst }) = *rate else { continue };
            if !(1..=RATE_MAX).contains(&rate) {
                return Err(LimitError::Rate { name, value: rate });
            }
            let Some(Burst { per_second: burst, length }) = burst else { continue };
            if !(rate..=RATE_MAX).contains(&burst) {
                return Err(LimitError::Burst { name, burst, rate });
            }
            if length.is_zero() || length > BURST_MAX {
                return Err(LimitError::Length { name, length });
            }
        }
        Ok(())
    }

    fn each(&self) -> impl Iterator<Item = (&'static str, Unit, Option<Direction>, &Option<Rate>)> {
        use Direction::{Read, Write};
        [
            ("iops-total", Unit::Requests, None, &self.iops_total),
            ("iops-read", Unit::Requests, Some(Read), &self.iops_read),
            ("iops-write", Unit::Requests, Some(Write), &self.iops_write),
            ("bps-total", Unit::Bytes, None, &self.bps_total),
            ("bps-read", Unit::Bytes, Some(Read), &self.bps_read),
            ("bps-write", Unit::Bytes, Some(Write), &self.bps_write),
        ]
        .into_iter()
    }
}

/// What of a rate a bucket keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    /// The rate in the long run, for which a burst can be saved.
    Long,
    /// The rate of bursts.
    Short,
    /// The rate at which is made up for what was left undone.
    CatchUp,
}

/// One bucket, and what it counts.
#[derive(Clone, Debug)]
struct Counted {
    unit: Unit,
    direction: Option<Direction>,
    term: Term,
    bucket: Bucket,
}

/// Measures the work of a disk or group by its limits.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    buckets: Vec<Counted>,
    iops_size: Option<NonZeroU64>,
}

impl Meter {
    /// For limits that have been [checked](Limits::check); all that can be saved for a burst has been.
    pub fn new(limits: &Limits, now: Duration) -> Self {
        let mut meter = Self::default();
        meter.change(limits, now);
        meter
    }

    /// Goes on with other limits from now on. What was saved for a burst stays, as far as it fits, and what was done before
    /// makes nobody wait for longer than before.
    pub fn change(&mut self, limits: &Limits, now: Duration) {
        let mut old = std::mem::take(&mut self.buckets);
        for (_, unit, direction, rate) in limits.each() {
            for (term, rate, capacity) in rate.iter().flat_map(terms) {
                let is_same = |counted: &Counted| {
                    (counted.unit, counted.direction, counted.term) == (unit, direction, term)
                };
                let bucket = match old.iter().position(is_same) {
                    Some(at) => {
                        let mut bucket = old.swap_remove(at).bucket;
                        bucket.change(rate, capacity, now);
                        bucket
                    }
                    None => Bucket::new(rate, capacity, now),
                };
                self.buckets.push(Counted { unit, direction, term, bucket });
            }
        }
        self.iops_size = limits.iops_size;
    }

    /// From when on work in this direction may begin, if nothing else is done until then.
    pub fn ready_at(&mut self, direction: Direction, now: Duration) -> Duration {
        let buckets = concerned(&mut self.buckets, direction);
        buckets.map(|counted| counted.bucket.ready_at(now)).max().unwrap_or(now)
    }

    /// Counts work that begins.
    pub fn take(&mut self, work: &Work) {
        let iops_size = self.iops_size;
        for counted in concerned(&mut self.buckets, work.direction) {
            counted.bucket.take(cost(counted.unit, iops_size, work));
        }
    }

    /// As how many requests work counts, in billionths.
    pub(crate) fn requests_nano(&self, work: &Work) -> i128 {
        cost(Unit::Requests, self.iops_size, work)
    }
}

/// The buckets that count work in this direction.
fn concerned(buckets: &mut [Counted], direction: Direction) -> impl Iterator<Item = &mut Counted> {
    buckets.iter_mut().filter(move |counted| counted.direction.is_none_or(|its| its == direction))
}

/// What work takes out of a bucket, in billionths of a token.
fn cost(unit: Unit, iops_size: Option<NonZeroU64>, work: &Work) -> i128 {
    match (unit, iops_size) {
        (Unit::Bytes, _) => i128::from(work.bytes) * NANO,
        (Unit::Requests, Some(size)) => (i128::from(work.bytes) * NANO / i128::from(size.get())).max(NANO),
        (Unit::Requests, None) => NANO,
    }
}

/// The buckets of a rate: their rates and capacities, these in billionths of a token.
fn terms(rate: &Rate) -> impl Iterator<Item = (Term, u64, i128)> {
    let brings = |rate: u64, time: Duration| i128::from(rate) * time.as_nanos() as i128;
    let Rate { per_second, burst } = *rate;
    let saved = burst.map_or(0, |burst| brings(burst.per_second - per_second, burst.length));
    let long = (Term::Long, per_second, saved.max(brings(per_second, SAVED)));
    let short = burst.map(|burst| (Term::Short, burst.per_second, brings(burst.per_second, SAVED)));
    let fastest = burst.map_or(per_second, |burst| burst.per_second);
    let catch_up = (Term::CatchUp, fastest + fastest.div_ceil(CATCH_UP), brings(fastest, GRAIN));
    std::iter::once(long).chain(short).chain([catch_up])
}

#[cfg(test)]
mod tests;
