//! A guest and work in the background, in virtual time.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;
use std::time::Duration;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::storage::{HostFile, HostStorage, OpenOptions, Storage};
use sapwood_blockdev::units::FileOffset;

use super::*;
use crate::arbiter::{Arbiter, Settings};
use crate::governor::{Governor, Seat};
use crate::limits::{Limits, Rate};

const SERVICE: Time = Duration::from_millis(1);

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Ends each operation after [`SERVICE`].
struct Disk {
    now: Rc<Cell<Time>>,
    busy: VecDeque<(Time, u64, Op<HostFile>)>,
}

fn wanted(op: &Op<HostFile>) -> usize {
    match op {
        Op::Read(transfer) => transfer.wanted(),
        _ => 0,
    }
}

impl Engine for Disk {
    type File = HostFile;

    fn submit(&mut self, token: u64, op: Op<HostFile>) {
        self.busy.push_back((self.now.get() + SERVICE, token, op));
    }

    fn collect(&mut self, done: &mut Vec<Completion<HostFile>>) {
        while self.busy.front().is_some_and(|(at, ..)| *at <= self.now.get()) {
            let (_, token, op) = self.busy.pop_front().unwrap();
            done.push(Completion { token, result: Ok(wanted(&op)), op });
        }
    }

    fn wait(&mut self, _: Option<Time>) {}

    fn in_flight(&self) -> usize {
        self.busy.len()
    }

    fn now(&self) -> Time {
        self.now.get()
    }

    fn waker(&self) -> Waker {
        Waker::noop().clone()
    }
}

struct World {
    now: Rc<Cell<Time>>,
    governor: Arc<Governor>,
    background: Background,
    file: HostFile,
}

impl World {
    fn new(in_flight: usize) -> Self {
        let (now, governor) = (Rc::default(), Governor::new(in_flight, Time::ZERO));
        let background = governor.background(Time::ZERO);
        let any = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let file = HostStorage.open(&any, OpenOptions::READ.buffered()).unwrap();
        Self { now, governor, background, file }
    }

    fn engine(&self) -> BackgroundEngine<Disk> {
        let disk = Disk { now: Rc::clone(&self.now), busy: VecDeque::new() };
        BackgroundEngine::new(disk, &self.background)
    }

    fn read(&self, bytes: usize) -> Op<HostFile> {
        Op::read(self.file.clone(), FileOffset(0), AlignedBuf::zeroed(bytes))
    }

    fn pass(&self, time: Time) {
        self.now.set(self.now.get() + time);
    }

    /// A guest that keeps 16 reads of 64 KiB waiting for two seconds, beside work in the background of which each operation has so
    /// many bytes: how many of each have ended.
    fn beside(&self, weight: u32, bytes: usize) -> [usize; 2] {
        let settings = Settings { weight, ..Settings::default() };
        let seat = Seat::new(&self.governor, Arbiter::ROOT, &settings, self.now.get());
        let mut guest = Turnstile::new(seat.join(Waker::noop().clone()));
        let (mut busy, mut engine) = (VecDeque::new(), self.engine());
        let (mut ended, mut done) = ([0; 2], Vec::new());
        let end = self.now.get() + Duration::from_secs(2);
        while self.now.get() < end {
            while guest.waiting() < 16 {
                seat.mark();
                guest.push(Direction::Read, PIECE as u64, ());
            }
            while busy.front().is_some_and(|at| *at <= self.now.get()) {
                busy.pop_front();
                guest.ended(mark(0, true));
                ended[0] += 1;
            }
            guest.ask(|| self.now.get());
            while guest.next().is_some() {
                busy.push_back(self.now.get() + SERVICE);
            }
            while engine.in_flight() < 16 {
                engine.submit(7, self.read(bytes));
            }
            engine.collect(&mut done);
            assert!(done.iter().all(|done| done.token == 7));
            ended[1] += done.drain(..).count();
            assert!(busy.len() + engine.moving <= 8);
            self.pass(SERVICE / 20);
        }
        guest.leave(self.now.get());
        ended
    }
}

#[test]
fn it_shares_by_its_weight_once_a_guest_does() {
    // What has not begun does not count.
    for bytes in [PIECE, 1 << 20] {
        let world = World::new(8);
        let [guest, background] = world.beside(90, bytes);
        assert!(guest + background > 15_000, "nothing is left lying: {guest} {background}");
        let part = background as f64 / (guest + background) as f64;
        assert!((0.095..0.105).contains(&part), "10 of 100 in pieces of {bytes}: {part}");
        world.background.set_weight(30, world.now.get());
        let [guest, background] = world.beside(90, bytes);
        let part = background as f64 / (guest + background) as f64;
        assert!((0.24..0.26).contains(&part), "30 of 120: {part}");
        // Whatever a guest weighs, something goes on: 50 requests each second.
        world.background.set_weight(1, world.now.get());
        let [_, background] = world.beside(10_000, bytes);
        assert!((95..=110).contains(&background), "{background}");
    }
}

#[test]
fn it_waits_for_nobody_while_no_guest_shares() {
    let world = World::new(1);
    let limits = Limits { iops_total: Some(Rate { per_second: 1, burst: None }), ..Limits::default() };
    let limited = Settings { limits, ..Settings::default() };
    let _guest = Seat::new(&world.governor, Arbiter::ROOT, &limited, Time::ZERO);
    let (mut engine, mut done) = (world.engine(), Vec::new());
    (0..50).for_each(|token| engine.submit(token, world.read(4096)));
    engine.collect(&mut done);
    assert_eq!(engine.inner.in_flight(), 50);
    world.pass(SERVICE);
    engine.collect(&mut done);
    assert_eq!((done.len(), engine.in_flight()), (50, 0));
    assert!(done.iter().map(|done| done.token).eq(0..50));
}

/// Its thread may do something else for a long time, and would not look when a guest may go on.
#[test]
fn it_leaves_the_alarm_to_guests() {
    let world = World::new(1);
    let limits = Limits { iops_total: Some(Rate { per_second: 1, burst: None }), ..Limits::default() };
    let settings = Settings { limits, weight: 200, reserve_iops: None };
    let seat = Seat::new(&world.governor, Arbiter::ROOT, &settings, Time::ZERO);
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let mut guest = Turnstile::new(seat.join(Waker::from(Arc::clone(&flag))));
    let read = |guest: &mut Turnstile<()>| {
        guest.push(Direction::Read, 4096, ());
        guest.ask(|| world.now.get());
        guest.next()
    };
    assert!(read(&mut guest).is_some());
    guest.ended(mark(0, true));
    guest.ask(|| world.now.get());
    // Work in the background has the only place; then the guest's limit is in the way.
    let (mut engine, mut done) = (world.engine(), Vec::new());
    engine.submit(0, world.read(4096));
    engine.collect(&mut done);
    assert!(read(&mut guest).is_none() && guest.alarm().is_none());
    world.pass(SERVICE);
    engine.collect(&mut done);
    assert_eq!(done.len(), 1);
    assert!(flag.0.load(Ordering::Relaxed), "the guest's thread is told to look");
    guest.ask(|| world.now.get());
    assert!(guest.alarm().is_some_and(|at| at > world.now.get()));
    world.pass(Duration::from_secs(1));
    guest.ask(|| world.now.get());
    assert!(guest.next().is_some());
    guest.leave(world.now.get());
}

/// The thread may be busy with other things while they are granted.
#[test]
fn it_has_few_places_at_a_time() {
    let world = World::new(32);
    let sharing = Settings { weight: 200, ..Settings::default() };
    let _guest = Seat::new(&world.governor, Arbiter::ROOT, &sharing, Time::ZERO);
    let (mut engine, mut done) = (world.engine(), Vec::new());
    (0..10).for_each(|token| engine.submit(token, world.read(4096)));
    for left in [10, 6, 2, 0] {
        engine.collect(&mut done);
        assert_eq!((engine.in_flight(), engine.inner.in_flight()), (left, left.min(4)));
        world.pass(SERVICE);
    }
    assert!(done.iter().map(|done| done.token).eq(0..10));
}

/// A guest's request has four small ones before it at most, but for what had begun when it was quiet.
#[test]
fn it_takes_small_pieces_while_guests_are_busy() {
    let world = World::new(32);
    let seat = Seat::new(&world.governor, Arbiter::ROOT, &Settings::default(), Time::ZERO);
    let pieces = |engine: &BackgroundEngine<Disk>| -> Vec<usize> {
        engine.inner.busy.iter().map(|(_, _, op)| wanted(op)).collect()
    };
    let (mut engine, mut done) = (world.engine(), Vec::new());
    (0..6).for_each(|token| engine.submit(token, world.read(1 << 20)));
    engine.collect(&mut done);
    assert_eq!(pieces(&engine), [1 << 20; 6], "no guest asks for anything");
    seat.mark();
    (6..12).for_each(|token| engine.submit(token, world.read(1 << 20)));
    engine.collect(&mut done);
    assert_eq!((pieces(&engine).len(), engine.in_flight()), (6, 12), "these are enough");
    for left in [6, 2] {
        world.pass(SERVICE);
        engine.collect(&mut done);
        assert_eq!((pieces(&engine), engine.in_flight()), (vec![PIECE; left.min(4)], left));
    }
    world.pass(SERVICE);
    engine.collect(&mut done);
    assert!(done.iter().map(|done| done.token).eq(0..12) && engine.in_flight() == 0);
    // What comes back moved a part only, and is submitted again.
    engine.submit(0, done.pop().unwrap().op);
    engine.collect(&mut done);
    assert_eq!(pieces(&engine), [PIECE]);
    world.pass(Duration::from_millis(100));
    engine.collect(&mut done);
    engine.submit(0, done.pop().unwrap().op);
    engine.collect(&mut done);
    assert_eq!(pieces(&engine), [1 << 20], "it has been quiet for a while");
}

/// Syncs and names do not wait, whoever has all places.
#[test]
fn only_reads_and_writes_wait() {
    let world = World::new(1);
    let settings = Settings { weight: 200, ..Settings::default() };
    let seat = Seat::new(&world.governor, Arbiter::ROOT, &settings, Time::ZERO);
    let mut guest = Turnstile::new(seat.join(Waker::noop().clone()));
    guest.push(Direction::Read, 4096, ());
    guest.ask(|| world.now.get());
    let mut engine = world.engine();
    engine.submit(0, world.read(4096));
    engine.submit(1, Op::Sync { file: world.file.clone() });
    let mut done = Vec::new();
    engine.collect(&mut done);
    assert_eq!((engine.inner.in_flight(), engine.in_flight()), (1, 2));
    guest.leave(world.now.get());
    // The guest is gone, and with it what it had under way.
    engine.collect(&mut done);
    assert_eq!(engine.inner.in_flight(), 2);
}
