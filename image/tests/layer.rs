//! The layer on real files, driven through its queue: contents against a model, reopening,
//! bases, resizing, cleaning. Crashes are the simulator's business (crate `sapwood-tests`).
#![allow(missing_docs, clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Done, Request, run};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, BaseSpec, CreateLayer, Layer, LayerQueue, OpenLayer, Tuning};
use sapwood_image::{ErrorKind, Format, ImageError};

type Device = Arc<Layer<BlockingEngine>>;

fn io() -> Io<BlockingEngine> {
    Io::new(BlockingEngine::new().unwrap())
}

fn create(path: &Path, options: CreateLayer) -> Result<(), ImageError> {
    let (io, path) = (io(), path.to_owned());
    block_on(&io.clone(), async move { layer::create(&HostStorage, &io, &path, &options).await })
}

fn open(path: &Path, options: OpenLayer) -> Result<Device, ImageError> {
    let (io, path) = (io(), path.to_owned());
    block_on(&io.clone(), async move { Layer::open(&HostStorage, &io, &path, &options).await })
}

fn close(layer: Device) {
    let io = io();
    block_on(&io.clone(), async move { layer.close(&io).await }).unwrap();
}

fn checked(path: &Path) -> layer::CheckReport {
    let (io, path) = (io(), path.to_owned());
    block_on(&io.clone(), async move { layer::check(&HostStorage, &io, &path).await }).unwrap()
}

/// A small random-number generator: seeds make failures repeat.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A disk beside a copy of what it should hold.
struct Disk {
    layer: Device,
    queue: LayerQueue<BlockingEngine>,
    model: Vec<u8>,
}

impl Disk {
    fn open(path: &Path, model: Vec<u8>) -> Self {
        let tuning = Tuning { space_slack: Some(1 << 20), checkpoint_bytes: 1 << 20, ..Tuning::default() };
        let layer = open(path, OpenLayer { read_only: false, tuning }).unwrap();
        let queue = layer.queue_on(io());
        let mut disk = Self { layer, queue, model };
        disk.compare();
        disk
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let buf = SharedBuf::heap(bytes.len());
        buf.write_at(0, bytes);
        let at = GuestOffset(offset as u64);
        run(&mut self.queue, at, bytes.len() as u64, Command::Write(buf.into())).unwrap();
        self.model[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&mut self, offset: usize, len: usize) -> Vec<u8> {
        let buf = SharedBuf::heap(len);
        run(&mut self.queue, GuestOffset(offset as u64), len as u64, Command::Read(buf.clone().into()))
            .unwrap();
        let mut bytes = vec![0; len];
        buf.read_at(0, &mut bytes);
        bytes
    }

    fn compare(&mut self) {
        let got = self.read(0, self.model.len());
        let wrong = got.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first byte that differs");
    }

    fn random_step(&mut self, rng: &mut Rng) {
        let sectors = self.model.len() as u64 / 512;
        let unit = [1, 8][rng.below(2) as usize];
        let start = rng.below(sectors) / unit * unit;
        let len = (1 + rng.below(64)) * unit;
        let len = len.min(sectors - start);
        let (offset, bytes) = (start as usize * 512, len as usize * 512);
        match rng.below(10) {
            0..=5 => {
                let fill = rng.next() as u8;
                let data: Vec<u8> = (0..bytes).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
                self.write(offset, &data);
            }
            6 => {
                run(&mut self.queue, GuestOffset(offset as u64), bytes as u64, Command::WriteZeroes).unwrap();
                self.model[offset..offset + bytes].fill(0);
            }
            7 => {
                run(&mut self.queue, GuestOffset(offset as u64), bytes as u64, Command::Discard).unwrap();
                let whole = offset.next_multiple_of(4096)..(offset + bytes) / 4096 * 4096;
                if whole.start < whole.end {
                    self.model[whole].fill(0);
                }
            }
            8 => run(&mut self.queue, GuestOffset(0), 0, Command::Flush).unwrap(),
            _ => {
                let got = self.read(offset, bytes);
                assert!(got == self.model[offset..offset + bytes], "at {offset}");
            }
        }
    }

    fn on_io<T: 'static>(
        &self,
        f: impl AsyncFnOnce(Device, Io<BlockingEngine>) -> Result<T, ImageError> + 'static,
    ) -> T {
        let (io, layer) = (io(), Arc::clone(&self.layer));
        block_on(&io.clone(), async move { f(layer, io).await }).unwrap()
    }

    fn close(self) -> Vec<u8> {
        drop(self.queue);
        close(self.layer);
        self.model
    }
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.layer");
    (dir, path)
}

#[test]
fn random_work_matches_a_model_over_every_base() {
    for (seed, base) in [(1, "none"), (2, "raw"), (3, "layer")] {
        let (dir, path) = scratch();
        let mut rng = Rng(0x9e37_79b9 + seed);
        let size = 3 << 20;
        let mut model = vec![0; size as usize];
        let spec = match base {
            "none" => None,
            "raw" => {
                let contents: Vec<u8> = (0..(2 << 20) + 700).map(|_| rng.next() as u8).collect();
                std::fs::write(dir.path().join("base"), &contents).unwrap();
                model[..contents.len()].copy_from_slice(&contents);
                Some(BaseSpec::new("base", Format::Raw))
            }
            _ => {
                let below = dir.path().join("below");
                create(&below, CreateLayer { size: Some(2 << 20), ..CreateLayer::default() }).unwrap();
                let mut disk = Disk::open(&below, vec![0; 2 << 20]);
                (0..100).for_each(|_| disk.random_step(&mut rng));
                let contents = disk.close();
                model[..contents.len()].copy_from_slice(&contents);
                Some(BaseSpec::new("below", Format::Layer))
            }
        };
        create(
            &path,
            CreateLayer { size: Some(size), base: spec, segment_size: 256 << 10, ..Default::default() },
        )
        .unwrap();
        for round in 0..12 {
            let mut disk = Disk::open(&path, model);
            for _ in 0..120 {
                disk.random_step(&mut rng);
            }
            disk.compare();
            if round % 3 == 1 {
                disk.on_io(async |layer, io| layer.checkpoint(&io).await);
                while disk.on_io(async |layer, io| layer.clean(&io).await) && rng.below(4) > 0 {}
                disk.compare();
            }
            model = disk.close();
            let report = checked(&path);
            assert_eq!((report.errors, report.warnings), (vec![], vec![]), "{base}, round {round}");
        }
        // Far less than was written, which is some 40 MiB: segments are reused, or given back.
        let occupied = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(occupied < 16 << 20, "segments are reused: {occupied}");
    }
}

#[test]
fn a_dropped_layer_is_recovered() {
    let (_dir, path) = scratch();
    create(&path, CreateLayer { size: Some(1 << 20), ..CreateLayer::default() }).unwrap();
    let mut rng = Rng(77);
    let mut model = vec![0; 1 << 20];
    for _ in 0..20 {
        let mut disk = Disk::open(&path, model);
        (0..60).for_each(|_| disk.random_step(&mut rng));
        model = disk.model.clone();
        drop(disk);
    }
    Disk::open(&path, model).close();
    assert_eq!(checked(&path).errors, Vec::<String>::new());
}

#[test]
fn sizes_change_and_cut_bytes_stay_gone() {
    let (dir, path) = scratch();
    std::fs::write(dir.path().join("base"), vec![7; 1 << 20]).unwrap();
    let base = Some(BaseSpec::new("base", Format::Raw));
    create(&path, CreateLayer { size: Some(300 * 512), base, ..CreateLayer::default() }).unwrap();
    let mut disk = Disk::open(&path, vec![7; 300 * 512]);
    for size in [301, 100, 99, 2048, 3000, 1, 3000] {
        disk.on_io(async move |layer, io| layer.resize(&io, size * 512).await);
        disk.model.resize(size as usize * 512, 0);
        assert_eq!(disk.layer.geometry().size, size * 512);
        disk.compare();
        disk.write(disk.model.len() - 512, &[size as u8; 512]);
    }
    let model = disk.close();
    Disk::open(&path, model).close();
}

#[test]
fn a_second_writer_is_refused_and_told_who_holds_the_layer() {
    let (_dir, path) = scratch();
    create(&path, CreateLayer { size: Some(1 << 20), ..CreateLayer::default() }).unwrap();
    let first = open(&path, OpenLayer::default()).unwrap();
    let Err(refused) = open(&path, OpenLayer::default()) else { panic!("opened twice") };
    let text = refused.to_string();
    assert!(text.contains("in use") && text.contains(&std::process::id().to_string()), "{text}");
    close(first);
    open(&path, OpenLayer::default()).unwrap();
}

#[test]
fn a_changed_base_is_refused() {
    let (dir, path) = scratch();
    let base = dir.path().join("base");
    std::fs::write(&base, vec![1; 8192]).unwrap();
    let spec = Some(BaseSpec::new("base", Format::Raw));
    create(&path, CreateLayer { base: spec, ..CreateLayer::default() }).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(&base, vec![2; 8192]).unwrap();
    let Err(refused) = open(&path, OpenLayer::default()) else { panic!("a changed base was taken") };
    assert!(refused.to_string().contains("it was modified"), "{refused}");
    std::fs::remove_file(&base).unwrap();
    let Err(refused) = open(&path, OpenLayer::default()) else { panic!("a missing base was taken") };
    assert!(refused.to_string().contains("base"), "{refused}");
}

#[test]
fn writes_that_arrive_together_share_records() {
    let (_dir, path) = scratch();
    create(&path, CreateLayer { size: Some(1 << 30), ..CreateLayer::default() }).unwrap();
    let layer = open(&path, OpenLayer::default()).unwrap();
    let mut queue = layer.queue_on(io());
    let before = layer.info().sequence;
    for tag in 0..32 {
        let buf = SharedBuf::heap(4096);
        buf.write_at(0, &[tag as u8; 4096]);
        let offset = GuestOffset((tag * 7919 % 1000) * 4096);
        queue.submit(Request { tag, offset, len: 4096, command: Command::Write(buf.into()) });
    }
    let mut done: Vec<Done> = Vec::new();
    sapwood_blockdev::device::drain(&mut queue, &mut done);
    assert_eq!(done.len(), 32);
    assert!(layer.info().sequence - before <= 2, "32 writes in {} records", layer.info().sequence - before);
}

/// Cancelled at the first moment at which it can be: the disk reads as before, and nothing is left to be
/// finished.
#[test]
fn a_change_of_base_that_is_cancelled_leaves_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (size, far) = (200 << 20, 150 << 20);
    for name in ["base", "other"] {
        std::fs::File::create_new(path(name)).unwrap().set_len(size as u64).unwrap();
    }
    let spec = |name: &str| BaseSpec::new(name, Format::Raw);
    create(&path("disk"), CreateLayer { base: Some(spec("base")), ..CreateLayer::default() }).unwrap();
    let layer = open(&path("disk"), OpenLayer::default()).unwrap();
    let mut queue = layer.queue_on(io());
    for (at, byte) in [(4096, 1), (far, 2)] {
        let buf = SharedBuf::heap(8192);
        buf.write_at(0, &[byte; 8192]);
        run(&mut queue, GuestOffset(at as u64), 8192, Command::Write(buf.into())).unwrap();
    }
    let mut change = |commits: bool| {
        let (io, disk, base) = (io(), Arc::clone(&layer), spec("other"));
        let mut first = |_, _| ControlFlow::Break(());
        let ended = block_on(&io.clone(), async move {
            match commits {
                true => disk.commit_online(&HostStorage, &io, &mut first).await.map(drop),
                false => disk.rebase(&HostStorage, &io, Some(&base), &mut first).await,
            }
        });
        assert!(matches!(ended.unwrap_err().kind, ErrorKind::Cancelled));
        for (at, byte) in [(0, 0), (4096, 1), (far, 2), (far + 8192, 0)] {
            let buf = SharedBuf::heap(4096);
            run(&mut queue, GuestOffset(at as u64), 4096, Command::Read(buf.clone().into())).unwrap();
            let mut bytes = vec![9; 4096];
            buf.read_at(0, &mut bytes);
            assert!(bytes == vec![byte; 4096], "at {at}, commit: {commits}");
        }
        assert_eq!(layer.info().base.unwrap().path, Path::new("base"));
    };
    change(false);
    change(true);
    drop(queue);
    close(layer);
    // Opened without a word of a commit; the base has what was done until then.
    close(open(&path("disk"), OpenLayer::default()).unwrap());
    let base = std::fs::read(path("base")).unwrap();
    assert_eq!((base[4096], base[far]), (1, 0));
}
