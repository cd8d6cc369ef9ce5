//! Layers under crashes: random histories, and short ones cut at every event.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Request};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{Layer, LayerQueue};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::explore::{cut_everywhere, few_seeds, first_failure, report, run, seeds};
use sapwood_tests::sim::faults::Kind;
use sapwood_tests::sim::layer::LayerSubject;
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::plan::{Base, Plan, Shape, Step};
use sapwood_tests::sim::session::Worker;
use sapwood_tests::sim::storage::SimStorage;
use sapwood_tests::sim::subject::{Control, Disk, Subject, Task, disk_path};
use sapwood_tests::sim::world::{Config, ProcessId, Waiting, World};

#[test]
fn random_histories_keep_the_contract() {
    let subject = LayerSubject::default();
    // Lanes of the log took what is kept back on a full host, and guests waited for a checkpoint that had no space.
    let found = [53741];
    let (_, failure) = first_failure(&subject, found.into_iter().chain(seeds(1500)));
    if let Some(failure) = failure {
        panic!("{}", report(&subject, &failure, "sim_crash"));
    }
}

#[test]
fn random_histories_on_a_device_keep_the_contract() {
    let subject = LayerSubject { on_device: true, ..LayerSubject::default() };
    let (_, failure) = first_failure(&subject, seeds(300));
    if let Some(failure) = failure {
        panic!("{}", report(&subject, &failure, "sim_crash"));
    }
}

/// Random histories in which everything is laid in order where the cleaner would have run.
#[test]
fn random_histories_with_compaction_keep_the_contract() {
    let subject = LayerSubject::default();
    for seed in seeds(400) {
        let mut plan = Plan::random(seed, 3);
        // A host that was full is taken to be so until a guest writes: the refusal would seem to have no reason.
        if plan.shape.capacity.is_some() || plan.faults.no_space > 0 {
            continue;
        }
        plan.steps
            .iter_mut()
            .filter(|step| matches!(step, Step::Clean))
            .for_each(|step| *step = Step::Compact);
        let result = run(&subject, &plan, None, false).result;
        assert_eq!(result, Ok(()), "seed {seed}, with compaction where it cleans");
    }
}

#[test]
fn a_seed_replays() {
    for seed in 0..20 {
        let plan = Plan::random(seed, 3);
        let hash = || run(&LayerSubject::default(), &plan, None, true).hash;
        assert_eq!(hash(), hash(), "seed {seed} took two ways");
    }
}

/// Cuts the history of these steps at every event: kills and power cuts.
fn cut(shape: Shape, steps: &[Step]) {
    let cuts = [
        None,
        Some(Persistence::Sectors(0)),
        Some(Persistence::Sectors(60)),
        Some(Persistence::Prefix),
        Some(Persistence::Suffix),
    ];
    let subject = LayerSubject::default();
    let mut runs = 0;
    for seed in few_seeds() {
        let plan = Plan::written(seed, shape, steps);
        match cut_everywhere(&subject, &plan, &cuts) {
            Ok(more) => runs += more,
            Err(failure) => panic!("{}", report(&subject, &failure, "sim_crash")),
        }
    }
    println!("{runs} runs");
}

fn write(at: u64, len: u64) -> Step {
    Step::Write { queue: 0, at, len }
}

fn flush() -> Step {
    Step::Flush { queue: 0 }
}

#[test]
fn cut_writes_overwrites_sub_block_writes_discards() {
    let shape = Shape { base: Base::Raw(100), ..Shape::small() };
    cut(
        shape,
        &[
            write(0, 24),
            write(8, 8),
            Step::Run { rounds: 3 },
            write(11, 2),
            Step::Read { queue: 0, at: 0, len: 40 },
            flush(),
            write(29, 20),
            Step::Discard { queue: 0, at: 4, len: 20 },
            Step::Drain,
            Step::Zeroes { queue: 0, at: 30, len: 9 },
            write(8, 8),
            flush(),
            write(96, 16),
            Step::Drain,
        ],
    );
}

#[test]
fn cut_with_the_write_cache_off() {
    let shape = Shape { write_cache: false, base: Base::Layer(64), ..Shape::small() };
    cut(
        shape,
        &[
            write(0, 24),
            write(8, 8),
            write(11, 2),
            Step::Drain,
            Step::Discard { queue: 0, at: 0, len: 16 },
            write(3, 1),
            Step::Drain,
        ],
    );
}

#[test]
fn cut_resizes_over_a_layer() {
    let shape = Shape { base: Base::Layer(128), sectors_max: 200, ..Shape::small() };
    cut(
        shape,
        &[
            write(90, 30),
            Step::Drain,
            Step::Resize { sectors: 93 },
            Step::Run { rounds: 8 },
            write(80, 13),
            Step::Resize { sectors: 200 },
            Step::Drain,
            write(150, 20),
            Step::Resize { sectors: 157 },
            Step::Drain,
            Step::Resize { sectors: 190 },
            Step::Drain,
        ],
    );
}

#[test]
fn cut_checkpoints_and_reused_segments() {
    let shape = Shape { sectors: 64, ..Shape::small() };
    let mut steps = Vec::new();
    for _ in 0..8 {
        steps.extend([write(0, 64), Step::Run { rounds: 4 }, write(8, 24), Step::Drain]);
        steps.extend([Step::Checkpoint, Step::Run { rounds: 2 }, write(3, 9)]);
    }
    steps.extend([flush(), Step::Drain]);
    cut(shape, &steps);
}

#[test]
fn cut_the_cleaner_and_a_clean_stop() {
    let mut steps: Vec<Step> = (0..16).map(|block| write(block * 8, 8)).collect();
    steps.push(Step::Drain);
    steps.extend((0..16).step_by(2).map(|block| write(block * 8, 8)));
    steps.extend([Step::Run { rounds: 3 }, Step::Clean, write(8, 8), Step::Clean, Step::Drain]);
    steps.extend([Step::Checkpoint, Step::Clean, write(17, 3), Step::Drain]);
    steps.extend([Step::Reopen, write(0, 20), flush(), Step::Drain]);
    cut(Shape::small(), &steps);
}

#[test]
fn cut_a_compaction() {
    // Scattered, one record each; then laid in order while a guest writes to what is being moved.
    let mut steps: Vec<Step> = (0..8).flat_map(|i| [write(i * 5 % 8 * 8, 8), Step::Drain]).collect();
    steps.extend([Step::Compact, write(16, 8), Step::Run { rounds: 1 }, write(33, 3), Step::Drain]);
    steps.extend([flush(), Step::Drain, Step::Compact, write(8, 8), Step::Drain]);
    steps.extend([Step::Reopen, flush(), Step::Drain]);
    cut(Shape::small(), &steps);
}

#[test]
fn cut_three_queues() {
    let shape = Shape {
        queues: 3,
        base: Base::Raw(60),
        sync_interval: Duration::from_millis(2),
        checkpoint_interval: Duration::from_millis(5),
        ..Shape::small()
    };
    let mut steps = Vec::new();
    for round in 0..4 {
        for queue in 0..3 {
            steps.push(Step::Write { queue, at: round * 8, len: 16 });
            steps.push(Step::Write { queue, at: round * 8 + 3 * queue as u64, len: 4 });
        }
        steps.push(Step::Flush { queue: round as usize % 3 });
        steps.push(Step::Run { rounds: 5 });
    }
    steps.push(Step::Drain);
    cut(shape, &steps);
}

#[test]
fn cut_failed_records_and_syncs() {
    let fail = |kind, skip, no_space| Step::Fail { kind, skip, no_space };
    let many = |steps: &mut Vec<Step>| {
        for at in [0, 8, 16, 3, 40] {
            steps.extend([write(at, 8), Step::Run { rounds: 1 }]);
        }
        steps.extend([flush(), Step::Drain]);
    };
    for failure in [
        vec![fail(Kind::Write, 0, false)],
        vec![fail(Kind::Write, 1, true)],
        vec![fail(Kind::Write, 0, false), fail(Kind::Write, 0, false)],
        vec![fail(Kind::Allocate, 0, true)],
        vec![fail(Kind::Sync, 0, false)],
    ] {
        let mut steps = Vec::new();
        many(&mut steps);
        steps.extend(failure);
        many(&mut steps);
        many(&mut steps);
        cut(Shape::small(), &steps);
    }
}

/// Runs a task in a process of its own until it ends, or until the world has seen `events`.
fn go<T: 'static>(world: &World, worker: &Worker, task: Task<T>, events: u64) -> Option<T> {
    let result = worker.give(world, task);
    while world.events() < events {
        worker.run(world);
        if let Some(value) = result.take() {
            return Some(value);
        }
        world.step();
    }
    None
}

#[test]
fn a_layer_whose_making_was_cut_is_none_or_a_whole_one() {
    let subject = LayerSubject::default();
    let mut outcomes = [0, 0];
    for (seed, cut) in (0..200).flat_map(|seed| (1..8).map(move |cut| (seed, cut))) {
        let shape = Shape { base: Base::Raw(50), ..Shape::small() };
        let config = Config { waiting: Waiting::IsNoted, ..Config::blocking(seed) };
        let world = World::new(config);
        let process = world.process();
        let maker = Worker::new(&world, process);
        let task = subject.create(world.storage(process), maker.io.clone(), shape);
        let made = go(&world, &maker, task, cut);
        world.power_cut(Persistence::ALL[seed as usize % Persistence::ALL.len()]);
        maker.io.abandon_tasks();
        let process = world.process();
        let opener = Worker::new(&world, process);
        let task = subject.open(world.storage(process), opener.io.clone(), shape);
        let opened = go(&world, &opener, task, u64::MAX).expect("an outcome");
        assert!(made.is_none() || opened.is_ok(), "seed {seed}, cut {cut}: {:?}", opened.err());
        outcomes[usize::from(opened.is_ok())] += 1;
        opener.io.abandon_tasks();
    }
    assert!(outcomes.iter().all(|count| *count > 10), "{outcomes:?}");
}

/// A layer on a host with little room, and who does the background work.
struct OnFullHost {
    world: World,
    process: ProcessId,
    keeper: Worker,
    shape: Shape,
}

impl OnFullHost {
    fn new(seed: u64, shape: Shape) -> Self {
        let config = Config { capacity: shape.capacity, waiting: Waiting::IsNoted, ..Config::blocking(seed) };
        let world = World::new(config);
        let process = world.process();
        let host = Self { keeper: Worker::new(&world, process), world, process, shape };
        let made = LayerSubject::default().create(host.storage(), host.keeper.io.clone(), shape);
        host.run(made).expect("there is room");
        host
    }

    fn storage(&self) -> SimStorage {
        self.world.storage(self.process)
    }

    fn run<T: 'static>(&self, task: Task<T>) -> T {
        go(&self.world, &self.keeper, task, u64::MAX).expect("it ends")
    }

    fn open(&self) -> Option<Arc<Layer<SimEngine>>> {
        self.run(LayerSubject::default().open(self.storage(), self.keeper.io.clone(), self.shape)).ok()
    }

    fn control(&self, layer: &Arc<Layer<SimEngine>>, what: Control) -> Result<(), String> {
        self.run(Arc::clone(layer).control(self.storage(), self.keeper.io.clone(), what))
    }

    fn maintain(&self, layer: &Arc<Layer<SimEngine>>) {
        self.keeper.give(&self.world, Disk::maintain(Arc::clone(layer), self.keeper.io.clone()));
    }

    /// Ends a request at the start of the disk while the background work goes on, on a thread of its own; `None` when it waits for a
    /// minute.
    fn ends(
        &self,
        queue: &mut LayerQueue<SimEngine>,
        command: Command,
        len: u64,
    ) -> Option<Result<(), DeviceError>> {
        let Self { world, keeper, .. } = self;
        let deadline = world.now() + Duration::from_secs(60);
        queue.submit(Request { tag: 0, offset: GuestOffset(0), len, command });
        let engine = queue.with_engine(|engine| engine.id());
        world.rouse(engine);
        let mut done = Vec::new();
        while world.now() < deadline {
            if world.runnable(engine) {
                queue.poll(&mut done);
                if let Some(done) = done.pop() {
                    return Some(done.result);
                }
                queue.wait(None);
            } else if !keeper.run(world) && !world.step() {
                world.advance(world.next_deadline().unwrap_or(deadline));
            }
        }
        None
    }
}

impl Drop for OnFullHost {
    fn drop(&mut self) {
        self.keeper.io.abandon_tasks();
    }
}

fn data(blocks: u64) -> (Command, u64) {
    let bytes = blocks * 4096;
    (Command::Write(SharedBuf::heap(bytes as usize).into()), bytes)
}

/// A layer of so many blocks is full, and so is the host when it is opened again. The guest discards everything, and writes: what
/// became of the write; `None` if the layer is not opened.
fn write_where_all_was_discarded(blocks: u64) -> Option<Result<(), DeviceError>> {
    const CAPACITY: u64 = 4 << 20;
    let shape = Shape { sectors: 8 * blocks, capacity: Some(CAPACITY), ..Shape::small() };
    let host = OnFullHost::new(blocks, shape);
    let guest = Io::new(host.world.engine(host.process));
    let layer = host.open().expect("there is room");
    let mut queue = layer.queue_on(guest.clone());
    let (write, len) = data(blocks);
    host.ends(&mut queue, write, len)?.expect("there is room");
    drop(queue);
    host.control(&layer, Control::Close).expect("there is room");
    drop(layer);
    let file = host.storage().open(&disk_path(), OpenOptions::READ);
    let used = file.and_then(|file| file.allocated()).expect("the file is there");
    // There is room for the segment of the log and the next one.
    let filler = CAPACITY - used - 2 * u64::from(shape.segment_size);
    host.world.install(Path::new("/images/filler"), &vec![1; filler as usize]);
    let layer = host.open()?;
    host.maintain(&layer);
    let mut queue = layer.queue_on(guest);
    host.ends(&mut queue, Command::Discard, len).expect("a discard does not wait").ok();
    let (write, len) = data(1);
    let written = host.ends(&mut queue, write, len);
    let written = written.unwrap_or_else(|| panic!("{blocks} blocks: the guest waits for ever"));
    host.world.make_room();
    host.world.advance(host.world.now() + Duration::from_secs(2));
    let (write, len) = data(1);
    host.ends(&mut queue, write, len).expect("it does not wait").expect("there is room");
    Some(written)
}

#[test]
fn guests_do_not_wait_for_room_that_nobody_can_make() {
    // How much is left of the log's segment depends on how much was written.
    let written: Vec<_> = (30..62).filter_map(write_where_all_was_discarded).collect();
    assert!(written.contains(&Ok(())) && written.contains(&Err(DeviceError::NoSpace)), "{written:?}");
}

/// What a guest discards is room for its next writes, also where the log has lanes, which take space, too.
#[test]
fn lanes_leave_what_is_kept_back_on_a_full_host() {
    for seed in 0..40 {
        let capacity = Some((640 + 8 * seed) << 10);
        let host = OnFullHost::new(seed, Shape { queues: 3, sectors: 8 * 400, capacity, ..Shape::small() });
        let guest = Io::new(host.world.engine(host.process));
        let layer = host.open().expect("there is room");
        let mut queue = layer.queue_on(guest);
        let mut write = |blocks| {
            let (write, len) = data(blocks);
            host.ends(&mut queue, write, len).expect("no write waits").is_ok()
        };
        assert!((1..200).any(|n| !write(n)), "seed {seed}: the host is not full");
        for _ in 0..6 {
            // Where nothing is worth it, or there is no room for it, no more than lanes are opened.
            host.control(&layer, Control::Clean).ok();
        }
        host.maintain(&layer);
        let discarded = host.ends(&mut queue, Command::Discard, 400 * 4096);
        assert_eq!(discarded, Some(Ok(())), "seed {seed}");
        let has_room = (0..10).any(|_| {
            host.world.advance(host.world.now() + Duration::from_secs(2));
            let (write, len) = data(1);
            host.ends(&mut queue, write, len).expect("no write waits").is_ok()
        });
        assert!(has_room, "seed {seed}: what was discarded is no room");
    }
}

#[test]
#[ignore = "prints what happens in the history of SAPWOOD_SIM_SEED"]
fn show() {
    for seed in seeds(1) {
        let plan = Plan::random(seed, 3);
        let run = run(&LayerSubject::default(), &plan, None, true);
        println!("{:?}\n{:?}\n{}\n{:?}", plan.shape, plan.faults, run.trace.join("\n"), run.result);
    }
}
