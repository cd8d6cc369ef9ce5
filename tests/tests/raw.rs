//! Raw disks: reads and writes of any alignment from several queues, and what failures mean.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceError, DeviceQueue, Done, Request, run};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::units::{BlockSpan, GuestOffset};
use sapwood_image::raw::{CreateRaw, RawDevice, RawQueue, create};
use sapwood_image::{ErrorKind, ImageError};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::faults::{Faults, Kind, Planned};
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::world::{Config, World};

const DISK: &str = "/disk.raw";
const SECTOR: usize = 512;
/// A power cut that takes everything unsynced.
const NOTHING: Persistence = Persistence::Sectors(0);

type Device = RawDevice<SimEngine>;
type Queue = RawQueue<SimEngine>;

fn world(alignment: usize, bytes: &[u8]) -> World {
    let world = World::new(Config { alignment, ..Config::blocking(7) });
    world.install(Path::new(DISK), bytes);
    world
}

fn open(world: &World, read_only: bool) -> Result<Arc<Device>, ImageError> {
    RawDevice::open(&world.storage(world.process()), Path::new(DISK), read_only)
}

fn queue(world: &World, device: &Arc<Device>) -> Queue {
    device.queue(world.engine(world.process()))
}

fn read(queue: &mut Queue, offset: usize, len: usize) -> Vec<u8> {
    let buffer = SharedBuf::heap(len);
    run(queue, GuestOffset(offset as u64), len as u64, Command::Read(buffer.clone().into())).unwrap();
    let mut bytes = vec![0; len];
    buffer.read_at(0, &mut bytes);
    bytes
}

fn write(queue: &mut Queue, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
    let buffer = SharedBuf::heap(bytes.len());
    buffer.write_at(0, bytes);
    run(queue, GuestOffset(offset as u64), bytes.len() as u64, Command::Write(buffer.into()))
}

/// A disk in memory and the requests that change it and the real one alike.
struct Model {
    bytes: Vec<u8>,
    rng: Rng,
}

impl Model {
    /// Requests on neighbouring ranges, in random order, applied to the model.
    fn batch(&mut self) -> Vec<Request> {
        let sectors = self.bytes.len() / SECTOR;
        let mut at = self.rng.below(sectors as u64) as usize;
        let mut requests = Vec::new();
        for tag in 0..8 {
            let len = (self.rng.between(1, 20) as usize).min(sectors.saturating_sub(at));
            if len == 0 {
                break;
            }
            let (offset, bytes) = (at * SECTOR, len * SECTOR);
            let command = self.command(offset, bytes);
            requests.push(Request { tag, offset: GuestOffset(offset as u64), len: bytes as u64, command });
            at += len + self.rng.below(2) as usize;
        }
        for i in (1..requests.len()).rev() {
            requests.swap(i, self.rng.below(i as u64 + 1) as usize);
        }
        requests
    }

    fn command(&mut self, offset: usize, len: usize) -> Command {
        match self.rng.below(6) {
            0 => {
                self.bytes[offset..offset + len].fill(0);
                Command::WriteZeroes
            }
            1 => {
                let whole = BlockSpan::of(GuestOffset(offset as u64), len as u64).whole;
                if !whole.is_empty() {
                    self.bytes[whole.start as usize * 4096..whole.end as usize * 4096].fill(0);
                }
                Command::Discard
            }
            _ => {
                self.rng.fill(&mut self.bytes[offset..offset + len]);
                // Memory that may or may not be aligned.
                let skip = self.rng.pick(&[0, 0, 8, 512]);
                let buffer = SharedBuf::heap(len + skip).slice(skip..skip + len);
                buffer.write_at(0, &self.bytes[offset..offset + len]);
                Command::Write(buffer.into())
            }
        }
    }
}

fn finish(queues: &mut [Queue]) {
    let mut done: Vec<Done> = Vec::new();
    loop {
        queues.iter_mut().for_each(|queue| queue.poll(&mut done));
        // One may wait for a range that the other holds, whose operation starts when it waits.
        let busy = |queue: &mut Queue| queue.with_engine(|engine| engine.in_flight() > 0);
        let index = queues.iter_mut().position(busy);
        match index.or(queues.iter().position(|queue| queue.outstanding() > 0)) {
            Some(index) => queues[index].wait(None),
            None => break,
        }
    }
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
}

#[test]
fn random_requests_from_two_queues_agree_with_a_model() {
    for (alignment, size) in [(512, 1 << 18), (4096, 1 << 18), (4096, (1 << 18) + 512), (512, 100_000)] {
        for seed in 0..40 {
            let mut model = Model { bytes: vec![0; size], rng: Rng::new(seed) };
            model.rng.fill(&mut model.bytes);
            let world = world(alignment, &model.bytes);
            model.bytes.resize(size.next_multiple_of(SECTOR), 0);
            world.set_faults(Faults { short: 500, interrupted: 500, ..Faults::default() });
            let device = open(&world, false).unwrap();
            let mut queues = [queue(&world, &device), queue(&world, &device)];
            for _ in 0..20 {
                for request in model.batch() {
                    queues[(request.tag % 2) as usize].submit(request);
                }
                finish(&mut queues);
            }
            assert!(read(&mut queues[0], 0, model.bytes.len()) == model.bytes, "{alignment} {size} {seed}");
            let mut contents = world.contents(Path::new(DISK)).unwrap();
            assert_eq!(contents.len().next_multiple_of(SECTOR), model.bytes.len(), "the size stays");
            contents.resize(model.bytes.len(), 0);
            assert!(contents == model.bytes, "{alignment} {size} {seed}: the file");
        }
    }
}

#[test]
fn requests_outside_or_off_sectors_are_refused() {
    let world = world(512, &[0; 8192]);
    let device = open(&world, false).unwrap();
    let mut queue = queue(&world, &device);
    for (offset, len) in [(8192, 512), (7680, 1024), (100, 512), (0, 100), (u64::MAX - 511, 512)] {
        let result = run(&mut queue, GuestOffset(offset), len, Command::WriteZeroes);
        assert_eq!(result, Err(DeviceError::OutOfRange), "{offset} {len}");
    }
    let short = Command::Read(SharedBuf::heap(512).into());
    assert_eq!(run(&mut queue, GuestOffset(0), 1024, short), Err(DeviceError::OutOfRange));
}

#[test]
fn one_writer_or_many_readers() {
    let world = world(512, &[7; 4096]);
    let reader = open(&world, true).unwrap();
    let second = open(&world, true).unwrap();
    assert!(matches!(open(&world, false).map(drop).unwrap_err().kind, ErrorKind::Locked { .. }));
    let mut queue = queue(&world, &reader);
    assert_eq!(read(&mut queue, 0, 4096), [7; 4096]);
    assert_eq!(write(&mut queue, 0, &[1; 512]), Err(DeviceError::ReadOnly));
    drop((reader, second, queue));
    let _writer = open(&world, false).unwrap();
    assert!(open(&world, true).is_err());
}

#[test]
fn a_failed_sync_latches() {
    let world = world(512, &[0; 4096]);
    let device = open(&world, false).unwrap();
    let mut queue = queue(&world, &device);
    let failure = Planned { kind: Kind::Sync, skip: 0, errno: Errno::IO };
    world.set_faults(Faults { planned: vec![failure], ..Faults::default() });
    let flush = |queue: &mut Queue| run(queue, GuestOffset(0), 0, Command::Flush);
    write(&mut queue, 0, &[1; 512]).unwrap();
    assert_eq!(flush(&mut queue), Err(DeviceError::Io(Errno::IO)));
    assert_eq!(flush(&mut queue), Err(DeviceError::Latched), "a second sync proves nothing");
    assert_eq!(write(&mut queue, 0, &[2; 512]), Err(DeviceError::Latched));
    assert!(run(&mut queue, GuestOffset(0), 512, Command::Read(SharedBuf::heap(512).into())).is_ok());
}

#[test]
fn without_write_cache_a_write_survives_a_power_cut() {
    for (alignment, offset) in [(512, 0), (4096, 512)] {
        let world = world(alignment, &[0; 8192]);
        let device = open(&world, false).unwrap();
        device.set_write_cache(false);
        let mut queue = queue(&world, &device);
        write(&mut queue, offset, &[5; 512]).unwrap();
        world.power_cut(NOTHING);
        let contents = world.contents(Path::new(DISK)).unwrap();
        assert_eq!(contents[offset..offset + 512], [5; 512], "alignment {alignment}");
    }
}

#[test]
fn resize_is_durable_and_needs_whole_sectors() {
    let world = world(512, &[3; 8192]);
    let (device, io) = (open(&world, false).unwrap(), Io::new(world.engine(world.process())));
    let resize = |size| {
        let (device, io2) = (Arc::clone(&device), io.clone());
        block_on(&io, async move { device.resize(&io2, size).await })
    };
    assert!(resize(1000).is_err());
    resize(4096).unwrap();
    resize(16384).unwrap();
    assert_eq!(device.geometry().size, 16384);
    world.power_cut(NOTHING);
    let mut expected = vec![3; 4096];
    expected.resize(16384, 0);
    assert!(world.contents(Path::new(DISK)).unwrap() == expected);
}

#[test]
fn create_is_durable_and_touches_nothing_that_exists() {
    let world = World::new(Config { capacity: Some(1 << 20), ..Config::blocking(1) });
    let process = world.process();
    let make = |name: &'static str, size, allocate| {
        let (storage, io) = (world.storage(process), Io::new(world.engine(process)));
        let options = CreateRaw { size, allocate };
        block_on(&io.clone(), async move { create(&storage, &io, Path::new(name), options).await })
    };
    make("/new", 1000, false).unwrap();
    assert!(make("/new", 0, false).is_err());
    make("/large", 2 << 20, true).unwrap_err();
    assert_eq!(world.contents(Path::new("/large")), None, "removed");
    world.power_cut(NOTHING);
    assert_eq!(world.contents(Path::new("/new")), Some(vec![0; 1024]));
}
