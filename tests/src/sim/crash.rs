//! How processes die and the power fails.

use std::time::Duration;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::engine::{Completion, Op, Transfer};

use super::faults::Fate;
use super::medium::Stamp;
use super::persist::{Draw, Persistence};
use super::storage::SimFile;
use super::world::{ProcessId, State};

/// An end that comes when the world has seen so many events, wherever the program is then.
///
/// Its threads go on, as those of a program do not, and learn nothing but errors from then on: so code
/// that blocks on an engine can be cut in the middle.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// The number of events.
    pub event: u64,
    /// The process that is killed; `None`: the power fails.
    pub process: Option<ProcessId>,
    /// What a power cut leaves.
    pub mode: Persistence,
}

/// The same operation, for whoever has lost the program that submitted it.
fn copy_of(op: &Op<SimFile>) -> Op<SimFile> {
    let file = |file: &SimFile| file.clone();
    match op {
        Op::Read(transfer) | Op::Write(transfer) => {
            let mut bytes = vec![0; transfer.memory.len()];
            transfer.memory.read_at(0, &mut bytes);
            let memory: Memory = AlignedBuf::from_slice(&bytes).into();
            let Transfer { offset, done, at_most, .. } = *transfer;
            let copy = Transfer { file: transfer.file.clone(), offset, memory, done, at_most };
            if matches!(op, Op::Read(_)) { Op::Read(copy) } else { Op::Write(copy) }
        }
        Op::Sync { file: f } => Op::Sync { file: file(f) },
        Op::SyncAll { file: f } => Op::SyncAll { file: file(f) },
        Op::Allocate { file: f, offset, len } => Op::Allocate { file: file(f), offset: *offset, len: *len },
        Op::Punch { file: f, offset, len } => Op::Punch { file: file(f), offset: *offset, len: *len },
        Op::Discard { file: f, offset, len } => Op::Discard { file: file(f), offset: *offset, len: *len },
        Op::Truncate { file: f, size } => Op::Truncate { file: file(f), size: *size },
        Op::Rename { from, to } => Op::Rename { from: from.clone(), to: to.clone() },
        Op::Unlink { path } => Op::Unlink { path: path.clone() },
        Op::SyncDirectory { path } => Op::SyncDirectory { path: path.clone() },
    }
}

impl State {
    /// Nothing is done for a dead process.
    pub fn check_alive(&self, process: ProcessId) -> std::io::Result<()> {
        if self.dead[process as usize] { Err(Errno::IO.into()) } else { Ok(()) }
    }

    /// Performs the cut that was asked for, once its moment has come.
    pub fn cut_if_due(&mut self) {
        let Some(cut) = self.cut.take_if(|cut| self.events >= cut.event) else { return };
        let dies = |state: &Self, engine: usize| {
            let process = state.engines[engine].process;
            !state.dead[process as usize] && cut.process.is_none_or(|dying| dying == process)
        };
        let mut told = Vec::new();
        for engine in 0..self.engines.len() {
            if !dies(self, engine) {
                continue;
            }
            let ready = self.take_ready(engine);
            told.extend(ready.into_iter().map(|completion| (engine, completion.token, completion.op)));
        }
        for (due, mut flight) in std::mem::take(&mut self.flights) {
            if !flight.orphan && dies(self, flight.engine) {
                let copy = copy_of(&flight.op);
                told.push((flight.engine, flight.token, std::mem::replace(&mut flight.op, copy)));
            }
            self.flights.insert(due, flight);
        }
        match cut.process {
            Some(process) => self.kill(process),
            None => self.power_cut(cut.mode),
        }
        self.dead_are_told = true;
        for (engine, token, op) in told {
            self.tell(engine, Completion { token, result: Err(Errno::IO), op });
        }
    }

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
