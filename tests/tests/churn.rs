//! A full layer overwritten at random for long: the space it takes, what it writes for that, and what it
//! holds in the end.
//!
//! The disk is small, and so are its segments; `SAPWOOD_CHURN_MIB` sets another size,
//! `SAPWOOD_CHURN_PASSES` how often it is overwritten, `SAPWOOD_CHURN_DIR` where it lies: by default in memory, so that
//! syncs take no time. A soak does 16 GiB below target/. Times are printed (`--nocapture`), and decide nothing.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::engine::UringEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, CreateLayer, Layer, LayerInfo, LayerQueue, OpenLayer, Tuning};
use sapwood_tests::sim::rng::Rng;

type Engine = UringEngine;

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
const DEPTH: u64 = 64;
/// Parts of the disk that a segment is at least, of 4 MiB at most, and that may be logged between checkpoints.
const SEGMENTS: u64 = 512;
const CHECKPOINTS: u64 = 256;

/// Which blocks are overwritten.
#[derive(Clone, Copy, Debug)]
enum Mix {
    Uniform,
    /// Four of five writes go to one of five blocks.
    Hot,
}

struct Churn {
    layer: Arc<Layer<Engine>>,
    queue: LayerQueue<Engine>,
    maintenance: JoinHandle<()>,
    memory: Vec<SharedBuf>,
    free: Vec<u64>,
    /// The block that each request in flight writes, and when it was submitted.
    in_flight: Vec<(u64, Instant)>,
    /// How often each block was written.
    versions: Vec<u32>,
    latencies: Vec<Duration>,
    occupied_max: f64,
    /// Segments beyond what is allowed: those that hold something, the whole file, and how many that may be.
    over_max: [u64; 3],
    path: PathBuf,
    done: Vec<Done>,
    rng: Rng,
}

/// Whether all of it is wanted: 16 GiB on a real disk.
fn is_soak() -> bool {
    std::env::var_os("SAPWOOD_SOAK").is_some()
}

fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match std::env::var_os("SAPWOOD_CHURN_DIR") {
        Some(named) => named.into(),
        None if memory.is_dir() && !is_soak() => memory.to_owned(),
        None => env!("CARGO_TARGET_TMPDIR").into(),
    }
}

fn fill(block: u64, version: u32) -> Vec<u8> {
    let word = (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(version);
    word.to_le_bytes().repeat(BLOCK as usize / 8)
}

impl Churn {
    fn new(path: &Path, size: u64, tuning: Tuning) -> Self {
        let io = Io::new(UringEngine::new().unwrap());
        let (kept, path, inner) = (path.to_owned(), path.to_owned(), io.clone());
        let segment_size = (size / SEGMENTS).next_power_of_two().clamp(64 << 10, 4 << 20) as u32;
        let layer = block_on(&io, async move {
            let options = CreateLayer { size: Some(size), segment_size, ..CreateLayer::default() };
            layer::create(&HostStorage, &inner, &path, &options).await.unwrap();
            Layer::open(&HostStorage, &inner, &path, &OpenLayer { read_only: false, tuning }).await.unwrap()
        });
        let maintenance = {
            let layer = Arc::clone(&layer);
            thread::spawn(move || {
                let io = Io::new(UringEngine::new().unwrap());
                block_on(&io, layer.maintain(io.clone()));
            })
        };
        let queue = layer.queue_on(Io::new(UringEngine::new().unwrap()));
        Self {
            layer,
            queue,
            maintenance,
            memory: (0..DEPTH).map(|_| SharedBuf::heap(BLOCK as usize)).collect(),
            free: (0..DEPTH).collect(),
            in_flight: vec![(u64::MAX, Instant::now()); DEPTH as usize],
            versions: vec![0; (size / BLOCK) as usize],
            latencies: Vec::new(),
            occupied_max: 0.0,
            over_max: [0; 3],
            path: kept,
            done: Vec::new(),
            rng: Rng::new(7),
        }
    }

    fn blocks(&self) -> u64 {
        self.versions.len() as u64
    }

    fn poll(&mut self) {
        self.queue.poll(&mut self.done);
        for done in self.done.drain(..) {
            assert_eq!(done.result, Ok(()));
            let (block, since) = &mut self.in_flight[done.tag as usize];
            *block = u64::MAX;
            self.latencies.push(since.elapsed());
            self.free.push(done.tag);
        }
    }

    fn slot(&mut self) -> u64 {
        loop {
            if let Some(slot) = self.free.pop() {
                return slot;
            }
            self.poll();
            if self.free.is_empty() {
                self.queue.wait(None);
            }
        }
    }

    fn write(&mut self, block: u64) {
        // Two writes of one block in flight may end in either order.
        if self.in_flight.iter().any(|(other, _)| *other == block) {
            return;
        }
        let slot = self.slot();
        let version = &mut self.versions[block as usize];
        *version += 1;
        self.memory[slot as usize].write_at(0, &fill(block, *version));
        self.in_flight[slot as usize] = (block, Instant::now());
        let command = Command::Write(self.memory[slot as usize].clone().into());
        self.queue.submit(Request { tag: slot, offset: GuestOffset(block * BLOCK), len: BLOCK, command });
        if self.free.is_empty() {
            self.poll();
        }
    }

    fn settle(&mut self) {
        while self.free.len() < DEPTH as usize {
            self.poll();
            if self.free.len() < DEPTH as usize {
                self.queue.wait(None);
            }
        }
    }

    fn pick(&mut self, mix: Mix) -> u64 {
        let blocks = self.blocks();
        match mix {
            Mix::Uniform => self.rng.below(blocks),
            Mix::Hot if self.rng.percent(80) => self.rng.below(blocks / 5) * 5,
            Mix::Hot => {
                let cold = self.rng.below(blocks / 5 * 4);
                cold / 4 * 5 + 1 + cold % 4
            }
        }
    }

    /// Overwrites as many blocks as there are; without a mix, each of them in order.
    fn pass(&mut self, mix: Option<Mix>) -> String {
        let before = self.layer.info().traffic;
        let start = Instant::now();
        self.latencies.clear();
        for i in 0..self.blocks() {
            let block = mix.map_or(i, |mix| self.pick(mix));
            self.write(block);
            if i % 64 == 0 {
                let info = self.layer.info();
                self.occupied_max =
                    self.occupied_max.max(info.occupied_bytes as f64 / info.allowed_bytes as f64);
                let taken = std::fs::metadata(&self.path).unwrap().blocks() * 512;
                let over = |bytes: u64| bytes.saturating_sub(info.allowed_bytes) / info.segment_size;
                self.over_max[0] = self.over_max[0].max(over(info.occupied_bytes));
                self.over_max[1] = self.over_max[1].max(over(taken));
                self.over_max[2] = self.over_max[2].max(info.beside_bytes / info.segment_size);
            }
        }
        self.settle();
        let elapsed = start.elapsed();
        self.latencies.sort_unstable();
        let at = |percent: usize| self.latencies[self.latencies.len() * percent / 1000];
        let now = self.layer.info();
        let (guest, all) = (now.traffic.guest - before.guest, now.traffic.total() - before.total());
        format!(
            "{:6.1} MiB/s, median {:?}, p99 {:?}, p99.9 {:?}, amplification {:.3} (moved {:.3}, nodes {:.3}, index {:.3}), lanes {}, space {:.3} of what is allowed",
            self.blocks() as f64 * BLOCK as f64 / MIB as f64 / elapsed.as_secs_f64(),
            at(500),
            at(990),
            at(999),
            all as f64 / guest as f64,
            (now.traffic.moved - before.moved) as f64 / guest as f64,
            (now.traffic.nodes - before.nodes) as f64 / guest as f64,
            (now.traffic.index - before.index) as f64 / guest as f64,
            now.lanes,
            self.occupied_max,
        )
    }

    /// Ends it as a server does.
    fn close(mut self) -> (LayerInfo, Vec<u32>) {
        // It may still do something for the cleaner, beside its own requests.
        sapwood_blockdev::device::drain(&mut self.queue, &mut self.done);
        drop(self.queue);
        let io = Io::new(UringEngine::new().unwrap());
        let (layer, inner) = (Arc::clone(&self.layer), io.clone());
        block_on(&io, async move { layer.close(&inner).await }).unwrap();
        self.maintenance.join().unwrap();
        (self.layer.info(), self.versions)
    }
}

/// Reads everything back in order.
fn verify(path: &Path, versions: &[u32]) {
    let io = Io::new(BlockingEngine::new().unwrap());
    let (at, inner) = (path.to_owned(), io.clone());
    let options = OpenLayer { read_only: true, ..OpenLayer::default() };
    let layer = block_on(&io, async move { Layer::open(&HostStorage, &inner, &at, &options).await }).unwrap();
    let mut queue = layer.queue_on(Io::new(BlockingEngine::new().unwrap()));
    let mut done = Vec::new();
    let unit = 256;
    let memory = SharedBuf::heap((unit * BLOCK) as usize);
    for start in (0..versions.len() as u64).step_by(unit as usize) {
        let len = unit.min(versions.len() as u64 - start) * BLOCK;
        let command = Command::Read(memory.clone().into());
        assert_eq!(len, unit * BLOCK, "whole units");
        queue.submit(Request { tag: 0, offset: GuestOffset(start * BLOCK), len, command });
        sapwood_blockdev::device::drain(&mut queue, &mut done);
        assert!(done.drain(..).all(|done| done.result.is_ok()));
        let mut bytes = vec![0; len as usize];
        memory.read_at(0, &mut bytes);
        for (block, found) in (start..).zip(bytes.chunks_exact(BLOCK as usize)) {
            assert!(found == fill(block, versions[block as usize]), "block {block}");
        }
    }
}

/// With `space_percent` of the live data, or by default. `amplification_max` is for this size and for 2 GiB or more: the
/// smaller the disk, the more often its map is stored.
fn churn(name: &str, mix: Mix, space_percent: Option<u64>, amplification_max: [f64; 2]) {
    if let Err(error) = UringEngine::new() {
        return eprintln!("skipped: {name}: no io_uring: {error}");
    }
    let folder = tempfile::tempdir_in(folder()).unwrap();
    let path = folder.path().join("churn.layer");
    let usual = if is_soak() { 16 << 10 } else { 512 };
    let mib: u64 = std::env::var("SAPWOOD_CHURN_MIB").map_or(usual, |mib| mib.parse().unwrap());
    let size = mib * MIB;
    let mut tuning =
        Tuning { checkpoint_bytes: size / CHECKPOINTS, space_slack: Some(size / 10), ..Tuning::default() };
    tuning.space_percent = space_percent.unwrap_or(tuning.space_percent);
    let mut churn = Churn::new(&path, size, tuning);
    println!("{mix:?} fill: {}", churn.pass(None));
    let before = churn.layer.info().traffic;
    let passes = std::env::var("SAPWOOD_CHURN_PASSES").map_or(10, |passes| passes.parse().unwrap());
    for pass in 0..passes {
        println!("{mix:?} pass {pass}: {}", churn.pass(Some(mix)));
    }
    let (occupied_max, over_max) = (churn.occupied_max, churn.over_max);
    let (info, versions) = churn.close();
    let (guest, all) = (info.traffic.guest - before.guest, info.traffic.total() - before.total());
    let amplification = all as f64 / guest as f64;
    println!("{mix:?}: amplification {amplification:.3}, space at most {occupied_max:.3} of what is allowed");
    verify(&path, &versions);
    let amplification_max = amplification_max[usize::from(mib >= 2048)];
    assert!(amplification <= amplification_max, "{amplification}");
    // What is in flight may begin two segments more. While the space of one is given back, another may be taken, and
    // between two looks each of the two threads may have taken one.
    let [occupied, file, beside] = over_max;
    println!("{mix:?}: at most {occupied} and {file} segments more than allowed, {beside} beside");
    assert!(occupied <= 2 && file <= 2 + beside + 3, "{over_max:?} segments");
}

#[test]
fn random_overwrites_stay_within_their_bounds() {
    churn("random overwrites", Mix::Uniform, None, [2.6, 2.5]);
}

#[test]
fn overwrites_of_hot_and_cold_blocks_stay_within_their_bounds() {
    churn("hot and cold overwrites", Mix::Hot, None, [2.25, 2.15]);
}

#[test]
fn more_space_is_less_work_for_the_cleaner() {
    churn("hot and cold overwrites with more space", Mix::Hot, Some(170), [1.6, 1.6]);
}
