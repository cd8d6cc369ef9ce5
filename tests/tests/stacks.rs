//! Deep stacks of layers: what they read as, and that it costs no more than a shallow one.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::device::{Command, DeviceError};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::layer::Tuning;
use sapwood_image::{ErrorKind, ExtentKind};
use sapwood_tests::counting::{Counters, CountingEngine};
use sapwood_tests::damage::lab::{Bench, HostLab, Lab, check};
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::stack::{Made, Maker, Stack};

const BLOCK: usize = 4096;
const SEGMENT: u32 = 64 << 10;

/// The host's files behind an engine that counts.
#[derive(Clone, Default)]
struct CountingLab(Arc<Counters>);

impl Lab for CountingLab {
    type Storage = HostStorage;
    type Engine = CountingEngine<BlockingEngine>;

    fn storage(&self) -> HostStorage {
        HostStorage
    }

    fn engine(&self) -> Self::Engine {
        CountingEngine::new(HostLab.engine(), Arc::clone(&self.0))
    }
}

/// Descriptors of this process for files in `folder`.
fn descriptors(folder: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|file| file.starts_with(folder))).count()
}

/// The disk of a layer over a disk.
fn over(below: &[u8], made: &Made) -> Vec<u8> {
    let mut disk = vec![0; made.size as usize];
    let shared = disk.len().min(below.len());
    disk[..shared].copy_from_slice(&below[..shared]);
    for (block, bytes) in &made.own {
        let start = (*block as usize * BLOCK).min(disk.len());
        let end = (start + BLOCK).min(disk.len());
        disk[start..end].copy_from_slice(&bytes[..end - start]);
    }
    disk
}

/// A layer with a random history of whole blocks and sizes.
fn random_layer(rng: &mut Rng, number: usize) -> Made {
    const BLOCKS: u64 = 1200;
    let size = |rng: &mut Rng| rng.between(BLOCKS - 300, BLOCKS) * BLOCK as u64 - 512 * rng.below(9);
    let mut maker = Maker::new(number, size(rng), SEGMENT);
    for _ in 0..rng.below(40) {
        let block = rng.below(maker.size / BLOCK as u64 - 16);
        let count = rng.between(1, 16);
        match rng.below(20) {
            0..=8 => {
                let mut fill = vec![0; count as usize];
                rng.fill(&mut fill);
                maker.write(block, &fill);
            }
            9 => maker.write(block, &[7]),
            10..=12 => maker.zero(block, count, Command::WriteZeroes),
            13..=15 => maker.zero(block, count, Command::Discard),
            16 => maker.zero(0, maker.size / BLOCK as u64, Command::Discard),
            17 => maker.checkpoint(),
            _ => {
                let size = size(rng);
                maker.resize(size);
            }
        }
    }
    maker.end(rng.percent(70))
}

/// Compares all of a disk, and random parts of it, and what its map says.
fn verify(bench: &mut Bench<CountingLab>, disk: &[u8], rng: &mut Rng, what: &str) {
    assert_eq!(bench.size(), disk.len() as u64, "{what}");
    for start in (0..disk.len()).step_by(1 << 20) {
        let end = disk.len().min(start + (1 << 20));
        assert!(bench.read(start as u64, end - start).unwrap() == disk[start..end], "{what}: from {start}");
    }
    for _ in 0..50 {
        let start = rng.below(disk.len() as u64 / 512) as usize * 512;
        let end = disk.len().min(start + 512 * rng.between(1, 200) as usize);
        let read = bench.read(start as u64, end - start).unwrap();
        assert!(read == disk[start..end], "{what}: {start}..{end}");
    }
    let (mut at, mut files) = (0, BTreeMap::new());
    for extent in bench.extents(0..disk.len() as u64).unwrap() {
        assert_eq!(extent.start, at, "{what}");
        at += extent.len;
        let bytes = &disk[extent.start as usize..at as usize];
        match extent.kind {
            ExtentKind::Zero | ExtentKind::Absent => {
                assert!(bytes.iter().all(|byte| *byte == 0), "{what}: {extent:?}");
            }
            _ => {
                let (path, offset) = (extent.file.unwrap(), extent.offset.unwrap() as usize);
                let file: &mut Vec<u8> =
                    files.entry(path.clone()).or_insert_with(|| std::fs::read(&path).unwrap());
                let stored = &file[offset.min(file.len())..file.len().min(offset + bytes.len())];
                assert!(stored == &bytes[..stored.len()], "{what}: at {}", extent.start);
            }
        }
    }
    assert_eq!(at, disk.len() as u64, "{what}");
}

/// Random requests of any alignment to the topmost layer.
fn change(bench: &mut Bench<CountingLab>, disk: &mut [u8], rng: &mut Rng) {
    for _ in 0..30 {
        let start = rng.below(disk.len() as u64 / 512) as usize * 512;
        let end = disk.len().min(start + 512 * rng.between(1, 60) as usize);
        if rng.percent(70) {
            rng.fill(&mut disk[start..end]);
            bench.write(start as u64, &disk[start..end]).unwrap();
        } else {
            disk[start..end].fill(0);
            bench.command(start as u64, (end - start) as u64, Command::WriteZeroes).unwrap();
        }
    }
}

#[test]
fn a_stack_of_any_layers_reads_as_a_flat_disk() {
    // (memory for the index, files, memory for the map of the topmost layer)
    let bounds = [(64 << 20, 128, 64 << 20), (2000, 4, 0), (0, 3, 0), (0, 1, 1 << 20), (6000, 1, 0)];
    for seed in 0..10 {
        let mut rng = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let mut stack = Stack::new(folder.path());
        let mut disk = Vec::new();
        for _ in 0..rng.between(1, 24) {
            let made = random_layer(&mut rng, stack.depth);
            disk = over(&disk, &made);
            stack.push(made);
        }
        let top = stack.path(stack.depth - 1);
        let lab = CountingLab::default();
        for (index_bytes, files_max, map_cache_bytes) in bounds {
            let what = format!("seed {seed}, depth {}, {index_bytes} and {files_max}", stack.depth);
            let tuning = Tuning { index_bytes, files_max, map_cache_bytes, ..Tuning::default() };
            let mut bench = Bench::open_tuned(&lab, &top, false, tuning).unwrap();
            verify(&mut bench, &disk, &mut rng, &what);
            change(&mut bench, &mut disk, &mut rng);
            verify(&mut bench, &disk, &mut rng, &what);
            let info = bench.layer.info();
            assert_eq!(info.depth, stack.depth - 1, "{what}");
            assert!(info.index_bytes as u64 <= index_bytes, "{what}: {} bytes", info.index_bytes);
            // The topmost file itself is not below.
            let open = descriptors(folder.path());
            assert!(open <= files_max.max(1) + 1, "{what}: {open} descriptors");
            bench.close().unwrap();
            assert_eq!(descriptors(folder.path()), 0, "{what}");
        }
        let errors = check(&lab, &top).unwrap().errors;
        assert!(errors.is_empty(), "seed {seed}: {errors:?}");
    }
}

#[test]
fn a_smaller_image_cuts_what_lies_below_it() {
    for (index_bytes, seen) in [(64 << 20, 2560), (0, 2560), (64 << 20, 2048), (0, 0), (64 << 20, 512)] {
        let folder = tempfile::tempdir().unwrap();
        let mut stack = Stack::new(folder.path());
        let end = 10 * BLOCK + seen;
        for (size, fill) in [(14 * BLOCK, Some(5)), (end, None), (12 * BLOCK, None), (13 * BLOCK, None)] {
            let mut maker = Maker::new(stack.depth, size as u64, SEGMENT);
            fill.into_iter().for_each(|fill| maker.write(0, &[fill; 14]));
            stack.push(maker.end(true));
        }
        let tuning = Tuning { index_bytes, ..Tuning::default() };
        let mut bench = Bench::open_tuned(&CountingLab::default(), &stack.path(3), true, tuning).unwrap();
        let mut disk = vec![0; 13 * BLOCK];
        disk[..end].fill(5);
        verify(&mut bench, &disk, &mut Rng::new(1), &format!("{index_bytes}, {seen}"));
        let extents = bench.extents(0..disk.len() as u64).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.depth).collect::<Vec<_>>(), [3, 1, 0]);
    }
}

/// Blocks of the disk of a deep stack: 1 GiB.
const DEEP_BLOCKS: u64 = 1 << 18;

/// A stack over a raw image, its layers empty or with a few blocks each. What each block that a layer
/// holds is filled with.
fn deep(folder: &Path, depth: usize, blocks_each: u64) -> (Stack, BTreeMap<u64, u8>) {
    let mut rng = Rng::new(depth as u64);
    let mut stack = Stack::new(folder);
    let mut model = BTreeMap::new();
    // All of one layer's blocks are filled by the lowest, so that every request reads something.
    for number in 0..=depth {
        let mut maker = Maker::new(number, DEEP_BLOCKS * BLOCK as u64, 1 << 20);
        let all = if number == 0 { 64 } else { 0 };
        for i in 0..all {
            maker.write(i * 4096, &[1]);
            model.insert(i * 4096, 1);
        }
        for _ in 0..if number == 0 { 0 } else { blocks_each } {
            let (block, fill) = (rng.below(DEEP_BLOCKS), rng.between(2, 255) as u8);
            maker.write(block, &[fill]);
            model.insert(block, fill);
        }
        stack.push(maker.end(true));
    }
    (stack, model)
}

#[test]
fn a_read_costs_the_same_below_a_thousand_layers() {
    let mut rng = Rng::new(3);
    for blocks_each in [0, 3] {
        for depth in [1, 10, 100, 1000] {
            let folder = tempfile::tempdir().unwrap();
            let (stack, model) = deep(folder.path(), depth, blocks_each);
            let lab = CountingLab::default();
            let before = lab.0.now().reads;
            let mut bench = Bench::open(&lab, &stack.path(depth), true).unwrap();
            let opening = lab.0.now().reads - before;
            let what = format!("depth {depth}, {blocks_each} blocks each");
            // Header, root, usage nodes, branches, leaves; and the topmost layer a few more.
            assert!(opening <= 5 * (depth as u64 + 1) + 4, "{what}: {opening} reads to open");
            let info = bench.layer.info();
            assert!(info.index_bytes <= (depth + 64) * 3 * 16, "{what}: {} bytes", info.index_bytes);
            assert!(descriptors(folder.path()) <= 129, "{what}");

            let blocks: Vec<u64> = model.keys().copied().collect();
            // The map of the topmost layer is read as it is needed.
            for block in &blocks {
                bench.read(block * BLOCK as u64, BLOCK).unwrap();
            }
            let (mut reads, mut twice) = (0, 0);
            for _ in 0..500 {
                let block = rng.pick(&blocks);
                let before = lab.0.now().reads;
                let bytes = bench.read(block * BLOCK as u64, BLOCK).unwrap();
                let cost = lab.0.now().reads - before;
                assert!(bytes == vec![model[&block]; BLOCK], "{what}: block {block}");
                // A closed file is recognised by its first blocks.
                assert!(cost == 1 || cost == 2 && depth == 1000, "{what}: {cost} reads");
                (reads, twice) = (reads + cost, twice + u64::from(cost == 2));
                assert!(descriptors(folder.path()) <= 129, "{what}");
            }
            println!("{what}: {opening} reads to open, {reads} for 500 requests, {twice} files opened again");
            let before = lab.0.now().reads;
            let nothing = (0..DEEP_BLOCKS).filter(|block| !model.contains_key(block)).take(100);
            for block in nothing {
                assert!(bench.read(block * BLOCK as u64, BLOCK).unwrap() == vec![0; BLOCK], "{what}");
            }
            assert_eq!(lab.0.now().reads, before, "{what}: zeroes are known");
            bench.close().unwrap();
        }
    }
}

#[test]
fn a_file_that_changes_while_it_is_closed_is_noticed() {
    for (index_bytes, damage) in [(64 << 20, false), (0, false), (64 << 20, true), (0, true)] {
        let folder = tempfile::tempdir().unwrap();
        let mut stack = Stack::new(folder.path());
        for number in 0..4 {
            let mut maker = Maker::new(stack.depth, 1 << 20, SEGMENT);
            maker.write(number, &[number as u8 + 1]);
            stack.push(maker.end(true));
        }
        let lab = CountingLab::default();
        let tuning = Tuning { index_bytes, files_max: 1, ..Tuning::default() };
        let mut bench = Bench::open_tuned(&lab, &stack.path(3), true, tuning).unwrap();
        assert_eq!(bench.read(0, 4096).unwrap(), [1; 4096]);
        if damage {
            // Another layer in its place.
            let mut other = std::fs::read(stack.path(1)).unwrap();
            sapwood_tests::damage::corrupt::rename_layer(&mut other, [9; 16]);
            std::fs::write(stack.path(1), other).unwrap();
        } else {
            let mut writer = Bench::open(&lab, &stack.path(1), false).unwrap();
            writer.write(4096, &[77; 4096]).unwrap();
            writer.close().unwrap();
        }
        let refused = bench.read(4096, 4096);
        assert_eq!(refused, Err(DeviceError::Corrupt), "{index_bytes}, {damage}");
        // What the others hold is read on, where the changed one need not be asked.
        assert_eq!(bench.read(2 * 4096, 4096).unwrap(), [3; 4096]);
        assert_eq!(bench.read(0, 4096).is_ok(), index_bytes > 0);
    }
}

#[test]
fn open_files_are_locked_and_closed_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let mut stack = Stack::new(folder.path());
    for number in 0..12 {
        let mut maker = Maker::new(stack.depth, 1 << 20, SEGMENT);
        maker.write(number, &[1]);
        stack.push(maker.end(true));
    }
    let tuning = Tuning { files_max: 9, ..Tuning::default() };
    let bench = Bench::open_tuned(&HostLab, &stack.path(11), true, tuning).unwrap();
    let is_locked = |number: usize| match Bench::open(&HostLab, &stack.path(number), false) {
        Ok(_) => false,
        Err(error) => matches!(error.kind, ErrorKind::Locked { .. }),
    };
    // The pool keeps what lies above, and leaves room to open others.
    let locked: Vec<usize> = (0..12).filter(|number| is_locked(*number)).collect();
    assert_eq!(locked, [7, 8, 9, 10, 11]);
    drop(bench);
}

#[test]
fn a_damaged_leaf_harms_only_its_own_part() {
    use sapwood_tests::damage::corrupt;
    let folder = tempfile::tempdir().unwrap();
    let mut stack = Stack::new(folder.path());
    for number in 0..3 {
        let mut maker = Maker::new(stack.depth, 16 << 20, SEGMENT);
        maker.write(number, &[number as u8 + 1]);
        maker.write(1024 + number, &[number as u8 + 1]);
        stack.push(maker.end(true));
    }
    let mut image = std::fs::read(stack.path(1)).unwrap();
    corrupt::node_checksum(&mut image);
    std::fs::write(stack.path(1), image).unwrap();
    let mut bench = Bench::open(&CountingLab::default(), &stack.path(2), true).unwrap();
    let read = |bench: &mut Bench<CountingLab>, block: u64| bench.read(block * 4096, 4096);
    assert_eq!(read(&mut bench, 2).unwrap(), [3; 4096]);
    let (low, high) = (read(&mut bench, 0), read(&mut bench, 1024));
    assert!(low.is_err() != high.is_err());
}
