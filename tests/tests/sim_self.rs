//! The simulator tests itself: a toy disk without flaws keeps its contract in every history, a
//! toy with a flaw is caught, and a seed replays.

use sapwood_tests::sim::explore::{first_failure, report, run, seeds};
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::plan::Plan;
use sapwood_tests::sim::toy::{Flaw, Toy};

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
