//! Whether what a snapshot holds is the disk as it was at one moment while the guest wrote it.
//!
//! The moment lies between two events of the guest. What was reported before it is in the snapshot; what was
//! submitted after it is not; the rest may go either way. So each sector tells between which events the
//! moment was, and there must be one that all sectors allow. A write that began after another one had
//! been reported is never there without that one.

use super::content::{Contents, SECTOR_BYTES, Value};
use super::register::Tick;

/// A version of a sector.
#[derive(Clone, Copy, Debug)]
struct Version {
    id: u64,
    value: Value,
    submitted: Tick,
    /// When it was reported as done; never, where it may have done nothing.
    reported: Option<Tick>,
}

/// All versions of all sectors since the last recovery.
#[derive(Clone, Debug)]
pub struct Ledger {
    sectors: Vec<Vec<Version>>,
}

impl Ledger {
    /// Of sectors that hold these values.
    pub fn new(values: impl Iterator<Item = Value>) -> Self {
        let mut ledger = Self { sectors: Vec::new() };
        for (sector, value) in values.enumerate() {
            ledger.sectors.push(Vec::new());
            ledger.settle(sector as u64, value);
        }
        ledger
    }

    /// A sector holds this value and nothing else is under way.
    pub fn settle(&mut self, sector: u64, value: Value) {
        self.sectors[sector as usize] = vec![Version { id: 0, value, submitted: 0, reported: Some(0) }];
    }

    /// A version was submitted.
    pub fn submit(&mut self, sector: u64, id: u64, value: Value, now: Tick) {
        self.sectors[sector as usize].push(Version { id, value, submitted: now, reported: None });
    }

    /// A version was reported as done.
    pub fn reported(&mut self, sector: u64, id: u64, now: Tick) {
        let versions = self.sectors[sector as usize].iter_mut();
        versions.filter(|version| version.id == id).for_each(|version| version.reported = Some(now));
    }

    /// The moments from `since` to `until`, each behind the event of that number, at which a sector may have
    /// held a value.
    fn moments(&self, sector: u64, value: Value, since: Tick, until: Tick) -> Vec<bool> {
        let mut moments = vec![false; (until - since + 1) as usize];
        let versions = &self.sectors[sector as usize];
        for version in versions.iter().filter(|version| version.value == value) {
            let replaced = versions
                .iter()
                .filter(|later| version.reported.is_some_and(|reported| reported < later.submitted))
                .filter_map(|later| later.reported)
                .min();
            let end = replaced.map_or(until, |replaced| until.min(replaced.saturating_sub(1)));
            for moment in since.max(version.submitted)..=end {
                moments[(moment - since) as usize] = true;
            }
        }
        moments
    }

    /// Whether these bytes are the disk as it was at some moment between two events.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self, contents: &Contents, data: &[u8], since: Tick, until: Tick) -> Result<(), String> {
        let mut moments = vec![true; (until - since + 1) as usize];
        for (sector, bytes) in (0..).zip(data.chunks_exact(SECTOR_BYTES)) {
            let value = contents.recognise(sector, bytes);
            let value = value.map_err(|what| format!("sector {sector} of a snapshot holds {what}"))?;
            let allowed = self.moments(sector, value, since, until);
            if !allowed.contains(&true) {
                return Err(format!("sector {sector} of a snapshot holds {value:?}, which it did not then"));
            }
            moments.iter_mut().zip(allowed).for_each(|(moment, allowed)| *moment &= allowed);
            if !moments.contains(&true) {
                let cut = "it has what came after what it lacks";
                return Err(format!("a snapshot is no consistent cut: {cut}, by sector {sector}: {value:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::content::ZERO;
    use super::*;

    const A: Value = Value(1);
    const B: Value = Value(2);

    /// A is written to sector 0 and reported, then B to sector 1.
    fn ledger() -> (Contents, Ledger) {
        let mut contents = Contents::default();
        assert_eq!([contents.fresh(), contents.fresh()], [A, B]);
        let mut ledger = Ledger::new([ZERO; 2].into_iter());
        ledger.submit(0, 1, A, 10);
        ledger.reported(0, 1, 12);
        ledger.submit(1, 1, B, 14);
        (contents, ledger)
    }

    #[test]
    fn nothing_is_there_without_what_was_reported_before_it_began() {
        let (contents, ledger) = ledger();
        let check = |values, since, until| {
            ledger.check(&contents, &contents.bytes(0, values), since, until).map_err(|error| error.len())
        };
        assert_eq!(check(&[A, B], 9, 20), Ok(()));
        assert_eq!(check(&[A, ZERO], 9, 20), Ok(()));
        assert_eq!(check(&[ZERO, ZERO], 9, 20), Ok(()));
        assert!(check(&[ZERO, B], 9, 20).is_err());
        assert!(check(&[ZERO, ZERO], 12, 20).is_err(), "A had been reported");
        assert!(check(&[A, B], 5, 13).is_err(), "B had not begun");
    }
}
