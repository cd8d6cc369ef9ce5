//! What of the unsynced writes a power cut leaves behind.

use std::collections::HashMap;

use super::medium::Stamp;
use super::rng::Rng;

/// How a power cut chooses among the unsynced versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// Every sector of every write decides for itself; the number is the percentage that
    /// persists.
    Sectors(u32),
    /// Every write persists as a whole or not at all.
    Writes(u32),
    /// Writes persist in the order in which they reached the file; the one at which the power
    /// failed is torn.
    Prefix,
    /// Only the latest writes persist: the cache wrote the newest first.
    Suffix,
}

impl Persistence {
    /// Every mode that the tests use.
    pub const ALL: [Self; 8] = [
        Self::Sectors(0),
        Self::Sectors(50),
        Self::Sectors(80),
        Self::Sectors(100),
        Self::Writes(50),
        Self::Writes(90),
        Self::Prefix,
        Self::Suffix,
    ];
}

/// The decisions of one power cut.
pub struct Draw {
    mode: Persistence,
    boundary: Stamp,
    writes: HashMap<Stamp, bool>,
    rng: Rng,
}

impl Draw {
    /// Decides about versions with these stamps.
    pub fn new(mode: Persistence, stamps: &[Stamp], rng: &mut Rng) -> Self {
        let boundary = if stamps.is_empty() { 0 } else { rng.pick(stamps) };
        Self { mode, boundary, writes: HashMap::new(), rng: rng.fork(1) }
    }

    /// Whether one sector's version (or one change of a file's size) persists.
    pub fn persists(&mut self, stamp: Stamp) -> bool {
        match self.mode {
            Persistence::Sectors(percent) => self.rng.percent(percent),
            Persistence::Writes(percent) => {
                let rng = &mut self.rng;
                *self.writes.entry(stamp).or_insert_with(|| rng.percent(percent))
            }
            Persistence::Prefix if stamp == self.boundary => self.rng.percent(50),
            Persistence::Prefix => stamp < self.boundary,
            Persistence::Suffix if stamp == self.boundary => self.rng.percent(50),
            Persistence::Suffix => stamp > self.boundary,
        }
    }
}
