//! The simulator tests itself: a toy disk without flaws keeps its contract in every history, a
//! toy with a flaw is caught, and a seed replays.

use std::path::Path;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op, Transfer};
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_blockdev::units::FileOffset;
use sapwood_tests::sim::explore::{first_failure, report, run, seeds};
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::plan::Plan;
use sapwood_tests::sim::toy::{Flaw, Toy};
use sapwood_tests::sim::world::{Config, World};

#[test]
fn a_sound_toy_keeps_the_contract() {
    let toy = Toy::default();
    let (_, failure) = first_failure(&toy, seeds(1000));
    if let Some(failure) = failure {
        panic!("{}", report(&toy, &failure, "sim_self"));
    }
}

#[test]
fn every_flaw_of_the_toy_is_caught() {
    let missed: Vec<Flaw> = Flaw::ALL
        .into_iter()
        .filter(|flaw| {
            let (tried, failure) = first_failure(&Toy { flaw: Some(*flaw) }, 0..1000);
            println!("{flaw:?}: {tried} seeds, {:?}", failure.as_ref().map(|failure| &failure.message));
            failure.is_none()
        })
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

#[test]
fn a_disk_that_loses_syncs_is_noticed() {
    let toy = Toy::default();
    let caught = (0..100).find(|seed| {
        let mut plan = Plan::random(*seed, 1);
        plan.faults = Faults { lost_sync: 5000, ..Faults::default() };
        run(&toy, &plan, None, false).result.is_err()
    });
    assert!(caught.is_some());
}

#[test]
fn a_seed_replays() {
    for seed in 0..20 {
        let plan = Plan::random(seed, 1);
        let hash = || run(&Toy::default(), &plan, None, true).hash;
        assert_eq!(hash(), hash(), "seed {seed} took two ways");
    }
}

/// As the host's engines do it: what is left is submitted again by whoever asked.
#[test]
fn a_transfer_moves_no_more_than_it_is_to() {
    let world = World::new(Config::blocking(0));
    let path = Path::new("/file");
    let file = world.storage(world.process()).open(path, OpenOptions::CREATE).unwrap();
    let mut engine = world.engine(world.process());
    let mut run = |op| {
        let mut done = Vec::new();
        engine.submit(0, op);
        engine.collect(&mut done);
        while done.is_empty() {
            engine.wait(None);
            engine.collect(&mut done);
        }
        let done = done.pop().unwrap();
        let (Op::Read(transfer) | Op::Write(transfer)) = done.op else { panic!("a transfer") };
        (done.result, transfer)
    };
    let memory = AlignedBuf::from_slice(&[7; 3 * 4096]);
    let write = Transfer { at_most: 8192, ..Transfer::new(file.clone(), FileOffset(0), memory) };
    let (moved, mut back) = run(Op::Write(write));
    assert_eq!((moved, world.contents(path).unwrap().len()), (Ok(8192), 8192));
    back.done += 8192;
    assert_eq!(run(Op::Write(back)).0, Ok(4096));
    assert_eq!(world.contents(path).unwrap(), [7; 3 * 4096]);
    let read = Transfer { at_most: 4096, ..Transfer::new(file, FileOffset(4096), AlignedBuf::zeroed(8192)) };
    let (moved, back) = run(Op::Read(read));
    let bytes = back.memory.into_buf();
    assert_eq!((moved, &bytes[..4096], &bytes[4096..]), (Ok(4096), &[7; 4096][..], &[0; 4096][..]));
}
