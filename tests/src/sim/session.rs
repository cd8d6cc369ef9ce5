//! One process that serves a disk: its threads, driven by the simulator.
//!
//! Each queue, the background work and the owner's commands have an engine of their own, as
//! threads have. A thread runs only when it has not gone to sleep or its engine would have woken
//! it: a forgotten wake-up leaves it asleep, and the history stuck.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Done, Request};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::GuestOffset;

use super::contract::{Action, Contract, Ticket};
use super::engine::SimEngine;
use super::medium::SECTOR;
use super::rng::Rng;
use super::subject::Disk;
use super::world::{EngineId, ProcessId, World};

/// A thread without a queue.
pub struct Worker {
    /// Its reactor.
    pub io: Io<SimEngine>,
    engine: EngineId,
}

/// A request that the guest waits for.
struct Waiting {
    /// What the contract knows of it; nothing for a look at the disk after a recovery.
    ticket: Option<Ticket>,
    buf: SharedBuf,
    /// How many resizes there had been, counted at their starts and ends: while the size
    /// changes, a request may fall outside.
    resizes: u64,
}

struct Lane<Q> {
    queue: Q,
    io: Io<SimEngine>,
    engine: EngineId,
    waiting: Vec<Option<Waiting>>,
}

/// A process that serves a disk.
pub struct Session<D: Disk> {
    /// The process.
    pub process: ProcessId,
    /// The disk.
    pub disk: Arc<D>,
    /// The thread of the owner's commands.
    pub owner: Worker,
    /// Resizes, counted at their starts and ends.
    pub resizes: u64,
    /// Whether a request was refused because an earlier operation failed.
    pub latched: bool,
    /// How the last [`Session::peek`] ended.
    pub peeked: Option<Result<(), DeviceError>>,
    keeper: Worker,
    lanes: Vec<Lane<D::Queue>>,
    world: World,
    failures: (u64, u64),
}

impl Worker {
    /// A thread of a process.
    pub fn new(world: &World, process: ProcessId) -> Self {
        let engine = world.engine(process);
        let id = engine.id();
        Self { io: Io::new(engine), engine: id }
    }

    /// Gives it something to do; the result arrives in the slot.
    pub fn give<T: 'static>(
        &self,
        world: &World,
        task: impl Future<Output = T> + 'static,
    ) -> Rc<RefCell<Option<T>>> {
        let slot = Rc::new(RefCell::new(None));
        let result = Rc::clone(&slot);
        self.io.spawn(async move {
            let value = task.await;
            *result.borrow_mut() = Some(value);
        });
        world.rouse(self.engine);
        slot
    }

    /// Lets it run until it sleeps, if it is awake.
    pub fn run(&self, world: &World) -> bool {
        let awake = world.runnable(self.engine);
        if awake {
            let mut finished = Vec::new();
            self.io.poll(&mut finished);
            assert!(finished.is_empty(), "nothing was started without a future");
            self.io.wait(None);
        }
        awake
    }
}

impl<D: Disk> Session<D> {
    /// Starts the threads of a process that has opened a disk; `owner` opened it.
    pub fn start(world: &World, process: ProcessId, disk: Arc<D>, owner: Worker, queues: usize) -> Self {
        let lane = |_| {
            let engine = world.engine(process);
            let id = engine.id();
            let io = Io::new(engine);
            Lane { queue: disk.queue_on(io.clone()), io, engine: id, waiting: Vec::new() }
        };
        let lanes = (0..queues).map(lane).collect();
        let keeper = Worker::new(world, process);
        drop(keeper.give(world, Arc::clone(&disk).maintain(keeper.io.clone())));
        let (world, failures) = (world.clone(), world.failures());
        Self {
            process,
            disk,
            owner,
            resizes: 0,
            latched: false,
            peeked: None,
            keeper,
            lanes,
            world,
            failures,
        }
    }

    /// The disk's size in sectors now.
    pub fn sectors(&self) -> u64 {
        self.disk.geometry().size / SECTOR
    }

    /// Whether any operation failed since the start.
    pub fn storage_failed(&self) -> bool {
        self.world.failures() != self.failures
    }

    /// Whether any sync failed since the start.
    pub fn sync_failed(&self) -> bool {
        self.world.failures().1 != self.failures.1
    }

    /// Requests not yet reported.
    pub fn outstanding(&self) -> usize {
        self.lanes.iter().map(|lane| lane.waiting.iter().flatten().count()).sum()
    }

    /// Requests of one queue not yet reported.
    pub fn outstanding_on(&self, queue: usize) -> usize {
        self.lanes[queue].waiting.iter().flatten().count()
    }

    /// Submits what the guest wants.
    ///
    /// # Panics
    /// On a resize, which is not the guest's to ask for.
    pub fn submit(&mut self, queue: usize, action: Action, contract: &mut Contract) {
        let (first, count) = match &action {
            Action::Read(first, count) | Action::Zeroes(first, count) | Action::Discard(first, count) => {
                (*first, *count)
            }
            Action::Write(first, values) => (*first, values.len() as u64),
            Action::Flush => (0, 0),
            Action::Resize(_) => panic!("guests do not resize"),
        };
        let len = count * SECTOR;
        let data = matches!(action, Action::Read(..) | Action::Write(..));
        let buf = SharedBuf::heap(if data { len as usize } else { 0 });
        let command = match &action {
            Action::Read(..) => Command::Read(buf.clone().into()),
            Action::Write(_, values) => {
                buf.write_at(0, &contract.contents.bytes(first, values));
                Command::Write(buf.clone().into())
            }
            Action::Zeroes(..) => Command::WriteZeroes,
            Action::Discard(..) => Command::Discard,
            Action::Flush | Action::Resize(_) => Command::Flush,
        };
        self.world.note(|| format!("q{queue} submit {action:?}"));
        let ticket = contract.submit(action);
        self.ask(queue, Some(ticket), buf, GuestOffset(first * SECTOR), len, command);
    }

    /// Reads sectors behind the contract's back, to see what a recovery has found.
    pub fn peek(&mut self, queue: usize, first: u64, count: u64) -> SharedBuf {
        let len = count * SECTOR;
        let buf = SharedBuf::heap(len as usize);
        self.peeked = None;
        let command = Command::Read(buf.clone().into());
        self.ask(queue, None, buf.clone(), GuestOffset(first * SECTOR), len, command);
        buf
    }

    fn ask(
        &mut self,
        queue: usize,
        ticket: Option<Ticket>,
        buf: SharedBuf,
        offset: GuestOffset,
        len: u64,
        command: Command,
    ) {
        let lane = &mut self.lanes[queue];
        let free = lane.waiting.iter().position(Option::is_none);
        let tag = free.unwrap_or(lane.waiting.len());
        if free.is_none() {
            lane.waiting.push(None);
        }
        lane.waiting[tag] = Some(Waiting { ticket, buf, resizes: self.resizes });
        lane.queue.submit(Request { tag: tag as u64, offset, len, command });
        self.world.rouse(lane.engine);
    }

    /// Lets one thread that is awake run; false when all sleep.
    ///
    /// # Errors
    /// What the disk reported and must not.
    pub fn run_one(&mut self, contract: &mut Contract, luck: &mut Rng) -> Result<bool, String> {
        let threads = self.lanes.len() + 2;
        let start = luck.below(threads as u64) as usize;
        for n in 0..threads {
            let ran = match (start + n) % threads {
                0 => self.owner.run(&self.world),
                1 => self.keeper.run(&self.world),
                thread => self.run_lane(thread - 2, contract)?,
            };
            if ran {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn run_lane(&mut self, number: usize, contract: &mut Contract) -> Result<bool, String> {
        let lane = &mut self.lanes[number];
        if !self.world.runnable(lane.engine) {
            return Ok(false);
        }
        let mut done = Vec::new();
        lane.queue.poll(&mut done);
        lane.queue.wait(None);
        for done in done {
            let waiting = self.lanes[number].waiting.get_mut(done.tag as usize).and_then(Option::take);
            let waiting =
                waiting.ok_or(format!("q{number} reported #{}, which nobody asked for", done.tag))?;
            self.report(number, &done, &waiting, contract)?;
        }
        Ok(true)
    }

    fn report(
        &mut self,
        queue: usize,
        done: &Done,
        waiting: &Waiting,
        contract: &mut Contract,
    ) -> Result<(), String> {
        let Some(ticket) = &waiting.ticket else {
            self.peeked = Some(done.result);
            return Ok(());
        };
        self.world.note(|| format!("q{queue} reported {:?} {ticket}", done.result));
        let Err(error) = done.result else {
            let mut data = vec![0; waiting.buf.len()];
            waiting.buf.read_at(0, &mut data);
            return contract.done(ticket, &data);
        };
        contract.failed(ticket);
        let resized = self.resizes != waiting.resizes || !self.resizes.is_multiple_of(2);
        let excused = match error {
            DeviceError::OutOfRange => resized,
            DeviceError::Corrupt | DeviceError::Unsupported | DeviceError::ReadOnly => false,
            DeviceError::Io(_) | DeviceError::NoSpace | DeviceError::Latched => self.storage_failed(),
        };
        self.latched |= error == DeviceError::Latched;
        if excused { Ok(()) } else { Err(format!("a request failed without a reason: {error}")) }
    }

    /// Gives up everything, finished or not.
    pub fn abandon(self) {
        let Self { disk, owner, keeper, lanes, .. } = self;
        for lane in lanes {
            drop(lane.queue);
            lane.io.abandon_tasks();
        }
        owner.io.abandon_tasks();
        keeper.io.abandon_tasks();
        drop(disk);
    }
}
