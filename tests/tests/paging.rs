//! The map of a layer is larger than its cache: nothing is lost, memory stays bounded, and few
//! reads are spent on the map.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, run};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ImageError;
use sapwood_image::layer::{self, CreateLayer, Layer, LayerQueue, OpenLayer, Tuning};
use sapwood_tests::sim::rng::Rng;

const BLOCK: u64 = 4096;
/// Blocks of a leaf of the map.
const LEAF: u64 = 512;

struct Disk {
    layer: Arc<Layer<BlockingEngine>>,
    queue: LayerQueue<BlockingEngine>,
}

fn io() -> Io<BlockingEngine> {
    Io::new(BlockingEngine::new().unwrap())
}

fn create(path: &Path, size: u64) {
    let path = path.to_owned();
    let options = CreateLayer { size: Some(size), segment_size: 1 << 20, ..CreateLayer::default() };
    let io = io();
    block_on(&io.clone(), async move { layer::create(&HostStorage, &io, &path, &options).await }).unwrap();
}

fn check(path: &Path) -> Vec<String> {
    let (io, path) = (io(), path.to_owned());
    let report = block_on(&io.clone(), async move { layer::check(&HostStorage, &io, &path).await });
    report.unwrap().errors
}

impl Disk {
    fn open(path: &Path, map_cache_bytes: u64) -> Self {
        let tuning = Tuning { map_cache_bytes, space_slack: Some(1 << 20), ..Tuning::default() };
        let (io, path) = (io(), path.to_owned());
        let options = OpenLayer { read_only: false, tuning };
        let reactor = io.clone();
        let opened = async move { Layer::open(&HostStorage, &io, &path, &options).await };
        let layer = block_on(&reactor, opened).unwrap();
        let queue = layer.queue_on(self::io());
        Self { layer, queue }
    }

    fn on_io<T: 'static>(
        &self,
        f: impl AsyncFnOnce(Arc<Layer<BlockingEngine>>, Io<BlockingEngine>) -> Result<T, ImageError> + 'static,
    ) -> T {
        let (io, layer) = (io(), Arc::clone(&self.layer));
        block_on(&io.clone(), async move { f(layer, io).await }).unwrap()
    }

    fn checkpoint(&self) {
        self.on_io(async |layer, io| layer.checkpoint(&io).await);
    }

    /// Fills `count` blocks with what [`contents`] says of them.
    fn write(&mut self, block: u64, count: u64, value: u64) {
        let bytes: Vec<u8> = (block..block + count).flat_map(|block| contents(block, value)).collect();
        let buf = SharedBuf::heap(bytes.len());
        buf.write_at(0, &bytes);
        let command = Command::Write(buf.slice(0..bytes.len()).into());
        run(&mut self.queue, GuestOffset(block * BLOCK), bytes.len() as u64, command).unwrap();
    }

    fn command(&mut self, block: u64, count: u64, command: Command) {
        run(&mut self.queue, GuestOffset(block * BLOCK), count * BLOCK, command).unwrap();
    }

    fn read(&mut self, block: u64) -> Vec<u8> {
        let buf = SharedBuf::heap(BLOCK as usize);
        let command = Command::Read(buf.slice(0..BLOCK as usize).into());
        run(&mut self.queue, GuestOffset(block * BLOCK), BLOCK, command).unwrap();
        let mut bytes = vec![0; BLOCK as usize];
        buf.read_at(0, &mut bytes);
        bytes
    }

    fn verify(&mut self, block: u64, model: &BTreeMap<u64, u64>) {
        let expected = model.get(&block).map_or_else(|| vec![0; BLOCK as usize], |v| contents(block, *v));
        assert!(self.read(block) == expected, "block {block}");
    }

    fn close(self) {
        drop(self.queue);
        let io = io();
        let layer = self.layer;
        block_on(&io.clone(), async move { layer.close(&io).await }).unwrap();
    }
}

fn contents(block: u64, value: u64) -> Vec<u8> {
    [block, value].iter().flat_map(|word| word.to_le_bytes()).cycle().take(BLOCK as usize).collect()
}

/// A block in one of 400 leaves of 40 branches.
fn some_block(rng: &mut Rng) -> u64 {
    let (branch, leaf) = (rng.below(40), rng.below(10) * 37);
    (branch * 512 + leaf) * LEAF + rng.below(LEAF)
}

#[test]
fn a_cache_of_any_size_changes_nothing() {
    for (seed, cache) in [(1, 0), (2, 16 << 10), (3, 64 << 20)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, 64 << 30);
        let mut rng = Rng::new(seed);
        let mut model = BTreeMap::new();
        let mut disk = Disk::open(&path, cache);
        for step in 0..3000 {
            let block = some_block(&mut rng);
            let count = 1 + rng.below(3);
            match rng.below(12) {
                0..=6 => {
                    disk.write(block, count, step);
                    model.extend((block..block + count).map(|block| (block, step)));
                }
                7 => {
                    // Long enough for leaves, and sometimes for a branch, to become uniform.
                    let count = [count, 3 * LEAF, 600 * LEAF][rng.below(3) as usize];
                    let command = if step % 2 == 0 { Command::Discard } else { Command::WriteZeroes };
                    disk.command(block, count, command);
                    model.retain(|b, _| !(block..block + count).contains(b));
                }
                8 if step % 5 == 0 => {
                    disk.checkpoint();
                    let bytes = disk.layer.info().map_bytes;
                    assert!(bytes <= cache, "{bytes} bytes in a cache of {cache}");
                }
                9 if step % 7 == 0 => drop(disk.on_io(async |layer, io| layer.clean(&io).await)),
                10 if step % 50 == 0 => {
                    if rng.below(2) == 0 {
                        disk.close();
                    } else {
                        drop(disk);
                    }
                    disk = Disk::open(&path, cache);
                }
                _ => disk.verify(block, &model),
            }
        }
        let written: Vec<u64> = model.keys().copied().collect();
        written.iter().for_each(|&block| disk.verify(block, &model));
        disk.close();
        assert_eq!(check(&path), [""; 0]);
        let mut disk = Disk::open(&path, cache);
        written.iter().for_each(|&block| disk.verify(block, &model));
        disk.close();
    }
}

/// A disk of 60 leaves that are too scattered to be kept as runs.
fn scattered(path: &Path) {
    create(path, 1 << 30);
    let mut disk = Disk::open(path, 64 << 20);
    let mut rng = Rng::new(7);
    let mut blocks: Vec<u64> = (0..60 * LEAF).step_by(3).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, rng.below(i as u64 + 1) as usize);
    }
    blocks.iter().for_each(|&block| disk.write(block, 1, 1));
    disk.close();
}

/// Reads of nodes for each of so many random reads of blocks.
fn reads_for_random_reads(disk: &mut Disk, requests: u64) -> f64 {
    let mut rng = Rng::new(9);
    let before = disk.layer.info().map_reads;
    for _ in 0..requests {
        let block = rng.below(60 * LEAF / 3) * 3;
        assert!(disk.read(block) == contents(block, 1), "block {block}");
    }
    (disk.layer.info().map_reads - before) as f64 / requests as f64
}

#[test]
fn a_miss_costs_one_read_and_a_full_cache_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    scattered(&path);
    // Space for six leaves of sixty, and for the branch.
    let mut small = Disk::open(&path, 6 * 2200 + 4300);
    let each = reads_for_random_reads(&mut small, 5000);
    assert!(each <= 1.02, "{each} reads of the map for each request: more than half of all reads");
    assert!(each > 0.5, "{each}: the cache is not as small as it should be");
    small.close();
    let mut large = Disk::open(&path, 64 << 20);
    let first = reads_for_random_reads(&mut large, 5000);
    assert!(first * 5000.0 <= 61.0, "{first}: nothing is read twice");
    assert_eq!(reads_for_random_reads(&mut large, 5000), 0.0);
    large.close();
}

#[test]
fn sequential_reads_read_the_map_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, 2 << 30);
    let mut disk = Disk::open(&path, 64 << 20);
    let blocks: Vec<u64> = (0..1024).map(|leaf| leaf * LEAF + leaf % 7).collect();
    blocks.iter().for_each(|&block| disk.write(block, 1, 1));
    disk.close();
    let mut disk = Disk::open(&path, 1 << 20);
    for &block in &blocks {
        assert!(disk.read(block) == contents(block, 1), "block {block}");
    }
    let reads = disk.layer.info().map_reads;
    assert!(reads <= 80, "{reads} reads for 1024 leaves and two branches");
    disk.close();
}
