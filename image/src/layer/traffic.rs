//! What was written to a layer since it was made, by what it was for.
//!
//! Blocks that guests wrote are also the layer's clock: data is as old as the number of blocks written
//! since. It tells how soon data is likely to be overwritten (see `age`), and does not stand still for
//! or run away from any load.

use super::log::Part;
use super::record::Run;

/// Blocks of 4 KiB written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Data of guests.
    pub guest: u64,
    /// Data that the cleaner moved.
    pub moved: u64,
    /// Nodes of the map.
    pub nodes: u64,
    /// Index blocks of records.
    pub index: u64,
}

impl Traffic {
    /// Counts a part of a record.
    pub(super) fn count(&mut self, part: &Part) {
        let blocks = u64::from(part.run.data_blocks());
        match part.run {
            Run::Nodes { .. } => self.nodes += blocks,
            _ if part.upkeep => self.moved += blocks,
            _ => self.guest += blocks,
        }
    }

    /// Counts a record that was found on recovery, which does not tell data that was moved from that of guests.
    pub(super) fn count_found(&mut self, runs: &[(Run, u32)]) {
        self.index += 1;
        for (run, _) in runs {
            let blocks = u64::from(run.data_blocks());
            match run {
                Run::Nodes { .. } => self.nodes += blocks,
                _ => self.guest += blocks,
            }
        }
    }

    /// All blocks.
    pub fn total(&self) -> u64 {
        self.guest + self.moved + self.nodes + self.index
    }

    /// Write amplification: blocks written for each block of a guest. `None` before the first one.
    pub fn amplification(&self) -> Option<f64> {
        (self.guest > 0).then(|| self.total() as f64 / self.guest as f64)
    }
}
