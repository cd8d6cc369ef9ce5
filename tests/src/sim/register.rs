//! One sector's history, and which values the guest's contract allows it to have.
//!
//! Time is a count of events of the guest: submissions and reports. A version precedes another
//! when it ended before the other was submitted, or when a read showed the order; versions that
//! overlap may have happened in either order.

use super::content::Value;

/// A moment in the order of everything the guest sees.
pub type Tick = u64;

/// Which crash a recovery follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Crash {
    /// The process died (or stopped): everything that was reported survives.
    Kill,
    /// The power failed, or the storage dropped data after a failed sync: everything that was
    /// flushed survives.
    Power,
}

/// How a version ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not reported: it may happen at any moment, or never.
    Pending,
    /// Reported as done.
    Reported,
    /// Reported as done, with no promise that it changed anything.
    Optional,
    /// Reported as failed: it may still come to light at the next recovery, whatever reads showed
    /// before, but not after a later write.
    Failed,
}

#[derive(Clone, Debug)]
struct Version {
    id: u64,
    value: Value,
    submitted: Tick,
    /// A read that began at this time saw it: it happened after whatever had ended by then.
    observed: Tick,
    ended: Option<Tick>,
    state: State,
    flushed: bool,
    /// When a read that saw it was reported first.
    seen: Option<Tick>,
    /// When a read that saw something later was reported first: no read that begins afterwards
    /// sees this.
    overtaken: Option<Tick>,
    /// A read saw something later that was reported itself: a kill does not bring it back.
    replaced: bool,
}

/// A sector (or the size of the disk).
#[derive(Clone, Debug)]
pub struct Register {
    versions: Vec<Version>,
    last_id: u64,
}

impl Version {
    fn of(id: u64, value: Value, submitted: Tick) -> Self {
        Self {
            id,
            value,
            submitted,
            observed: submitted,
            ended: None,
            state: State::Pending,
            flushed: false,
            seen: None,
            overtaken: None,
            replaced: false,
        }
    }

    /// Since when a reader must not see anything older.
    fn established(&self) -> Option<Tick> {
        let reported = self.ended.filter(|_| self.state == State::Reported);
        match (reported, self.seen) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether it certainly happened before `other`.
    fn precedes(&self, other: &Self) -> bool {
        let since = if self.state == State::Failed { other.submitted } else { other.observed };
        self.id != other.id && self.ended.is_some_and(|ended| ended < since)
    }
}

impl Register {
    /// A sector that holds a durable value.
    pub fn new(value: Value) -> Self {
        let mut register = Self { versions: Vec::new(), last_id: 0 };
        register.settle(value, 0);
        register
    }

    fn settle(&mut self, value: Value, now: Tick) {
        self.last_id += 1;
        let mut only = Version::of(self.last_id, value, now);
        (only.ended, only.state, only.flushed) = (Some(now), State::Reported, true);
        self.versions = vec![only];
    }

    /// A write was submitted.
    pub fn submit(&mut self, value: Value, now: Tick) -> u64 {
        self.last_id += 1;
        self.versions.push(Version::of(self.last_id, value, now));
        self.last_id
    }

    /// A write was reported as done; `durable` when that includes that it is durable.
    pub fn reported(&mut self, id: u64, now: Tick, durable: bool) {
        self.end(id, now, State::Reported);
        if durable && let Some(version) = self.versions.iter_mut().find(|version| version.id == id) {
            version.flushed = true;
        }
    }

    /// Something that may have changed the sector was reported as done.
    pub fn reported_optional(&mut self, id: u64, now: Tick) {
        self.end(id, now, State::Optional);
    }

    /// A write was reported as failed.
    pub fn failed(&mut self, id: u64, now: Tick) {
        self.end(id, now, State::Failed);
    }

    fn end(&mut self, id: u64, now: Tick, state: State) {
        // A version of before a recovery may be gone.
        if let Some(version) = self.versions.iter_mut().find(|version| version.id == id) {
            (version.ended, version.state) = (Some(now), state);
        }
    }

    /// A flush that was submitted at `submitted` was reported.
    pub fn flush(&mut self, submitted: Tick) {
        for version in &mut self.versions {
            let covered = version.ended.is_some_and(|ended| ended < submitted);
            version.flushed |= covered && version.state == State::Reported;
        }
    }

    /// Forgets what neither a crash nor a read can bring back; `oldest` is when the oldest read
    /// that is not reported was submitted.
    pub fn forget(&mut self, oldest: Tick) {
        if self.versions.len() > 1 {
            let settled =
                |version: &&Version| version.flushed && version.ended.is_some_and(|ended| ended < oldest);
            let settled: Vec<Version> = self.versions.iter().filter(settled).cloned().collect();
            self.versions.retain(|version| !settled.iter().any(|later| version.precedes(later)));
        }
    }

    /// A read that lasted from `submitted` to `now` returned `value`.
    ///
    /// # Errors
    /// The values that were allowed.
    pub fn read(&mut self, value: Value, submitted: Tick, now: Tick) -> Result<(), Vec<Value>> {
        let allowed: Vec<usize> =
            (0..self.versions.len()).filter(|at| self.readable(*at, submitted)).collect();
        let matching: Vec<usize> =
            allowed.iter().copied().filter(|at| self.versions[*at].value == value).collect();
        if matching.is_empty() {
            return Err(allowed.into_iter().map(|at| self.versions[at].value).collect());
        }
        if let [only] = matching[..] {
            let only = &mut self.versions[only];
            only.observed = only.observed.max(submitted);
            only.seen = only.seen.or(Some(now));
        }
        let reported = matching.iter().all(|at| {
            let version = &self.versions[*at];
            version.state == State::Reported && version.ended.is_some_and(|ended| ended < submitted)
        });
        for at in 0..self.versions.len() {
            let version = &mut self.versions[at];
            if !matching.contains(&at) && version.ended.is_some_and(|ended| ended < submitted) {
                version.overtaken = version.overtaken.or(Some(now));
                version.replaced |= reported && version.state != State::Failed;
            }
        }
        Ok(())
    }

    fn readable(&self, at: usize, submitted: Tick) -> bool {
        let version = &self.versions[at];
        version.overtaken.is_none_or(|since| since >= submitted)
            && !self.versions.iter().any(|later| {
                later.established().is_some_and(|since| since < submitted) && version.precedes(later)
            })
    }

    /// The values a recovery may find.
    pub fn recoverable(&self, crash: Crash) -> Vec<Value> {
        let survives = |version: &Version| match crash {
            Crash::Kill => version.state == State::Reported,
            Crash::Power => version.flushed,
        };
        let gone = |version: &Version| {
            let older = |later: &Version| survives(later) && version.precedes(later);
            (crash == Crash::Kill && version.replaced) || self.versions.iter().any(older)
        };
        self.versions.iter().filter(|version| !gone(version)).map(|version| version.value).collect()
    }

    /// A recovery found `value`: from now on that is what the sector holds, durably.
    ///
    /// # Errors
    /// The values that were allowed.
    pub fn recovered(&mut self, value: Value, crash: Crash, now: Tick) -> Result<(), Vec<Value>> {
        let allowed = self.recoverable(crash);
        if !allowed.contains(&value) {
            return Err(allowed);
        }
        self.settle(value, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Value = Value(1);
    const B: Value = Value(2);
    const C: Value = Value(3);

    #[test]
    fn flushed_survives_a_power_cut_and_reported_a_kill() {
        let mut sector = Register::new(A);
        let write = sector.submit(B, 1);
        assert_eq!(sector.recoverable(Crash::Kill), [A, B]);
        sector.reported(write, 2, false);
        assert_eq!(sector.recoverable(Crash::Kill), [B]);
        assert_eq!(sector.recoverable(Crash::Power), [A, B]);
        sector.flush(2);
        assert_eq!(sector.recoverable(Crash::Power), [A, B], "reported as the flush was submitted");
        sector.flush(3);
        assert_eq!(sector.recoverable(Crash::Power), [B]);
    }

    #[test]
    fn overlapping_writes_may_happen_in_either_order_until_a_read_tells() {
        let mut sector = Register::new(A);
        let (b, c) = (sector.submit(B, 1), sector.submit(C, 2));
        sector.reported(b, 3, false);
        sector.reported(c, 4, false);
        assert_eq!(sector.recoverable(Crash::Kill), [B, C]);
        assert!(sector.read(A, 5, 6).is_err());
        assert!(sector.read(B, 5, 6).is_ok());
        assert!(sector.read(C, 7, 8).is_err(), "the earlier read saw the later value");
        assert_eq!(sector.recoverable(Crash::Kill), [B]);
    }

    #[test]
    fn what_a_read_saw_stays() {
        let mut sector = Register::new(A);
        sector.submit(B, 1);
        assert!(sector.read(B, 2, 3).is_ok(), "a pending write may be seen");
        assert!(sector.read(A, 4, 5).is_err(), "and not disappear");
        assert_eq!(sector.recoverable(Crash::Kill), [A, B], "unless its process dies");
    }

    #[test]
    fn a_read_that_began_before_a_write_may_miss_it() {
        let mut sector = Register::new(A);
        let write = sector.submit(B, 2);
        sector.reported(write, 3, true);
        sector.forget(1);
        assert!(sector.read(B, 4, 5).is_ok());
        assert!(sector.read(A, 1, 6).is_ok(), "it began before");
        assert!(sector.read(A, 4, 6).is_err());
    }

    #[test]
    fn a_failed_write_may_have_happened_but_not_after_a_later_one() {
        let mut sector = Register::new(A);
        let write = sector.submit(B, 1);
        sector.failed(write, 2);
        assert!(sector.read(A, 3, 4).is_ok());
        assert!(sector.read(B, 5, 6).is_err(), "it has not happened");
        assert_eq!(sector.recoverable(Crash::Kill), [A, B], "yet");
        let write = sector.submit(C, 7);
        sector.reported(write, 8, false);
        assert_eq!(sector.recoverable(Crash::Kill), [C]);
    }

    #[test]
    fn recovery_settles() {
        let mut sector = Register::new(A);
        let write = sector.submit(B, 1);
        assert!(sector.recovered(C, Crash::Power, 2).is_err());
        assert!(sector.recovered(A, Crash::Power, 2).is_ok());
        sector.reported(write, 3, false);
        assert_eq!(sector.recoverable(Crash::Power), [A]);
    }
}
