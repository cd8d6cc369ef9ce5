//! Random histories of a store, and whether it keeps what the model says.

use std::collections::BTreeSet;

use sapwood_blockdev::Errno;
use sapwood_store::StoreOptions;

use super::action::{Action, cut_off};
use super::model::{Content, Model, zeroes};
use super::rig::{Failure, Rig};
use crate::sim::crash::Cut;
use crate::sim::faults::{Faults, Kind, Planned};
use crate::sim::persist::Persistence;
use crate::sim::rng::Rng;
use crate::sim::world::{Config, World};

/// Events after which nothing opens a store any more.
const EVENTS_MAX: u64 = 1_000_000;

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The process is killed.
    Kill,
    /// The power fails.
    Power(Persistence),
    /// An operation fails, and the store is opened again.
    Failure,
}

/// A history: what was done, for the report of a failure.
pub struct History {
    rng: Rng,
    model: Model,
    options: StoreOptions,
    rig: Rig,
    mark: u64,
    log: Vec<String>,
}

fn expect<T>(what: &str, done: Result<T, Failure>) -> Result<T, String> {
    done.map_err(|failure| format!("{what}: {} ({})", failure.text, failure.kind))
}

impl History {
    fn new(seed: u64, options: &StoreOptions) -> Self {
        let world = World::new(Config::blocking(seed));
        let (rig, rng) = (Rig::new(&world, options), Rng::new(seed).fork(7));
        Self { rng, model: Model::default(), options: options.clone(), rig, mark: 0, log: Vec::new() }
    }

    fn next_action(&mut self) -> Action {
        self.mark += 1;
        let mut action = Action::random(&mut self.rng, &self.model, self.mark);
        // Where it is not known what the store must say, it is asked so that it does not matter.
        if let Action::Switch(volume, _, discard) | Action::Rollback(volume, discard) = &mut action
            && self.model.volumes.get(volume).is_some_and(|volume| volume.is_dirty.is_none())
        {
            *discard = true;
        }
        self.log.push(format!("{action:?}"));
        action
    }

    /// Does something at random and compares what is said.
    fn step(&mut self) -> Result<(), String> {
        let action = self.next_action();
        let done = self.rig.perform(&action);
        self.compare(&action, done)
    }

    fn act(&mut self, action: &Action) -> Result<(), String> {
        self.log.push(format!("{action:?}"));
        let done = self.rig.perform(action);
        self.compare(action, done)
    }

    fn compare(&mut self, action: &Action, done: Result<(), Failure>) -> Result<(), String> {
        let expected = self.model.apply(action);
        match (&done, expected) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(failure), Err(kind)) if failure.kind == kind => Ok(()),
            _ => Err(format!("{action:?}: {done:?}, expected {expected:?}")),
        }
    }

    /// Reads everything back; what was not certain is known then.
    fn verify(&mut self) -> Result<(), String> {
        let found = expect("the tree", self.rig.summary())?;
        if found != self.model.summary() {
            return Err(differences(&found, &self.model.summary()));
        }
        for ((volume, name), snapshot) in &mut self.model.snapshots {
            let what = format!("{volume}@{name}");
            let found = expect(&what, self.rig.read_snapshot(volume, name))?;
            check(&what, &mut snapshot.content, &found)?;
        }
        for (name, volume) in &mut self.model.volumes {
            let found = expect(name, self.rig.read_volume(name))?;
            check(name, &mut volume.content, &found)?;
            volume.unsynced.clear();
        }
        self.check_differences()?;
        self.rig.check_files()
    }

    /// Asks what differs between snapshots, whose contents are certain.
    fn check_differences(&self) -> Result<(), String> {
        let names: Vec<&(String, String)> = self.model.snapshots.keys().collect();
        let mut rng = Rng::new(self.mark).fork(11);
        for _ in 0..names.len().min(4) {
            let to = rng.pick(&names);
            let from = if rng.percent(80) { Some(rng.pick(&names)) } else { None };
            let what = format!("from {from:?} to {to:?}");
            let found = expect(&what, self.rig.diff(from, to))?;
            let old = from.map_or_else(zeroes, |from| self.model.snapshots[from].content.clone());
            let new = &self.model.snapshots[to].content;
            let differs: Vec<usize> = (0..new.len()).filter(|block| old[*block] != new[*block]).collect();
            if found != differs {
                return Err(format!("{what}: {found:?} differ, not {differs:?}"));
            }
        }
        Ok(())
    }

    /// Opens the store in a new process, once what the old one had in flight has ended.
    fn reopen(&mut self) -> Result<(), String> {
        self.rig = Rig::new(&self.rig.world, &self.options);
        let last = self.rig.world.events() + EVENTS_MAX;
        loop {
            match self.rig.open() {
                Ok(_) => {
                    // What a dead process has in flight keeps the locks of its layers, too; a host waits for it.
                    while self.rig.world.step() {}
                    return self.rig.check_files().map_err(|error| format!("after tidying: {error}"));
                }
                Err(failure) if failure.kind == "locked" && self.rig.world.events() < last => {
                    if !self.rig.world.step() {
                        return Err(format!("a dead process holds a lock for ever: {}", failure.text));
                    }
                }
                Err(failure) => return Err(format!("opening: {} ({})", failure.text, failure.kind)),
            }
        }
    }

    /// Frees what nobody needs, after which nothing is left to be freed and everything reads as before.
    fn collect(&mut self) -> Result<(), String> {
        let first = expect("the collection", self.rig.collect(50))?;
        let second = expect("the second collection", self.rig.collect(50))?;
        if !first.kept.is_empty() || second.packs_dropped > 0 {
            return Err(format!("first {first:?}, then {second:?}"));
        }
        self.verify()
    }

    fn arm(&mut self, end: End) {
        let world = &self.rig.world;
        let ahead = 1 << self.rng.between(1, 9);
        let event = world.events() + self.rng.between(1, ahead);
        let process = self.rig.process;
        match end {
            End::Kill => world.cut_at(Some(Cut { event, process: Some(process), mode: Persistence::Prefix })),
            End::Power(mode) => world.cut_at(Some(Cut { event, process: None, mode })),
            End::Failure => {
                let kind = self.rng.pick(&[Kind::Write, Kind::Sync, Kind::Read, Kind::Other]);
                let skip = self.rng.below(ahead / 4 + 1) as u32;
                let planned = vec![Planned { kind, skip, errno: Errno::IO }];
                world.set_faults(Faults { planned, ..Faults::default() });
            }
        }
    }

    /// Goes on until something ends the session, or long enough.
    fn session(&mut self, steps: u64, end: End) -> Result<(), String> {
        // A sync that fails may drop what was not durable.
        let power = end != End::Kill;
        self.arm(end);
        let mut candidates = Vec::new();
        for _ in 0..steps {
            let action = self.next_action();
            let done = self.rig.perform(&action);
            let failed = done.as_ref().is_err_and(|failure| {
                !self.rig.world.is_alive(self.rig.process)
                    || end == End::Failure
                        && ["io", "device", "corrupt", "base"].contains(&failure.kind.as_str())
            });
            if failed {
                self.log.push(format!("    cut off by {end:?}"));
                candidates = cut_off(&self.model, &action, self.rig.progress.get(), power);
                break;
            }
            // Said in time: it holds.
            self.compare(&action, done)?;
            if !self.rig.world.is_alive(self.rig.process) {
                break;
            }
        }
        let world = self.rig.world.clone();
        world.cut_at(None);
        world.set_faults(Faults::default());
        if world.is_alive(self.rig.process) {
            match end {
                End::Kill => world.cut_now(Some(self.rig.process), Persistence::Prefix),
                End::Power(mode) => world.cut_now(None, mode),
                // It closes the store, as far as that can be done.
                End::Failure => {}
            }
        }
        if candidates.is_empty() {
            candidates.push(self.model.clone());
        }
        if power {
            candidates.iter_mut().for_each(Model::power_cut);
        }
        self.reopen()?;
        let found = expect("the tree", self.rig.summary())?;
        let fitting = candidates.iter().rfind(|model| model.summary() == found);
        let fitting = fitting.ok_or_else(|| differences(&found, &candidates[0].summary()))?;
        self.model = fitting.clone();
        // Sometimes what was cut off is used before anybody has looked at it.
        match self.rng.percent(50) {
            true => self.verify(),
            false => self.snapshot_unread(),
        }
    }

    fn snapshot_unread(&mut self) -> Result<(), String> {
        let volumes: Vec<String> = self.model.volumes.keys().cloned().collect();
        for volume in volumes {
            let name = format!("s{}", self.rng.below(4));
            let action = Action::Snapshot(volume, name);
            self.log.push(format!("{action:?}"));
            let done = self.rig.perform(&action);
            self.compare(&action, done)?;
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), String> {
        expect("init", self.rig.init())?;
        expect("open", self.rig.open()).map(drop)
    }

    fn told(&self, message: &str) -> String {
        format!("{message}\n    {}", self.log.join("\n    "))
    }
}

/// Compares what a disk reads as with what it may read as.
fn check(what: &str, content: &mut Content, found: &[u32]) -> Result<(), String> {
    if content.len() != found.len() {
        return Err(format!("{what} has {} blocks", found.len()));
    }
    for (block, (marks, found)) in content.iter_mut().zip(found).enumerate() {
        if !marks.contains(found) {
            return Err(format!("{what}: block {block} reads as {found}, not as one of {marks:?}"));
        }
        *marks = [*found].into();
    }
    Ok(())
}

fn differences(found: &BTreeSet<String>, expected: &BTreeSet<String>) -> String {
    format!("too much: {:?}; missing: {:?}", found - expected, expected - found)
}

/// A history of `steps` without any failure.
///
/// # Errors
/// In what the store differs from the model, and what was done.
pub fn undisturbed(seed: u64, steps: u64) -> Result<(), String> {
    let mut history = History::new(seed, &StoreOptions::default());
    let mut go = || {
        history.begin()?;
        for _ in 0..steps {
            history.step()?;
        }
        history.verify()?;
        history.collect()?;
        expect("opening", history.rig.open())?;
        history.verify()
    };
    let result = go();
    result.map_err(|message| format!("seed {seed}: {}", history.told(&message)))
}

/// A history of a few sessions, each of which is cut off.
///
/// # Errors
/// As [`undisturbed`].
pub fn cut(seed: u64, options: &StoreOptions) -> Result<(), String> {
    let mut history = History::new(seed, options);
    let mut go = || {
        history.begin()?;
        let first = history.rng.between(0, 6);
        for _ in 0..first {
            history.step()?;
        }
        for _ in 0..history.rng.between(1, 4) {
            let end = match history.rng.below(10) {
                0..4 => End::Kill,
                4..8 => End::Power(history.rng.pick(&Persistence::ALL)),
                _ => End::Failure,
            };
            let steps = history.rng.between(1, 10);
            history.session(steps, end)?;
        }
        history.verify()?;
        history.collect()
    };
    let result = go();
    result.map_err(|message| format!("seed {seed}: {}", history.told(&message)))
}

/// A writer is killed, and a snapshot of what it left is taken before anybody has looked at that; then the
/// power fails.
///
/// # Errors
/// The snapshot lacks what was reported to the writer.
pub fn killed_writer(seed: u64, options: &StoreOptions) -> Result<(), String> {
    let mut history = History::new(seed, options);
    let volume = || "v0".to_owned();
    let mut go = || {
        history.begin()?;
        history.act(&Action::Create(volume()))?;
        history.act(&Action::Write(volume(), vec![(20, 99)], true))?;
        let (world, process) = (history.rig.world.clone(), Some(history.rig.process));
        let event = world.events() + history.rng.between(1, 80);
        world.cut_at(Some(Cut { event, process, mode: Persistence::Prefix }));
        let write = Action::Write(volume(), (0..8).map(|block| (block, block as u32 + 1)).collect(), true);
        let done = history.rig.perform(&write);
        world.cut_at(None);
        if done.is_ok() {
            return Ok(());
        }
        let left = cut_off(&history.model, &write, history.rig.progress.get(), false).pop();
        history.model = left.expect("a write leaves one state");
        history.reopen()?;
        history.act(&Action::Snapshot(volume(), "s0".to_owned()))?;
        world.cut_now(None, Persistence::Sectors(0));
        history.model.power_cut();
        history.reopen()?;
        history.verify()
    };
    let result = go();
    result.map_err(|message| format!("seed {seed}: {}", history.told(&message)))
}

/// The making of a store, cut off at an event. Whether it had ended before.
///
/// # Errors
/// What is there then is no store, and cannot be made one.
pub fn cut_init(
    seed: u64,
    event: u64,
    power: Option<Persistence>,
    options: &StoreOptions,
) -> Result<bool, String> {
    let mut history = History::new(seed, options);
    let (world, process) = (history.rig.world.clone(), history.rig.process);
    let mode = power.unwrap_or(Persistence::Prefix);
    world.cut_at(Some(Cut { event, process: power.is_none().then_some(process), mode }));
    let made = history.rig.init();
    world.cut_at(None);
    if world.is_alive(process) {
        world.cut_now(power.is_none().then_some(process), mode);
    }
    let is_made = made.is_ok();
    // What the dead process had in flight.
    while world.step() {}
    let mut go = || {
        history.rig = Rig::new(&world, &StoreOptions::default());
        match history.rig.open() {
            Ok(_) => {}
            Err(failure) if failure.kind == "not-found" && !is_made => history.begin()?,
            Err(failure) => return Err(format!("{} ({})", failure.text, failure.kind)),
        }
        for _ in 0..3 {
            history.step()?;
        }
        history.verify()
    };
    let result = go();
    result
        .map(|()| is_made)
        .map_err(|message| format!("seed {seed}, event {event}: {}", history.told(&message)))
}
