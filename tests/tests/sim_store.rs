//! Stores in the simulated world: random histories against a model, and the same cut off anywhere.

use std::panic::{AssertUnwindSafe, catch_unwind};

use sapwood_blockdev::Errno;
use sapwood_store::{Mutation, StoreOptions};
use sapwood_tests::sim::explore::seeds;
use sapwood_tests::sim::faults::{Faults, Kind, Planned};
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::store::history::{cut, cut_init, killed_writer, undisturbed};
use sapwood_tests::sim::store::rig::Rig;
use sapwood_tests::sim::store::setup::Course;
use sapwood_tests::sim::store::together::Past;
use sapwood_tests::sim::world::{Config, World};

/// Seeds within which a breach must be noticed.
const SEEDS_MAX: u64 = 3000;

/// Histories of so many steps without any failure.
fn undisturbed_all(course: Course, seeds: impl IntoIterator<Item = u64>, steps: u64) -> Vec<Past> {
    let one = |seed| undisturbed(course, seed, steps, &StoreOptions::default());
    seeds.into_iter().map(|seed| one(seed).unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Histories that are cut off now and then.
fn cut_all(course: Course, seeds: impl IntoIterator<Item = u64>) {
    for seed in seeds {
        cut(course, seed, &StoreOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn random_histories_hold_what_the_model_says() {
    undisturbed_all(Course::Small, seeds(150), 50);
}

#[test]
fn random_histories_cut_anywhere_lose_nothing_that_was_reported() {
    // A commit that failed was taken for one that was not made, and the layer that it named was removed.
    let found = [1236];
    cut_all(Course::Small, found.into_iter().chain(seeds(600)));
}

#[test]
fn large_disks_and_archives_hold_what_the_model_says() {
    undisturbed_all(Course::Large, seeds(60), 40);
}

#[test]
fn large_disks_and_archives_cut_anywhere_lose_nothing_that_was_reported() {
    cut_all(Course::Large, seeds(400));
}

#[test]
fn several_things_at_a_time_are_as_in_some_order() {
    let (mut at_a_time, mut refused) = (0, 0);
    // A new layer was opened over one of which something was still read ahead.
    let found = [287];
    for past in undisturbed_all(Course::Together, found.into_iter().chain(seeds(100)), 30) {
        (at_a_time, refused) = (at_a_time + past.at_a_time, refused + past.refused);
    }
    // It is one in 24.
    assert!(refused * 12 < at_a_time, "{refused} of {at_a_time} were refused");
}

#[test]
fn a_seed_replays_with_several_things_at_a_time() {
    for seed in 0..20 {
        let past = || undisturbed(Course::Together, seed, 20, &StoreOptions::default());
        let past = || past().unwrap_or_else(|error| panic!("{error}"));
        assert!(past() == past(), "seed {seed} took two ways");
    }
}

#[test]
fn several_things_at_a_time_cut_anywhere_lose_nothing_that_was_reported() {
    cut_all(Course::Together, seeds(300));
}

#[test]
fn a_snapshot_of_what_a_killed_writer_left_is_durable() {
    for seed in seeds(200) {
        killed_writer(seed, &StoreOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Cuts the making of a store at every event. How many of them were cut before it was made.
fn cut_every_init(options: &StoreOptions) -> Result<u64, String> {
    let mut cuts = 0;
    let ends =
        [None, Some(Persistence::Sectors(0)), Some(Persistence::Sectors(50)), Some(Persistence::Suffix)];
    for (seed, end) in (0..4).flat_map(|seed| ends.map(|end| (seed, end))) {
        for event in 1.. {
            if cut_init(seed, event, end, options)? {
                break;
            }
            cuts += 1;
        }
    }
    Ok(cuts)
}

#[test]
fn a_store_whose_making_was_cut_is_made_again() {
    let cuts = cut_every_init(&StoreOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    assert!(cuts > 100, "{cuts} cuts");
}

#[test]
fn every_breach_of_the_order_is_noticed() {
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let options = StoreOptions { mutation: Some(mutation), ..StoreOptions::default() };
        let noticed = match mutation {
            Mutation::RenameWithoutDirectorySync => cut_every_init(&options).err(),
            Mutation::SnapshotWithoutSync => {
                (0..SEEDS_MAX).find_map(|seed| killed_writer(seed, &options).err())
            }
            Mutation::CollectWithoutPins | Mutation::UnlinkWhileRead => {
                (0..SEEDS_MAX).find_map(|seed| undisturbed(Course::Together, seed, 30, &options).err())
            }
            _ => (0..SEEDS_MAX).find_map(|seed| {
                let ended = catch_unwind(AssertUnwindSafe(|| cut(Course::Small, seed, &options)));
                ended.unwrap_or_else(|_| Err(format!("seed {seed}: it panicked"))).err()
            }),
        };
        match noticed.as_deref().and_then(|text| text.lines().next()) {
            Some(text) => println!("{mutation:?}: {text}"),
            None => missed.push(mutation),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn after_a_commit_that_failed_nothing_is_read_from_the_catalog_before_it_is_opened_again() {
    for seed in 0..40 {
        let world = World::new(Config::blocking(seed));
        let mut rig = Rig::new(&world, &StoreOptions::default().into());
        rig.init().unwrap();
        rig.open().unwrap();
        rig.store().create("before", 1 << 20).unwrap();
        // The last sync of a commit is the one after which nobody knows; any of them will do.
        let planned = vec![Planned { kind: Kind::Sync, skip: (seed % 2) as u32, errno: Errno::IO }];
        world.set_faults(Faults { planned, ..Faults::default() });
        rig.store().create("maybe", 1 << 20).expect_err("a sync fails");
        world.set_faults(Faults::default());
        let error = rig.store().list().expect_err("what is in memory may not be what is stored");
        assert_eq!(error.kind.name(), "io");
        rig.store().create("after", 1 << 20).expect_err("nor is it changed");
        rig.open().unwrap();
        let names: Vec<String> = rig.store().list().unwrap().into_iter().map(|listed| listed.name).collect();
        assert!(names == ["before"] || names == ["before", "maybe"], "seed {seed}: {names:?}");
    }
}
