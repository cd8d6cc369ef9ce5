//! Snapshots of a disk that four threads write, on the host's files: every one is a consistent cut. What a
//! switch costs is counted.
#![allow(missing_docs, clippy::unwrap_used)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Done, Request, drain};
use sapwood_blockdev::engine::{BlockingEngine, Engine, UringEngine};
use sapwood_blockdev::io::{Io, block_on, run_alone};
use sapwood_blockdev::storage::{HostFile, HostStorage};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ImageError;
use sapwood_image::layer::{self, CreateLayer, Layer, OpenLayer, Tuning};
use sapwood_image::volume::{Successor, Volume, VolumeQueue};
use sapwood_tests::counting::{Counters, CountingEngine};
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::synthetic::{self, Synthetic};

const BLOCK: u64 = 4096;
const THREADS: u64 = 4;
const DEPTH: usize = 32;
const SNAPSHOTS: u64 = 20;
/// Writes between two snapshots, about.
const WRITES: u64 = 1500;
/// Blocks that one thread may write.
const REGION: u64 = 1 << 20;

/// A way to make an engine for a thread.
type Make<E> = fn() -> E;

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(number.to_string())
}

fn run_io<E: Engine, T: 'static>(make: Make<E>, f: impl AsyncFnOnce(Io<E>) -> T + 'static) -> T {
    run_alone(Io::new(make()), |io| f(io))
}

fn open<E: Engine<File = HostFile>>(make: Make<E>, path: PathBuf, read_only: bool) -> Arc<Layer<E>> {
    let tuning = Tuning { files_max: 16, checkpoint_bytes: 4 << 20, ..Tuning::default() };
    run_io(make, async move |io| {
        Layer::open(&HostStorage, &io, &path, &OpenLayer { read_only, tuning }).await.unwrap()
    })
}

async fn snapshot<E: Engine<File = HostFile>>(
    volume: Arc<Volume<E>>,
    io: Io<E>,
    path: PathBuf,
    commit: impl FnOnce(),
) -> Result<(), ImageError> {
    let next = Successor::New { path, base: volume.path().file_name().unwrap().into() };
    let commit = async || {
        commit();
        Ok(())
    };
    volume.snapshot(&HostStorage, &io, &next, commit).await
}

/// When writes began and were reported, by a clock that all threads share: the `n`th write of a thread is to
/// the `n`th block of its region.
#[derive(Default)]
struct Log {
    began: Vec<u64>,
    reported: Vec<u64>,
}

struct Writer<'a, E: Engine> {
    thread: u64,
    queue: VolumeQueue<E>,
    clock: &'a AtomicU64,
    log: Log,
    rng: Rng,
    /// What is being read back.
    reads: VecDeque<(u64, SharedBuf)>,
}

const FLUSH: u64 = u64::MAX;
const READ: u64 = 1 << 40;

impl<E: Engine> Writer<'_, E> {
    fn contents(&self, n: u64) -> Vec<u8> {
        contents(self.thread, n, self.log.began[n as usize])
    }

    fn ask(&mut self, tag: u64, block: u64, len: u64, command: Command) {
        let offset = GuestOffset((self.thread * REGION + block) * BLOCK);
        self.queue.submit(Request { tag, offset, len, command });
    }

    fn write(&mut self) {
        let n = self.log.began.len() as u64;
        assert!(n < REGION);
        self.log.began.push(self.clock.fetch_add(1, Ordering::SeqCst));
        self.log.reported.push(u64::MAX);
        let buf = SharedBuf::heap(BLOCK as usize);
        buf.write_at(0, &self.contents(n));
        self.ask(n, n, BLOCK, Command::Write(buf.into()));
        match self.rng.below(100) {
            0 => self.ask(FLUSH, 0, 0, Command::Flush),
            1..5 if self.reads.is_empty() => {
                let n = self.rng.below(n + 1);
                if self.log.reported[n as usize] < u64::MAX {
                    let buf = SharedBuf::heap(BLOCK as usize);
                    self.reads.push_back((n, buf.clone()));
                    self.ask(READ, n, BLOCK, Command::Read(buf.into()));
                }
            }
            _ => {}
        }
    }

    fn report(&mut self, done: &Done) {
        assert_eq!(done.result, Ok(()));
        match done.tag {
            FLUSH => {}
            READ => {
                let (n, buf) = self.reads.pop_front().unwrap();
                let mut bytes = vec![0; BLOCK as usize];
                buf.read_at(0, &mut bytes);
                assert!(bytes == self.contents(n), "thread {} reads back write {n}", self.thread);
            }
            n => self.log.reported[n as usize] = self.clock.fetch_add(1, Ordering::SeqCst),
        }
    }

    fn run(mut self, stop: &AtomicBool) -> Log {
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            while self.queue.outstanding() < DEPTH {
                self.write();
            }
            self.queue.poll(&mut done);
            if done.is_empty() {
                self.queue.wait(None);
            }
            done.drain(..).for_each(|done| self.report(&done));
        }
        drain(&mut self.queue, &mut done);
        done.iter().for_each(|done| self.report(done));
        self.log
    }
}

fn contents(thread: u64, n: u64, began: u64) -> Vec<u8> {
    let words = [thread + 1, n, began, !n];
    words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>().repeat(BLOCK as usize / 32)
}

/// How many files are open, but for those that each thread may be opening for a read in place of another one.
fn open_files() -> usize {
    let look = |_| {
        thread::sleep(Duration::from_millis(1));
        fs::read_dir("/proc/self/fd").unwrap().count()
    };
    (0..50).map(look).min().unwrap()
}

/// Looks whether the disk of a layer is what had been written at one moment from `since` to `until`.
fn check_cut<E: Engine<File = HostFile>>(
    make: Make<E>,
    layer: &Arc<Layer<E>>,
    logs: &[Log],
    since: u64,
    until: u64,
) {
    let mut queue = layer.queue(make());
    let (mut newest_there, mut oldest_missing) = (0, u64::MAX);
    let chunk = 256;
    for (thread, log) in (0..).zip(logs) {
        for first in (0..log.began.len() as u64).step_by(chunk as usize) {
            let buf = SharedBuf::heap((chunk * BLOCK) as usize);
            let (offset, len) = (GuestOffset((thread * REGION + first) * BLOCK), chunk * BLOCK);
            queue.submit(Request { tag: 0, offset, len, command: Command::Read(buf.clone().into()) });
            let mut done = Vec::new();
            drain(&mut queue, &mut done);
            assert_eq!(done[0].result, Ok(()));
            let mut bytes = vec![0; BLOCK as usize];
            for n in first..(first + chunk).min(log.began.len() as u64) {
                buf.read_at(((n - first) * BLOCK) as usize, &mut bytes);
                let (began, reported) = (log.began[n as usize], log.reported[n as usize]);
                if bytes == contents(thread, n, began) {
                    newest_there = newest_there.max(began);
                } else {
                    assert!(bytes.iter().all(|byte| *byte == 0), "thread {thread}, write {n}: torn");
                    oldest_missing = oldest_missing.min(reported);
                }
            }
        }
    }
    assert!(
        newest_there < oldest_missing,
        "{newest_there} is there without what was reported at {oldest_missing}"
    );
    assert!(oldest_missing >= since && newest_there <= until, "it is not of the time when it was taken");
}

fn every_snapshot_is_a_consistent_cut<E: Engine<File = HostFile>>(make: Make<E>) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    let first = path(folder, 0);
    run_io(make, async move |io| {
        let options = CreateLayer { size: Some(THREADS * REGION * BLOCK), ..CreateLayer::default() };
        layer::create(&HostStorage, &io, &first, &options).await.unwrap();
    });
    let volume = Volume::new(open(make, path(folder, 0), false));
    let (clock, stop) = (AtomicU64::new(1), AtomicBool::new(false));
    let (mut times, mut logs) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        let keeper = Arc::clone(&volume);
        scope.spawn(move || run_io(make, async move |io| keeper.maintain(io).await));
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (volume, clock, stop) = (Arc::clone(&volume), &clock, &stop);
                scope.spawn(move || {
                    let (queue, rng) = (volume.queue(make()), Rng::new(thread));
                    let writer =
                        Writer { thread, queue, clock, log: Log::default(), rng, reads: VecDeque::new() };
                    writer.run(stop)
                })
            })
            .collect();
        let wait = |writes| {
            let end = clock.load(Ordering::SeqCst) + 2 * writes;
            while clock.load(Ordering::SeqCst) < end {
                assert!(!writers.iter().any(|writer| writer.is_finished()), "a writer has failed");
                thread::sleep(Duration::from_millis(1));
            }
        };
        // Whatever fails, all threads come to their ends.
        let failed = catch_unwind(AssertUnwindSafe(|| {
            wait(WRITES);
            let mut files = 0;
            for number in 1..=SNAPSHOTS {
                let since = clock.load(Ordering::SeqCst);
                let (taken, path) = (Arc::clone(&volume), path(folder, number));
                run_io(make, async move |io| snapshot(taken, io, path, || ()).await).unwrap();
                times.push((since, clock.load(Ordering::SeqCst)));
                wait(WRITES);
                let info = volume.layer().info();
                assert_eq!(info.depth as u64, number);
                assert!(info.map_bytes <= 8 << 20 && info.index_bytes <= 8 << 20, "{info:?}");
                if number == SNAPSHOTS / 2 {
                    files = open_files();
                }
            }
            assert!(open_files() <= files + 2, "{} files are open, {files} half-way", open_files());
        }));
        stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        let closed = Arc::clone(&volume);
        run_io(make, async move |io| closed.close(&io).await).unwrap();
        failed.unwrap_or_else(|panic| resume_unwind(panic));
        logs.extend(ended.into_iter().map(Result::unwrap));
    });
    drop(volume);
    for (number, (since, until)) in (0..).zip(times) {
        let frozen = open(make, path(folder, number), true);
        assert!(frozen.info().clean, "layer {number} was closed");
        check_cut(make, &frozen, &logs, since, until);
    }
    let disk = open(make, path(folder, SNAPSHOTS), true);
    let end = clock.load(Ordering::SeqCst);
    check_cut(make, &disk, &logs, end, end);
}

#[test]
fn every_snapshot_of_a_disk_that_four_threads_write_is_a_consistent_cut() {
    match UringEngine::new() {
        Ok(_) => every_snapshot_is_a_consistent_cut(|| UringEngine::new().unwrap()),
        Err(_) => every_snapshot_is_a_consistent_cut(|| BlockingEngine::new().unwrap()),
    }
}

/// Reads that a switch and the first write after it cost, of a disk of which so many bytes are mapped.
fn reads_of_a_switch(mapped: u64) -> u64 {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let what = Synthetic { size: mapped, mapped, records: false };
    synthetic::make(&path(folder.path(), 0), &what).unwrap();
    let counters = Arc::<Counters>::default();
    let engine = || CountingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(&counters));
    let io = Io::new(engine());
    let (inner, first) = (io.clone(), path(folder.path(), 0));
    let layer = block_on(&io, async move {
        Layer::open(&HostStorage, &inner, &first, &OpenLayer::default()).await.unwrap()
    });
    let volume = Volume::new(layer);
    let mut queue = volume.queue(engine());
    let mut done = Vec::new();
    let write = |queue: &mut VolumeQueue<_>, block: u64| {
        let buf = SharedBuf::heap(BLOCK as usize);
        let (offset, command) = (GuestOffset(block * BLOCK), Command::Write(buf.into()));
        queue.submit(Request { tag: block, offset, len: BLOCK, command });
    };
    write(&mut queue, 1);
    drain(&mut queue, &mut done);
    let before = counters.now().reads;
    // Something is outstanding until the new layer is ready, and committed.
    write(&mut queue, 1);
    let committed = Rc::new(Cell::new(false));
    let (flag, taken, inner, second) =
        (Rc::clone(&committed), Arc::clone(&volume), io.clone(), path(folder.path(), 1));
    io.spawn(async move { snapshot(taken, inner, second, || flag.set(true)).await.unwrap() });
    while !committed.get() {
        io.poll(&mut Vec::new());
    }
    assert!(volume.path().ends_with("0"));
    write(&mut queue, 2);
    queue.poll(&mut done);
    queue.poll(&mut done);
    assert_eq!((done.len(), volume.path().ends_with("1")), (3, true));
    let reads = counters.now().reads - before;
    while io.tasks() > 0 {
        io.poll(&mut Vec::new());
    }
    reads
}

#[test]
fn a_switch_reads_the_same_of_a_small_map_and_a_large_one() {
    let [small, large] = [1, 64].map(|gib| reads_of_a_switch(gib << 30));
    println!("{small} reads, {large} reads");
    assert_eq!(small, large);
    assert!(small <= 8, "{small} reads");
}

/// The longest gap between two completions of random writes, 32 outstanding, and how many there were.
fn longest_gap(volume: &Arc<Volume<UringEngine>>, blocks: u64, seed: u64, time: Duration) -> (Duration, u64) {
    let mut queue = volume.queue(UringEngine::new().unwrap());
    let (mut rng, mut done, mut count) = (Rng::new(seed), Vec::new(), 0);
    let buf = SharedBuf::heap(BLOCK as usize);
    let begin = Instant::now();
    let (mut last, mut gap) = (begin, Duration::ZERO);
    while begin.elapsed() < time {
        while queue.outstanding() < DEPTH {
            let (offset, command) =
                (GuestOffset(rng.below(blocks) * BLOCK), Command::Write(buf.clone().into()));
            queue.submit(Request { tag: count, offset, len: BLOCK, command });
        }
        queue.poll(&mut done);
        if done.is_empty() {
            queue.wait(None);
            continue;
        }
        gap = gap.max(last.elapsed());
        last = Instant::now();
        count += done.drain(..).count() as u64;
    }
    drain(&mut queue, &mut done);
    (gap, count)
}

#[test]
#[ignore = "measures"]
fn pause() {
    for gib in [1, 64] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mapped = gib << 30;
        let what = Synthetic { size: mapped, mapped, records: false };
        synthetic::make(&path(folder.path(), 0), &what).unwrap();
        let (io, first) = (Io::new(UringEngine::new().unwrap()), path(folder.path(), 0));
        let inner = io.clone();
        let layer = block_on(&io, async move {
            Layer::open(&HostStorage, &inner, &first, &OpenLayer::default()).await.unwrap()
        });
        let volume = Volume::new(layer);
        thread::scope(|scope| {
            let keeper = Arc::clone(&volume);
            scope.spawn(move || {
                run_io(|| UringEngine::new().unwrap(), async move |io| keeper.maintain(io).await)
            });
            for round in 0..6 {
                let loaded = Arc::clone(&volume);
                let time = Duration::from_secs(4);
                let load = scope.spawn(move || longest_gap(&loaded, mapped / BLOCK, round, time));
                thread::sleep(time / 2);
                let mut took = Duration::ZERO;
                if round % 2 == 1 {
                    let begin = Instant::now();
                    let (taken, next, inner) = (Arc::clone(&volume), path(folder.path(), round), io.clone());
                    block_on(&io, async move { snapshot(taken, inner, next, || ()).await.unwrap() });
                    took = begin.elapsed();
                }
                let (gap, count) = load.join().unwrap();
                println!("{gib} GiB, round {round}: gap {gap:.1?}, {count} writes, snapshot took {took:.1?}");
            }
            let (closed, inner) = (Arc::clone(&volume), io.clone());
            block_on(&io, async move { closed.close(&inner).await.unwrap() });
        });
    }
}
