//! Changes of a layer's base, cut at every event: the disk reads the same before and after, and doing
//! the same again finishes it.

use std::future::Future;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command, DeviceQueue, Request};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, BaseSpec, CreateLayer, Layer, Mutation, OpenLayer, Tuning};
use sapwood_image::{Format, ImageError};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::explore::few_seeds;
use sapwood_tests::sim::faults::{Faults, Kind, Planned};
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::storage::SimStorage;
use sapwood_tests::sim::world::{Config, ProcessId, World};

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// Size of the disk: the last block is cut.
const DISK: usize = 40 * BLOCK + 3 * SECTOR;
/// Events after which an operation that does not end is stuck.
const EVENTS_MAX: u64 = 100_000;

type Outcome<T = ()> = Result<T, ImageError>;

fn path(name: &str) -> PathBuf {
    Path::new("/images").join(name)
}

/// Contents that differ by block and by `mark`; every fifth block is zero.
fn pattern(len: usize, mark: u8) -> Vec<u8> {
    let byte = |i: usize| match i / BLOCK % 5 {
        4 => 0,
        _ => mark ^ (i / SECTOR) as u8 | 1,
    };
    (0..len).map(byte).collect()
}

/// `bytes` as a disk of another size shows them.
fn sized(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.resize(len, 0);
    bytes
}

/// A process of one thread.
struct Process {
    world: World,
    id: ProcessId,
    storage: SimStorage,
    io: Io<SimEngine>,
}

impl Process {
    fn new(world: &World) -> Self {
        let id = world.process();
        let (storage, io) = (world.storage(id), Io::new(world.engine(id)));
        Self { world: world.clone(), id, storage, io }
    }

    /// Runs a task until it ends, or until the world has seen `events`.
    fn run_until<T: 'static>(&self, events: u64, task: impl Future<Output = T> + 'static) -> Option<T> {
        let slot = std::rc::Rc::new(std::cell::Cell::new(None));
        let result = std::rc::Rc::clone(&slot);
        self.io.spawn(async move { result.set(Some(task.await)) });
        let mut finished = Vec::new();
        while self.world.events() < events {
            self.io.poll(&mut finished);
            if let Some(value) = slot.take() {
                return Some(value);
            }
            if !self.world.step() {
                self.io.wait(None);
            }
        }
        None
    }

    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        let value = self.run_until(self.world.events() + EVENTS_MAX, task);
        value.expect("stuck")
    }

    fn create(&self, name: &str, size: usize, base: Option<BaseSpec>) {
        let (storage, io, path) = (self.storage.clone(), self.io.clone(), path(name));
        let options = CreateLayer { size: Some(size as u64), base, segment_size: 64 << 10, overwrite: false };
        self.run(async move { layer::create(&storage, &io, &path, &options).await }).expect("a new layer");
    }

    fn open(&self, name: &str, read_only: bool) -> Outcome<Arc<Layer<SimEngine>>> {
        let (storage, io, path) = (self.storage.clone(), self.io.clone(), path(name));
        let options = OpenLayer { read_only, ..OpenLayer::default() };
        self.run(async move { Layer::open(&storage, &io, &path, &options).await })
    }

    fn close(&self, layer: Arc<Layer<SimEngine>>) {
        let io = self.io.clone();
        self.run(async move { layer.close(&io).await }).expect("a clean stop");
    }

    /// Performs commands on a layer, each to its end, and closes it.
    fn change(&self, name: &str, commands: &[(usize, usize, Option<u8>)], disk: &mut [u8]) {
        let layer = self.open(name, false).expect("a layer");
        let mut queue = layer.queue_on(self.io.clone());
        for &(at, len, mark) in commands {
            let bytes = mark.map_or(vec![0; len], |mark| pattern(len, mark));
            let buf = SharedBuf::heap(len);
            buf.write_at(0, &bytes);
            let command = if mark.is_some() { Command::Write(buf.into()) } else { Command::WriteZeroes };
            device::run(&mut queue, GuestOffset(at as u64), len as u64, command).expect("no faults");
            disk[at..at + len].copy_from_slice(&bytes);
        }
        drop(queue);
        self.close(layer);
    }

    fn contents(&self, layer: &Arc<Layer<SimEngine>>) -> Vec<u8> {
        let len = layer.geometry().size as usize;
        let buf = SharedBuf::heap(len);
        let mut queue = layer.queue_on(self.io.clone());
        let command = Command::Read(buf.clone().into());
        device::run(&mut queue, GuestOffset(0), len as u64, command).expect("no faults");
        let mut bytes = vec![0; len];
        buf.read_at(0, &mut bytes);
        bytes
    }

    /// Opens the layer, for writing or not, and compares.
    #[track_caller]
    fn holds(&self, name: &str, read_only: bool, disk: &[u8]) -> Outcome {
        let layer = self.open(name, read_only)?;
        assert!(self.contents(&layer) == disk, "{name} reads otherwise than before");
        self.close(layer);
        Ok(())
    }
}

/// What is done to the layer `top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// It gets another base.
    Rebase(Option<(&'static str, Format)>),
    /// It is merged into its base, and removed or not.
    Commit { delete: bool },
}

/// The base of `top`.
#[derive(Clone, Copy, Debug)]
enum Start {
    Nothing,
    /// The raw disk `old`.
    Raw,
    /// The layer `mid` over it.
    Layer,
}

/// Files to begin with, and what the layer `top` among them holds.
struct Scene {
    start: Start,
    change: Change,
    files: Vec<(&'static str, Vec<u8>)>,
    disk: Vec<u8>,
}

impl Scene {
    fn new(start: Start, change: Change) -> Self {
        let world = World::new(Config::blocking(1));
        let disk = prepare(&Process::new(&world), start);
        let file = |name| (name, world.contents(&path(name)).expect("a file"));
        Self { start, change, files: ["old", "new", "mid", "other", "top"].map(file).into(), disk }
    }

    /// A world with the files.
    fn world(&self, seed: u64) -> World {
        let world = World::new(Config::blocking(seed));
        self.files.iter().for_each(|(name, bytes)| world.install(&path(name), bytes));
        world
    }
}

/// Makes the files: raw disks `old` (short) and `new` (longer than the disk), a layer `mid` over `old`,
/// a layer `other` over nothing, and `top`. What `top` holds.
fn prepare(process: &Process, start: Start) -> Vec<u8> {
    let (old, new) = (pattern(20 * BLOCK + 700, 0x40), pattern(50 * BLOCK, 0x80));
    process.world.install(&path("old"), &old);
    process.world.install(&path("new"), &new);
    let spec = |name: &str, format| BaseSpec::new(path(name), format);
    let mut mid = sized(old, 30 * BLOCK);
    process.create("mid", mid.len(), Some(spec("old", Format::Raw)));
    process.change("mid", &[(2 * BLOCK, 3 * BLOCK, Some(2)), (10 * BLOCK, 2 * BLOCK, None)], &mut mid);
    let mut other = vec![0; 35 * BLOCK];
    process.create("other", other.len(), None);
    process.change("other", &[(BLOCK, 6 * BLOCK, Some(6)), (34 * BLOCK, BLOCK, Some(9))], &mut other);
    let (base, below) = match start {
        Start::Nothing => (None, Vec::new()),
        Start::Raw => (Some(spec("old", Format::Raw)), pattern(20 * BLOCK + 700, 0x40)),
        Start::Layer => (Some(spec("mid", Format::Layer)), mid),
    };
    let mut top = sized(below, DISK);
    process.create("top", DISK, base);
    let commands = [
        (0, 2 * BLOCK, Some(0x11)),
        (3 * BLOCK + SECTOR, SECTOR, Some(0x13)),
        (6 * BLOCK, 5 * BLOCK, None),
        (28 * BLOCK, 4 * BLOCK, Some(0x15)),
        (DISK - SECTOR, SECTOR, Some(0x17)),
    ];
    process.change("top", &commands, &mut top);
    top
}

fn act(process: &Process, change: Change, tuning: Tuning) -> impl Future<Output = Outcome> + use<> {
    let (storage, io) = (process.storage.clone(), process.io.clone());
    async move {
        match change {
            Change::Rebase(base) => {
                let base = base.map(|(name, format)| BaseSpec::new(path(name), format));
                layer::rebase(&storage, &io, &path("top"), base.as_ref(), tuning, &mut |_, _| {}).await
            }
            Change::Commit { delete } => {
                layer::commit(&storage, &io, &path("top"), delete, tuning, &mut |_, _| {}).await.map(drop)
            }
        }
    }
}

/// The end of a world.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Kill,
    Power(Persistence),
    /// And then the newest slot is lost.
    PowerAndSlot,
}

const CUTS: [Cut; 6] = [
    Cut::Kill,
    Cut::Power(Persistence::Sectors(0)),
    Cut::Power(Persistence::Sectors(60)),
    Cut::Power(Persistence::Prefix),
    Cut::Power(Persistence::Suffix),
    Cut::PowerAndSlot,
];

/// What the files of a layer's base hold, as a disk of `top`'s size shows them.
fn base_holds(process: &Process, start: Start, disk: &[u8]) -> bool {
    match start {
        Start::Nothing => unreachable!("nothing to merge into"),
        Start::Raw => sized(process.world.contents(&path("old")).expect("a base"), DISK) == disk,
        Start::Layer => process.holds("mid", true, disk).is_ok(),
    }
}

/// The top after a cut: it is the disk, or says what to do. Whether it is the disk.
fn is_whole(process: &Process, change: Change, disk: &[u8]) -> Result<bool, String> {
    for read_only in [true, false] {
        match process.holds("top", read_only, disk) {
            Ok(()) => {}
            Err(error) => {
                let text = error.to_string();
                let unfinished = matches!(change, Change::Commit { .. }) && text.contains("sapwood commit");
                return if unfinished { Ok(false) } else { Err(text) };
            }
        }
    }
    Ok(true)
}

/// Damages the slot that names the newest checkpoint.
fn lose_slot(process: &Process) {
    let file = process.world.contents(&path("top")).expect("the layer");
    let generation = |parity: usize| {
        let at = (1 + parity) * BLOCK;
        u64::from_le_bytes(file[at + 24..at + 32].try_into().expect("8 bytes"))
    };
    let newest = u64::from(generation(1) > generation(0));
    process.world.damage(&path("top"), (1 + newest) * (BLOCK / SECTOR) as u64);
}

/// One world: prepared, changed up to a cut, looked at, and finished. `None` when there was nothing
/// left to cut.
fn cut_at(scene: &Scene, seed: u64, event: u64, cut: Cut, tuning: Tuning) -> Result<Option<bool>, String> {
    let world = scene.world(seed);
    let changer = Process::new(&world);
    let done = changer.run_until(event, act(&changer, scene.change, tuning));
    if let Some(result) = done {
        result.map_err(|error| format!("without a cut: {error}"))?;
        return Ok(None);
    }
    match cut {
        Cut::Kill => world.kill(changer.id),
        Cut::Power(persistence) => world.power_cut(persistence),
        Cut::PowerAndSlot => world.power_cut(Persistence::Sectors(60)),
    }
    changer.io.abandon_tasks();
    while world.step() {}
    look_and_finish(&world, scene, matches!(cut, Cut::PowerAndSlot)).map(Some)
}

/// Looks at what an interrupted change left, and does it again. Whether the layer was whole.
fn look_and_finish(world: &World, scene: &Scene, slot_is_lost: bool) -> Result<bool, String> {
    let &Scene { start, change, ref disk, .. } = scene;
    let process = Process::new(world);
    let deletes = change == (Change::Commit { delete: true });
    if world.contents(&path("top")).is_none() {
        let merged = deletes && base_holds(&process, start, disk);
        return if merged { Ok(true) } else { Err("the layer is gone".to_owned()) };
    }
    if slot_is_lost {
        lose_slot(&process);
    }
    let whole = is_whole(&process, change, disk)?;
    process.run(act(&process, change, Tuning::default())).map_err(|error| format!("again: {error}"))?;
    if !deletes {
        process.holds("top", true, disk).map_err(|error| format!("afterwards: {error}"))?;
        let (storage, io) = (process.storage.clone(), process.io.clone());
        let report = process.run(async move { layer::check(&storage, &io, &path("top")).await });
        let errors = report.map_err(|error| error.to_string())?.errors;
        assert!(errors.is_empty(), "{errors:?}");
    }
    if matches!(change, Change::Commit { .. }) && !base_holds(&process, start, disk) {
        return Err("the base does not hold the disk".to_owned());
    }
    Ok(whole)
}

/// One world in which an operation of a change fails. `None` when there are not that many.
fn fail_at(scene: &Scene, planned: Planned) -> Result<Option<bool>, String> {
    let world = scene.world(u64::from(planned.skip));
    let changer = Process::new(&world);
    world.set_faults(Faults { planned: vec![planned], ..Faults::default() });
    let result = changer.run(act(&changer, scene.change, Tuning::default()));
    let mut happened = true;
    world.change_faults(|faults| happened = std::mem::take(faults).planned.is_empty());
    if !happened {
        return result.map(|()| None).map_err(|error| format!("nothing failed: {error}"));
    }
    world.kill(changer.id);
    changer.io.abandon_tasks();
    while world.step() {}
    let deleted = scene.change == (Change::Commit { delete: true }) && world.contents(&path("top")).is_none();
    let gone_too_early = deleted && result.is_err() && planned.kind != Kind::Other;
    assert!(!gone_too_early, "{result:?}");
    look_and_finish(&world, scene, false).map(Some)
}

/// Cuts a change at every event in every way. How often the layer was whole after a cut, and how
/// often it asked for more.
fn cut_everywhere((start, change): (Start, Change), seed: u64, tuning: Tuning) -> Result<[u64; 2], String> {
    let scene = Scene::new(start, change);
    let mut outcomes = [0, 0];
    for cut in CUTS {
        for event in 1.. {
            match cut_at(&scene, seed, event, cut, tuning) {
                Ok(Some(whole)) => outcomes[usize::from(!whole)] += 1,
                Ok(None) => break,
                Err(error) => {
                    return Err(format!(
                        "{start:?}, {change:?}, seed {seed}, event {event}, {cut:?}: {error}"
                    ));
                }
            }
        }
    }
    Ok(outcomes)
}

const NEW: Option<(&str, Format)> = Some(("new", Format::Raw));
const OTHER: Option<(&str, Format)> = Some(("other", Format::Layer));
const OLD: Option<(&str, Format)> = Some(("old", Format::Raw));

#[test]
fn a_rebase_cut_anywhere_keeps_the_disk() {
    let scenes = [
        (Start::Raw, NEW),
        (Start::Raw, OTHER),
        (Start::Layer, OLD),
        (Start::Layer, None),
        (Start::Nothing, NEW),
    ];
    for seed in few_seeds() {
        for (start, base) in scenes {
            let [whole, _] = cut_everywhere((start, Change::Rebase(base)), seed, Tuning::default()).unwrap();
            assert!(whole > 60, "{whole} cuts of {start:?} to {base:?}");
        }
    }
}

#[test]
fn a_commit_cut_anywhere_can_be_finished() {
    for seed in few_seeds() {
        for (start, delete) in [(Start::Raw, false), (Start::Layer, false), (Start::Layer, true)] {
            let scene = (start, Change::Commit { delete });
            let [whole, unfinished] = cut_everywhere(scene, seed, Tuning::default()).unwrap();
            assert!(whole > 20 && unfinished > 20, "{whole} and {unfinished} cuts of {scene:?}");
        }
    }
}

#[test]
fn a_change_that_fails_anywhere_can_be_tried_again() {
    let kinds = [Kind::Read, Kind::Write, Kind::Sync, Kind::Allocate, Kind::Other];
    for scene in [
        (Start::Raw, Change::Rebase(NEW)),
        (Start::Layer, Change::Rebase(None)),
        (Start::Raw, Change::Commit { delete: false }),
        (Start::Layer, Change::Commit { delete: true }),
    ] {
        let files = Scene::new(scene.0, scene.1);
        for kind in kinds {
            let errno = if kind == Kind::Allocate { Errno::NOSPC } else { Errno::IO };
            for skip in 0.. {
                match fail_at(&files, Planned { kind, skip, errno }) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => panic!("{scene:?}, {kind:?} {skip}: {error}"),
                }
            }
        }
    }
}

#[test]
fn every_breach_of_the_order_is_noticed() {
    for (mutation, scene) in [
        (Mutation::SlotBeforeBaseRecord, (Start::Raw, Change::Rebase(NEW))),
        (Mutation::BaseInOneSlot, (Start::Raw, Change::Commit { delete: false })),
        (Mutation::CommitWithoutMark, (Start::Layer, Change::Commit { delete: false })),
    ] {
        let tuning = Tuning { mutation: Some(mutation), ..Tuning::default() };
        let noticed = (0..3).find_map(|seed| cut_everywhere(scene, seed, tuning).err());
        println!("{mutation:?}: {}", noticed.unwrap_or_else(|| panic!("{mutation:?} was not noticed")));
    }
}

/// Flattens a layer while a guest writes it: the guest's writes win.
fn flatten_under_writes(seed: u64, tuning: Tuning) -> bool {
    let world = World::new(Config::blocking(seed));
    let process = Process::new(&world);
    let mut disk = prepare(&process, Start::Raw);
    let (storage, io) = (process.storage.clone(), process.io.clone());
    let opened = (storage.clone(), io.clone());
    let options = OpenLayer { read_only: false, tuning };
    let layer = block_on(&io, async move { Layer::open(&opened.0, &opened.1, &path("top"), &options).await });
    let layer = layer.expect("a layer");
    let mut queue = layer.queue_on(io.clone());
    let flattened = std::rc::Rc::new(std::cell::Cell::new(None));
    let (result, inner, task_io) = (std::rc::Rc::clone(&flattened), Arc::clone(&layer), io.clone());
    io.spawn(async move {
        result.set(Some(inner.rebase(&storage, &task_io, None, &mut |_, _| ControlFlow::Continue(())).await));
    });
    let (mut rng, mut done, mut tag) = (Rng::new(seed), Vec::new(), 0);
    for _ in 0..EVENTS_MAX {
        if tag < 12 && rng.percent(30) {
            tag += 1;
            let sectors = DISK / SECTOR - 20;
            let (at, len) =
                (rng.below(sectors as u64) as usize * SECTOR, rng.between(1, 20) as usize * SECTOR);
            let bytes = pattern(len, 0xa0 + tag as u8);
            let buf = SharedBuf::heap(len);
            buf.write_at(0, &bytes);
            disk[at..at + len].copy_from_slice(&bytes);
            let command = Command::Write(buf.into());
            queue.submit(Request { tag, offset: GuestOffset(at as u64), len: len as u64, command });
        }
        queue.poll(&mut done);
        // One at a time: writes of the same block in flight together have no order.
        while queue.outstanding() > 0 && rng.percent(90) {
            world.step();
            queue.poll(&mut done);
        }
        if queue.outstanding() > 0 {
            device::drain(&mut queue, &mut done);
        }
        match flattened.take() {
            Some(result) => {
                result.expect("no faults");
                break;
            }
            None => drop(world.step()),
        }
    }
    drop(queue);
    let same = process.contents(&layer) == disk;
    assert!(layer.info().base.is_none(), "stuck");
    process.close(layer);
    same && process.open("top", true).is_ok_and(|layer| process.contents(&layer) == disk)
}

#[test]
fn a_guest_that_writes_during_a_flatten_wins() {
    for seed in 0..200 {
        assert!(flatten_under_writes(seed, Tuning::default()), "seed {seed}");
    }
    let tuning = Tuning { mutation: Some(Mutation::CopyUpOverWriter), ..Tuning::default() };
    assert!((0..200).any(|seed| !flatten_under_writes(seed, tuning)), "the rule is not tested");
}
