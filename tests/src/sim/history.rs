//! Runs a history against a disk and checks what the guest sees.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sapwood_blockdev::Errno;

use super::content::{SECTOR_BYTES, Value};
use super::contract::{Action, Contract, Ticket};
use super::faults::{Faults, Kind, Planned};
use super::medium::SECTOR;
use super::persist::Persistence;
use super::plan::{Plan, Shape, Step};
use super::register::Tick;
use super::rng::Rng;
use super::session::Session;
use super::snapshots::Snapshot;
use super::subject::{Control, Disk, Subject, disk_path};
use super::world::{Config, Waiting, World};

/// Requests outstanding on a queue.
const DEPTH_MAX: usize = 12;

/// When to crash, whatever the history does at that moment.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// After so many events.
    pub event: u64,
    /// How: a kill, or a power cut that leaves what this says.
    pub power: Option<Persistence>,
}

/// Why a history stops early.
#[derive(Debug)]
pub enum Stop {
    /// The disk broke its contract.
    Violation(String),
    /// The moment to crash has come.
    Cut(Cut),
}

impl From<String> for Stop {
    fn from(message: String) -> Self {
        Self::Violation(message)
    }
}

pub(super) type Outcome<T = ()> = Result<T, Stop>;

/// A command of the owner that has not finished.
pub(super) struct Order {
    pub ticket: Option<Ticket>,
    pub what: Control,
    /// When it was given.
    pub since: Tick,
    pub result: Rc<RefCell<Option<Result<(), String>>>>,
}

/// A history being run.
pub struct History<S: Subject> {
    pub(super) subject: S,
    pub(super) shape: Shape,
    pub(super) faults: Faults,
    /// The world it happens in.
    pub world: World,
    pub(super) contract: Contract,
    pub(super) session: Option<Session<S::Disk>>,
    pub(super) orders: Vec<Order>,
    /// Snapshots that were ordered, or asked for.
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) snapshots_ordered: u64,
    pub(super) cut: Option<Cut>,
    pub(super) luck: Rng,
    /// See [`run_rounds`](Self::run_rounds).
    pub(super) hurried: bool,
    started: u64,
}

impl<S: Subject> History<S> {
    /// A history of `plan` that crashes at `cut`, if it is asked to.
    pub fn new(subject: S, plan: &Plan, cut: Option<Cut>, trace: bool) -> Self {
        let shape = plan.shape;
        let world = World::new(Config {
            seed: plan.seed,
            alignment: shape.alignment,
            capacity: shape.capacity,
            waiting: Waiting::IsNoted,
            trace,
        });
        let contract = Contract::new(shape.sectors, shape.base.sectors(), shape.sectors_max);
        Self {
            subject,
            shape,
            faults: plan.faults.clone(),
            world,
            contract,
            session: None,
            orders: Vec::new(),
            snapshots: Vec::new(),
            snapshots_ordered: 0,
            cut,
            luck: Rng::new(plan.seed ^ 0x6c75_636b),
            hurried: false,
            started: 0,
        }
    }

    /// Makes the disk, runs every step, and ends with a recovery and a clean stop.
    ///
    /// # Errors
    /// How the disk broke its contract.
    pub fn run(&mut self, plan: &Plan) -> Result<(), String> {
        let cut = self.cut.take();
        let made = self.create().and_then(|()| {
            self.start()?;
            (self.cut, self.started) = (cut, self.world.events());
            plan.steps.iter().try_for_each(|step| self.step(*step))
        });
        let ended = match made.and_then(|()| self.finish()) {
            Err(Stop::Cut(cut)) => self.crash(cut.power, true).and_then(|()| self.finish()),
            ended => ended,
        };
        match ended {
            Ok(()) => Ok(()),
            Err(Stop::Violation(message)) => Err(message),
            Err(Stop::Cut(_)) => unreachable!("a history is cut once"),
        }
    }

    /// The events at which the history can be cut: those since the disk was first opened.
    pub fn cuts(&self) -> std::ops::Range<u64> {
        self.started + 1..self.world.events() + 1
    }

    /// A last guest writes and flushes, the power fails, and the disk is stopped cleanly.
    fn finish(&mut self) -> Outcome {
        if self.session.is_none() {
            self.start()?;
        }
        self.step(Step::Write { queue: 0, at: 3, len: 9 })?;
        self.step(Step::Flush { queue: 0 })?;
        self.step(Step::Drain)?;
        self.step(Step::Power { persistence: Persistence::Sectors(50) })?;
        self.stop()?;
        self.check()
    }

    /// One step.
    ///
    /// # Errors
    /// A violation, or that the moment to crash has come.
    pub fn step(&mut self, step: Step) -> Outcome {
        self.world.note(|| format!("STEP {step:?}"));
        match step {
            Step::Read { queue, .. }
            | Step::Write { queue, .. }
            | Step::Zeroes { queue, .. }
            | Step::Discard { queue, .. }
            | Step::Flush { queue } => {
                let queue = self.room(queue)?;
                let action = self.action(step);
                self.submit(queue, action);
            }
            Step::Forge { queue, at, from } => self.forge(queue, at, from)?,
            Step::Resize { sectors } => self.resize(sectors)?,
            Step::Flatten => self.change_base(Control::Flatten)?,
            Step::Rebase => self.change_base(Control::Rebase)?,
            Step::Commit => self.change_base(Control::Commit)?,
            Step::Checkpoint => self.work(Control::Checkpoint),
            Step::Clean => self.work(Control::Clean),
            Step::Compact => self.work(Control::Compact),
            Step::Seal => self.order(Control::Seal, None),
            Step::Snapshot => self.take_snapshot()?,
            Step::Run { rounds } => self.run_rounds(rounds)?,
            Step::Pass { millis } => self.pass(Duration::from_millis(millis))?,
            Step::Drain => self.drain()?,
            Step::Fail { kind, skip, no_space } => self.plan_failure(kind, skip, no_space),
            Step::Reopen => self.reopen()?,
            Step::Kill => self.crash(None, false)?,
            Step::Power { persistence } => self.crash(Some(persistence), false)?,
            Step::DamageSlot { power } => self.damage_slot(power)?,
            Step::DamageLog { block } => self.damage_log(block)?,
        }
        if self.session().latched {
            self.reopen()?;
        }
        self.run_rounds(1)
    }

    pub(super) fn session(&mut self) -> &mut Session<S::Disk> {
        self.session.as_mut().expect("a session between steps")
    }

    /// A place on the disk as it is now.
    fn place(&mut self, at: u64, len: u64) -> (u64, u64) {
        let sectors = self.session().sectors();
        let first = at % sectors;
        (first, len.clamp(1, sectors - first))
    }

    fn submit(&mut self, queue: usize, action: Action) {
        let session = self.session.as_mut().expect("a session");
        session.submit(queue, action, &mut self.contract);
    }

    /// What a guest's step asks for on the disk as it is now.
    fn action(&mut self, step: Step) -> Action {
        match step {
            Step::Read { at, len, .. } => {
                let (first, count) = self.place(at, len);
                Action::Read(first, count)
            }
            Step::Write { at, len, .. } => {
                let (first, count) = self.place(at, len);
                Action::Write(first, (0..count).map(|_| self.contract.contents.fresh()).collect())
            }
            Step::Zeroes { at, len, .. } => {
                let (first, count) = self.place(at, len);
                Action::Zeroes(first, count)
            }
            Step::Discard { at, len, .. } => {
                let (first, count) = self.place(at, len);
                Action::Discard(first, count)
            }
            _ => Action::Flush,
        }
    }

    /// Waits until a queue has room for a request. The disk may have another size afterwards.
    fn room(&mut self, queue: usize) -> Outcome<usize> {
        let queue = queue % self.shape.queues;
        self.wait_for("room in the queue", |history| history.session().outstanding_on(queue) < DEPTH_MAX)?;
        Ok(queue)
    }

    /// Writes a copy of a block of the disk's own file that is no guest's data.
    fn forge(&mut self, queue: usize, at: u64, from: u64) -> Outcome {
        let queue = self.room(queue)?;
        let Some((_, block)) = self.own_block(from) else { return Ok(()) };
        let (first, count) = self.place(at / 8 * 8, 8);
        let sectors = (first..first + count).zip(block.chunks_exact(SECTOR_BYTES));
        let values: Vec<Value> =
            sectors.map(|(sector, bytes)| self.contract.contents.foreign(sector, bytes)).collect();
        self.submit(queue, Action::Write(first, values));
        Ok(())
    }

    /// One of the blocks of the disk's file that hold no guest's data: its number and contents.
    pub(super) fn own_block(&self, choice: u64) -> Option<(u64, Vec<u8>)> {
        let file = self.world.contents(&disk_path())?;
        let is_own = |(_, block): &(u64, &[u8])| {
            block[0] != 0
                && !block.chunks_exact(SECTOR_BYTES).any(|sector| self.contract.contents.is_guests(sector))
        };
        let own: Vec<(u64, &[u8])> = (0..).zip(file.chunks_exact(8 * SECTOR_BYTES)).filter(is_own).collect();
        let (number, block) = own.get((choice % own.len().max(1) as u64) as usize)?;
        Some((*number, block.to_vec()))
    }

    fn resize(&mut self, sectors: u64) -> Outcome {
        self.wait_for_alone()?;
        let ticket = self.contract.submit(Action::Resize(sectors));
        self.session().resizes += 1;
        self.order(Control::Resize(sectors * SECTOR), Some(ticket));
        Ok(())
    }

    fn change_base(&mut self, what: Control) -> Outcome {
        self.wait_for_alone()?;
        self.order(what, None);
        Ok(())
    }

    /// Work on the layer that is current: not while that is being replaced.
    fn work(&mut self, what: Control) {
        if !self.orders.iter().any(|order| matches!(order.what, Control::Snapshot(_))) {
            self.order(what, None);
        }
    }

    /// Waits for the end of what must be alone.
    fn wait_for_alone(&mut self) -> Outcome {
        self.wait_for("an earlier command", |history| {
            !history.orders.iter().any(|order| order.what.is_alone())
        })
    }

    pub(super) fn order(&mut self, what: Control, ticket: Option<Ticket>) {
        let world = self.world.clone();
        let session = self.session();
        let storage = world.storage(session.process);
        let task = Arc::clone(&session.disk).control(storage, session.owner.io.clone(), what);
        let result = session.owner.give(&world, task);
        let since = self.contract.now();
        self.orders.push(Order { ticket, what, since, result });
    }

    fn plan_failure(&mut self, kind: Kind, skip: u32, no_space: bool) {
        let errno = if no_space { Errno::NOSPC } else { Errno::IO };
        self.world.change_faults(|faults| faults.planned.push(Planned { kind, skip, errno }));
    }
}
