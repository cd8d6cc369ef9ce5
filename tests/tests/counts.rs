//! Efficiency that can be counted: writes to the file, bytes written and allocated, allocations of
//! memory, system calls. Times are the business of `cargo xtask bench`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceQueue, Request, drain};
use sapwood_blockdev::engine::UringEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::Format;
use sapwood_image::layer::{self, BaseSpec, CreateLayer, Layer, LayerQueue, OpenLayer};
use sapwood_tests::counting::allocator::{self, Counting};
use sapwood_tests::counting::{Counters, CountingEngine};
use sapwood_tests::frontend::{self, Frontend};
use sapwood_vhost::{Options, Server};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type Uring = CountingEngine<UringEngine>;

const BLOCK: u64 = 4096;
/// Size of the disks: written blocks are far from each other, as a guest's are.
const DISK_BLOCKS: u64 = 1 << 18;
const DEPTH: usize = 32;

/// Why this machine cannot run a test, said where the test's output is not kept back.
fn skip(test: &str, reason: &str) {
    let _ = writeln!(io::stderr(), "skipped: {test}: {reason}");
}

/// Whether there is io_uring, which these tests count on.
fn has_uring(test: &str) -> bool {
    match UringEngine::new() {
        Ok(_) => true,
        Err(error) => {
            skip(test, &format!("no io_uring: {error}"));
            false
        }
    }
}

/// Blocks in an order without repetition: steps of an odd number reach every residue of a power
/// of two.
fn scattered(i: u64) -> GuestOffset {
    GuestOffset(i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % DISK_BLOCKS * BLOCK)
}

/// An open layer and what its engines did.
struct Disk {
    layer: Arc<Layer<Uring>>,
    counters: Arc<Counters>,
    maintenance: thread::JoinHandle<()>,
}

fn io(counters: &Arc<Counters>) -> Io<Uring> {
    Io::new(CountingEngine::new(UringEngine::new().unwrap(), Arc::clone(counters)))
}

impl Disk {
    fn create(path: &Path) -> Self {
        Self::create_over(path, None)
    }

    fn create_over(path: &Path, base: Option<BaseSpec>) -> Self {
        let counters = Arc::new(Counters::default());
        let io = io(&counters);
        let (path, inner) = (path.to_owned(), io.clone());
        let layer = block_on(&io, async move {
            let options = CreateLayer { size: Some(DISK_BLOCKS * BLOCK), base, ..CreateLayer::default() };
            layer::create(&HostStorage, &inner, &path, &options).await.unwrap();
            Layer::open(&HostStorage, &inner, &path, &OpenLayer::default()).await.unwrap()
        });
        let maintenance = {
            let (layer, counters) = (Arc::clone(&layer), Arc::clone(&counters));
            thread::spawn(move || {
                let io = self::io(&counters);
                block_on(&io, layer.maintain(io.clone()));
            })
        };
        Self { layer, counters, maintenance }
    }

    fn queue(&self) -> LayerQueue<Uring> {
        self.layer.queue_on(io(&self.counters))
    }

    /// Ends it as a server does; the blocks that are mapped.
    fn close(self) -> u64 {
        let (layer, io) = (Arc::clone(&self.layer), io(&self.counters));
        block_on(&io.clone(), async move { layer.close(&io).await }).unwrap();
        self.maintenance.join().unwrap();
        self.layer.info().live_blocks
    }
}

/// A client of a queue with memory of its own for each request in flight.
struct Client {
    queue: LayerQueue<Uring>,
    memory: Vec<SharedBuf>,
    done: Vec<sapwood_blockdev::device::Done>,
}

impl Client {
    fn new(disk: &Disk) -> Self {
        let memory = (0..DEPTH).map(|_| SharedBuf::heap(BLOCK as usize)).collect();
        Self { queue: disk.queue(), memory, done: Vec::with_capacity(DEPTH) }
    }

    fn submit(&mut self, slot: u64, offset: GuestOffset, write: bool) {
        let memory = self.memory[slot as usize].clone().into();
        let command = if write { Command::Write(memory) } else { Command::Read(memory) };
        self.queue.submit(Request { tag: slot, offset, len: BLOCK, command });
    }

    /// All slots at once, then waits for all.
    fn batch(&mut self, first: u64, write: bool) {
        for slot in 0..DEPTH as u64 {
            self.submit(slot, scattered(first + slot), write);
        }
        drain(&mut self.queue, &mut self.done);
        assert!(self.done.drain(..).all(|done| done.result.is_ok()));
    }

    /// Keeps all slots busy until `count` requests from number `first` on are done.
    fn stream(&mut self, first: u64, count: u64, write: bool) {
        let mut next = first;
        for slot in 0..DEPTH as u64 {
            self.submit(slot, scattered(next), write);
            next += 1;
        }
        let mut done = std::mem::take(&mut self.done);
        while self.queue.outstanding() > 0 {
            self.queue.poll(&mut done);
            // What ended may have been the layer's own work, which is no report.
            if done.is_empty() && self.queue.outstanding() > 0 {
                self.queue.wait(None);
            }
            for done in done.drain(..) {
                done.result.unwrap();
                if next < first + count {
                    self.submit(done.tag, scattered(next), write);
                    next += 1;
                }
            }
        }
        self.done = done;
    }
}

#[test]
fn writes_that_arrive_together_are_at_most_two() {
    if !has_uring("writes_that_arrive_together_are_at_most_two") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(&dir.path().join("disk"));
    let mut client = Client::new(&disk);
    let (mut most, mut all) = (0, 0);
    let batches = 200;
    for batch in 0..batches {
        let before = disk.counters.now();
        client.batch(batch * DEPTH as u64, true);
        let writes = disk.counters.now().writes - before.writes;
        (most, all) = (most.max(writes), all + writes);
    }
    println!("{batches} batches of {DEPTH} writes: {all} writes to the file, at most {most} for one");
    // No checkpoint is due yet, so all of them are records.
    assert!(most <= 2, "{most} writes for {DEPTH} that arrived together");
    drop(client);
    disk.close();
}

#[test]
fn few_bytes_are_written_for_each_byte() {
    if !has_uring("few_bytes_are_written_for_each_byte") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(&dir.path().join("disk"));
    let mut client = Client::new(&disk);
    let before = disk.counters.now();
    let blocks = 24 << 10;
    client.stream(0, blocks, true);
    drop(client);
    let counters = Arc::clone(&disk.counters);
    assert_eq!(disk.close(), blocks);
    let after = counters.now();
    let written = (after.written_bytes - before.written_bytes) as f64 / (blocks * BLOCK) as f64;
    println!("{blocks} first writes: {} writes, {written:.3} bytes for each", after.writes - before.writes);
    assert!(written <= 1.1, "{written:.3} bytes written for each byte, checkpoints included");
}

/// A file system in a file, mounted.
struct Mounted {
    folder: PathBuf,
}

impl Mounted {
    /// # Errors
    /// Why this machine cannot.
    fn new(kind: &str, folder: &Path) -> Result<Self, String> {
        let run = |program: &mut Program| match program.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("{program:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => Err(format!("{program:?}: {error}")),
        };
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".to_owned());
        }
        let image = folder.join("image");
        let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(1 << 30).map_err(|error| error.to_string())?;
        run(Program::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        let mounted = folder.join("mounted");
        std::fs::create_dir(&mounted).map_err(|error| error.to_string())?;
        run(Program::new("mount").args(["-o", "loop"]).args([&image, &mounted]))?;
        Ok(Self { folder: mounted })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Program::new("umount").arg(&self.folder).status();
        assert!(done.is_ok_and(|status| status.success()) || thread::panicking(), "unmounting");
    }
}

fn space_after_a_clean_stop(test: &str, kind: &str) {
    if !has_uring(test) {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mounted = match Mounted::new(kind, dir.path()) {
        Ok(mounted) => mounted,
        Err(reason) => return skip(test, &reason),
    };
    let path = mounted.folder.join("disk");
    let disk = Disk::create(&path);
    let mut client = Client::new(&disk);
    client.stream(0, 16 << 10, true);
    drop(client);
    let live = disk.close() * BLOCK;
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    let ratio = allocated as f64 / live as f64;
    println!("{kind}: {ratio:.3} bytes allocated for each live byte");
    assert!(ratio <= 1.15, "{kind}: {allocated} bytes allocated for {live}");
}

#[test]
fn space_after_a_clean_stop_ext4() {
    space_after_a_clean_stop("space_after_a_clean_stop_ext4", "ext4");
}

#[test]
fn space_after_a_clean_stop_xfs() {
    space_after_a_clean_stop("space_after_a_clean_stop_xfs", "xfs");
}

#[test]
fn reads_allocate_nothing_and_enter_the_kernel_seldom() {
    static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
    if has_uring("reads_allocate_nothing_and_enter_the_kernel_seldom") {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::create(&dir.path().join("disk"));
        Client::new(&disk).stream(0, 4096, true);
        reads_cost_little(disk, &ALLOCATIONS);
    }
}

#[test]
fn reads_from_below_allocate_nothing_and_enter_the_kernel_seldom() {
    static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
    if !has_uring("reads_from_below_allocate_nothing_and_enter_the_kernel_seldom") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::File::create(path("base")).unwrap().set_len(DISK_BLOCKS * BLOCK).unwrap();
    let low = Disk::create_over(&path("low"), Some(BaseSpec::new("base", Format::Raw)));
    Client::new(&low).stream(0, 2048, true);
    low.close();
    let middle = Disk::create_over(&path("middle"), Some(BaseSpec::new("low", Format::Layer)));
    Client::new(&middle).stream(1024, 2048, true);
    middle.close();
    // Some of what is read lies in each of the three files.
    let top = Disk::create_over(&path("top"), Some(BaseSpec::new("middle", Format::Layer)));
    reads_cost_little(top, &ALLOCATIONS);
}

/// Reads the first 4096 scattered blocks, counting.
fn reads_cost_little(disk: Disk, allocated: &'static AtomicU64) {
    let mut client = Client::new(&disk);
    client.stream(0, 4096, false);
    let enters = |client: &mut Client| client.queue.with_engine(|engine| engine.inner().stats().enters);
    let (before, reads_before) = (enters(&mut client), disk.counters.now().reads);
    allocator::count_in(Some(allocated));
    (0..128).for_each(|batch| client.batch(batch * DEPTH as u64, false));
    allocator::count_in(None);
    let enters = enters(&mut client) - before;
    let reads = disk.counters.now().reads - reads_before;
    let allocations = allocated.load(Ordering::Relaxed);
    println!("{reads} reads in batches of {DEPTH}: {allocations} allocations, {enters} system calls");
    assert_eq!(reads, 128 * DEPTH as u64, "one operation for each request");
    assert_eq!(allocations, 0, "the fast path of reads allocates nothing");
    // One that submits a batch; of the others each finds at least one finished read.
    assert!(enters <= 128 + reads, "{enters} system calls for {reads} reads");
    drop(client);
    disk.close();
}

/// Allocations of the queue's thread of a server, for each request, in a steady state.
fn served_allocations(counter: &'static AtomicU64, write: bool) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(&dir.path().join("disk"));
    let mut client = Client::new(&disk);
    client.stream(0, 4096, true);
    drop(client);
    let counters = Arc::clone(&disk.counters);
    let options = Options::new(dir.path().join("socket"));
    let server = Server::start(Arc::clone(&disk.layer), options, move || {
        allocator::count_in(Some(counter));
        Ok(CountingEngine::new(UringEngine::new()?, Arc::clone(&counters)))
    })
    .unwrap();
    let options =
        frontend::Options { slots: DEPTH, slot_bytes: BLOCK as usize, ..frontend::Options::default() };
    let mut client = Frontend::connect(&dir.path().join("socket"), &options).unwrap();
    let rounds = 64;
    for round in 0..2 * rounds {
        if round == rounds {
            counter.store(0, Ordering::Relaxed);
        }
        serve_batch(&mut client, write);
    }
    let allocations = counter.load(Ordering::Relaxed);
    drop(client);
    server.stop();
    disk.close();
    allocations as f64 / (rounds * DEPTH) as f64
}

fn serve_batch(client: &mut Frontend, write: bool) {
    let data = [7; BLOCK as usize];
    let queue = &mut client.queues[0];
    for i in 0..DEPTH as u64 {
        let offset = scattered(i).0;
        let command = if write {
            frontend::Command::Write(offset, &data)
        } else {
            frontend::Command::Read(offset, BLOCK as usize)
        };
        queue.submit(i, command).unwrap();
    }
    queue.kick().unwrap();
    while queue.outstanding() > 0 {
        let finished = queue.poll(|done| done.result.unwrap());
        assert!(finished > 0 || queue.wait(std::time::Duration::from_secs(20)).unwrap(), "an answer in time");
    }
}

#[test]
fn served_reads_allocate_nothing() {
    static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
    if !has_uring("served_reads_allocate_nothing") {
        return;
    }
    let each = served_allocations(&ALLOCATIONS, false);
    println!("{each} allocations for each read");
    assert!(each == 0.0, "{each} allocations for each read");
}

#[test]
fn served_writes_allocate_little() {
    static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
    if !has_uring("served_writes_allocate_little") {
        return;
    }
    let each = served_allocations(&ALLOCATIONS, true);
    println!("{each} allocations for each write");
    assert!(each < 4.0, "{each} allocations for each write");
}
