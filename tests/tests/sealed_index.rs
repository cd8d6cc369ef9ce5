//! The exact index of sealed contents: runs that are written, asked, merged, exchanged and damaged.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use sapwood_blockdev::engine::Op;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_BYTES;
use sapwood_image::sealed::index::{
    CANDIDATES_MAX, Index, LOOK_UP_PAGES_MAX, MERGED_MAX, RUN_ENTRIES_MAX, Run, WrittenRun, merge, run_name,
    write_run,
};
use sapwood_image::sealed::{Entry, Hash, Place};
use sapwood_image::{ErrorKind, ImageError};
use sapwood_tests::counting::Counters;
use sapwood_tests::damage::lab::{HostLab, Lab, wait};
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::damage::meter::{Meter, metered};
use sapwood_tests::damage::seal::checksum;
use sapwood_tests::sealed::{CountingLab, SimLab};
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::world::{Config, World};

#[global_allocator]
static METER: Meter = Meter;

/// Entries in a page.
const PAGE: usize = 255;

fn hash(rng: &mut Rng) -> Hash {
    let mut bytes = [0; 32];
    rng.fill(&mut bytes);
    Hash(bytes)
}

fn place(pack: u32, n: u64) -> Place {
    Place::new(pack, 4096 + n % 8_000_000 * 32, 700, (n % 32) as usize)
}

/// Entries of some packs, by seed.
fn entries(seed: u64, count: usize, packs: std::ops::Range<u32>) -> Vec<Entry> {
    let mut rng = Rng::new(seed);
    let span = u64::from(packs.end - packs.start);
    (0..count as u64)
        .map(|n| Entry { hash: hash(&mut rng), place: place(packs.start + rng.below(span) as u32, n) })
        .collect()
}

fn write<L: Lab>(lab: &L, directory: &Path, number: u32, entries: &[Entry]) -> WrittenRun {
    let (directory, entries) = (directory.to_owned(), entries.to_vec());
    wait(lab, async move |storage, io| write_run(&storage, &io, &directory, number, entries).await).unwrap()
}

type RunOf<L> = Run<<<L as Lab>::Engine as sapwood_blockdev::engine::Engine>::File>;

fn open<L: Lab>(lab: &L, directory: &Path, number: u32) -> Result<Arc<RunOf<L>>, ImageError> {
    let directory = directory.to_owned();
    wait(lab, async move |storage, io| Run::open(&storage, &io, &directory, number).await).map(Arc::new)
}

fn merged<L: Lab>(
    lab: &L,
    directory: &Path,
    number: u32,
    runs: &[Arc<RunOf<L>>],
    lives: impl Fn(u32) -> bool + 'static,
) -> Result<WrittenRun, ImageError> {
    let (directory, runs) = (directory.to_owned(), runs.to_vec());
    wait(lab, async move |storage, io| merge(&storage, &io, &directory, number, &runs, lives).await)
}

fn look_up<L: Lab>(lab: &L, index: &Arc<Index<L::Engine>>, hash: Hash) -> Result<Vec<Place>, ImageError> {
    let index = Arc::clone(index);
    wait(lab, async move |_, io| index.look_up(&io, &hash).await)
}

fn sim() -> SimLab {
    SimLab::new(&World::new(Config::blocking(5)))
}

#[test]
fn a_look_up_reads_one_page_of_a_run() {
    let lab = CountingLab { lab: sim(), counters: Arc::new(Counters::default()) };
    let directory = Path::new("/");
    let all = entries(1, 40_000, 1..9);
    let written = write(&lab, directory, 1, &all);
    assert_eq!((written.number, written.entries), (1, 40_000));
    let index = Arc::new(Index::new(0));
    index.replace([open(&lab, directory, 1).unwrap()]);
    assert_eq!((index.runs()[0].entries(), index.runs()[0].packs()), (40_000, (1, 8)));

    let before = lab.counters.now().reads;
    let (mut rng, mut most) = (Rng::new(2), 0);
    let asked = 2000;
    for _ in 0..asked {
        let entry = all[rng.below(40_000) as usize];
        let reads = lab.counters.now().reads;
        assert_eq!(look_up(&lab, &index, entry.hash).unwrap(), [entry.place]);
        most = most.max(lab.counters.now().reads - reads);
    }
    let reads = lab.counters.now().reads - before;
    assert!(most <= 2, "{most} reads for one");
    assert!(reads <= asked + asked / 50 && reads > asked / 2, "{reads} reads for {asked}");
    for _ in 0..200 {
        let reads = lab.counters.now().reads;
        assert_eq!(look_up(&lab, &index, hash(&mut rng)).unwrap(), []);
        assert!(lab.counters.now().reads - reads <= 1, "absent");
    }
    // What is asked for again is kept: not always the first time, since the cache is full.
    let reads = lab.counters.now().reads;
    (0..20).for_each(|_| assert_eq!(look_up(&lab, &index, all[0].hash).unwrap(), [all[0].place]));
    assert!(lab.counters.now().reads - reads <= 4);
}

#[test]
fn an_absent_hash_costs_one_page_of_each_run() {
    let lab = CountingLab { lab: sim(), counters: Arc::new(Counters::default()) };
    let index = Arc::new(Index::new(0));
    let runs = (1..=14).map(|number| {
        write(&lab, Path::new("/"), number, &entries(u64::from(number), 3000, number..number + 1));
        open(&lab, Path::new("/"), number).unwrap()
    });
    index.replace(runs.collect::<Vec<_>>());
    let numbers: Vec<u32> = index.runs().iter().map(|run| run.number()).collect();
    assert_eq!(numbers, (1..=14).rev().collect::<Vec<_>>(), "the newest first");
    let (mut rng, before) = (Rng::new(99), lab.counters.now().reads);
    for _ in 0..200 {
        look_up(&lab, &index, hash(&mut rng)).unwrap();
    }
    let reads = lab.counters.now().reads - before;
    // Some of the 168 pages are among the 32 that are kept.
    assert!((200 * 9..=200 * 14).contains(&reads), "{reads} reads for 200 absent hashes in 14 runs");
}

#[test]
fn equal_prefixes_are_all_candidates_within_a_bound() {
    let lab = sim();
    let mut all = entries(3, 2000, 1..3);
    let same = all[1000].hash;
    let one = |n: u32| Entry { hash: same, place: place(100 + n, u64::from(n)) };
    for count in [3, 700] {
        all.extend((0..count).map(one));
        write(&lab, Path::new("/"), count, &all);
        let index = Arc::new(Index::default());
        index.replace([open(&lab, Path::new("/"), count).unwrap()]);
        let found = look_up(&lab, &index, same).unwrap();
        assert_eq!(found.len(), CANDIDATES_MAX.min(count as usize + 1));
        assert_eq!(found[0].pack(), 100 + count - 1, "the newest pack first");
        assert!(found.is_sorted_by_key(|place| std::cmp::Reverse(place.to_bits())));
        // Its neighbours are not hidden by it.
        for entry in &all[990..1010] {
            assert!(look_up(&lab, &index, entry.hash).unwrap().contains(&entry.place) || entry.hash == same);
        }
    }
}

#[test]
fn places_in_packs_that_are_gone_hide_nothing() {
    let lab = CountingLab { lab: sim(), counters: Arc::new(Counters::default()) };
    let mut all = entries(3, 2000, 1..3);
    let same = all[1000].hash;
    // The good one is the oldest of many.
    all.extend((0..3000).map(|n| Entry { hash: same, place: place(100 + n, u64::from(n)) }));
    write(&lab, Path::new("/"), 1, &all);
    let (index, run) = (Arc::new(Index::new(0)), open(&lab, Path::new("/"), 1).unwrap());
    index.publish([Arc::clone(&run)], 1..3100, &[]);
    let reads = lab.counters.now().reads;
    let found = look_up(&lab, &index, same).unwrap();
    assert_eq!((found.len(), found[0].pack()), (CANDIDATES_MAX, 3099));
    assert!(lab.counters.now().reads - reads <= 2, "no more is read than is needed");
    index.publish([Arc::clone(&run)], [], &(101..3100).collect::<Vec<_>>());
    assert_eq!(look_up(&lab, &index, same).unwrap(), [place(100, 0), all[1000].place]);
    index.publish([Arc::clone(&run)], [], &[100]);
    assert_eq!(look_up(&lab, &index, same).unwrap(), [all[1000].place]);
    index.publish([Arc::clone(&run)], [], &[1, 2]);
    let reads = lab.counters.now().reads;
    assert_eq!(look_up(&lab, &index, same).unwrap(), []);
    assert!(lab.counters.now().reads - reads <= LOOK_UP_PAGES_MAX as u64);

    // More of them than the bound of pages.
    all.extend((0..9000).map(|n| Entry { hash: same, place: place(10_000 + n, u64::from(n)) }));
    write(&lab, Path::new("/"), 2, &all);
    let run = open(&lab, Path::new("/"), 2).unwrap();
    index.publish([Arc::clone(&run)], 1..3, &[]);
    let reads = lab.counters.now().reads;
    assert_eq!(look_up(&lab, &index, same).unwrap(), [], "it is given up");
    assert!(lab.counters.now().reads - reads <= LOOK_UP_PAGES_MAX as u64);
    // What was published with other runs stays known.
    index.replace([run]);
    assert_eq!(look_up(&lab, &index, all[5].hash).unwrap(), [all[5].place]);
}

#[test]
fn merging_keeps_what_lives() {
    let (lab, directory) = (sim(), Path::new("/"));
    let lists: Vec<_> = (0..5u32)
        .map(|n| {
            let mut list = entries(u64::from(n), 500 + 700 * n as usize, 10 * n + 1..10 * n + 9);
            // Some are in two runs.
            list.extend(entries(u64::from(n.saturating_sub(1)), 100, 10 * n + 1..10 * n + 9));
            list.extend(entries(77, 300, 70..71));
            list
        })
        .collect();
    let runs: Vec<_> = (1..)
        .zip(&lists)
        .map(|(number, list)| {
            write(&lab, directory, number, list);
            open(&lab, directory, number).unwrap()
        })
        .collect();
    let lives = |pack: u32| !pack.is_multiple_of(3);
    let written = merged(&lab, directory, 9, &runs, lives).unwrap();
    let wanted: BTreeSet<(u64, u64)> = lists
        .iter()
        .flatten()
        .filter(|entry| lives(entry.place.pack()))
        .map(|entry| (entry.hash.prefix(), entry.place.to_bits()))
        .collect();
    assert_eq!(written.entries, wanted.len() as u64, "each once");
    let (old, new) = (Arc::new(Index::default()), Arc::new(Index::default()));
    old.replace(runs);
    new.replace([open(&lab, directory, 9).unwrap()]);
    let mut places: BTreeMap<u64, usize> = BTreeMap::new();
    wanted.iter().for_each(|(prefix, _)| *places.entry(*prefix).or_default() += 1);
    for entry in lists.iter().flatten() {
        let found = look_up(&lab, &new, entry.hash).unwrap();
        assert_eq!(found.contains(&entry.place), lives(entry.place.pack()));
        assert_eq!(found.len(), places.get(&entry.hash.prefix()).copied().unwrap_or(0));
        assert!(look_up(&lab, &old, entry.hash).unwrap().contains(&entry.place));
    }
    // Of nothing comes a run that says nothing.
    let none = merged(&lab, directory, 10, &[], |_| true).unwrap();
    assert_eq!((none.entries, none.bytes), (0, 2 * BLOCK_BYTES as u64));
    new.replace([open(&lab, directory, 10).unwrap()]);
    assert_eq!(look_up(&lab, &new, lists[0][0].hash).unwrap(), []);
}

#[test]
fn memory_is_bounded_while_runs_are_made() {
    let folder = tempfile::tempdir().unwrap();
    let runs: Vec<_> = (0..8u32)
        .map(|n| {
            write(&HostLab, folder.path(), n + 1, &entries(u64::from(n), 150_000, n + 1..n + 2));
            open(&HostLab, folder.path(), n + 1).unwrap()
        })
        .collect();
    let (written, taken) = metered(12 << 20, || merged(&HostLab, folder.path(), 9, &runs, |_| true).unwrap());
    assert_eq!(written.entries, 8 * 150_000);
    assert!(written.bytes > 18 << 20, "more than what is allowed: {} bytes, {taken} taken", written.bytes);

    let too_many: Vec<_> = (0..=MERGED_MAX).map(|_| Arc::clone(&runs[0])).collect();
    let error = merged(&HostLab, folder.path(), 10, &too_many, |_| true).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Invalid(_)), "{error}");
    let (at, entry) = (folder.path().to_owned(), Entry { hash: Hash([1; 32]), place: place(1, 1) });
    let error = wait(&HostLab, async move |storage, io| {
        write_run(&storage, &io, &at, 11, std::iter::repeat_n(entry, RUN_ENTRIES_MAX + 1)).await
    });
    assert!(matches!(error.unwrap_err().kind, ErrorKind::Invalid(_)));
    let names = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(names.count(), 9, "no unfinished file is left");
}

#[test]
fn runs_are_exchanged_while_others_look_up() {
    let folder = tempfile::tempdir().unwrap();
    let all = entries(8, 20_000, 1..9);
    let runs: Vec<_> = (0..4)
        .map(|n| {
            write(&HostLab, folder.path(), n + 1, &all[n as usize * 5000..][..5000]);
            open(&HostLab, folder.path(), n + 1).unwrap()
        })
        .collect();
    merged(&HostLab, folder.path(), 9, &runs, |_| true).unwrap();
    let merged = open(&HostLab, folder.path(), 9).unwrap();
    let index = Arc::new(Index::new(0));
    index.replace(runs.clone());
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rng = Rng::new(1);
            for _ in 0..3000 {
                let entry = all[rng.below(20_000) as usize];
                assert_eq!(look_up(&HostLab, &index, entry.hash).unwrap(), [entry.place]);
            }
            ends.store(true, Ordering::Relaxed);
        });
        while !ends.load(Ordering::Relaxed) && !reader.is_finished() {
            index.replace([Arc::clone(&merged)]);
            index.replace(runs.clone());
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_run_is_whole_or_not_there_after_a_power_cut() {
    let all = entries(6, 3000, 1..4);
    for cut in 0..60 {
        let world = World::new(Config::blocking(cut));
        let lab = SimLab::new(&world);
        let (list, at) = (all.clone(), PathBuf::from("/"));
        let syncs = cut % 2 == 0;
        wait(&lab, async move |storage, io: Io<_>| {
            write_run(&storage, &io, &at, 1, list).await.unwrap();
            if syncs {
                io.run(Op::SyncDirectory { path: at }).await.result.unwrap();
            }
        });
        world.power_cut(Persistence::Sectors(cut as u32 % 101));
        let lab = SimLab::new(&world);
        match open(&lab, Path::new("/"), 1) {
            Ok(run) => {
                assert_eq!(run.entries(), 3000);
                let index = Arc::new(Index::default());
                index.replace([run]);
                assert_eq!(look_up(&lab, &index, all[5].hash).unwrap(), [all[5].place]);
            }
            Err(error) => assert!(!syncs, "{error}"),
        }
    }
}

/// A run in memory.
fn bytes_of(entries: &[Entry]) -> Vec<u8> {
    let world = World::new(Config::blocking(1));
    write(&SimLab::new(&world), Path::new("/"), 1, entries);
    world.contents(&Path::new("/").join(run_name(1))).unwrap()
}

fn in_memory(bytes: &[u8]) -> MemoryStorage {
    let storage = MemoryStorage::new(5000);
    storage.install(&Path::new("/").join(run_name(1)), bytes);
    storage
}

#[test]
fn a_damaged_page_is_an_error_that_says_where() {
    let all = entries(4, 5000, 1..4);
    let mut sorted = all.clone();
    sorted.sort_by_key(|entry| entry.hash.prefix());
    let whole = bytes_of(&all);
    for page in [0, 7, 19] {
        let mut bad = whole.clone();
        bad[(page + 1) * BLOCK_BYTES + 2000] ^= 4;
        let storage = in_memory(&bad);
        let index = Arc::new(Index::default());
        index.replace([open(&storage, Path::new("/"), 1).unwrap()]);
        let error = look_up(&storage, &index, sorted[page * PAGE + 100].hash).unwrap_err();
        assert_eq!(error.path, Path::new("/").join(run_name(1)));
        let at = (page as u64 + 1) * BLOCK_BYTES as u64;
        assert!(matches!(error.kind, ErrorKind::Corrupt { offset, .. } if offset == at), "{error}");
        look_up(&storage, &index, sorted[(page + 3) % 19 * PAGE + 100].hash).unwrap();
        let runs = index.runs();
        let error = merged(&storage, Path::new("/"), 2, &runs, |_| true).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Corrupt { offset, .. } if offset == at), "{error}");
    }
}

/// Makes the checksum of a block right again: of the header and trailer, or of a page.
fn seal(run: &mut [u8], block: usize) {
    let blocks = run.len() / BLOCK_BYTES;
    let id: [u8; 16] = run[24..40].try_into().unwrap();
    let bytes = &mut run[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES];
    if block == 0 || block + 1 == blocks {
        let sum = checksum(&bytes[..BLOCK_BYTES - 4]);
        bytes[BLOCK_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
    } else {
        let number = (block as u32 - 1).to_le_bytes();
        let sum = checksum(&[&id[..], &number, &bytes[4..]].concat());
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
    }
}

#[test]
fn the_checksums_are_those_of_the_document() {
    let whole = bytes_of(&entries(4, 600, 1..4));
    let mut again = whole.clone();
    (0..whole.len() / BLOCK_BYTES).for_each(|block| seal(&mut again, block));
    assert!(again == whole);
}

#[test]
fn no_bytes_of_a_run_do_harm() {
    let all = entries(4, 2500, 1..4);
    let whole = bytes_of(&all);
    let (mut refused, mut noticed, mut unnoticed) = (0, 0, 0);
    for seed in 0..500 {
        let mut rng = Rng::new(seed);
        let mut bad = whole.clone();
        let is_sealed = seed % 2 == 0;
        for _ in 0..rng.between(1, 3) {
            let block = rng.below(bad.len() as u64 / BLOCK_BYTES as u64) as usize;
            // Heads of pages and fields of the header and trailer are at their starts.
            let within = if rng.percent(70) { rng.below(72) } else { rng.below(BLOCK_BYTES as u64) } as usize;
            let at = block * BLOCK_BYTES + within;
            match rng.below(3) {
                0 => bad[at] ^= 1 << rng.below(8),
                1 => bad[at] = rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
                _ => {
                    let end = bad.len().min(at + 8);
                    rng.fill(&mut bad[at..end]);
                }
            }
            if is_sealed {
                seal(&mut bad, block);
            }
        }
        if rng.percent(10) {
            let len = rng.below(bad.len() as u64 + 10_000) as usize;
            bad.resize(len, 0);
        }
        metered(4 << 20, || {
            let storage = in_memory(&bad);
            let run = match open(&storage, Path::new("/"), 1) {
                Ok(run) => run,
                Err(error) => {
                    assert!(error.path == Path::new("/").join(run_name(1)), "{error}");
                    refused += 1;
                    return;
                }
            };
            let index = Arc::new(Index::new(0));
            index.replace([Arc::clone(&run)]);
            let mut errors = 0;
            for entry in all.iter().step_by(50) {
                match look_up(&storage, &index, entry.hash) {
                    Ok(found) => assert!(is_sealed || found == [entry.place], "never less than was there"),
                    Err(error) => {
                        assert!(matches!(error.kind, ErrorKind::Corrupt { .. }), "{error}");
                        errors += 1;
                    }
                }
            }
            // It cannot be finished, since files in memory have no names that change: but it reads all.
            assert!(merged(&storage, Path::new("/"), 2, &[run], |_| true).is_err());
            if errors > 0 { noticed += 1 } else { unnoticed += 1 }
        });
    }
    assert!(refused > 100 && noticed > 50 && unnoticed > 10, "{refused} {noticed} {unnoticed}");
}
