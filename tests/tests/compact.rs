//! A layer filled at random is laid in the order of the disk: what reading it costs then, what space that takes
//! meanwhile and afterwards, guests beside it, and damage that must not be hidden. Reads and bytes are counted.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceQueue, Request, drain};
use sapwood_blockdev::engine::{BlockingEngine, Engine, UringEngine};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, Compacted, CreateLayer, Layer, LayerInfo, OpenLayer, Tuning};
use sapwood_tests::counting::{Counters, CountingEngine};
use sapwood_tests::sim::rng::Rng;

type Counted = CountingEngine<BlockingEngine>;

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
const DEPTH: usize = 32;

fn io() -> Io<BlockingEngine> {
    Io::new(BlockingEngine::new().unwrap())
}

fn contents(block: u64, version: u64) -> Vec<u8> {
    ((block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version).to_le_bytes().repeat(BLOCK as usize / 8)
}

fn shuffled(blocks: u64) -> Vec<u64> {
    let (mut order, mut rng) = ((0..blocks).collect::<Vec<_>>(), Rng::new(11));
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order
}

fn open<E>(io: &Io<E>, path: &Path) -> Arc<Layer<E>>
where
    E: Engine<File = <BlockingEngine as Engine>::File> + 'static,
{
    let (inner, path) = (io.clone(), path.to_owned());
    block_on(io, async move { Layer::open(&HostStorage, &inner, &path, &OpenLayer::default()).await })
        .unwrap()
}

fn close<E>(io: &Io<E>, layer: &Arc<Layer<E>>) -> LayerInfo
where
    E: Engine<File = <BlockingEngine as Engine>::File> + 'static,
{
    let (inner, closed) = (io.clone(), Arc::clone(layer));
    block_on(io, async move { closed.close(&inner).await }).unwrap();
    layer.info()
}

/// Writes block after block into a new layer.
fn fill(path: &Path, size: u64, segment_size: u32, order: &[u64]) -> LayerInfo {
    let io = io();
    let (inner, at) = (io.clone(), path.to_owned());
    block_on(&io, async move {
        let options = CreateLayer { size: Some(size), segment_size, ..CreateLayer::default() };
        layer::create(&HostStorage, &inner, &at, &options).await
    })
    .unwrap();
    let layer = open(&io, path);
    let mut queue = layer.queue_on(io.clone());
    let mut done = Vec::new();
    for batch in order.chunks(DEPTH) {
        for &block in batch {
            let memory = SharedBuf::heap(BLOCK as usize);
            memory.write_at(0, &contents(block, 0));
            let (offset, command) = (GuestOffset(block * BLOCK), Command::Write(memory.into()));
            queue.submit(Request { tag: block, offset, len: BLOCK, command });
        }
        drain(&mut queue, &mut done);
        assert!(done.drain(..).all(|done| done.result.is_ok()));
    }
    drop(queue);
    close(&io, &layer)
}

/// Reads the whole disk in requests of 1 MiB; how many reads of the file that takes.
fn read_all(path: &Path, version: impl Fn(u64) -> u64) -> u64 {
    let counters = Arc::new(Counters::default());
    let io: Io<Counted> = Io::new(CountingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(&counters)));
    let layer = open(&io, path);
    let mut queue = layer.queue_on(io.clone());
    let before = counters.now().reads;
    let (memory, mut done, mut bytes) = (SharedBuf::heap(MIB as usize), Vec::new(), vec![0; MIB as usize]);
    for start in (0..layer.info().size).step_by(MIB as usize) {
        let command = Command::Read(memory.clone().into());
        queue.submit(Request { tag: 0, offset: GuestOffset(start), len: MIB, command });
        drain(&mut queue, &mut done);
        assert!(done.drain(..).all(|done| done.result.is_ok()));
        memory.read_at(0, &mut bytes);
        for (block, found) in (start / BLOCK..).zip(bytes.chunks_exact(BLOCK as usize)) {
            assert!(found == contents(block, version(block)), "block {block}");
        }
    }
    let reads = counters.now().reads - before;
    drop(queue);
    close(&io, &layer);
    reads
}

fn check(path: &Path) -> Vec<String> {
    let (io, path) = (io(), path.to_owned());
    let inner = io.clone();
    block_on(&io, async move { layer::check(&HostStorage, &inner, &path).await }).unwrap().errors
}

fn compact(path: &Path) -> Compacted {
    let (io, path) = (io(), path.to_owned());
    let inner = io.clone();
    block_on(&io, async move {
        layer::compact(&HostStorage, &inner, &path, Tuning::default(), &mut |_, _| {}).await
    })
    .unwrap()
}

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// The most that a file takes while `f` runs.
fn peak<R>(path: &Path, f: impl FnOnce() -> R) -> (R, u64) {
    let (ended, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                most.fetch_max(allocated(path), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let result = f();
        ended.store(true, Ordering::Relaxed);
        result
    });
    (result, most.into_inner())
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk.layer");
    (folder, path)
}

#[test]
fn what_was_scattered_is_read_with_as_few_reads_as_what_was_written_in_order() {
    let (size, segment) = (256 * MIB, MIB as u32);
    let (folder, path) = folder();
    let ordered = folder.path().join("ordered.layer");
    fill(&ordered, size, segment, &(0..size / BLOCK).collect::<Vec<_>>());
    let wanted = read_all(&ordered, |_| 0);
    fill(&path, size, segment, &shuffled(size / BLOCK));
    let scattered = read_all(&path, |_| 0);
    let (compacted, peak) = peak(&path, || compact(&path));
    let (reads, after) = (read_all(&path, |_| 0), allocated(&path));
    println!("reads: {scattered} scattered, {reads} compacted, {wanted} written in order; {compacted:?}");
    println!(
        "{:.3} of the live data at the peak, {:.3} after",
        peak as f64 / size as f64,
        after as f64 / size as f64
    );
    assert!(scattered > 10 * wanted, "{scattered} reads, {wanted} of what was written in order");
    assert!(reads * 2 <= wanted * 3, "{reads} reads, {wanted} of what was written in order");
    assert!(after <= size / 100 * 115, "{after} bytes for {size}");
    assert!(peak <= size + size / 8 + 48 * u64::from(segment), "{peak} bytes for {size}");
    assert_eq!(compacted.damaged, 0);
    assert!(compacted.moved <= 4 * size, "{} bytes moved", compacted.moved);
    assert_eq!(check(&path), Vec::<String>::new());
    let again = compact(&path);
    println!("again: {again:?}");
    assert!(again.moved <= size / 20, "{again:?}");
}

#[test]
fn guests_write_beside_it() {
    let size = 64 * MIB;
    let (_folder, path) = folder();
    fill(&path, size, 256 << 10, &shuffled(size / BLOCK));
    let io = io();
    let layer = open(&io, &path);
    let maintenance = thread::spawn({
        let layer = Arc::clone(&layer);
        move || {
            let io = self::io();
            block_on(&io, layer.maintain(io.clone()));
        }
    });
    let ended = Arc::new(AtomicBool::new(false));
    let guest = thread::spawn({
        let (layer, ended) = (Arc::clone(&layer), Arc::clone(&ended));
        move || write_at_random(&layer, &ended)
    });
    let (inner, compacting) = (io.clone(), Arc::clone(&layer));
    let compacted = block_on(&io, async move { compacting.compact(&inner, |_, _| {}).await }).unwrap();
    ended.store(true, Ordering::Relaxed);
    let versions = guest.join().unwrap();
    close(&io, &layer);
    maintenance.join().unwrap();
    drop(layer);
    let written = versions.iter().filter(|&&version| version > 0).count();
    println!("{written} blocks overwritten meanwhile; {compacted:?}");
    assert!(written > 0 && compacted.runs_after * 2 < compacted.runs_before, "{written}, {compacted:?}");
    read_all(&path, |block| versions[block as usize]);
    assert_eq!(check(&path), Vec::<String>::new());
}

/// Overwrites blocks until told to end; the version of each.
fn write_at_random(layer: &Arc<Layer<BlockingEngine>>, ended: &AtomicBool) -> Vec<u64> {
    let mut queue = layer.queue_on(io());
    let (mut rng, mut done) = (Rng::new(5), Vec::new());
    let mut versions = vec![0; (layer.info().size / BLOCK) as usize];
    while !ended.load(Ordering::Relaxed) {
        let block = rng.below(versions.len() as u64);
        versions[block as usize] += 1;
        let memory = SharedBuf::heap(BLOCK as usize);
        memory.write_at(0, &contents(block, versions[block as usize]));
        let (offset, command) = (GuestOffset(block * BLOCK), Command::Write(memory.into()));
        queue.submit(Request { tag: 0, offset, len: BLOCK, command });
        drain(&mut queue, &mut done);
        assert!(done.drain(..).all(|done| done.result.is_ok()));
        thread::sleep(Duration::from_micros(200));
    }
    versions
}

#[test]
fn damage_stays_what_it_is() {
    let size = 16 * MIB;
    let (_folder, path) = folder();
    fill(&path, size, 256 << 10, &shuffled(size / BLOCK));
    let block = 1234;
    let bytes = std::fs::read(&path).unwrap();
    let wanted = contents(block, 0);
    let at = bytes.chunks_exact(BLOCK as usize).position(|found| found == wanted).unwrap() as u64;
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[!wanted[7]], at * BLOCK + 7).unwrap();
    assert_eq!(check(&path).len(), 1);
    let compacted = compact(&path);
    println!("{compacted:?}");
    assert!((BLOCK..=256 << 10).contains(&compacted.damaged), "{compacted:?}");
    assert!(compacted.runs_after * 4 < compacted.runs_before, "the rest is in order: {compacted:?}");
    assert_eq!(check(&path).len(), 1, "the damage is still known");
}

/// Mebibytes each second of sequential reads of 1 MiB, four at once.
fn speed(path: &Path) -> f64 {
    let io = Io::new(UringEngine::new().unwrap());
    let layer = open(&io, path);
    let mut queue = layer.queue_on(io.clone());
    let memory: Vec<SharedBuf> = (0..4).map(|_| SharedBuf::heap(MIB as usize)).collect();
    let (size, mut next, mut done) = (layer.info().size, 0, Vec::new());
    let begin = Instant::now();
    let mut free = vec![0, 1, 2, 3];
    while next < size || queue.outstanding() > 0 {
        while next < size
            && let Some(tag) = free.pop()
        {
            let command = Command::Read(memory[tag as usize].clone().into());
            queue.submit(Request { tag, offset: GuestOffset(next), len: MIB, command });
            next += MIB;
        }
        queue.poll(&mut done);
        if done.is_empty() && queue.outstanding() > 0 {
            queue.wait(None);
        }
        free.extend(done.drain(..).map(|done| done.tag));
    }
    let speed = (size / MIB) as f64 / begin.elapsed().as_secs_f64();
    drop(queue);
    close(&io, &layer);
    speed
}

/// Prints ratios; a release build is worth looking at.
#[test]
#[ignore = "measures times"]
fn speed_of_sequential_reads() {
    let size = std::env::var("SAPWOOD_COMPACT_MIB").map_or(1024, |mib| mib.parse().unwrap()) * MIB;
    let (folder, path) = folder();
    let ordered = folder.path().join("ordered.layer");
    fill(&ordered, size, 4 << 20, &(0..size / BLOCK).collect::<Vec<_>>());
    fill(&path, size, 4 << 20, &shuffled(size / BLOCK));
    let before: Vec<[f64; 2]> = (0..3).map(|_| [speed(&path), speed(&ordered)]).collect();
    let begin = Instant::now();
    let (compacted, peak) = peak(&path, || compact(&path));
    let seconds = begin.elapsed().as_secs_f64();
    println!("{seconds:.1} s, at most {:.3} of the live data; {compacted:?}", peak as f64 / size as f64);
    for (turn, [scattered, sequential]) in before.into_iter().enumerate() {
        let [compacted, again] = [speed(&path), speed(&ordered)];
        println!(
            "turn {turn}: scattered {:.2} and compacted {:.2} of what was written in order ({again:.0} MiB/s)",
            scattered / sequential,
            compacted / again
        );
    }
}
