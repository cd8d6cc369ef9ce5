//! What lies below a layer is changed while guests go on: random histories, and short ones cut at every
//! event.

use sapwood_image::layer::{Mutation, Tuning};
use sapwood_tests::sim::explore::{Failure, cut_everywhere, few_seeds, report, run, seeds};
use sapwood_tests::sim::layer::LayerSubject;
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::plan::{Base, Plan, Shape, Step};
use sapwood_tests::sim::rng::Rng;

const CUTS: [Option<Persistence>; 5] = [
    None,
    Some(Persistence::Sectors(0)),
    Some(Persistence::Sectors(60)),
    Some(Persistence::Prefix),
    Some(Persistence::Suffix),
];

#[test]
fn random_histories_keep_the_contract() {
    let subject = LayerSubject::default();
    // A raw base that could not be grown was marked all the same, and the mark could not be taken off.
    // After a commit that failed, the layer was given the same base again, which was not durable.
    let found = [1357, 3015];
    for seed in found.into_iter().chain(seeds(300)) {
        let plan = Plan::with_bases(seed, 3);
        if let Err(message) = run(&subject, &plan, None, false).result {
            panic!("{}", report(&subject, &Failure { plan, cut: None, message }, "sim_online"));
        }
    }
}

fn write(at: u64, len: u64) -> Step {
    Step::Write { queue: 0, at, len }
}

/// A guest that writes before, during and after `change`.
fn steps(change: Step) -> Vec<Step> {
    let mut steps = vec![write(0, 24), Step::Zeroes { queue: 0, at: 24, len: 16 }, Step::Drain, change];
    for at in [0, 3, 24, 70] {
        steps.extend([Step::Run { rounds: 8 }, write(at, 8)]);
    }
    steps.extend([Step::Discard { queue: 0, at: 8, len: 16 }, Step::Flush { queue: 0 }, Step::Drain]);
    steps
}

fn cut(base: Base, change: Step, tuning: Tuning, seed: u64) -> Result<u64, Box<Failure>> {
    let subject = LayerSubject { tuning, ..LayerSubject::default() };
    let shape = Shape { base, ..Shape::small() };
    cut_everywhere(&subject, &Plan::written(seed, shape, &steps(change)), &CUTS)
}

/// The bases are shorter than the disk, or longer.
fn cut_all(change: Step, bases: &[Base]) {
    for seed in few_seeds() {
        for &base in bases {
            let runs = cut(base, change, Tuning::default(), seed).unwrap_or_else(|failure| {
                panic!("{base:?}: {}", report(&LayerSubject::default(), &failure, "sim_online"))
            });
            assert!(runs > 100, "{base:?}: {runs} runs");
        }
    }
}

#[test]
fn a_commit_cut_anywhere_keeps_what_guests_write() {
    cut_all(Step::Commit, &[Base::Raw(100), Base::Layer(140)]);
}

#[test]
fn a_rebase_cut_anywhere_keeps_what_guests_write() {
    cut_all(Step::Rebase, &[Base::Raw(100)]);
}

#[test]
fn a_flatten_cut_anywhere_keeps_what_guests_write() {
    cut_all(Step::Flatten, &[Base::Layer(64)]);
}

/// A guest that writes here and there while that is merged.
fn busy(seed: u64, tuning: Tuning) -> Result<(), String> {
    let subject = LayerSubject { tuning, ..LayerSubject::default() };
    let mut rng = Rng::new(seed);
    let mut steps = vec![write(0, 1024), Step::Drain, Step::Commit];
    for _ in 0..200 {
        steps.extend([Step::Run { rounds: rng.between(1, 12) }, write(rng.below(128) * 8, 8)]);
    }
    let shape = Shape { sectors: 1024, sectors_max: 1024, base: Base::Raw(1100), ..Shape::small() };
    run(&subject, &Plan::written(seed, shape, &steps), None, false).result
}

#[test]
fn a_guest_that_writes_during_a_commit_wins() {
    for seed in 0..50 {
        busy(seed, Tuning::default()).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    let tuning = Tuning { mutation: Some(Mutation::ShedOverWriter), ..Tuning::default() };
    let noticed = (0..200).find_map(|seed| busy(seed, tuning).err()).expect("the rule is tested");
    println!("{noticed}");
}

#[test]
fn every_breach_of_the_order_is_noticed() {
    for mutation in [Mutation::ShedBeforeBaseSync, Mutation::UnmarkBeforeBaseSync] {
        let tuning = Tuning { mutation: Some(mutation), ..Tuning::default() };
        let noticed = (0..20).find_map(|seed| cut(Base::Raw(150), Step::Commit, tuning, seed).err());
        let noticed = noticed.unwrap_or_else(|| panic!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {}", noticed.message);
    }
}
