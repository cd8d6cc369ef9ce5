//! Damage by seed: thousands of changes to a small layer, each of which must end in a layer that
//! works or in an error that names the file; and every flipped bit, which must be noticed or lie in
//! space that nothing uses. In memory, with operations and memory counted.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use sapwood_blockdev::device::Command;
use sapwood_image::ImageError;
use sapwood_tests::damage::corrupt::{Image, base_of, newest};
use sapwood_tests::damage::format::{BLOCK, FIRST_SEGMENT, slot_at, slots};
use sapwood_tests::damage::lab::{Bench, check};
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::damage::meter::{Meter, metered};
use sapwood_tests::damage::mutate::mutate;
use sapwood_tests::damage::seal::Seal;
use sapwood_tests::damage::specimen::{self, Specimen};
use sapwood_tests::damage::walk;
use sapwood_tests::sim::rng::Rng;

#[global_allocator]
static METER: Meter = Meter;

/// What one layer of a few hundred KiB may take: memory in bytes, operations on files, time.
const MEMORY_MAX: usize = 160 << 20;
const OPERATIONS_MAX: u64 = 20_000;
const TIME_MAX: Duration = Duration::from_secs(20);
const SEEDS: u64 = 1_800;

fn store(image: &Image) -> MemoryStorage {
    let storage = MemoryStorage::new(OPERATIONS_MAX);
    storage.install(&specimen::path(), image);
    storage.install(Path::new("base"), &specimen::base());
    storage
}

/// Whether the error names what it is about: the layer, with the field when bytes are wrong.
fn is_clean(error: &ImageError) -> bool {
    error.path == specimen::path() && !error.to_string().contains('\n')
}

/// Opens, reads, checks, writes, cleans, closes. Says how it ended.
fn survive(image: &Image) -> &'static str {
    let (storage, path) = (store(image), specimen::path());
    let report = check(&storage, &path);
    report.as_ref().err().into_iter().for_each(|e| assert!(is_clean(e), "{e}"));
    let faultless = report.is_ok_and(|report| report.errors.is_empty());
    match Bench::open(&storage, &path, true) {
        Err(error) => {
            assert!(is_clean(&error), "{error}");
            assert!(!faultless, "check says nothing of {error}");
        }
        Ok(mut bench) => {
            let len = bench.size().min(specimen::SIZE) as usize;
            bench.read(0, len).ok();
            bench.extents(0..bench.size()).ok();
        }
    }
    let mut bench = match Bench::open(&storage, &path, false) {
        Ok(bench) => bench,
        Err(error) => {
            assert!(is_clean(&error), "{error}");
            return "refused";
        }
    };
    let size = bench.size();
    let mut written = Ok(());
    for i in 0..20 {
        let at = (i * 40_960 + (i % 2) * 512) % size.max(8192);
        written = written.and(bench.write(at, &[9; 4096]));
    }
    written = written.and(bench.command(0, 8192, Command::WriteZeroes));
    for _ in 0..3 {
        bench.clean().err().into_iter().for_each(|e| assert!(is_clean(&e), "{e}"));
    }
    let closed = bench.close();
    closed.as_ref().err().into_iter().for_each(|e| assert!(is_clean(e), "{e}"));
    if faultless && closed.is_ok() {
        assert_eq!(check(&storage, &path).unwrap().errors, [""; 0]);
    }
    if closed.is_ok() && written.is_ok() { "works" } else { "failed" }
}

#[test]
fn no_damage_by_seed_is_more_than_an_error() {
    let specimens = [specimen::written(), specimen::abandoned(), specimen::over_base(), specimen::empty()];
    let mut ends: std::collections::BTreeMap<(&str, bool), u32> = Default::default();
    for seed in 0..SEEDS {
        let mut rng = Rng::new(seed);
        let mut image = specimens[(seed % 4) as usize].bytes.clone();
        let seal = rng.pick(&[None, Some(Seal::CHECKSUMS), Some(Seal::ALL), Some(Seal::ALL)]);
        mutate(&mut image, &mut rng, seal);
        println!("seed {seed}");
        let start = Instant::now();
        let (end, peak) = metered(MEMORY_MAX, || survive(&image));
        assert!(peak < MEMORY_MAX && start.elapsed() < TIME_MAX, "{peak} bytes, {:?}", start.elapsed());
        *ends.entry((end, seal.is_some())).or_default() += 1;
    }
    println!("{ends:?}");
    assert!(ends[&("refused", true)] > 100 && ends[&("works", true)] > 100, "damage gets past checksums");
}

/// Bytes of a layer that something uses: the header, the slots, the base record,
/// records with live data, live nodes.
fn live_bytes(specimen: &Specimen) -> BTreeSet<usize> {
    let b = &specimen.bytes;
    let mut live: BTreeSet<usize> = (0..BLOCK).collect();
    [0, 1].iter().for_each(|&i| live.extend(slot_at(i)..slot_at(i) + 512));
    live.extend(base_of(b)..base_of(b) + BLOCK);
    let nodes = walk::nodes(b, newest(b));
    nodes.iter().for_each(|node| live.extend(node.at..node.at + node.len));
    let storage = store(b);
    let bench = Bench::open(&storage, &specimen::path(), true).unwrap();
    for extent in bench.extents(0..specimen::SIZE).unwrap() {
        if let Some(offset) = extent.offset.filter(|_| extent.depth == 0) {
            live.extend(offset as usize..(offset + extent.len) as usize);
        }
    }
    let is_live = |r: &&walk::RecordAt| {
        let mut data = r.at + BLOCK..r.at + (1 + r.data_blocks) * BLOCK;
        let of_nodes = nodes.iter().any(|node| data.contains(&node.at));
        !of_nodes && data.any(|byte| byte % BLOCK == 0 && live.contains(&byte))
    };
    let indexes: Vec<usize> = walk::records(b).iter().filter(is_live).map(|r| r.at).collect();
    indexes.into_iter().for_each(|at| live.extend(at..at + BLOCK));
    live
}

/// Whether a check of the layer, or an attempt to open it, notices.
fn is_noticed(image: &Image) -> bool {
    check(&store(image), &specimen::path()).map_or(true, |report| !report.errors.is_empty())
}

#[test]
fn every_flipped_bit_is_noticed_or_in_dead_space() {
    for specimen in [specimen::written(), specimen::over_base()] {
        let live = live_bytes(&specimen);
        let mut rng = Rng::new(5);
        let storage = store(&specimen.bytes);
        let whole = check(&storage, &specimen::path()).unwrap();
        assert_eq!((whole.errors.len(), whole.mapped_blocks), (0, whole.verified_blocks));
        let newest_slot = slots(&specimen.bytes)[0];
        let mut unnoticed = Vec::new();
        let chosen: Vec<usize> = live.iter().copied().filter(|_| rng.chance(60)).collect();
        for at in chosen {
            let mut image = specimen.bytes.clone();
            image[at] ^= 1 << rng.below(8);
            // The older slot takes over: nothing is lost, and the next checkpoint mends it.
            let is_spare = (newest_slot..newest_slot + 512).contains(&at);
            if !is_spare && !is_noticed(&image) {
                unnoticed.push(at);
            }
        }
        assert!(unnoticed.is_empty(), "{unnoticed:#x?}");
        for _ in 0..300 {
            let at = rng.below(specimen.bytes.len() as u64) as usize;
            let mut image = specimen.bytes.clone();
            image[at] ^= 1 << rng.below(8);
            if live.contains(&at) || at / BLOCK >= FIRST_SEGMENT && is_noticed(&image) {
                continue;
            }
            let storage = store(&image);
            let mut bench = Bench::open(&storage, &specimen::path(), true).unwrap();
            assert!(bench.read(0, specimen.disk.len()).unwrap() == specimen.disk, "dead space: {at:#x}");
        }
    }
}
