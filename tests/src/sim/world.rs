//! The simulated world: files, a clock, processes and their engines, and crashes.
//!
//! Everything follows from one seed. Invariants:
//! - the clock moves only when somebody asks for the next event, never by itself;
//! - an operation has its effect at one moment between its start and its completion, in an order
//!   that has nothing to do with submission;
//! - a dead process submits nothing and completes nothing, but what it had in flight may still
//!   reach the files later, and holds its locks until then.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use sapwood_blockdev::engine::{Completion, Op, Time};
use sapwood_blockdev::storage::Lock;

use super::crash::Cut;
use super::engine::{SimEngine, WakeFlag};
use super::faults::{Fate, Faults};
use super::medium::{Medium, SECTOR, Stamp};
use super::names::{FileId, Names};
use super::persist::Persistence;
use super::rng::Rng;
use super::storage::{Description, SimFile, SimStorage};
use super::trace::Trace;

/// The number of a process.
pub type ProcessId = u32;
/// The number of an engine.
pub type EngineId = usize;

/// What [`Engine::wait`](sapwood_blockdev::engine::Engine::wait) does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// It moves the clock to the next event: for tests that block on one engine.
    MovesTheClock,
    /// It notes what the thread sleeps for and returns: for a runner of several engines, which
    /// asks [`World::runnable`] and moves the clock itself.
    IsNoted,
}

/// A sector that went bad.
#[derive(Debug)]
pub struct Damage {
    file: FileId,
    sector: u64,
    before: Vec<u8>,
    noise: Vec<u8>,
}

/// What a world is like.
#[derive(Clone, Debug)]
pub struct Config {
    /// Everything random follows from it.
    pub seed: u64,
    /// What direct I/O must be aligned to, in bytes.
    pub alignment: usize,
    /// Bytes that the file system has space for.
    pub capacity: Option<u64>,
    /// What waiting does.
    pub waiting: Waiting,
    /// Whether to keep a trace.
    pub trace: bool,
}

impl Config {
    /// A world for tests that block on one engine.
    pub fn blocking(seed: u64) -> Self {
        Self { seed, alignment: 512, capacity: None, waiting: Waiting::MovesTheClock, trace: false }
    }
}

/// A world; clones are handles on the same one.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

/// A file and what is known about it beside its bytes.
#[derive(Default)]
pub(super) struct File {
    pub medium: Medium,
    pub mtime_ns: u64,
    /// A block device: its size is fixed, and discards leave anything.
    pub is_device: bool,
    /// What a power cut leaves of it: what syncs of data alone do not cover is lost.
    pub mtime_ns_durable: u64,
    open: Vec<Weak<Description>>,
    pub locks: Vec<(Weak<Description>, Lock)>,
}

/// An operation between start and completion.
pub(super) struct Flight {
    pub engine: EngineId,
    pub token: u64,
    pub submitted: Stamp,
    pub fate: Fate,
    pub op: Op<SimFile>,
    /// The process died: nobody waits for it, and it may reach the file in part.
    pub orphan: bool,
}

/// Moment of completion, and a number that makes it unique.
pub(super) type Due = (Time, u64);

pub(super) struct EngineState {
    pub process: ProcessId,
    wake: Arc<WakeFlag>,
    ready: Vec<Completion<SimFile>>,
    sleep: Option<Option<Time>>,
    gone: bool,
}

pub(super) struct State {
    pub config: Config,
    pub now: Time,
    pub stamp: Stamp,
    pub events: u64,
    pub failures: (u64, u64),
    pub files: Vec<File>,
    pub names: Names,
    pub flights: BTreeMap<Due, Flight>,
    pub faults: Faults,
    pub timing: Rng,
    pub luck: Rng,
    pub random: Rng,
    pub trace: Trace,
    pub engines: Vec<EngineState>,
    pub dead: Vec<bool>,
    /// An end that is to come.
    pub cut: Option<Cut>,
    /// Whether operations of dead processes fail, in place of being forgotten.
    pub dead_are_told: bool,
    ids: u64,
}

impl World {
    /// A world without files.
    pub fn new(config: Config) -> Self {
        let mut rng = Rng::new(config.seed);
        let (timing, luck, random) = (rng.fork(1), rng.fork(2), rng.fork(3));
        let trace = Trace::new(config.trace);
        Self(Arc::new(Mutex::new(State {
            config,
            now: Duration::from_secs(1),
            stamp: 1,
            events: 0,
            failures: (0, 0),
            files: Vec::new(),
            names: Names::default(),
            flights: BTreeMap::new(),
            faults: Faults::default(),
            timing,
            luck,
            random,
            trace,
            engines: Vec::new(),
            dead: Vec::new(),
            cut: None,
            dead_are_told: false,
            ids: 0,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process.
    pub fn process(&self) -> ProcessId {
        let mut state = self.state();
        state.dead.push(false);
        (state.dead.len() - 1) as ProcessId
    }

    /// The file system as a process sees it.
    pub fn storage(&self, process: ProcessId) -> SimStorage {
        SimStorage::new(self.clone(), process)
    }

    /// A new engine: a thread of a process.
    pub fn engine(&self, process: ProcessId) -> SimEngine {
        let wake = Arc::new(WakeFlag::default());
        let mut state = self.state();
        state.engines.push(EngineState {
            process,
            wake: Arc::clone(&wake),
            ready: Vec::new(),
            sleep: None,
            gone: false,
        });
        SimEngine::new(self.clone(), state.engines.len() - 1, wake)
    }

    /// Makes a durable file.
    pub fn install(&self, path: &Path, bytes: &[u8]) {
        let mut state = self.state();
        let file = state.create(path);
        state.files[file].medium = Medium::of(bytes);
        state.names.sync(path.parent().unwrap_or(Path::new("")));
    }

    /// Puts a block device of `size` bytes of zeroes there.
    pub fn install_device(&self, path: &Path, size: u64) {
        self.install(path, &[]);
        let mut state = self.state();
        let file = state.names.get(path).expect("just installed");
        state.files[file].is_device = true;
        state.files[file].medium.truncate(0, size);
        state.files[file].medium.sync(0);
    }

    /// What readers see of a file now; nothing if there is none.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state();
        let medium = &state.files[state.names.get(path)?].medium;
        let mut bytes = vec![0; medium.size() as usize];
        medium.read(0, &mut bytes);
        Some(bytes)
    }

    /// Sets the faults from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Changes the faults.
    pub fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state().faults);
    }

    /// Somebody makes room: the file system has space for everything from now on.
    pub fn make_room(&self) {
        self.state().config.capacity = None;
    }

    /// Completes the operation that is due next, moving the clock. False when none is in flight.
    pub fn step(&self) -> bool {
        self.state().step()
    }

    /// When the next operation completes.
    pub fn next_due(&self) -> Option<Time> {
        self.state().flights.first_key_value().map(|(due, _)| due.0)
    }

    /// When the first sleeping thread's deadline comes.
    pub fn next_deadline(&self) -> Option<Time> {
        let state = self.state();
        state.engines.iter().filter(|engine| !engine.gone).filter_map(|engine| engine.sleep?).min()
    }

    /// Moves the clock forward to `time`, completing nothing.
    pub fn advance(&self, time: Time) {
        let mut state = self.state();
        state.now = state.now.max(time);
    }

    /// Now.
    pub fn now(&self) -> Time {
        self.state().now
    }

    /// Whether a thread that waited on this engine would have been woken, or did not wait.
    pub fn runnable(&self, engine: EngineId) -> bool {
        let state = self.state();
        let engine = &state.engines[engine];
        match engine.sleep {
            None => true,
            Some(deadline) => {
                !engine.ready.is_empty()
                    || engine.wake.is_set()
                    || deadline.is_some_and(|time| time <= state.now)
            }
        }
    }

    /// Something else than its engine gave this thread work.
    pub fn rouse(&self, engine: EngineId) {
        self.state().engines[engine].sleep = None;
    }

    /// How many operations have failed so far, retries of interrupted ones aside; and syncs among
    /// them.
    pub fn failures(&self) -> (u64, u64) {
        self.state().failures
    }

    /// How many operations have taken effect so far: the points at which a history can be cut.
    pub fn events(&self) -> u64 {
        self.state().events
    }

    /// A process dies. What it had in flight may still reach the files, in part, much later.
    pub fn kill(&self, process: ProcessId) {
        self.state().kill(process);
    }

    /// A process has stopped by itself: its threads are gone, but what it forgot to close stays
    /// open.
    pub fn retire(&self, process: ProcessId) {
        self.state().bury(process);
    }

    /// Fills a sector of a file with noise behind everybody's back. Nothing when there is no such
    /// file.
    pub fn damage(&self, path: &Path, sector: u64) -> Option<Damage> {
        let mut state = self.state();
        let file = state.names.get(path)?;
        let mut noise = vec![0; SECTOR as usize];
        state.luck.fill(&mut noise);
        let mut before = vec![0; SECTOR as usize];
        let medium = &mut state.files[file].medium;
        medium.read(sector * SECTOR, &mut before);
        medium.damage(sector, &noise);
        let now = state.now;
        state.trace.add(now, || format!("DAMAGE sector {sector} of {}", path.display()));
        Some(Damage { file, sector, before, noise })
    }

    /// Undoes damage, unless the sector was written since.
    pub fn mend(&self, damage: &Damage) {
        let mut state = self.state();
        let medium = &mut state.files[damage.file].medium;
        let mut seen = vec![0; SECTOR as usize];
        medium.read(damage.sector * SECTOR, &mut seen);
        if seen == damage.noise {
            medium.damage(damage.sector, &damage.before);
            let now = state.now;
            state.trace.add(now, || format!("MEND sector {}", damage.sector));
        }
    }

    /// The power fails: every process dies, and what was not synced persists as `mode` says.
    pub fn power_cut(&self, mode: Persistence) {
        self.state().power_cut(mode);
    }

    /// Asks for an end at a later moment; `None` takes it back.
    pub fn cut_at(&self, cut: Option<Cut>) {
        self.state().cut = cut;
    }

    /// Such an end, now.
    pub fn cut_now(&self, process: Option<ProcessId>, mode: Persistence) {
        let mut state = self.state();
        state.cut = Some(Cut { event: 0, process, mode });
        state.cut_if_due();
    }

    /// Whether a process lives.
    pub fn is_alive(&self, process: ProcessId) -> bool {
        !self.state().dead[process as usize]
    }

    /// Notes a line in the trace.
    pub fn note(&self, line: impl FnOnce() -> String) {
        let mut state = self.state();
        let now = state.now;
        state.trace.add(now, line);
    }

    /// The trace so far, and a hash of it.
    pub fn trace(&self) -> (Vec<String>, u64) {
        let state = self.state();
        (state.trace.lines(), state.trace.hash())
    }
}

impl State {
    pub fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub fn create(&mut self, path: &Path) -> usize {
        self.files.push(File::default());
        self.names.link(path, self.files.len() - 1);
        self.files.len() - 1
    }

    /// Notes a new description. A file that nobody had open is read from the disk again.
    pub fn opened(&mut self, description: &Arc<Description>) {
        let dead = &self.dead;
        let file = &mut self.files[description.file];
        file.open.retain(|other| other.upgrade().is_some_and(|d| !dead[d.process as usize]));
        if file.open.is_empty() {
            file.medium.forget_lost();
        }
        file.open.push(Arc::downgrade(description));
    }

    /// Takes a lock; says who is in the way.
    pub fn lock(&mut self, description: &Arc<Description>, lock: Lock) -> Option<ProcessId> {
        let mut locks = std::mem::take(&mut self.files[description.file].locks);
        locks.retain(|(owner, _)| owner.upgrade().is_some_and(|owner| self.holds(&owner)));
        let in_the_way = locks.iter().find_map(|(owner, held)| {
            let owner = owner.upgrade()?;
            let conflict = lock == Lock::Exclusive || *held == Lock::Exclusive;
            (owner.id != description.id && conflict).then_some(owner.process)
        });
        if in_the_way.is_none() {
            locks.retain(|(owner, _)| owner.upgrade().is_some_and(|owner| owner.id != description.id));
            locks.push((Arc::downgrade(description), lock));
        }
        self.files[description.file].locks = locks;
        in_the_way
    }

    pub fn unlock(&mut self, description: &Arc<Description>) {
        let others = |(owner, _): &(Weak<Description>, Lock)| {
            owner.upgrade().is_some_and(|owner| owner.id != description.id)
        };
        self.files[description.file].locks.retain(others);
    }

    /// Whether an open description still holds its locks: its process lives, or an operation in
    /// flight keeps it open.
    fn holds(&self, description: &Arc<Description>) -> bool {
        !self.dead[description.process as usize]
            || self.flights.values().any(|flight| {
                super::landing::file_of(&flight.op)
                    .is_some_and(|file| file.description().id == description.id)
            })
    }

    pub fn collect(&mut self, engine: EngineId, done: &mut Vec<Completion<SimFile>>) {
        let ready = &mut self.engines[engine].ready;
        let all = ready.len() as u64;
        let some = if all > 1 && self.timing.percent(20) { self.timing.between(1, all) } else { all };
        done.extend(ready.drain(..some as usize));
        self.engines[engine].sleep = None;
    }

    pub fn wait(&mut self, engine: EngineId, deadline: Option<Time>) {
        self.cut_if_due();
        if !self.engines[engine].ready.is_empty() || deadline.is_some_and(|time| time <= self.now) {
            return;
        }
        if self.config.waiting == Waiting::IsNoted {
            self.engines[engine].sleep = Some(deadline);
            return;
        }
        match (self.flights.first_key_value().map(|(due, _)| due.0), deadline) {
            (Some(due), None) if self.step() => assert!(due <= self.now),
            (Some(due), Some(time)) if due <= time => assert!(self.step()),
            (_, Some(time)) => self.now = time,
            // Another thread has not collected all of its completions.
            (_, None) if self.engines.iter().any(|engine| !engine.ready.is_empty()) => {}
            (_, None) => panic!("deadlock: a thread waits and nothing is in flight"),
        }
    }

    pub fn in_flight(&self, engine: EngineId) -> usize {
        let flying = self.flights.values().filter(|flight| flight.engine == engine && !flight.orphan);
        flying.count() + self.engines[engine].ready.len()
    }

    pub fn gone(&mut self, engine: EngineId) {
        self.engines[engine].gone = true;
        self.engines[engine].ready.clear();
    }

    pub fn is_dead(&self, engine: EngineId) -> bool {
        self.dead[self.engines[engine].process as usize]
    }

    /// Hands a completion to its thread.
    pub fn deliver(&mut self, engine: EngineId, completion: Completion<SimFile>) {
        if !self.engines[engine].gone && !self.is_dead(engine) {
            self.engines[engine].ready.push(completion);
        }
    }

    /// Takes the completions that a thread has not collected.
    pub fn take_ready(&mut self, engine: EngineId) -> Vec<Completion<SimFile>> {
        std::mem::take(&mut self.engines[engine].ready)
    }

    /// Lets a thread of a dead process know.
    pub fn tell(&mut self, engine: EngineId, completion: Completion<SimFile>) {
        self.engines[engine].ready.push(completion);
    }

    /// Takes back what a dead process can no longer use.
    pub fn bury(&mut self, process: ProcessId) {
        for engine in self.engines.iter_mut().filter(|engine| engine.process == process) {
            engine.ready.clear();
            engine.gone = true;
        }
    }
}
