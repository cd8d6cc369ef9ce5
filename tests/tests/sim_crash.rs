//! Layers under crashes: random histories, and short ones cut at every event.

use std::time::Duration;

use sapwood_tests::sim::explore::{cut_everywhere, few_seeds, first_failure, report, run, seeds};
use sapwood_tests::sim::faults::Kind;
use sapwood_tests::sim::layer::LayerSubject;
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::plan::{Base, Plan, Shape, Step};
use sapwood_tests::sim::session::Worker;
use sapwood_tests::sim::subject::{Subject, Task};
use sapwood_tests::sim::world::{Config, Waiting, World};

#[test]
fn random_histories_keep_the_contract() {
    let subject = LayerSubject::default();
    let (_, failure) = first_failure(&subject, seeds(1500));
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

#[test]
#[ignore = "prints what happens in the history of SAPWOOD_SIM_SEED"]
fn show() {
    for seed in seeds(1) {
        let plan = Plan::random(seed, 3);
        let run = run(&LayerSubject::default(), &plan, None, true);
        println!("{:?}\n{:?}\n{}\n{:?}", plan.shape, plan.faults, run.trace.join("\n"), run.result);
    }
}
