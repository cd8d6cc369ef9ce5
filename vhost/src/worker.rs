//! One thread with one engine, one device queue and, while a driver uses it, one virtqueue.
//!
//! A turn takes every available request, lets the device move on and reports what has finished,
//! in whatever order, with one notification. When a turn brought nothing, the thread polls a
//! little ([`Spin`]), then asks for a kick, looks once more, and sleeps in the device queue's
//! `wait`, which watches the kick descriptor too.
//!
//! Commands come through a channel and the engine's waker. To stop a ring is to take nothing
//! more from it, to wait for what is in flight and to report that: afterwards nothing of this
//! thread touches the guest's memory.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::task::Waker;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sapwood_blockdev::device::{BlockDevice, Command as DeviceCommand, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::{Engine, WatchFd};
use sapwood_blockdev::units::GuestOffset;

use crate::features::Features;
use crate::guest::GuestMap;
use crate::notify::{Complaints, Kick, Notifier};
use crate::queue::Ring;
use crate::request::finish::{Flight, Flights, Used, answer};
use crate::request::layout::{ID_BYTES, Status};
use crate::request::parse::{DiskRange, write_id};
use crate::request::{Action, Chain, Limits, Parsed, parse};
use crate::spin::Spin;

/// How often a queue without a kick descriptor is looked at (vhost-user: "polling will be used").
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// What a ring needs to run.
#[derive(Debug)]
pub(crate) struct Start {
    pub ring: Ring,
    /// A private copy.
    pub map: GuestMap,
    pub features: Features,
    pub kick: Option<Kick>,
    pub call: Notifier,
    pub error: Notifier,
}

enum Command {
    Start(Box<Start>),
    /// Drains, then answers the index of the next available request, if a ring ran.
    Stop(SyncSender<Option<u16>>),
}

/// What does not change while a thread lives.
pub(crate) struct Setup<D> {
    pub device: Arc<D>,
    pub index: usize,
    pub id: [u8; ID_BYTES],
    pub spin: Duration,
}

/// The handle of a worker thread. Dropping it drains and ends the thread.
pub(crate) struct Worker {
    commands: Option<Sender<Command>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

/// A ring that was told to stop.
pub(crate) struct Stopping(Receiver<Option<u16>>);

impl Stopping {
    /// Waits until the ring has drained; the index of the next available request. `None` when no
    /// ring ran (or the thread is gone).
    pub(crate) fn wait(self) -> Option<u16> {
        self.0.recv().ok().flatten()
    }
}

impl Worker {
    /// Starts a thread whose engine `factory` makes.
    ///
    /// # Errors
    /// What the factory or the system says.
    pub(crate) fn spawn<D>(
        setup: Setup<D>,
        factory: impl FnOnce() -> io::Result<D::Engine> + Send + 'static,
    ) -> io::Result<Self>
    where
        D: BlockDevice<Engine: WatchFd>,
    {
        let (commands, receiver) = channel();
        let (ready, is_ready) = sync_channel(1);
        let name = format!("vq{}", setup.index);
        let thread = thread::Builder::new().name(name).spawn(move || {
            let engine = match factory() {
                Ok(engine) => engine,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let waker = engine.waker();
            let spins = [Spin::new(setup.spin), Spin::new(setup.spin)];
            let queue = setup.device.queue(engine);
            let _ = ready.send(Ok(waker));
            Loop { setup, queue, commands: receiver, active: None, done: Vec::new(), spins }.run();
        })?;
        let waker = is_ready.recv().map_err(|_| io::Error::other("the queue's thread panicked"))??;
        Ok(Self { commands: Some(commands), waker, thread: Some(thread) })
    }

    /// Lets a ring run. None may be running.
    ///
    /// # Errors
    /// When the thread has ended, which it does only by panicking.
    pub(crate) fn start(&self, start: Start) -> io::Result<()> {
        self.send(Command::Start(Box::new(start)))
    }

    /// Tells the ring to stop.
    pub(crate) fn stop(&self) -> Stopping {
        let (reply, receiver) = sync_channel(1);
        if let Err(error) = self.send(Command::Stop(reply)) {
            log::error!("stopping a queue: {error}");
        }
        Stopping(receiver)
    }

    fn send(&self, command: Command) -> io::Result<()> {
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        self.waker.wake_by_ref();
        if sent { Ok(()) } else { Err(io::Error::other("the queue's thread is gone")) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        self.waker.wake_by_ref();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a queue's thread panicked");
        }
    }
}

/// A running ring and what is in flight on it.
struct Active {
    start: Start,
    broken: bool,
    flights: Flights,
    chain: Chain,
    ranges: Vec<DiskRange>,
    complaints: Complaints,
}

impl Active {
    fn new(start: Start) -> Self {
        Self {
            start,
            broken: false,
            flights: Flights::default(),
            chain: Chain::default(),
            ranges: Vec::new(),
            complaints: Complaints::default(),
        }
    }

    /// Whether the driver has not heard of as many requests as there can be: what was answered
    /// is published before more is taken, whatever the driver makes available meanwhile.
    fn is_full(&self) -> bool {
        let Start { ring, .. } = &self.start;
        self.flights.len() + ring.unpublished() >= usize::from(ring.size())
    }

    /// The next request's head, unless there is none or may be none.
    fn next(&mut self) -> Option<u16> {
        if self.broken || self.is_full() {
            return None;
        }
        match self.start.ring.pop() {
            Ok(head) => head,
            Err(error) => {
                self.fail(&error.to_string());
                None
            }
        }
    }

    /// Takes nothing more from the ring until it is started anew.
    fn fail(&mut self, why: &str) {
        log::error!("the queue stops: {why}");
        self.broken = true;
        self.start.error.signal();
    }

    /// Whether work is there or came while kicks were being enabled.
    fn enable_kicks(&mut self) -> bool {
        if self.broken || self.is_full() {
            return false;
        }
        self.start.ring.enable_kicks().unwrap_or_else(|error| {
            self.fail(&error.to_string());
            false
        })
    }

    fn push(&mut self, used: Used) {
        self.start.ring.push(used.head, used.len);
    }

    fn publish(&mut self) {
        if self.start.ring.publish() {
            self.start.call.signal();
        }
    }

    /// Parses the chain at `head` and gives the device what there is for it, or answers at once.
    fn take(&mut self, head: u16, limits: &Limits, id: &[u8; ID_BYTES], queue: &mut impl DeviceQueue) {
        let Start { ring, map, features, .. } = &self.start;
        let indirect = features.has(Features::INDIRECT_DESC);
        let parsed = self
            .chain
            .walk(ring.descriptors(), head, map, indirect)
            .map_err(|error| error.to_string())
            .and_then(|()| {
                parse(&mut self.chain, map, limits, &mut self.ranges).map_err(|error| error.to_string())
            });
        let Parsed { status, action } = match parsed {
            Ok(parsed) => parsed,
            Err(why) => {
                if let Some(n) = self.complaints.count() {
                    log::warn!("a malformed request (number {n}): {why}");
                }
                return self.push(Used { head, len: 0 });
            }
        };
        let used = match action {
            Action::Answer(answered) => answer(head, status, answered, 0, map),
            Action::GetId => {
                let answered = match write_id(&self.chain, map, id) {
                    Ok(()) => Status::Ok,
                    Err(_) => Status::IoError,
                };
                answer(head, status, answered, ID_BYTES as u32, map)
            }
            action => return self.submit(head, status, action, queue),
        };
        self.push(used);
    }

    fn submit(&mut self, head: u16, status: u64, action: Action, queue: &mut impl DeviceQueue) {
        let mut flight = Flight { head, status, data_len: 0, parts: 1, answer: Status::Ok };
        let (offset, len, command) = match action {
            Action::Read(offset, memory) => {
                flight.data_len = memory.len() as u32;
                (offset, memory.len() as u64, DeviceCommand::Read(memory))
            }
            Action::Write(offset, memory) => (offset, memory.len() as u64, DeviceCommand::Write(memory)),
            Action::Flush => (GuestOffset(0), 0, DeviceCommand::Flush),
            Action::Discard | Action::WriteZeroes => {
                flight.parts = self.ranges.len() as u32;
                let tag = self.flights.add(flight);
                for (range, tag) in self.ranges.iter().zip(tag..) {
                    let zeroes = matches!(action, Action::WriteZeroes);
                    let command = if zeroes { DeviceCommand::WriteZeroes } else { DeviceCommand::Discard };
                    queue.submit(Request { tag, offset: range.offset, len: range.len, command });
                }
                return;
            }
            Action::Answer(_) | Action::GetId => unreachable!("answered at once"),
        };
        let tag = self.flights.add(flight);
        queue.submit(Request { tag, offset, len, command });
    }
}

struct Loop<D: BlockDevice> {
    setup: Setup<D>,
    queue: D::Queue,
    commands: Receiver<Command>,
    active: Option<Active>,
    done: Vec<Done>,
    /// For idle times with nothing in flight, when only the guest can bring work, and for others.
    spins: [Spin; 2],
}

impl<D: BlockDevice<Engine: WatchFd>> Loop<D> {
    fn run(mut self) {
        while self.obey() {
            let spin = usize::from(self.queue.outstanding() > 0);
            if self.turn() {
                self.spins.iter_mut().for_each(Spin::busy);
            } else if self.spins[spin].again(|| self.queue.with_engine(|engine| engine.now())) {
                std::hint::spin_loop();
            } else {
                self.sleep();
            }
        }
    }

    /// Does what was commanded; false at the end. All of it, because one wake may stand for
    /// several commands.
    fn obey(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(start)) => self.start(*start),
                Ok(Command::Stop(reply)) => {
                    let next = self.stop();
                    // Whoever asked may have gone.
                    let _ = reply.send(next);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    self.stop();
                    return false;
                }
            }
        }
    }

    fn start(&mut self, start: Start) {
        assert!(self.active.is_none(), "a ring was started on a running queue");
        let kick = start.kick.as_ref().map(Kick::fd);
        self.queue.with_engine(|engine| engine.watch(kick));
        start.ring.disable_kicks();
        self.active = Some(Active::new(start));
    }

    /// Stops taking requests and waits for those in flight.
    fn stop(&mut self) -> Option<u16> {
        self.queue.with_engine(|engine| engine.watch(None));
        self.queue.hurry();
        // What is outstanding may be the device's own work, whose end is no report: look before
        // every wait.
        loop {
            let moved = self.report();
            if self.queue.outstanding() == 0 {
                break;
            }
            if !moved {
                self.queue.wait(None);
            }
        }
        let active = self.active.take()?;
        assert!(active.flights.is_empty(), "the device forgot a request");
        Some(active.start.ring.next_available())
    }

    /// Moves everything that can move; whether anything did.
    fn turn(&mut self) -> bool {
        let took = self.take();
        self.report() || took
    }

    /// Takes the available requests.
    fn take(&mut self) -> bool {
        let Some(active) = &mut self.active else { return false };
        let Some(mut head) = active.next() else { return false };
        let geometry = self.setup.device.geometry();
        let limits =
            Limits { size: geometry.size, read_only: geometry.read_only, features: active.start.features };
        loop {
            active.take(head, &limits, &self.setup.id, &mut self.queue);
            match active.next() {
                Some(next) => head = next,
                None => return true,
            }
        }
    }

    /// Lets the device move on and reports what has finished (or was answered at once).
    fn report(&mut self) -> bool {
        self.queue.poll(&mut self.done);
        let finished = !self.done.is_empty();
        let Some(active) = &mut self.active else {
            assert!(!finished, "the device finished what nobody asked");
            return false;
        };
        for done in self.done.drain(..) {
            if let Err(error) = done.result
                && let Some(n) = active.complaints.count()
            {
                log::warn!("a request failed (number {n}): {error}");
            }
            if let Some(used) = active.flights.done(&done, &active.start.map) {
                active.push(used);
            }
        }
        active.publish();
        finished
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self) {
        let mut deadline = None;
        if let Some(active) = &mut self.active {
            if active.enable_kicks() {
                return active.start.ring.disable_kicks();
            }
            if active.start.kick.is_none() {
                deadline = Some(self.queue.with_engine(|engine| engine.now()) + POLL_INTERVAL);
            }
        }
        let spin = usize::from(self.queue.outstanding() > 0);
        let before = self.queue.with_engine(|engine| engine.now());
        self.queue.wait(deadline);
        let after = self.queue.with_engine(|engine| engine.now());
        self.spins[spin].slept(before, after);
        let Some(active) = &mut self.active else { return };
        active.start.ring.disable_kicks();
        if active.start.kick.as_ref().is_some_and(|kick| !kick.clear()) {
            log::warn!("the kick descriptor is of no use: the queue is polled instead");
            active.start.kick = None;
            self.queue.with_engine(|engine| engine.watch(None));
        }
    }
}
