//! Sealed snapshots read as disks: alone and below a layer, with the counts that are promised, with damage, with packs that
//! have moved, and by several threads.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceError, run};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::below::Chain;
use sapwood_image::counts::Lookups;
use sapwood_image::layer::{
    self, CreateInStore, Layer, LayerId, OpenLayer, ResolveBase, Resolved, StoreBase,
};
use sapwood_image::sealed::index::{Index, Run, write_run};
use sapwood_image::sealed::{Hash, Packs, PacksTuning, Root, root_hash};
use sapwood_image::{Disk, DiskQueue, ErrorKind, ExtentKind, Format, info};
use sapwood_tests::counting::Counters;
use sapwood_tests::damage::lab::{Bench, HostLab, Lab, wait};
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::qcow2::reader::expect_at_random;
use sapwood_tests::sealed::{CountingLab, Made, Shape, SimLab, content, dense, make, packs};
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::world::{Config, World};

const BLOCK: usize = 4096;
/// A disk whose tree has three levels and whose last block is cut.
const SIZE: usize = 700 * BLOCK + 512;

/// A directory with packs, and a lab in which they are read.
struct Rig<L: Lab> {
    lab: L,
    directory: PathBuf,
    index: Arc<Index<L::Engine>>,
    packs: Arc<Packs<L::Engine>>,
}

impl<L: Lab> Rig<L> {
    fn new(lab: &L, directory: &Path, tuning: PacksTuning) -> Self {
        let index = Arc::new(Index::new(0));
        let packs = packs(&lab.storage(), directory, &tuning, &index);
        Self { lab: lab.clone(), directory: directory.to_owned(), index, packs }
    }

    fn make(&self, disk: &[u8], shape: Shape) -> Made {
        let (directory, disk) = (self.directory.clone(), disk.to_vec());
        wait(&self.lab, async move |storage, io| make(&storage, &io, &directory, &disk, shape).await).unwrap()
    }

    /// Makes a run of the index of all that is in the packs of `made`, and takes it.
    fn index(&self, number: u32, made: &Made) {
        let (directory, entries) = (self.directory.clone(), made.entries.clone());
        wait(&self.lab, async move |storage, io| write_run(&storage, &io, &directory, number, entries).await)
            .unwrap();
        self.take_run(number);
    }

    fn take_run(&self, number: u32) {
        let directory = self.directory.clone();
        let run =
            wait(&self.lab, async move |storage, io| Run::open(&storage, &io, &directory, number).await);
        let runs = self.index.runs();
        self.index.replace(runs.iter().cloned().chain([Arc::new(run.unwrap())]));
    }

    fn disk(&self, root: Root) -> Arc<Disk<L::Engine>> {
        Disk::open_sealed(&self.packs, root).unwrap()
    }

    fn queue(&self, root: Root) -> DiskQueue<L::Engine> {
        self.disk(root).queue_on(Io::new(self.lab.engine()))
    }

    /// Opens packs, so that what is counted afterwards is reading.
    fn open(&self, numbers: &[u32]) {
        let (packs, numbers) = (Arc::clone(&self.packs), numbers.to_vec());
        wait(&self.lab, async move |_, io| {
            for number in numbers {
                packs.pack(&io, number).await.unwrap();
            }
        });
    }
}

fn read<L: Lab>(queue: &mut DiskQueue<L::Engine>, offset: usize, len: usize) -> Result<Vec<u8>, DeviceError> {
    let buf = SharedBuf::heap(len);
    buf.write_at(0, &vec![0xee; len]);
    run(queue, GuestOffset(offset as u64), len as u64, Command::Read(buf.clone().into()))?;
    let mut bytes = vec![0; len];
    buf.read_at(0, &mut bytes);
    Ok(bytes)
}

/// Reads a whole disk in pieces: each is right, or an error. How many were errors.
fn read_all<L: Lab>(rig: &Rig<L>, root: Root, disk: &[u8]) -> usize {
    let mut queue = rig.queue(root);
    let mut errors = 0;
    for start in (0..disk.len()).step_by(7 * BLOCK) {
        let end = disk.len().min(start + 7 * BLOCK);
        match read::<L>(&mut queue, start, end - start) {
            Ok(bytes) => assert!(bytes == disk[start..end], "never wrong data: {start:#x}"),
            Err(_) => errors += 1,
        }
    }
    errors
}

fn small() -> PacksTuning {
    PacksTuning { files_max: 2, frame_bytes: 0, node_bytes: 0 }
}

fn world() -> (World, SimLab) {
    let world = World::new(Config::blocking(3));
    let lab = SimLab::new(&world);
    (world, lab)
}

#[test]
fn reads_of_any_alignment_are_what_was_sealed() {
    let disk = content(1, SIZE);
    for tuning in [PacksTuning::default(), small()] {
        let folder = tempfile::tempdir().unwrap();
        let rig = Rig::new(&HostLab, folder.path(), tuning);
        let made = rig.make(&disk, Shape::from(1));
        expect_at_random(&mut rig.queue(made.root), "host", &disk, &mut Rng::new(1), 60);

        let (world, lab) = world();
        world.set_faults(Faults::benign());
        let rig = Rig::new(&lab, Path::new("/"), tuning);
        let made = rig.make(&disk, Shape { frame_blocks: 32, ..Shape::from(7) });
        expect_at_random(&mut rig.queue(made.root), "simulator", &disk, &mut Rng::new(2), 60);
    }
}

#[test]
fn disks_of_all_heights_end_where_they_end() {
    for size in [512, BLOCK, 16 * BLOCK, 17 * BLOCK - 512, 256 * BLOCK, 257 * BLOCK] {
        let (_, lab) = world();
        let rig = Rig::new(&lab, Path::new("/"), PacksTuning::default());
        for disk in [dense(size.div_ceil(BLOCK))[..size].to_vec(), vec![0; size]] {
            let first = if disk[8] == 0 && disk[2] == 0 { 500 } else { 1 };
            let root = rig.make(&disk, Shape::from(first)).root;
            let mut queue = rig.queue(root);
            expect_at_random(&mut queue, "edges", &disk, &mut Rng::new(3), 4);
            assert_eq!(read::<SimLab>(&mut queue, size, 512), Err(DeviceError::OutOfRange));
            let write = Command::Write(SharedBuf::heap(512).into());
            assert_eq!(run(&mut queue, GuestOffset(0), 512, write), Err(DeviceError::ReadOnly));
        }
    }
}

#[test]
fn extents_say_what_is_zero_and_what_is_stored() {
    let (_, lab) = world();
    let rig = Rig::new(&lab, Path::new("/"), PacksTuning::default());
    let disk = content(5, SIZE);
    let root = rig.make(&disk, Shape::from(1)).root;
    let sealed = rig.disk(root);
    let extents = wait(&lab, async move |_, io| sealed.extents(&io, 0..u64::MAX).await).unwrap();
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.start, at);
        at += extent.len;
        let is_zero = extent.kind == ExtentKind::Zero;
        assert!(is_zero || extent.kind == ExtentKind::Compressed);
        for block in disk[extent.start as usize..at as usize].chunks(BLOCK) {
            assert_eq!(block.iter().all(|byte| *byte == 0), is_zero);
        }
    }
    assert_eq!(at, SIZE as u64);
    assert!(extents.len() > 10 && extents.len() < 200, "neighbours are joined: {}", extents.len());
    let said = info::info_of(&lab.storage(), Path::new("/store"), &rig.disk(root)).unwrap();
    assert_eq!((said.format, said.virtual_size), (Format::Sealed, SIZE as u64));
    assert_eq!(said.root, Some(root_hash(SIZE as u64, &root.tree.hash)));
}

/// A dense disk with three levels of nodes, and how many pages its nodes take.
const BLOCKS: usize = 4096;
const LEVELS: u64 = 3;

fn counting(frame_blocks: usize, tuning: PacksTuning) -> (Rig<CountingLab<SimLab>>, Made, Vec<u8>, u64) {
    let (_, lab) = world();
    let rig = Rig::new(&CountingLab { lab, counters: Arc::new(Counters::default()) }, Path::new("/"), tuning);
    let disk = dense(BLOCKS);
    let made = rig.make(&disk, Shape { frame_blocks, pack_frames: 100, ..Shape::from(1) });
    rig.open(&made.packs);
    let node = 4 + 16 * 40 + 16;
    let pages = (BLOCK + made.nodes * usize::next_multiple_of(node, 32)).div_ceil(16 << 10) as u64;
    (rig, made, disk, pages)
}

#[test]
fn a_read_costs_one_read_when_the_nodes_are_there() {
    let (rig, made, disk, pages) = counting(16, PacksTuning::default());
    let count = || rig.lab.counters.now().reads;
    let mut queue = rig.queue(made.root);
    let mut read = |block: usize| {
        let before = count();
        let bytes = read::<CountingLab<SimLab>>(&mut queue, block * BLOCK, BLOCK).unwrap();
        assert!(bytes == disk[block * BLOCK..][..BLOCK]);
        count() - before
    };
    let cold = read(1234);
    assert!((2..=LEVELS + 1).contains(&cold), "cold: {cold}");
    assert_eq!(read(1234), 0, "cached");
    assert_eq!(read(1235), 0, "in the same frame");

    let (sealed, before) = (rig.disk(made.root), count());
    wait(&rig.lab, async move |_, io| sealed.extents(&io, 0..u64::MAX).await).unwrap();
    let walked = count() - before;
    assert!(walked < pages && walked + LEVELS >= pages, "{walked} reads of {pages} pages");
    assert!(made.nodes as u64 / pages >= 20, "{} nodes in {pages} pages", made.nodes);
    for block in [0, 4095, 2000, 777] {
        assert_eq!(read(block), 1, "warm: block {block}");
        assert_eq!(read(block), 0, "cached: block {block}");
    }
}

/// Blocks that are not zero.
fn stored_blocks(disk: &[u8]) -> u64 {
    disk.chunks(BLOCK).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64
}

#[test]
fn blocks_count_by_whether_their_frame_was_in_memory() {
    let (_, lab) = world();
    let rig = Rig::new(&lab, Path::new("/"), PacksTuning::default());
    let disk = content(4, SIZE);
    let made = rig.make(&disk, Shape::from(1));
    let stored = stored_blocks(&disk);
    let frames = made.frames as u64;
    assert!(frames > 10 && stored > 4 * frames);
    let sealed = rig.disk(made.root);
    let mut queue = sealed.queue_on(Io::new(lab.engine()));
    let of = |disk: &Disk<_>| disk.counts().unwrap().frames;
    // Whatever the size of requests is: each frame is missed once.
    for start in (0..SIZE).step_by(7 * BLOCK) {
        read::<SimLab>(&mut queue, start, (SIZE - start).min(7 * BLOCK)).unwrap();
    }
    assert_eq!(of(&sealed), Lookups { hits: stored - frames, misses: frames });
    read::<SimLab>(&mut queue, 0, SIZE).unwrap();
    assert_eq!(of(&sealed), Lookups { hits: 2 * stored - frames, misses: frames });
    // Another disk of the same packs finds what is there, and counts for itself.
    let other = rig.disk(made.root);
    read::<SimLab>(&mut other.queue_on(Io::new(lab.engine())), 0, SIZE).unwrap();
    assert_eq!(of(&other), Lookups { hits: stored, misses: 0 });
    assert_eq!(of(&sealed), Lookups { hits: 2 * stored - frames, misses: frames });
}

#[test]
fn going_over_a_disk_reads_each_page_and_each_frame_once() {
    // What is read again when next to nothing is kept: nodes high up, and frames of which a request wants a part.
    let cases =
        [(BLOCK, PacksTuning::default(), 1, 1), (256 * BLOCK, small(), 1, 4), (7 * BLOCK, small(), 2, 4)];
    for (request, tuning, frame_reads, page_reads) in cases {
        let tuning = PacksTuning { files_max: 128, ..tuning };
        let (rig, made, disk, pages) = counting(32, tuning);
        let before = rig.lab.counters.now().reads;
        let mut queue = rig.queue(made.root);
        for start in (0..disk.len()).step_by(request) {
            let end = disk.len().min(start + request);
            let bytes = read::<CountingLab<SimLab>>(&mut queue, start, end - start).unwrap();
            assert!(bytes == disk[start..end]);
        }
        let reads = rig.lab.counters.now().reads - before;
        let most = frame_reads * made.frames as u64 + page_reads * pages;
        assert!(
            reads >= made.frames as u64 + pages - LEVELS && reads <= most,
            "requests of {request}: {reads} reads, not {most}"
        );
    }
}

#[test]
fn bounds_hold_whatever_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let tuning = PacksTuning { files_max: 4, frame_bytes: 1 << 20, node_bytes: 256 << 10 };
    let rig = Rig::new(&HostLab, folder.path(), tuning);
    let disk = dense(BLOCKS);
    let made = rig.make(&disk, Shape { pack_frames: 5, ..Shape::from(1) });
    assert!(made.packs.len() > 50);
    let (mut queue, mut rng) = (rig.queue(made.root), Rng::new(9));
    for _ in 0..300 {
        let start = rng.below(BLOCKS as u64 - 64) as usize * BLOCK;
        let len = rng.between(1, 64) as usize * BLOCK;
        assert!(read::<HostLab>(&mut queue, start, len).unwrap() == disk[start..start + len]);
        assert!(rig.packs.open_packs() <= 4, "{} packs", rig.packs.open_packs());
        let most = tuning.frame_bytes + tuning.node_bytes;
        assert!(rig.packs.cached_bytes() <= most + most / 8, "{} bytes", rig.packs.cached_bytes());
        let open = fs::read_dir("/proc/self/fd").unwrap();
        let at =
            |fd: &fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(folder.path()));
        assert!(open.flatten().filter(at).count() <= 4, "open files");
    }
    assert!(rig.packs.cached_bytes() > tuning.frame_bytes / 2, "what may be kept is kept");
}

#[test]
fn two_threads_bring_everything_once() {
    let folder = tempfile::tempdir().unwrap();
    let lab = CountingLab { lab: HostLab, counters: Arc::new(Counters::default()) };
    let rig = Rig::new(&lab, folder.path(), PacksTuning::default());
    let disk = dense(BLOCKS);
    let made = rig.make(&disk, Shape { pack_frames: 100, ..Shape::from(1) });
    rig.open(&made.packs);
    let before = lab.counters.now().reads;
    let sealed = rig.disk(made.root);
    thread::scope(|scope| {
        for seed in 0..2 {
            let (sealed, lab, disk) = (&sealed, &lab, &disk);
            scope.spawn(move || {
                let mut queue = sealed.queue_on(Io::new(lab.engine()));
                expect_at_random(&mut queue, "two threads", disk, &mut Rng::new(seed), 40);
                expect_all::<CountingLab<HostLab>>(&mut queue, disk);
            });
        }
    });
    let node = usize::next_multiple_of(4 + 16 * 40 + 16, 32);
    let pages = (BLOCK + made.nodes * node).div_ceil(16 << 10);
    assert_eq!(lab.counters.now().reads - before, (made.frames + pages) as u64);
}

fn expect_all<L: Lab>(queue: &mut DiskQueue<L::Engine>, disk: &[u8]) {
    for start in (0..disk.len()).step_by(64 * BLOCK) {
        let end = disk.len().min(start + 64 * BLOCK);
        assert!(read::<L>(queue, start, end - start).unwrap() == disk[start..end]);
    }
}

/// A small snapshot twice over, in packs from 1 and from 100 on, and an index of the second: all files.
fn twice(disk: &[u8]) -> (Vec<(PathBuf, Vec<u8>)>, Made, Made) {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::new(&HostLab, folder.path(), PacksTuning::default());
    let one = rig.make(disk, Shape { pack_frames: 3, ..Shape::from(1) });
    let two = rig.make(disk, Shape { frame_blocks: 5, pack_frames: 9, ..Shape::from(100) });
    rig.index(1, &two);
    let files = fs::read_dir(folder.path()).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (Path::new("/").join(path.file_name().unwrap()), fs::read(path).unwrap())
    });
    (files.collect(), one, two)
}

#[test]
fn a_flipped_bit_is_an_error_or_the_other_copy() {
    let disk = content(8, 150 * BLOCK);
    let (files, one, two) = twice(&disk);
    let is_of = |made: &Made, path: &Path| {
        let name = path.file_stem().unwrap().to_str().unwrap();
        path.extension().unwrap() == "pack" && made.packs.contains(&u32::from_str_radix(name, 16).unwrap())
    };
    let targets: Vec<_> = files.iter().filter(|(path, _)| is_of(&one, path)).collect();
    let (mut rng, mut noticed) = (Rng::new(77), 0);
    for round in 0..500 {
        let (path, bytes) = targets[rng.below(targets.len() as u64) as usize];
        let mut bad = bytes.clone();
        let at = rng.below(bad.len() as u64) as usize;
        bad[at] ^= 1 << rng.below(8);
        for has_copy in [false, true] {
            let storage = MemoryStorage::new(20_000);
            files.iter().for_each(|(path, bytes)| storage.install(path, bytes));
            storage.install(path, &bad);
            let rig = Rig::new(&storage, Path::new("/"), PacksTuning::default());
            if has_copy {
                rig.take_run(1);
            }
            let errors = read_all(&rig, one.root, &disk);
            assert!(!has_copy || errors == 0, "round {round}: {errors} errors in spite of a copy");
            noticed += errors.min(1);
        }
    }
    assert!(noticed > 300, "most bits matter: {noticed}");
    assert_eq!(two.root.tree.hash, one.root.tree.hash, "equal content has one hash");
}

#[test]
fn errors_name_the_pack_and_the_offset() {
    let (files, one, _) = twice(&content(8, 150 * BLOCK));
    let storage = MemoryStorage::new(20_000);
    files.iter().for_each(|(path, bytes)| storage.install(path, bytes));
    let rig = Rig::new(&storage, Path::new("/"), PacksTuning::default());
    let (entry, other) = (one.entries[0], one.entries[17]);
    let (packs, hash) = (Arc::clone(&rig.packs), Hash([7; 32]));
    let errors = wait(&storage, async move |_, io| {
        let path = packs.pack(&io, entry.place.pack()).await.unwrap().path().to_owned();
        let error = packs.block(&io, &hash, entry.place).await.unwrap_err();
        let named = matches!(error.kind, ErrorKind::Corrupt { offset, .. } if offset == entry.place.offset());
        assert!(named && error.path == path, "{error}");
        let error = packs.block(&io, &entry.hash, other.place).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Corrupt { .. }), "{error}");
        packs.block(&io, &entry.hash, entry.place).await.unwrap();
        packs.block(&io, &hash, sapwood_image::sealed::Place::NONE).await.unwrap_err().to_string()
    });
    assert!(errors.contains("in none of the packs"), "{errors}");
}

#[test]
fn what_has_moved_is_found_by_the_index() {
    let disk = content(11, SIZE);
    for case in 0..3 {
        let (world, lab) = world();
        let rig = Rig::new(&lab, Path::new("/"), PacksTuning::default());
        let one = rig.make(&disk, Shape { places: case != 2, ..Shape::from(1) });
        let two = rig.make(&disk, Shape { frame_blocks: 9, ..Shape::from(200) });
        let data = &one.packs[..one.packs.len() - 1];
        let gone: Vec<u32> = match case {
            // The data was moved, the nodes still say where it was.
            0 => data.to_vec(),
            // The nodes were moved, too.
            1 => one.packs.clone(),
            // Nobody says where anything is.
            _ => Vec::new(),
        };
        for number in &gone {
            let path = Path::new("/").join(sapwood_image::sealed::pack_name(*number));
            wait(&lab, async move |_, io| io.run(sapwood_blockdev::engine::Op::Unlink { path }).await.result)
                .unwrap();
        }
        assert!(read_all(&rig, one.root, &disk) > 0, "case {case}: without the index it is lost");
        rig.index(1, if case == 2 { &one } else { &two });
        world.set_faults(Faults::benign());
        assert_eq!(read_all(&rig, one.root, &disk), 0, "case {case}");
        expect_at_random(&mut rig.queue(one.root), "moved", &disk, &mut Rng::new(4), 10);
    }
}

#[test]
fn packs_that_are_withdrawn_are_let_go_of() {
    let disk = content(12, SIZE);
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::new(&HostLab, folder.path(), PacksTuning::default());
    let one = rig.make(&disk, Shape::from(1));
    let two = rig.make(&disk, Shape { frame_blocks: 9, ..Shape::from(200) });
    rig.index(1, &two);
    assert_eq!(read_all(&rig, one.root, &disk), 0);
    let (packs, entry) = (Arc::clone(&rig.packs), one.entries[0]);
    let held = wait(&HostLab, async move |_, io| packs.pack(&io, entry.place.pack()).await).unwrap();
    let (open, kept) = (rig.packs.open_packs(), rig.packs.cached_bytes());
    assert_eq!(open, one.packs.len());
    for number in &one.packs {
        fs::remove_file(folder.path().join(sapwood_image::sealed::pack_name(*number))).unwrap();
    }
    rig.packs.withdraw(&one.packs);
    assert_eq!(rig.packs.open_packs(), 0);
    assert!(rig.packs.cached_bytes() < kept / 10 && !rig.packs.cached_frame(entry.place));
    assert_eq!(read_all(&rig, one.root, &disk), 0, "all of it is elsewhere");
    assert_eq!(rig.packs.open_packs(), two.packs.len());
    let frame = wait(&HostLab, async move |_, io| held.frame(&io, entry.place).await);
    assert!(frame.unwrap().hashes().any(|hash| hash == entry.hash), "who reads a pack ends well");
}

#[test]
fn failed_reads_are_errors_and_are_not_kept() {
    let (world, lab) = world();
    let disk = content(13, SIZE);
    let rig = Rig::new(&lab, Path::new("/"), small());
    let made = rig.make(&disk, Shape::from(1));
    world.set_faults(Faults { read_error: 1500, ..Faults::benign() });
    let errors: usize = (0..5).map(|_| read_all(&rig, made.root, &disk)).sum();
    assert!(errors > 10, "{errors} errors");
    world.set_faults(Faults::benign());
    assert_eq!(read_all(&rig, made.root, &disk), 0);
}

/// Knows one snapshot: a layer, until it has a root.
struct Resolver<E: Engine> {
    packs: Arc<Packs<E>>,
    frozen: PathBuf,
    root: Mutex<Option<Root>>,
}

const STORE: [u8; 16] = [1; 16];
const FROZEN: LayerId = [2; 16];

impl<E: Engine> ResolveBase<E> for Resolver<E> {
    fn resolve(&self, _: &StoreBase) -> Result<Resolved<E>, String> {
        Ok(match *self.root.lock().unwrap() {
            None => Resolved::Frozen { path: self.frozen.clone(), layer: FROZEN, kept: Arc::new(()) },
            Some(root) => Resolved::Sealed { packs: Arc::clone(&self.packs), root },
        })
    }
}

/// Makes a layer that holds a disk, and an empty one over it.
fn make_layers<L: Lab>(lab: &L, base: &Path, top: &Path, disk: &[u8]) {
    let (frozen, upper) = (base.to_owned(), top.to_owned());
    wait(lab, async move |storage, io| {
        let size = SIZE as u64;
        let options = CreateInStore { id: FROZEN, size, base: None, segment_size: 256 << 10 };
        layer::create_in_store(&storage, &io, &frozen, &options).await?;
        let base = Some(StoreBase { store: STORE, snapshot: FROZEN, size });
        layer::create_in_store(&storage, &io, &upper, &CreateInStore { id: [3; 16], base, ..options }).await
    })
    .unwrap();
    let mut bench = Bench::open(lab, base, false).unwrap();
    for (at, bytes) in (0..).step_by(64 * BLOCK).zip(disk.chunks(64 * BLOCK)) {
        bench.write(at, bytes).unwrap();
    }
    bench.close().unwrap();
}

/// A layer in a store over another one that becomes a sealed snapshot while the layer is open.
fn layer_over<L: Lab>(lab: &L, directory: &Path, empty_base: impl Fn(&Path)) {
    let disk = content(21, SIZE);
    let (base, top) = (directory.join("base"), directory.join("top"));
    let rig = Rig::new(lab, directory, PacksTuning::default());
    let made = rig.make(&disk, Shape::from(1));
    let root = made.root;
    let resolver =
        Arc::new(Resolver { packs: Arc::clone(&rig.packs), frozen: base.clone(), root: Mutex::default() });
    make_layers(lab, &base, &top, &disk);
    let asked = Arc::clone(&resolver) as Arc<dyn ResolveBase<_>>;
    let layer = wait(lab, async move |storage, io| {
        Layer::open_in_store(&storage, &io, &top, &OpenLayer::default(), &asked).await
    })
    .unwrap();
    let mut bench = Bench::over(lab, layer);
    assert!(bench.read(0, SIZE).unwrap() == disk, "over the layer");
    let reopen = |layer: &Arc<Layer<L::Engine>>, root| {
        *resolver.root.lock().unwrap() = Some(root);
        let (layer, resolver) = (Arc::clone(layer), Arc::clone(&resolver) as Arc<dyn ResolveBase<_>>);
        wait(lab, async move |storage, io| layer.reopen_base(&storage, &io, &resolver).await)
    };
    let refused = reopen(&bench.layer, Root { size: root.size + 512, ..root }).unwrap_err();
    assert!(matches!(refused.kind, ErrorKind::Base(_)), "{refused}");
    assert!(bench.read(0, SIZE).unwrap() == disk, "it reads what it read before");
    reopen(&bench.layer, root).unwrap();
    empty_base(&base);

    let (mut model, mut rng) = (disk, Rng::new(5));
    let mut whole = bench.read(0, SIZE).unwrap();
    assert!(whole == model, "before anything is written");
    // Parts of a frame that are read at the same time all wait for it.
    let (stored, first) = (stored_blocks(&model), bench.layer.counts().frames);
    assert!(first.misses >= made.frames as u64 && first.hits + first.misses == stored, "{first:?}");
    bench.read(0, SIZE).unwrap();
    assert_eq!(bench.layer.counts().frames, Lookups { hits: first.hits + stored, ..first });
    for round in 0..200 {
        let start = rng.below(SIZE as u64 / 512) as usize * 512;
        let len = rng.between(1, 40).min(((SIZE - start) / 512) as u64) as usize * 512;
        let range = start..start + len;
        match rng.below(4) {
            0 => {
                let bytes = vec![round as u8 + 1; len];
                bench.write(start as u64, &bytes).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            1 => {
                bench.command(start as u64, len as u64, Command::WriteZeroes).unwrap();
                model[range].fill(0);
            }
            _ => assert!(bench.read(start as u64, len).unwrap() == model[range], "round {round}"),
        }
    }
    whole = bench.read(0, SIZE).unwrap();
    assert!(whole == model);
    expect_at_random(
        &mut bench.layer.queue_on(Io::new(lab.engine())),
        "layer over a sealed snapshot",
        &model,
        &mut Rng::new(6),
        20,
    );
    let extents = bench.extents(0..SIZE as u64).unwrap();
    assert!(extents.iter().any(|extent| extent.depth == 1 && extent.kind == ExtentKind::Compressed));
    assert!(extents.iter().any(|extent| extent.depth == 0 && extent.kind == ExtentKind::Data));
    bench.close().unwrap();
}

#[test]
fn a_layer_lies_over_a_sealed_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    // Whoever still read the base would find nothing there.
    layer_over(&HostLab, folder.path(), |base| fs::File::create(base).unwrap().set_len(0).unwrap());

    let (world, lab) = world();
    world.set_faults(Faults::benign());
    layer_over(&lab, Path::new("/"), |base| world.install(base, &[]));
}

#[test]
fn a_root_that_no_disk_has_is_refused() {
    let (_, lab) = world();
    let rig = Rig::new(&lab, Path::new("/"), PacksTuning::default());
    let disk = dense(20);
    let root = rig.make(&disk, Shape::from(1)).root;
    for size in [100, (64 << 40) + 512, u64::MAX / 512 * 512] {
        assert!(Chain::open_sealed(&rig.packs, Root { size, ..root }).is_err(), "{size} bytes");
    }
    // A tree that is too low, or too high, for its disk.
    for size in [16 * BLOCK, 300 * BLOCK] {
        let mut queue = rig.queue(Root { size: size as u64, ..root });
        assert_eq!(read::<SimLab>(&mut queue, 0, 512), Err(DeviceError::Corrupt));
    }
}
