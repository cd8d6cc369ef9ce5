//! Random histories of a store, and whether it keeps what the model says.

use std::collections::{BTreeMap, BTreeSet};

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::Time;
use sapwood_store::StoreOptions;

use super::action::{Action, Outcome, Progress, cut_off};
use super::model::{Content, Model, zeroes};
use super::rig::{Done, Failure, Rig};
use super::setup::{Course, Setup};
use super::together::Past;
use crate::sim::crash::Cut;
use crate::sim::faults::{Faults, Kind, Planned};
use crate::sim::persist::Persistence;
use crate::sim::rng::Rng;
use crate::sim::world::{Config, World};

/// Events after which nothing opens a store any more.
const EVENTS_MAX: u64 = 1_000_000;

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The process is killed.
    Kill,
    /// The power fails.
    Power(Persistence),
    /// An operation fails, and the store is opened again.
    Failure,
}

/// A history: what was done, for the report of a failure.
pub struct History {
    pub(super) course: Course,
    pub(super) rng: Rng,
    /// What may be there: more than one thing, until somebody has looked.
    pub(super) models: Vec<Model>,
    setup: Setup,
    pub(super) rig: Rig,
    pub(super) mark: u64,
    pub(super) log: Vec<String>,
    /// How many things were done while others were, and how many of them refused for that.
    pub(super) at_a_time: usize,
    pub(super) refused: usize,
}

/// What became of an action.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) done: Done,
    pub(super) progress: Progress,
    /// What was read.
    pub(super) found: Option<Vec<u32>>,
}

impl Report {
    /// Does something.
    pub(super) fn of(rig: &mut Rig, action: &Action) -> Self {
        let done = rig.perform(action);
        Self { done, progress: rig.progress.get(), found: rig.found.take() }
    }

    /// Whether that is what it must have been.
    pub(super) fn fits(&self, outcome: Outcome) -> bool {
        match (&self.done, outcome) {
            (Ok(()), Ok(())) => true,
            (Err(failure), Err(kind)) => failure.kind == kind,
            _ => false,
        }
    }
}

fn expect<T>(what: &str, done: Result<T, Failure>) -> Result<T, String> {
    done.map_err(|failure| format!("{what}: {} ({})", failure.text, failure.kind))
}

impl History {
    fn new(course: Course, seed: u64, options: &StoreOptions) -> Self {
        let world = World::new(Config::blocking(seed));
        let setup = course.setup(seed, options);
        let (rig, rng) = (Rig::new(&world, &setup), Rng::new(seed).fork(7));
        let (models, log) = (vec![Model::default()], Vec::new());
        Self { course, rng, models, setup, rig, mark: 0, log, at_a_time: 0, refused: 0 }
    }

    fn next_action(&mut self) -> Action {
        self.mark += 1;
        let model = &self.models[0];
        let special = match self.course {
            Course::Large => match self.rng.below(100) {
                0..15 => Action::with_archive(&mut self.rng, model, self.mark, None),
                15..35 => Some(Action::Seal(self.rng.between(1, 8))),
                _ => None,
            },
            _ => None,
        };
        let mut action = special.unwrap_or_else(|| Action::random(&mut self.rng, model, self.mark));
        // Where it is not known what the store must say, it is asked so that it does not matter.
        if let Action::Switch(volume, _, discard) | Action::Rollback(volume, discard) = &mut action
            && self.is_any_dirty(volume)
        {
            *discard = true;
        }
        self.log.push(format!("{action:?}"));
        action
    }

    /// Whether a volume may hold writes, and may not.
    fn is_any_dirty(&self, volume: &str) -> bool {
        let volumes = self.models.iter().filter_map(|model| model.volumes.get(volume));
        volumes.into_iter().any(|volume| volume.is_dirty.is_none())
    }

    /// Does something at random and compares what is said.
    fn step(&mut self) -> Result<(), String> {
        let action = self.next_action();
        let report = Report::of(&mut self.rig, &action);
        self.compare(&action, &report)?;
        self.look()
    }

    fn act(&mut self, action: &Action) -> Result<(), String> {
        self.log.push(format!("{action:?}"));
        let report = Report::of(&mut self.rig, action);
        self.compare(action, &report)?;
        self.look()
    }

    fn compare(&mut self, action: &Action, report: &Report) -> Result<(), String> {
        self.log.push(format!("    {report:?}"));
        let outcomes: Vec<_> = self.models.iter().flat_map(|model| model.outcomes(action)).collect();
        let expected: Vec<Outcome> = outcomes.iter().map(|(outcome, _)| *outcome).collect();
        let fits = outcomes.into_iter().filter(|(outcome, _)| report.fits(*outcome));
        self.models = fits.map(|(_, model)| model).collect();
        match self.models.is_empty() {
            false => Ok(()),
            true => Err(format!("{action:?}: {report:?}, expected one of {expected:?}")),
        }
    }

    /// Looks what of what may be there is, if that is not known.
    pub(super) fn look(&mut self) -> Result<(), String> {
        if self.models.len() < 2 { Ok(()) } else { self.compare_trees() }
    }

    fn compare_trees(&mut self) -> Result<(), String> {
        let found = expect("the tree", self.rig.summary())?;
        let expected = self.models[0].summary();
        self.models.retain(|model| model.summary() == found);
        if self.models.is_empty() { Err(differences(&found, &expected)) } else { Ok(()) }
    }

    /// Reads everything back; what was not certain is known then.
    pub(super) fn verify(&mut self) -> Result<(), String> {
        self.compare_trees()?;
        let (mut volumes, mut snapshots) = (BTreeMap::new(), BTreeMap::new());
        for (volume, name) in self.models[0].snapshots.keys() {
            let what = format!("{volume}@{name}");
            let found = expect(&what, self.rig.read_snapshot(volume, name))?;
            snapshots.insert((volume.clone(), name.clone()), found);
        }
        for name in self.models[0].volumes.keys() {
            volumes.insert(name.clone(), expect(name, self.rig.read_volume(name))?);
        }
        let check_all = |model: &mut Model| {
            for (key, snapshot) in &mut model.snapshots {
                check(&format!("{}@{}", key.0, key.1), &mut snapshot.content, &snapshots[key])?;
            }
            for (name, volume) in &mut model.volumes {
                check(name, &mut volume.content, &volumes[name])?;
                volume.unsynced.clear();
            }
            Ok::<_, String>(())
        };
        let mut wrong = None;
        self.models.retain_mut(|model| check_all(model).map_err(|error| wrong = Some(error)).is_ok());
        // Those are the same, but for what archives hold.
        let mut left: Vec<Model> = Vec::new();
        for model in std::mem::take(&mut self.models) {
            if left.iter().all(|other| other.archives != model.archives) {
                left.push(model);
            }
        }
        self.models = left;
        if let (true, Some(wrong)) = (self.models.is_empty(), wrong) {
            return Err(wrong);
        }
        self.check_differences()?;
        self.rig.check_files()
    }

    /// Asks what differs between snapshots, whose contents are certain.
    fn check_differences(&self) -> Result<(), String> {
        let model = &self.models[0];
        let names: Vec<&(String, String)> = model.snapshots.keys().collect();
        let mut rng = Rng::new(self.mark).fork(11);
        for _ in 0..names.len().min(4) {
            let to = rng.pick(&names);
            let from = if rng.percent(80) { Some(rng.pick(&names)) } else { None };
            let what = format!("from {from:?} to {to:?}");
            let found = expect(&what, self.rig.diff(from, to))?;
            let old = from.map_or_else(zeroes, |from| model.snapshots[from].content.clone());
            let new = &model.snapshots[to].content;
            let differs: Vec<usize> = (0..new.len()).filter(|block| old[*block] != new[*block]).collect();
            if found != differs {
                return Err(format!("{what}: {found:?} differ, not {differs:?}"));
            }
        }
        Ok(())
    }

    /// Opens the store in a new process, once what the old one had in flight has ended.
    fn reopen(&mut self) -> Result<(), String> {
        self.rig = Rig::new(&self.rig.world, &self.setup);
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
    pub(super) fn collect(&mut self) -> Result<(), String> {
        self.rig.sweep();
        self.check_accounts()?;
        // Of what is stored twice, what a collection has moved may be the copy that nothing refers to any more.
        let more = if expect("what is stored", self.rig.stored())?.has_copies() { 4 } else { 1 };
        let mut done = vec![expect("the collection", self.rig.collect(50))?];
        while done.len() <= more && done.last().is_some_and(|last| done.len() < 2 || last.packs_dropped > 0) {
            done.push(expect("the next collection", self.rig.collect(50))?);
        }
        if !done[0].kept.is_empty() || done.last().is_some_and(|last| last.packs_dropped > 0) {
            return Err(format!("the collections do not end: {done:?}"));
        }
        self.verify()?;
        self.check_accounts()
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

    /// Whether an action, as its report says, has failed because the session has ended, so that it may be done or not.
    pub(super) fn is_cut_off(&self, report: &Report, end: End) -> bool {
        report.done.as_ref().is_err_and(|failure| {
            !self.rig.world.is_alive(self.rig.process)
                || end == End::Failure && ["io", "device", "corrupt", "base"].contains(&failure.kind.as_str())
        })
    }

    /// Does something at random; whether something has ended the session.
    fn advance(&mut self, end: End) -> Result<bool, String> {
        if self.course == Course::Together && self.rng.percent(60) {
            return self.group(Some(end));
        }
        let action = self.next_action();
        let report = Report::of(&mut self.rig, &action);
        if self.is_cut_off(&report, end) {
            self.log.push(format!("    cut off by {end:?}"));
            // A sync that fails may drop what was not durable.
            let (models, power) = (std::mem::take(&mut self.models), end != End::Kill);
            let left = models.iter().flat_map(|model| cut_off(model, &action, report.progress, power));
            self.models = left.collect();
            return Ok(true);
        }
        // Said in time: it holds.
        self.compare(&action, &report)?;
        Ok(!self.rig.world.is_alive(self.rig.process))
    }

    /// Goes on until something ends the session, or long enough.
    fn session(&mut self, steps: u64, end: End) -> Result<(), String> {
        self.arm(end);
        for _ in 0..steps {
            if self.advance(end)? {
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
        match end {
            End::Kill => {}
            End::Failure => self.models.iter_mut().for_each(Model::sync_failed),
            End::Power(_) => self.lose_power(),
        }
        self.reopen()?;
        self.compare_trees()?;
        // Sometimes what was cut off is used before anybody has looked at it.
        match self.rng.percent(50) {
            true => self.verify(),
            false => self.snapshot_unread(),
        }
    }

    /// What was not durable may be gone.
    fn lose_power(&mut self) {
        self.models = std::mem::take(&mut self.models).into_iter().flat_map(Model::power_cut).collect();
    }

    fn snapshot_unread(&mut self) -> Result<(), String> {
        let volumes: Vec<String> = self.models[0].volumes.keys().cloned().collect();
        for volume in volumes {
            let name = format!("s{}", self.rng.below(4));
            self.act(&Action::Snapshot(volume, name))?;
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
pub fn undisturbed(course: Course, seed: u64, steps: u64, options: &StoreOptions) -> Result<Past, String> {
    let mut history = History::new(course, seed, options);
    let mut go = || {
        history.begin()?;
        for _ in 0..steps {
            match course == Course::Together && history.rng.percent(60) {
                true => history.undisturbed_group()?,
                false => history.step()?,
            }
        }
        if course != Course::Together {
            history.verify()?;
        }
        history.collect()?;
        expect("opening", history.rig.open())?;
        history.verify()?;
        Ok(history.rig.world.now())
    };
    let end: Result<Time, String> = go();
    let end = end.map_err(|message| format!("seed {seed}: {}", history.told(&message)))?;
    let History { log, at_a_time, refused, .. } = history;
    Ok(Past { log, end, at_a_time, refused })
}

/// A history of a few sessions, each of which is cut off.
///
/// # Errors
/// As [`undisturbed`].
pub fn cut(course: Course, seed: u64, options: &StoreOptions) -> Result<(), String> {
    let mut history = History::new(course, seed, options);
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
    let mut history = History::new(Course::Small, seed, options);
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
        history.models = cut_off(&history.models[0], &write, history.rig.progress.get(), false);
        history.reopen()?;
        history.act(&Action::Snapshot(volume(), "s0".to_owned()))?;
        world.cut_now(None, Persistence::Sectors(0));
        history.lose_power();
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
    let mut history = History::new(Course::Small, seed, options);
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
        history.rig = Rig::new(&world, &StoreOptions::default().into());
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
