//! Threads and a device in virtual time: whatever order the threads run in, all that is asked for is done, in time.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::time::Duration;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::engine::{Completion, Op};
use sapwood_blockdev::storage::HostFile;
use sapwood_blockdev::units::GuestOffset;

use super::*;
use crate::arbiter::Arbiter;
use crate::limits::{Limits, Rate};
use crate::random::random;

const SECOND: Time = Duration::from_secs(1);

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One thread's view of the world.
struct Clock {
    now: Rc<RefCell<Time>>,
    flag: Arc<Flag>,
    /// Until when the thread sleeps, if it does.
    sleep: Option<Option<Time>>,
}

impl Engine for Clock {
    type File = HostFile;

    fn submit(&mut self, _: u64, _: Op<HostFile>) {
        unreachable!("the device has no files");
    }

    fn collect(&mut self, _: &mut Vec<Completion<HostFile>>) {}

    fn wait(&mut self, deadline: Option<Time>) {
        self.sleep = Some(deadline);
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn now(&self) -> Time {
        *self.now.borrow()
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.flag))
    }
}

/// Ends each request after a fixed time, in order.
struct Device {
    clock: Clock,
    service: Time,
    busy: VecDeque<(Time, u64)>,
}

impl DeviceQueue for Device {
    type Engine = Clock;

    fn submit(&mut self, request: Request) {
        self.busy.push_back((self.clock.now() + self.service, request.tag));
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        let now = self.clock.now();
        while let Some((_, tag)) = self.busy.front().copied().filter(|(at, _)| *at <= now) {
            self.busy.pop_front();
            done.push(Done { tag, result: Ok(()) });
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.clock.wait(deadline.into_iter().chain(self.busy.front().map(|(at, _)| *at)).min());
    }

    fn outstanding(&self) -> usize {
        self.busy.len()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Clock) -> R) -> R {
        f(&mut self.clock)
    }
}

struct Thread {
    queue: LimitedQueue<Device>,
    flag: Arc<Flag>,
    /// Tags of what is outstanding: reads, writes.
    outstanding: [VecDeque<u64>; 2],
    ended: [u64; 2],
    polls: u64,
    /// Keeps so many reads and writes outstanding.
    wants: [usize; 2],
}

struct World {
    now: Rc<RefCell<Time>>,
    governor: Arc<Governor>,
    threads: BTreeMap<usize, Thread>,
    seats: Vec<Arc<Seat>>,
    next_tag: u64,
    seed: u64,
}

fn iops(per_second: u64) -> Settings {
    let limits = Limits { iops_total: Some(Rate { per_second, burst: None }), ..Limits::default() };
    Settings { limits, ..Settings::default() }
}

fn write_iops(per_second: u64) -> Settings {
    let limits = Limits { iops_write: Some(Rate { per_second, burst: None }), ..Limits::default() };
    Settings { limits, ..Settings::default() }
}

impl World {
    fn new(seed: u64) -> Self {
        let governor = Governor::new(8, Time::ZERO);
        let now = Rc::default();
        Self { now, governor, threads: BTreeMap::new(), seats: Vec::new(), next_tag: 0, seed }
    }

    fn now(&self) -> Time {
        *self.now.borrow()
    }

    fn disk(&mut self, parent: NodeId, settings: &Settings) -> usize {
        self.seats.push(Seat::new(&self.governor, parent, settings, self.now()));
        self.seats.len() - 1
    }

    fn change(&self, disk: usize, settings: &Settings) {
        self.governor.change(self.seats[disk].node(), Arbiter::ROOT, settings, self.now());
    }

    fn thread(&mut self, disk: usize, wants: [usize; 2]) -> usize {
        let flag = Arc::new(Flag(AtomicBool::new(true)));
        let clock = Clock { now: Rc::clone(&self.now), flag: Arc::clone(&flag), sleep: None };
        let device = Device { clock, service: Duration::from_micros(50), busy: VecDeque::new() };
        let queue = LimitedQueue::new(&self.seats[disk], device);
        let number = self.threads.last_key_value().map_or(0, |(number, _)| number + 1);
        let outstanding = [VecDeque::new(), VecDeque::new()];
        self.threads.insert(number, Thread { queue, flag, outstanding, ended: [0; 2], polls: 0, wants });
        number
    }

    /// One turn of a thread, as a server's thread makes it.
    fn turn(&mut self, number: usize) {
        let thread = self.threads.get_mut(&number).unwrap();
        thread.flag.0.store(false, Ordering::Relaxed);
        thread.queue.inner.clock.sleep = None;
        loop {
            for direction in [0, 1] {
                while thread.outstanding[direction].len() < thread.wants[direction] {
                    let memory = SharedBuf::heap(4096).slice(0..4096).into();
                    let command = if direction == 0 { Command::Read(memory) } else { Command::Write(memory) };
                    let tag = self.next_tag;
                    self.next_tag += 1;
                    thread.outstanding[direction].push_back(tag);
                    thread.queue.submit(Request { tag, offset: GuestOffset(0), len: 4096, command });
                }
            }
            let mut done = Vec::new();
            thread.queue.poll(&mut done);
            thread.polls += 1;
            if done.is_empty() {
                break;
            }
            for done in done {
                let first = |tags: &VecDeque<u64>| tags.front() == Some(&done.tag);
                let direction =
                    thread.outstanding.iter().position(first).expect("each direction keeps its order");
                thread.outstanding[direction].pop_front();
                thread.ended[direction] += 1;
            }
        }
        if !thread.flag.0.load(Ordering::Relaxed) {
            thread.queue.wait(None);
        }
    }

    /// Runs one thread that can run, or moves the clock; false when nothing is left to do.
    fn step(&mut self) -> bool {
        let now = self.now();
        let runnable = |thread: &Thread| {
            let sleep = thread.queue.inner.clock.sleep;
            thread.flag.0.load(Ordering::Relaxed)
                || sleep.is_none_or(|until| until.is_some_and(|until| until <= now))
        };
        let ready: Vec<usize> =
            self.threads.iter().filter(|(_, thread)| runnable(thread)).map(|(n, _)| *n).collect();
        if !ready.is_empty() {
            let chosen = ready[random(&mut self.seed) as usize % ready.len()];
            self.turn(chosen);
            return true;
        }
        let next = self.threads.values().filter_map(|thread| thread.queue.inner.clock.sleep.flatten()).min();
        if let Some(next) = next {
            *self.now.borrow_mut() = next;
        }
        next.is_some()
    }

    fn run_until(&mut self, end: Time) {
        while self.now() < end {
            let is_waiting = self.threads.values().any(|thread| thread.queue.outstanding() > 0);
            assert!(self.step() || !is_waiting, "at {:?} everybody sleeps, and something waits", self.now());
            if !is_waiting && self.threads.values().all(|thread| thread.wants == [0; 2]) {
                return;
            }
        }
    }

    fn ended(&self, thread: usize) -> u64 {
        self.threads[&thread].ended.iter().sum()
    }
}

#[test]
fn a_limit_holds_for_all_queues_of_a_disk_together_and_they_sleep() {
    let mut world = World::new(1);
    let disk = world.disk(Arbiter::ROOT, &iops(1000));
    let threads = [world.thread(disk, [4, 4]), world.thread(disk, [8, 0])];
    world.run_until(10 * SECOND);
    let ended: u64 = threads.iter().map(|thread| world.ended(*thread)).sum();
    assert!((9_990..=10_010).contains(&ended), "{ended}");
    assert!(threads.iter().all(|thread| world.ended(*thread) > 3000), "queues take turns");
    let polls: u64 = world.threads.values().map(|thread| thread.polls).sum();
    assert!(polls < 8 * ended, "{polls} looks for {ended} requests");
    assert!(world.seats[disk].waited() > SECOND);
}

#[test]
fn writes_that_wait_hold_back_no_read() {
    let mut world = World::new(2);
    let disk = world.disk(Arbiter::ROOT, &write_iops(100));
    let thread = world.thread(disk, [1, 16]);
    world.run_until(SECOND);
    let [reads, writes] = world.threads[&thread].ended;
    assert!((19_000..=20_000).contains(&reads), "one after another, each 50 us: {reads}");
    assert!((99..=102).contains(&writes), "{writes}");
}

#[test]
fn a_disk_without_limits_asks_nobody() {
    let mut world = World::new(3);
    let (free, limited) =
        (world.disk(Arbiter::ROOT, &Settings::default()), world.disk(Arbiter::ROOT, &iops(10)));
    let threads = [world.thread(free, [4, 4]), world.thread(limited, [1, 1])];
    world.run_until(SECOND);
    assert!(!world.seats[free].is_governed() && world.seats[limited].is_governed());
    assert!(world.ended(threads[0]) > 150_000);
    assert_eq!(world.seats[free].waited(), Time::ZERO);
    // As soon as somebody shares, all do.
    world.change(limited, &Settings { weight: 200, ..Settings::default() });
    assert!(world.seats[free].is_governed());
    world.run_until(2 * SECOND);
    assert!(world.threads.values().all(|thread| thread.ended.iter().all(|ended| *ended > 5000)));
}

/// Who comes and goes, and what is said of groups, decides for all that it is about.
#[test]
fn disks_ask_as_long_as_anything_that_they_are_in_has_a_limit_or_anybody_shares() {
    let governor = Governor::new(8, Time::ZERO);
    let seat = |parent, settings: &Settings| Seat::new(&governor, parent, settings, Time::ZERO);
    let (plain, sharing) = (Settings::default(), Settings { weight: 200, ..Settings::default() });
    let outer = governor.add_group(Arbiter::ROOT, &iops(10), Time::ZERO);
    let inner = governor.add_group(outer, &plain, Time::ZERO);
    let (within, without) = (seat(inner, &plain), seat(Arbiter::ROOT, &plain));
    let governed = || [within.is_governed(), without.is_governed()];
    assert_eq!(governed(), [true, false]);
    let shares = seat(Arbiter::ROOT, &sharing);
    assert_eq!(governed(), [true, true]);
    assert!(seat(Arbiter::ROOT, &plain).is_governed(), "who comes while others share");
    drop(shares);
    assert_eq!(governed(), [true, false]);
    governor.change(outer, Arbiter::ROOT, &plain, Time::ZERO);
    assert_eq!(governed(), [false, false]);
    governor.change(inner, outer, &iops(10), Time::ZERO);
    assert_eq!(governed(), [true, false]);
    governor.remove_group(inner, Time::ZERO);
    assert_eq!(governed(), [false, false], "what is in it is in the one above");
    let group = governor.add_group(Arbiter::ROOT, &sharing, Time::ZERO);
    assert_eq!(governed(), [true, true]);
    governor.remove_group(group, Time::ZERO);
    assert_eq!(governed(), [false, false]);
}

#[test]
fn a_limit_that_is_lifted_lets_everything_begin_at_once() {
    let mut world = World::new(4);
    let disk = world.disk(Arbiter::ROOT, &iops(1));
    let thread = world.thread(disk, [32, 0]);
    world.run_until(SECOND / 2);
    assert!(world.ended(thread) <= 1);
    world.change(disk, &Settings::default());
    world.run_until(world.now() + SECOND / 100);
    assert!(world.ended(thread) > 1000);
    world.change(disk, &iops(100));
    let before = world.ended(thread);
    world.run_until(world.now() + SECOND);
    let more = world.ended(thread) - before;
    assert!((99..=135).contains(&more), "32 may have begun before: {more}");
}

#[test]
fn a_queue_that_is_stopped_waits_no_longer_and_pays_later() {
    let mut world = World::new(5);
    let disk = world.disk(Arbiter::ROOT, &iops(100));
    let (stopped, other) = (world.thread(disk, [50, 50]), world.thread(disk, [1, 0]));
    world.run_until(SECOND / 10);
    let thread = world.threads.get_mut(&stopped).unwrap();
    thread.wants = [0; 2];
    thread.queue.hurry();
    let before = world.now();
    while world.threads[&stopped].queue.outstanding() > 0 {
        world.turn(stopped);
        *world.now.borrow_mut() += Duration::from_micros(10);
    }
    assert!(world.now() - before < SECOND / 100);
    let (before, ended) = (world.now(), world.ended(other));
    world.run_until(before + SECOND * 9 / 10);
    assert!(world.ended(other) <= ended + 2, "the others pay, too: the limit is the disk's");
    world.run_until(before + 2 * SECOND);
    assert!(world.ended(other) > ended + 80);
}

#[test]
fn who_looks_for_all_may_leave() {
    let mut world = World::new(6);
    let disk = world.disk(Arbiter::ROOT, &iops(10));
    let threads: Vec<usize> = (0..4).map(|_| world.thread(disk, [4, 0])).collect();
    for thread in &threads[1..] {
        world.run_until(world.now() + SECOND / 2);
        world.threads.remove(thread);
    }
    let ended = world.ended(threads[0]);
    world.run_until(world.now() + 2 * SECOND);
    let more = world.ended(threads[0]) - ended;
    assert!((19..=21).contains(&more), "{more}");
    assert!(world.governor.in_flight() <= 4);
}

/// Disks, queues and limits come, change and go; whatever is left ends, and nothing is counted that is not there.
#[test]
fn random_histories_come_to_an_end() {
    for seed in 0..400 {
        let mut world = World::new(seed);
        history(&mut world, seed);
    }
}

fn history(world: &mut World, seed: u64) {
    let mut state = seed + 1000;
    let mut below = move |bound: u64| random(&mut state) % bound;
    let group = world.governor.add_group(Arbiter::ROOT, &iops(5000), Time::ZERO);
    let settings = |choice: u64| match choice {
        0 => Settings::default(),
        1 => iops(50),
        2 => iops(20_000),
        3 => write_iops(300),
        4 => Settings { weight: 300, ..Settings::default() },
        _ => Settings { reserve_iops: Some(700), ..iops(3000) },
    };
    for _ in 0..40 {
        match below(8) {
            0 if world.seats.len() < 4 => {
                let parent = if below(2) == 0 { group } else { Arbiter::ROOT };
                world.disk(parent, &settings(below(6)));
            }
            1 | 2 if !world.seats.is_empty() && world.threads.len() < 6 => {
                let disk = below(world.seats.len() as u64) as usize;
                world.thread(disk, [below(5) as usize, below(5) as usize]);
            }
            3 if !world.seats.is_empty() => {
                let disk = below(world.seats.len() as u64) as usize;
                world.change(disk, &settings(below(6)));
            }
            4 => {
                let chosen = world.threads.keys().nth(below(6) as usize).copied();
                chosen.map(|number| world.threads.remove(&number));
            }
            5 => {
                let chosen = world.threads.keys().nth(below(6) as usize).copied();
                if let Some(thread) = chosen.and_then(|number| world.threads.get_mut(&number)) {
                    thread.queue.hurry();
                    thread.flag.0.store(true, Ordering::Relaxed);
                }
            }
            _ => {
                let end = world.now() + Duration::from_micros(below(20_000));
                world.run_until(end);
            }
        }
        if world.threads.is_empty() {
            *world.now.borrow_mut() += Duration::from_millis(1);
        }
    }
    world.threads.values_mut().for_each(|thread| {
        thread.wants = [0; 2];
        thread.flag.0.store(true, Ordering::Relaxed);
    });
    world.run_until(world.now() + 60 * SECOND);
    let left: usize = world.threads.values().map(|thread| thread.queue.outstanding()).sum();
    assert_eq!((left, world.governor.in_flight()), (0, 0), "seed {seed}");
}
