//! Sleeping and what ends it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::units::FileOffset;

use crate::engines::{Subject, create, finish, pattern, write};

/// Longer than any pause of a busy test machine: a wait that takes it was not woken.
const LONG: Duration = Duration::from_secs(30);

/// Waits until `deadline`, and says whether the wait ended well before.
fn is_woken<E: Engine>(engine: &mut E, deadline: Duration) -> bool {
    let start = engine.now();
    engine.wait(Some(start + deadline));
    let woken = engine.now() < start + deadline;
    engine.collect(&mut Vec::new());
    woken
}

/// Waits until no left-over of an earlier wake ends the wait early.
fn settle<E: Engine>(engine: &mut E) {
    while is_woken(engine, Duration::from_millis(20)) {}
}

pub fn deadline_ends_the_wait<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let start = Instant::now();
    settle(&mut engine);
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert!(start.elapsed() < LONG);
    let past = engine.now().saturating_sub(LONG);
    engine.wait(Some(past));
    engine.wait(Some(Duration::ZERO));
    assert!(start.elapsed() < LONG);
}

pub fn wake_before_the_wait_is_kept<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let waker = engine.waker();
    waker.wake_by_ref();
    waker.wake_by_ref();
    engine.collect(&mut Vec::new());
    let enters = engine.stats().enters;
    assert!(is_woken(&mut engine, LONG));
    assert_eq!(engine.stats().enters, enters, "neither the wake nor the wait needs the kernel");
    settle(&mut engine);
}

pub fn wake_of_a_sleeper_arrives<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let waker = engine.waker();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        waker.wake();
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(40) {
        engine.wait(Some(engine.now() + LONG));
    }
    assert!(start.elapsed() < LONG);
    thread.join().unwrap();
    drop(engine);
}

/// Two threads count up and wake; the engine's thread answers each step. With one wake lost
/// both sides would stand still until the deadline.
pub fn no_wake_is_lost<E: Subject>(make: fn() -> E) {
    const STEPS: u64 = 10_000;
    let mut engine = make();
    let asked = Arc::new(AtomicU64::new(0));
    let answered = Arc::new(AtomicU64::new(0));
    let askers: Vec<_> = (0..2)
        .map(|_| {
            let (asked, answered, waker) = (Arc::clone(&asked), Arc::clone(&answered), engine.waker());
            thread::spawn(move || {
                for _ in 0..STEPS / 2 {
                    let mine = asked.fetch_add(1, Ordering::AcqRel) + 1;
                    waker.wake_by_ref();
                    let start = Instant::now();
                    while answered.load(Ordering::Acquire) < mine {
                        assert!(start.elapsed() < LONG, "step {mine} was not seen");
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut done = Vec::new();
    while answered.load(Ordering::Acquire) < STEPS {
        engine.collect(&mut done);
        let now = asked.load(Ordering::Acquire);
        if answered.swap(now, Ordering::AcqRel) == now {
            assert!(is_woken(&mut engine, LONG), "slept through a wake after step {now}");
        }
    }
    for asker in askers {
        asker.join().unwrap();
    }
}

fn kick() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn raise(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn empty(fd: &OwnedFd) {
    rustix::io::read(fd, &mut [0; 8]).unwrap();
}

pub fn watched_descriptor_ends_the_wait<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let fd = kick();
    engine.watch(Some(Arc::clone(&fd)));
    settle(&mut engine);
    for _ in 0..3 {
        raise(&fd);
        assert!(is_woken(&mut engine, LONG));
        assert!(is_woken(&mut engine, LONG), "it is still readable");
        empty(&fd);
        settle(&mut engine);
    }
    let raiser = {
        let fd = Arc::clone(&fd);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            raise(&fd);
        })
    };
    assert!(is_woken(&mut engine, LONG));
    raiser.join().unwrap();
}

pub fn watch_is_replaced_and_ended<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let (first, second) = (kick(), kick());
    engine.watch(Some(Arc::clone(&first)));
    settle(&mut engine);
    engine.watch(Some(Arc::clone(&second)));
    raise(&first);
    settle(&mut engine);
    raise(&second);
    assert!(is_woken(&mut engine, LONG));
    engine.watch(None);
    settle(&mut engine);
    drop(second);
    engine.watch(Some(Arc::clone(&first)));
    assert!(is_woken(&mut engine, LONG), "readable since before the watch");
    drop(engine);
    assert_eq!(Arc::strong_count(&first), 1, "the engine lets go of what it watched");
}

pub fn completion_ends_the_wait<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(4096, 1));
    settle(&mut engine);
    for _ in 0..100 {
        engine.submit(1, Op::read(file.clone(), FileOffset(0), AlignedBuf::zeroed(4096)));
        let start = Instant::now();
        engine.wait(None);
        assert!(start.elapsed() < LONG);
        finish(&mut engine, 1);
    }
}
