//! A layer on a file system that runs full under load, with the background work going on: nothing that
//! was flushed is lost, only writes fail, and they only for want of space; space that comes back is used.
//!
//! The file system is mounted for the test, which needs root: `cargo xtask test --only storage` runs it. A
//! block device runs full in the same way.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use sapwood_blockdev::engine::{BlockingEngine, Engine, UringEngine};
use sapwood_blockdev::storage::HostFile;
use sapwood_image::Format;
use sapwood_image::layer::Tuning;
use sapwood_tests::load::{Engines, Load};
use sapwood_tests::mounts::{LoopDevice, Mounted, skip};

const MIB: u64 = 1 << 20;
/// Batches of writes until the host must be full: many times its size.
const BATCHES_MAX: u64 = 20_000;
/// Refused batches in a row after which it is.
const REFUSED: u64 = 50;
/// Attempts at a write after which background work must have made room.
const ATTEMPTS: u64 = 300;

/// A layer on a small file system with a file that can be deleted to make space.
struct Full<E: Engine<File = HostFile>> {
    load: Load<E>,
    filler: PathBuf,
    // Last: unmounted when nothing uses it.
    _host: Mounted,
}

impl<E: Engine<File = HostFile>> Full<E> {
    /// Writes until the host is full, with flushes and discards in between.
    fn new(host: Mounted, engines: Engines<E>) -> Self {
        let filler = host.path().join("filler");
        let file = File::create_new(&filler).unwrap();
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 16 * MIB).unwrap();
        let tuning = Tuning { checkpoint_bytes: 4 * MIB, space_slack: Some(4 * MIB), ..Tuning::default() };
        let mut load = Load::create(&host.path().join("layer"), Format::Layer, 128 * MIB, tuning, engines);
        fill(&mut load);
        Self { load, filler, _host: host }
    }

    /// Everything is there, also after a restart, and the layer is sound.
    fn ends_well(mut self) {
        self.load.flush();
        self.load.verify();
        self.load.close();
        assert_eq!(self.load.check(), [""; 0]);
        self.load.open();
        self.load.verify();
        self.load.close();
    }
}

/// Writes until nothing is taken any more.
fn fill<E: Engine<File = HostFile>>(load: &mut Load<E>) {
    let mut refused = 0;
    for batch in 0..BATCHES_MAX {
        let tally = load.write();
        refused = if tally.done == 0 { refused + 1 } else { 0 };
        if refused == REFUSED {
            return;
        }
        match batch % 64 {
            15 | 47 => assert_eq!(load.flush().no_space, 0, "a flush needs no space"),
            31 => _ = load.discard(batch % (load.blocks() / 2), 16),
            _ => {}
        }
    }
    panic!("the host is never full");
}

/// Writes until that succeeds, giving background work the time to make room.
fn writes_succeed_again<E: Engine<File = HostFile>>(load: &mut Load<E>) {
    for _ in 0..ATTEMPTS {
        if load.write().no_space == 0 {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("writes are still refused");
}

fn host(test: &str) -> Option<Mounted> {
    host_of(test, 64 * MIB)
}

fn host_of(test: &str, bytes: u64) -> Option<Mounted> {
    let made = Mounted::on_loop("ext4", bytes, &["mkfs.ext4", "-q", "-m", "0"], "rw");
    made.map_err(|reason| skip(test, &reason)).ok()
}

fn space_that_comes_back_is_used<E: Engine<File = HostFile>>(engines: Engines<E>) {
    let Some(host) = host("full host") else { return };
    let mut full = Full::new(host, engines);
    assert_eq!(full.load.flush().done, 1, "flushes go on");
    full.load.verify();
    fs::remove_file(&full.filler).unwrap();
    writes_succeed_again(&mut full.load);
    full.ends_well();
}

#[test]
#[ignore = "needs root"]
fn full_host_refuses_writes_only() {
    space_that_comes_back_is_used::<BlockingEngine>(Arc::new(|| BlockingEngine::new().unwrap()));
}

#[test]
#[ignore = "needs root"]
fn full_host_refuses_writes_only_with_io_uring() {
    match UringEngine::new() {
        Ok(_) => space_that_comes_back_is_used::<UringEngine>(Arc::new(|| UringEngine::new().unwrap())),
        Err(error) => skip("full host with io_uring", &error.to_string()),
    }
}

/// A layer, larger than the loop device that holds it.
fn full_device(device: &LoopDevice) -> Load<BlockingEngine> {
    let engines: Engines<BlockingEngine> = Arc::new(|| BlockingEngine::new().unwrap());
    let tuning = Tuning { checkpoint_bytes: 4 * MIB, space_slack: Some(4 * MIB), ..Tuning::default() };
    let mut load = Load::create(device.path(), Format::Layer, 128 * MIB, tuning, engines);
    fill(&mut load);
    load
}

#[test]
#[ignore = "needs root"]
fn full_device_refuses_writes_only() {
    let device = LoopDevice::new(32 * MIB).unwrap();
    let mut load = full_device(&device);
    assert_eq!(load.flush().done, 1, "flushes go on");
    load.verify();
    // Whether it can be left tidy is another matter.
    let _ = load.try_close();
}

/// What a guest discards makes room by itself: nobody has to give the host space.
fn discards_make_room<E: Engine<File = HostFile>>(engines: Engines<E>) {
    let Some(host) = host("full host") else { return };
    let mut full = Full::new(host, engines);
    full.load.flush();
    let half = full.load.blocks() / 2;
    assert_eq!(full.load.discard(0, half).no_space, 0, "a discard needs no space of the host");
    assert_eq!(full.load.flush().no_space, 0);
    writes_succeed_again(&mut full.load);
    assert!(full.filler.exists());
    full.ends_well();
}

#[test]
#[ignore = "needs root"]
fn full_host_has_room_after_discards() {
    discards_make_room::<BlockingEngine>(Arc::new(|| BlockingEngine::new().unwrap()));
}

#[test]
#[ignore = "needs root"]
fn full_device_has_room_after_discards() {
    let device = LoopDevice::new(32 * MIB).unwrap();
    let mut load = full_device(&device);
    load.try_close().expect("closing needs no space");
    load.open();
    load.verify();
    let half = load.blocks() / 2;
    assert_eq!(load.discard(0, half).no_space, 0, "a discard needs no space of the device");
    assert_eq!(load.flush().no_space, 0);
    writes_succeed_again(&mut load);
    load.flush();
    load.verify();
    load.close();
}
