//! How processes die and the power fails.

use std::time::Duration;

use sapwood_blockdev::engine::Op;

use super::faults::Fate;
use super::medium::Stamp;
use super::persist::{Draw, Persistence};
use super::world::{ProcessId, State};

impl State {
    /// A process dies. What it had in flight is cancelled, or reaches the files later.
    pub fn kill(&mut self, process: ProcessId) {
        let now = self.now;
        self.trace.add(now, || format!("KILL process {process}"));
        self.dead[process as usize] = true;
        self.bury(process);
        for ((due, id), mut flight) in std::mem::take(&mut self.flights) {
            if flight.orphan || self.engines[flight.engine].process != process {
                self.flights.insert((due, id), flight);
            } else if !self.luck.percent(30) {
                flight.orphan = true;
                if matches!(flight.op, Op::Sync { .. } | Op::SyncAll { .. }) {
                    flight.fate = Fate::Done;
                }
                let late = Duration::from_micros(1 << self.luck.below(20));
                self.flights.insert((now + late, id), flight);
            }
        }
    }

    /// The power fails. What was in flight may have reached the files, in part.
    pub fn power_cut(&mut self, mode: Persistence) {
        let now = self.now;
        self.trace.add(now, || format!("POWER CUT {mode:?}"));
        for process in 0..self.dead.len() {
            self.dead[process] = true;
            self.bury(process as ProcessId);
        }
        for (_, mut flight) in std::mem::take(&mut self.flights) {
            flight.orphan = true;
            if self.luck.percent(80) {
                self.reach(&flight);
            }
        }
        let stamps: Vec<Stamp> = self.files.iter().flat_map(|file| file.medium.unsynced()).collect();
        let mut draw = Draw::new(mode, &stamps, &mut self.luck);
        for file in &mut self.files {
            file.medium.power_cut(&mut draw);
            file.mtime_ns = file.mtime_ns_durable;
            file.locks.clear();
        }
        self.names.power_cut(&mut self.luck);
    }
}
