//! Accounts, over a device and an engine that do what the test says, at times that the test says.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::Duration;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{
    BlockDevice, Command, DeviceError, DeviceQueue, Done, Geometry, Request, drain,
};
use sapwood_blockdev::engine::{Completion, Engine, Op, Time};
use sapwood_blockdev::storage::HostFile;
use sapwood_blockdev::units::GuestOffset;

use super::{Account, Accounted, Kind};
use crate::random::random;

/// Only tells the time, and counts how often it is asked for it.
#[derive(Clone, Default)]
struct Clock {
    now: Rc<Cell<Duration>>,
    readings: Rc<Cell<u64>>,
}

impl Engine for Clock {
    type File = HostFile;

    fn submit(&mut self, _: u64, _: Op<HostFile>) {
        unreachable!("the device does no I/O")
    }

    fn collect(&mut self, _: &mut Vec<Completion<HostFile>>) {}

    fn wait(&mut self, _: Option<Time>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn now(&self) -> Time {
        self.readings.set(self.readings.get() + 1);
        self.now.get()
    }

    fn waker(&self) -> Waker {
        Waker::noop().clone()
    }
}

/// Reports, the last first, what was submitted, unless it is told to hold it.
#[derive(Default)]
struct Echo {
    holds: AtomicBool,
}

struct EchoQueue {
    device: Arc<Echo>,
    clock: Clock,
    requests: Vec<Request>,
}

impl BlockDevice for Echo {
    type Engine = Clock;
    type Queue = EchoQueue;

    fn geometry(&self) -> Geometry {
        Geometry { size: 1 << 20, read_only: false, physical_block: 4096, discard_granularity: 4096 }
    }

    fn queue(self: &Arc<Self>, clock: Clock) -> EchoQueue {
        EchoQueue { device: Arc::clone(self), clock, requests: Vec::new() }
    }

    fn set_write_cache(&self, _: bool) {}
}

impl DeviceQueue for EchoQueue {
    type Engine = Clock;

    fn submit(&mut self, request: Request) {
        assert!(self.requests.iter().all(|other| other.tag != request.tag), "tags are unique");
        self.requests.push(request);
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        if self.device.holds.load(Ordering::Relaxed) {
            return;
        }
        // What lies past the end fails.
        let result = |request: &Request| match request.offset.0 < 1 << 20 {
            true => Ok(()),
            false => Err(DeviceError::Io(Errno::IO)),
        };
        done.extend(
            self.requests.drain(..).rev().map(|request| Done { tag: request.tag, result: result(&request) }),
        );
    }

    fn wait(&mut self, _: Option<Time>) {}

    fn outstanding(&self) -> usize {
        self.requests.len()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Clock) -> R) -> R {
        f(&mut self.clock)
    }
}

fn command(kind: Kind, memory: &SharedBuf, len: u64) -> Command {
    let memory = || memory.slice(0..len as usize).into();
    match kind {
        Kind::Read => Command::Read(memory()),
        Kind::Write => Command::Write(memory()),
        Kind::Flush => Command::Flush,
        Kind::Discard => Command::Discard,
        Kind::WriteZeroes => Command::WriteZeroes,
    }
}

fn request(tag: u64, offset: u64, len: u64, kind: Kind) -> Request {
    let command = command(kind, &SharedBuf::heap(4096), len);
    Request { tag, offset: GuestOffset(offset), len, command }
}

fn us(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

#[test]
fn everything_is_counted_and_queues_that_are_gone_too() {
    let (device, mut state) = (Accounted::new(Arc::new(Echo::default())), 1);
    let mut counted = [(0, 0, 0); Kind::ALL.len()];
    let mut taken = 0;
    for _ in 0..4 {
        let mut queues: Vec<_> = (0..3).map(|_| device.queue(Clock::default())).collect();
        for _ in 0..300 {
            let queue = &mut queues[random(&mut state) as usize % 3];
            let mut tags = Vec::new();
            for _ in 0..random(&mut state) % 4 {
                let kind = Kind::ALL[random(&mut state) as usize % Kind::ALL.len()];
                let (len, fails) = (512 * (1 + random(&mut state) % 8), random(&mut state).is_multiple_of(5));
                let tag = random(&mut state);
                queue.submit(request(tag, if fails { 1 << 20 } else { 0 }, len, kind));
                tags.push(tag);
                let (operations, bytes, errors) = &mut counted[kind as usize];
                *operations += 1;
                *bytes += if fails || kind == Kind::Flush { 0 } else { len };
                *errors += u64::from(fails);
                taken += 1;
            }
            assert_eq!(device.account().in_flight, tags.len() as u64);
            let mut done = vec![Done { tag: 7, result: Ok(()) }];
            drain(queue, &mut done);
            tags.push(7);
            assert!(
                done.iter().rev().map(|done| done.tag).eq(tags[..tags.len() - 1].iter().copied().chain([7])),
                "its own tags"
            );
        }
        let account = device.account();
        for kind in Kind::ALL {
            let done = &account[kind];
            assert_eq!((done.operations(), done.bytes, done.errors), counted[kind as usize], "{kind:?}");
        }
        assert_eq!((device.requests(), account.in_flight), (taken, 0));
        drop(queues);
        assert_eq!((device.account(), device.requests()), (account, taken), "they are gone");
    }
    assert!(taken > 1000 && counted.iter().all(|(operations, _, errors)| operations > errors && *errors > 0));
}

#[test]
fn times_are_from_submission_to_report_and_the_clock_is_read_once_for_all() {
    let echo = Arc::new(Echo::default());
    let (device, clock) = (Accounted::new(Arc::clone(&echo)), Clock::default());
    let mut queue = device.queue(clock.clone());
    let mut done = Vec::new();
    echo.holds.store(true, Ordering::Relaxed);
    for tag in 0..10 {
        queue.submit(request(tag, 0, 512, Kind::Read));
    }
    assert_eq!(clock.readings.get(), 1, "for all that are submitted");
    for _ in 0..100 {
        queue.poll(&mut done);
    }
    assert_eq!(clock.readings.get(), 1, "a poll that brings nothing reads no clock");
    clock.now.set(us(1000));
    queue.submit(request(10, 0, 512, Kind::Write));
    clock.now.set(us(3000));
    echo.holds.store(false, Ordering::Relaxed);
    queue.poll(&mut done);
    assert_eq!((clock.readings.get(), done.len()), (3, 11));
    let account = device.account();
    let times =
        |kind| (account[kind].latency.count(), account[kind].latency.sum(), account[kind].latency.max());
    assert_eq!(times(Kind::Read), (10, us(30000), us(3000)));
    assert_eq!(times(Kind::Write), (1, us(2000), us(2000)));
}

#[test]
fn what_a_queue_leaves_in_flight_goes_with_it() {
    let echo = Arc::new(Echo::default());
    echo.holds.store(true, Ordering::Relaxed);
    let device = Accounted::new(echo);
    let mut queue = device.queue(Clock::default());
    queue.submit(request(0, 0, 512, Kind::Read));
    assert_eq!((device.account().in_flight, device.account().operations()), (1, 0));
    drop(queue);
    assert_eq!((device.account(), device.requests()), (Account::default(), 1));
}

#[test]
fn accounts_add_up_and_are_told_apart() {
    let device = Accounted::new(Arc::new(Echo::default()));
    let mut queue = device.queue(Clock::default());
    let mut run = |kind, offset| {
        queue.submit(request(0, offset, 1024, kind));
        drain(&mut queue, &mut Vec::new());
    };
    run(Kind::Read, 0);
    let earlier = device.account();
    run(Kind::Write, 0);
    run(Kind::Read, 1 << 20);
    let later = device.account();
    let between = later.since(&earlier);
    assert_eq!((between.operations(), between.errors()), (2, 1));
    assert_eq!((between[Kind::Read].bytes, between[Kind::Write].bytes), (0, 1024));
    let mut sum = earlier.clone();
    sum.merge(&between);
    assert_eq!(sum, later);
    let written = serde_json::to_value(&later).unwrap();
    assert_eq!(written["write-zeroes"]["latency"]["count"], 0);
    assert_eq!(serde_json::from_value::<Account>(written).unwrap(), later);
}
