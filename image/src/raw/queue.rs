//! A queue: reads and writes go straight between the file and the caller's memory where its
//! alignment allows; everything else takes the slow path, as a task.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::Errno;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::{Engine, Op, Time};
use sapwood_blockdev::io::{Io, Outcome};
use sapwood_blockdev::units::{FileOffset, SECTOR_SIZE};

use super::device::RawDevice;
use super::ranges::Held;
use super::slow;

/// One thread's access to a raw image.
pub struct RawQueue<E: Engine> {
    device: Arc<RawDevice<E>>,
    io: Io<E>,
    /// Not yet started: new, or waiting for a range that another write holds.
    submitted: VecDeque<Request>,
    /// Started and not yet reported.
    started: usize,
    /// Operations of the fast path; their index is the token.
    flights: slab::Slab<Flight>,
    outcomes: Vec<(u64, Outcome)>,
    /// Where tasks of the slow path leave their results.
    finished: Rc<RefCell<Vec<Done>>>,
}

struct Flight {
    tag: u64,
    kind: Kind,
    /// Released when the write is over.
    held: Option<Held>,
}

enum Kind {
    Read,
    Write {
        /// The write cache is off: a sync follows.
        then_sync: bool,
    },
    Sync,
}

impl<E: Engine> RawQueue<E> {
    pub(super) fn new(device: Arc<RawDevice<E>>, io: Io<E>) -> Self {
        Self {
            device,
            io,
            submitted: VecDeque::new(),
            started: 0,
            flights: slab::Slab::new(),
            outcomes: Vec::new(),
            finished: Rc::default(),
        }
    }

    /// Starts every submitted request that can start, and refuses what never can.
    fn start_all(&mut self, done: &mut Vec<Done>) {
        for _ in 0..self.submitted.len() {
            let Some(request) = self.submitted.pop_front() else { break };
            if let Err(error) = check(&self.device, &request) {
                done.push(Done { tag: request.tag, result: Err(error) });
                continue;
            }
            match self.hold(&request) {
                Ok(held) => self.start(request, held),
                Err(Busy) => self.submitted.push_back(request),
            }
        }
    }

    /// Holds what the request changes, if the device needs that.
    fn hold(&self, request: &Request) -> Result<Option<Held>, Busy> {
        let writes = !matches!(request.command, Command::Read(_) | Command::Flush);
        if !writes || !self.device.holds_ranges() {
            return Ok(None);
        }
        let unit = self.device.alignment.offset as u64;
        let start = request.offset.0 / unit * unit;
        let end = (request.offset.0 + request.len).next_multiple_of(unit);
        let waker = || self.io.with_engine(|engine| engine.waker());
        self.device.ranges.hold(start..end, waker).map(Some).ok_or(Busy)
    }

    fn start(&mut self, request: Request, held: Option<Held>) {
        self.started += 1;
        let Request { tag, offset, len, command } = request;
        let (file, at) = (self.device.file.clone(), FileOffset(offset.0));
        let (kind, op) = match command {
            Command::Read(memory) if slow::is_direct(&self.device, offset.0, &memory) => {
                (Kind::Read, Op::read(file, at, memory))
            }
            Command::Write(memory) if slow::is_direct(&self.device, offset.0, &memory) => {
                (Kind::Write { then_sync: !self.device.write_cache() }, Op::write(file, at, memory))
            }
            Command::Flush => (Kind::Sync, Op::Sync { file }),
            command => return self.start_slow(Request { tag, offset, len, command }, held),
        };
        let token = self.flights.insert(Flight { tag, kind, held });
        self.io.start(token as u64, op);
    }

    fn start_slow(&self, request: Request, held: Option<Held>) {
        let (device, io) = (Arc::clone(&self.device), self.io.clone());
        let finished = Rc::clone(&self.finished);
        self.io.spawn(async move {
            let tag = request.tag;
            let result = slow::perform(&device, &io, request).await;
            drop(held);
            finished.borrow_mut().push(Done { tag, result });
        });
    }

    /// Takes the outcome of an operation of the fast path.
    fn finish(&mut self, token: u64, outcome: Outcome, done: &mut Vec<Done>) {
        let Flight { tag, kind, held } = self.flights.remove(token as usize);
        drop(held);
        let result = match kind {
            Kind::Read => outcome.zero_filled().map(drop).map_err(DeviceError::from),
            Kind::Write { then_sync: true } if outcome.result.is_ok() => {
                let token = self.flights.insert(Flight { tag, kind: Kind::Sync, held: None });
                self.io.start(token as u64, Op::Sync { file: self.device.file.clone() });
                return;
            }
            Kind::Write { .. } => outcome.result.map(drop).map_err(DeviceError::from),
            Kind::Sync => self.device.after_sync(outcome.result.map(drop).map_err(Errno::into)),
        };
        self.started -= 1;
        done.push(Done { tag, result });
    }
}

impl<E: Engine> DeviceQueue for RawQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        self.submitted.push_back(request);
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        // Twice or more only when a finished write releases a range that a waiting one needs.
        loop {
            self.start_all(done);
            let mut outcomes = std::mem::take(&mut self.outcomes);
            self.io.poll(&mut outcomes);
            let before = done.len();
            for (token, outcome) in outcomes.drain(..) {
                self.finish(token, outcome, done);
            }
            self.outcomes = outcomes;
            let finished = self.finished.take();
            self.started -= finished.len();
            done.extend(finished);
            if self.submitted.is_empty() || done.len() == before {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.io.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.submitted.len() + self.started
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        self.io.with_engine(f)
    }
}

/// A part of the range is held by another write.
struct Busy;

/// Whether the device can take the request at all.
fn check<E: Engine>(device: &RawDevice<E>, request: &Request) -> Result<(), DeviceError> {
    let memory = match &request.command {
        Command::Flush => return device.check_latch(),
        Command::Read(memory) => Some(memory),
        Command::Write(memory) => Some(memory),
        Command::Discard | Command::WriteZeroes => None,
    };
    let (offset, len) = (request.offset.0, request.len);
    let end = offset.checked_add(len).ok_or(DeviceError::OutOfRange)?;
    let on_sectors = offset.is_multiple_of(SECTOR_SIZE) && len.is_multiple_of(SECTOR_SIZE);
    if !on_sectors || end > device.size() || memory.is_some_and(|memory| memory.len() as u64 != len) {
        return Err(DeviceError::OutOfRange);
    }
    match request.command {
        Command::Read(_) => Ok(()),
        _ => device.check_writable(),
    }
}
