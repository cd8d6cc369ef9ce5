//! Large maps: a disk of 4 TiB of which 1 TiB is mapped densely, in places far from each other. What it
//! costs to open it, to read it with little memory, to check it and to discard it is counted.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, run};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, CheckReport, Layer, LayerQueue, OpenLayer, Tuning};
use sapwood_tests::counting::{Counters, CountingEngine, Counts};
use sapwood_tests::damage::meter::{Meter, metered};
use sapwood_tests::mounts::skip;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::synthetic::{self, Synthetic};
use tempfile::TempDir;

#[global_allocator]
static METER: Meter = Meter;

type Blocking = CountingEngine<BlockingEngine>;

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// Memory of a dense leaf, with what the cache takes for it.
const LEAF_MEMORY: u64 = 2048 + 128;

/// A layer in a file of its own.
struct Specimen {
    what: Synthetic,
    path: PathBuf,
    _folder: TempDir,
}

impl Specimen {
    fn new(what: Synthetic) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = folder.path().join("disk");
        let begin = Instant::now();
        synthetic::make(&path, &what).unwrap();
        println!("{} GiB mapped: made in {:.1?}", what.mapped / GIB, begin.elapsed());
        Self { what, path, _folder: folder }
    }

    fn map_bytes(&self) -> u64 {
        self.what.mapped / (2 * MIB) * LEAF_MEMORY
    }
}

fn on_io<T: 'static>(counters: &Arc<Counters>, f: impl AsyncFnOnce(Io<Blocking>) -> T + 'static) -> T {
    let io = Io::new(CountingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(counters)));
    block_on(&io.clone(), f(io))
}

/// An open layer and what its engines did.
struct Disk {
    layer: Arc<Layer<Blocking>>,
    queue: LayerQueue<Blocking>,
    counters: Arc<Counters>,
}

impl Disk {
    fn open(path: &Path, read_only: bool, map_cache_bytes: u64) -> Self {
        let counters = Arc::<Counters>::default();
        let tuning = Tuning { map_cache_bytes, ..Tuning::default() };
        let (path, options) = (path.to_owned(), OpenLayer { read_only, tuning });
        let layer =
            on_io(&counters, async move |io| Layer::open(&HostStorage, &io, &path, &options).await.unwrap());
        let engine = CountingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(&counters));
        let queue = layer.queue_on(Io::new(engine));
        Self { layer, queue, counters }
    }

    fn read(&mut self, block: u64) -> Vec<u8> {
        let buf = SharedBuf::heap(BLOCK as usize);
        let command = Command::Read(buf.slice(0..BLOCK as usize).into());
        run(&mut self.queue, GuestOffset(block * BLOCK), BLOCK, command).unwrap();
        let mut bytes = vec![0; BLOCK as usize];
        buf.read_at(0, &mut bytes);
        bytes
    }
}

impl Disk {
    /// Reads blocks in random order; reads of the file for each of them, in all and of the map's nodes.
    fn random_reads(&mut self, what: &Synthetic, count: u64, seed: u64) -> (f64, f64) {
        let mut rng = Rng::new(seed);
        let (before, nodes) = (self.counters.now(), self.layer.info().map_reads);
        for _ in 0..count {
            let block = rng.below(what.mapped / BLOCK);
            assert!(self.read(block) == what.contents(block), "block {block}");
        }
        let each = |reads: u64| reads as f64 / count as f64;
        (each(self.counters.now().reads - before.reads), each(self.layer.info().map_reads - nodes))
    }

    fn command(&mut self, range: std::ops::Range<u64>, command: Command) {
        run(&mut self.queue, GuestOffset(range.start), range.end - range.start, command).unwrap();
    }
}

fn check(path: &Path) -> (CheckReport, Counts) {
    let (path, counters) = (path.to_owned(), Arc::<Counters>::default());
    let report = on_io(&counters, async move |io| layer::check(&HostStorage, &io, &path).await.unwrap());
    (report, counters.now())
}

/// Reads of usage nodes when a layer is opened, at most: one for each, if they lie scattered.
fn usage_nodes(disk: &Disk) -> u64 {
    let info = disk.layer.info();
    (info.used_bytes / info.segment_size).div_ceil(256) + 1
}

#[test]
fn a_disk_of_4_tib_with_1_tib_mapped_is_open_at_once_and_read_with_little_memory() {
    let specimen = Specimen::new(Synthetic { size: 4 * TIB, mapped: TIB, records: false });
    for read_only in [true, false] {
        let begin = Instant::now();
        let (mut disk, peak) = metered(usize::MAX, || Disk::open(&specimen.path, read_only, 64 * MIB));
        let opened = disk.counters.now().reads;
        let block = specimen.what.marked().nth(33).unwrap();
        assert!(disk.read(block) == specimen.what.contents(block));
        let reads = disk.counters.now().reads;
        println!("opened and read once in {:.1?}, {reads} reads, {peak} bytes of memory", begin.elapsed());
        // The first blocks, the root, and two places where the log may go on.
        assert!(opened <= 4 + usage_nodes(&disk), "{opened} reads to open it");
        assert_eq!(reads - opened, 3, "a branch, a leaf and the block");
        assert!(peak as u64 <= 24 * MIB, "{peak} bytes of memory to open it");
    }
    let (cache, open) = (specimen.map_bytes() / 10, 16 * MIB);
    let (each, peak) = metered(usize::MAX, || {
        let mut disk = Disk::open(&specimen.path, false, cache);
        let each = disk.random_reads(&specimen.what, 70_000, 1);
        let taken = disk.layer.info().map_bytes;
        assert!(taken > cache * 9 / 10 && taken <= cache, "{taken} bytes in a cache of {cache}");
        each
    });
    println!("a tenth of the map in memory: {each:?} reads for each request, {peak} bytes of memory");
    assert!(each.0 <= 2.0, "{each:?}: more than twice what a full cache would need");
    assert!(peak as u64 <= open + cache, "{peak} bytes of memory with a cache of {cache}");
}

#[test]
fn random_reads_with_a_tenth_of_the_map_cost_at_most_twice_as_many_reads() {
    let specimen = Specimen::new(Synthetic { size: 4 * TIB, mapped: 64 * GIB, records: false });
    let reads = |share| {
        let mut disk = Disk::open(&specimen.path, true, (specimen.map_bytes() + MIB) / share);
        // In order, so that a full cache is full soon.
        (0..specimen.what.mapped / (2 * MIB)).for_each(|leaf| drop(disk.read(leaf * 512)));
        disk.random_reads(&specimen.what, 20_000, share)
    };
    let (full, half, tenth) = (reads(1), reads(2), reads(10));
    println!("reads for each request: full cache {full:?}, half {half:?}, a tenth {tenth:?}");
    assert!(full.1 <= 0.01, "{full:?}: the whole map is in memory");
    assert!(full.0 / tenth.0 >= 0.5, "{tenth:?} with a tenth of the map in memory, {full:?} with all");
    assert!(tenth.1 > 0.8, "{tenth:?}: the cache is not as small as it should be");
    // No cliff between them: what is in memory need not be read.
    assert!(half.1 <= 0.55, "{half:?} with half of the map in memory");
}

#[test]
fn a_discard_of_everything_takes_bounded_memory() {
    let specimen = Specimen::new(Synthetic { size: 4 * TIB, mapped: 64 * GIB, records: false });
    let cache = 8 * MIB;
    let mut disk = Disk::open(&specimen.path, false, cache);
    let before = disk.counters.now().reads;
    let begin = Instant::now();
    let ((), peak) = metered(usize::MAX, || disk.command(0..specimen.what.size, Command::Discard));
    let reads = disk.counters.now().reads - before;
    println!("discarded in {:.1?}, {reads} reads, {peak} bytes of memory", begin.elapsed());
    assert!(peak as u64 <= 2 * cache, "{peak} bytes of memory with a cache of {cache}");
    // Each leaf once, 32 ahead.
    assert!(reads <= specimen.what.mapped / (2 * MIB) / 12, "{reads} reads");
    for block in specimen.what.marked() {
        assert!(disk.read(block).iter().all(|&byte| byte == 0), "block {block}");
    }
    drop(disk.queue);
    on_io(&disk.counters, async move |io| disk.layer.close(&io).await.unwrap());
    let (report, _) = check(&specimen.path);
    assert_eq!((report.errors, report.mapped_blocks), (vec![], 0));
}

/// What a check may take: a bit for each block of the file, 56 bytes for each segment, a segment, and
/// nodes of the map.
fn check_memory_max(what: &Synthetic) -> u64 {
    let file = what.mapped + what.mapped / 64;
    file / BLOCK / 8 + file / (4 * MIB) * 56 + 4 * MIB + 6 * MIB
}

#[test]
fn a_check_reads_everything_once_in_bounded_memory() {
    let what = Synthetic { size: 4 * TIB, mapped: 4 * GIB, records: true };
    let specimen = Specimen::new(what);
    let begin = Instant::now();
    let ((report, counts), peak) = metered(usize::MAX, || check(&specimen.path));
    println!("checked in {:.1?}, {counts:?}, {peak} bytes of memory", begin.elapsed());
    assert_eq!(report.errors, [""; 0]);
    assert_eq!((report.mapped_blocks, report.verified_blocks), (what.mapped / BLOCK, what.mapped / BLOCK));
    let (segments, leaves) = (what.mapped / (1016 * BLOCK) + 1, what.mapped / (2 * MIB));
    assert!(counts.reads <= segments + leaves / 12 + 16, "{counts:?} for {segments} segments");
    assert!((peak as u64) < check_memory_max(&what), "{peak} bytes of memory");
}

#[test]
fn a_check_of_1_tib_takes_bounded_memory() {
    if std::env::var_os("SAPWOOD_SOAK").is_none() {
        return skip("check of 1 TiB", "it reads all of that, for minutes; SAPWOOD_SOAK=1 runs it");
    }
    let what = Synthetic { size: 4 * TIB, mapped: TIB, records: false };
    let specimen = Specimen::new(what);
    let begin = Instant::now();
    let ((report, counts), peak) = metered(usize::MAX, || check(&specimen.path));
    println!("checked in {:.1?}, {counts:?}, {peak} bytes of memory", begin.elapsed());
    // There are no records, which is not for memory to say.
    assert!(report.errors.iter().all(|e| e.contains("record") || e.contains("more errors")), "{report:?}");
    assert!((peak as u64) < check_memory_max(&what), "{peak} bytes of memory");
}
