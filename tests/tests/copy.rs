//! Copying and comparing disks.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use sapwood_blockdev::io::Io;
use sapwood_image::compare::compare;
use sapwood_image::convert::{Target, copy};
use sapwood_image::{Format, ImageError, OpenDisk, Side};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::world::{Config, World};

const SIZE: usize = 20 << 20;

fn world() -> World {
    World::new(Config::blocking(3))
}

fn side(world: &World, path: &str, read_only: bool) -> Result<Side<SimEngine>, ImageError> {
    let process = world.process();
    let options = OpenDisk { format: Some(Format::Raw), read_only, ..OpenDisk::default() };
    Side::open(&world.storage(process), Io::new(world.engine(process)), Path::new(path), options)
}

/// A disk with runs of data, of zeroes, and of both in one block.
fn content(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let len = (512 * rng.between(1, 3000) as usize).min(SIZE - at);
        if rng.percent(50) {
            rng.fill(&mut bytes[at..at + len]);
        }
        at += len;
    }
    bytes
}

fn copied(before: &[u8], target: Target) -> (World, Vec<u8>) {
    let world = world();
    let source = content(1);
    world.install(Path::new("/source"), &source);
    world.install(Path::new("/target"), before);
    let (mut from, mut to) =
        (side(&world, "/source", true).unwrap(), side(&world, "/target", false).unwrap());
    let mut last = 0;
    copy(&mut from, &mut to, target, &mut |done| {
        assert!(done > last, "progress");
        last = done;
    })
    .unwrap();
    assert_eq!(last, before.len() as u64);
    from.close().unwrap();
    to.close().unwrap();
    assert!(world.contents(Path::new("/source")).unwrap() == source, "the source is untouched");
    (world, source)
}

#[test]
fn a_copy_reads_as_the_source_and_stores_no_zeroes() {
    let (world, source) = copied(&vec![0; SIZE], Target::Zero);
    assert!(world.contents(Path::new("/target")).unwrap() == source);
}

#[test]
fn a_used_target_is_overwritten_to_its_end() {
    let (world, source) = copied(&vec![9; SIZE + (1 << 20)], Target::Used);
    let target = world.contents(Path::new("/target")).unwrap();
    assert!(target[..SIZE] == source);
    assert!(target[SIZE..].iter().all(|byte| *byte == 0), "zeroes past the end of the source");
}

#[test]
fn a_small_target_is_refused_and_untouched() {
    let world = world();
    world.install(Path::new("/source"), &[1; 8192]);
    world.install(Path::new("/target"), &[2; 4096]);
    let (mut from, mut to) =
        (side(&world, "/source", true).unwrap(), side(&world, "/target", false).unwrap());
    assert!(copy(&mut from, &mut to, Target::Used, &mut |_| ()).is_err());
    assert_eq!(world.contents(Path::new("/target")).unwrap(), [2; 4096]);
}

#[test]
fn a_failed_read_or_write_is_reported() {
    for faults in [
        Faults { read_error: 1000, ..Faults::default() },
        Faults { write_error: 1000, ..Faults::default() },
        Faults { sync_error: 10_000, ..Faults::default() },
    ] {
        let world = world();
        world.install(Path::new("/source"), &content(2));
        world.install(Path::new("/target"), &vec![0; SIZE]);
        let (mut from, mut to) =
            (side(&world, "/source", true).unwrap(), side(&world, "/target", false).unwrap());
        world.set_faults(faults);
        assert!(copy(&mut from, &mut to, Target::Zero, &mut |_| ()).is_err());
    }
}

#[test]
fn comparison_finds_the_first_difference() {
    let same = content(4);
    let mut other = same.clone();
    for (change, expected) in [(None, None), (Some(SIZE - 1), Some(SIZE - 1)), (Some(12345), Some(12345))] {
        if let Some(at) = change {
            other[at] ^= 1;
        }
        let world = world();
        world.install(Path::new("/a"), &same);
        world.install(Path::new("/b"), &other);
        let found = compared(&world);
        assert_eq!(found, expected.map(|at| at as u64));
    }
}

#[test]
fn a_shorter_disk_ends_in_zeroes() {
    let world = world();
    world.install(Path::new("/a"), &[7; 4096]);
    let mut longer = [7; 4096].to_vec();
    longer.resize(3 << 20, 0);
    world.install(Path::new("/b"), &longer);
    assert_eq!(compared(&world), None);
    longer[(2 << 20) + 5] = 1;
    world.install(Path::new("/b"), &longer);
    assert_eq!(compared(&world), Some((2 << 20) + 5));
}

fn compared(world: &World) -> Option<u64> {
    let (mut a, mut b) = (side(world, "/a", true).unwrap(), side(world, "/b", true).unwrap());
    let ab = compare(&mut a, &mut b, &mut |_| ()).unwrap();
    assert_eq!(compare(&mut b, &mut a, &mut |_| ()).unwrap(), ab, "in either order");
    ab
}
