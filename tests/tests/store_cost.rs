//! What it costs to take, clone, switch to and delete snapshots: not more for a large disk than for a small one. Counted; and
//! timed beside qcow2's internal snapshots, for the documents, when asked to.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Request, drain};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::{BLOCK_SIZE, GuestOffset};
use sapwood_image::layer::{Layer, OpenLayer, Tuning};
use sapwood_image::volume::Volume;
use sapwood_store::catalog::Look;
use sapwood_store::rows::VolumeRow;
use sapwood_store::{Id, SnapshotName, Store, StoreOptions, directory};
use sapwood_tests::counting::{Counters, CountingEngine, CountingStorage, Counts};
use sapwood_tests::synthetic::{self, Synthetic};

type Engine = CountingEngine<BlockingEngine>;

/// A store with one volume, whose layer is mapped densely.
struct Lab {
    _folder: tempfile::TempDir,
    store: Arc<Store<HostStorage, Engine>>,
    io: Io<Engine>,
    counters: Arc<Counters>,
}

fn engine(counters: &Arc<Counters>) -> Engine {
    CountingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(counters))
}

/// The id of the layer at `path`.
fn id_of(path: &Path) -> Id {
    let (io, path) = (Io::new(BlockingEngine::new().unwrap()), path.to_owned());
    let inner = io.clone();
    block_on(&io, async move {
        let options = OpenLayer { read_only: true, ..OpenLayer::default() };
        let layer = Layer::open(&HostStorage, &inner, &path, &options).await.unwrap();
        let id = layer.info().id;
        layer.close(&inner).await.unwrap();
        id.parse().unwrap()
    })
}

impl Lab {
    fn new(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let counters = Arc::<Counters>::default();
        let io = Io::new(engine(&counters));
        let (inner, catalog) = (io.clone(), engine(&counters));
        let (root, for_catalog) = (folder.path().join("store"), engine(&counters));
        let options = StoreOptions::default();
        let store = block_on(&io, async move {
            directory::init(&HostStorage, &inner, catalog, &root, &options).await.unwrap();
            Store::open(&HostStorage, &inner, for_catalog, &root, options).await.unwrap()
        });
        let volume = store.create("big", size).unwrap();
        let made = folder.path().join("made");
        synthetic::make(&made, &Synthetic { size, mapped: size, records: false }).unwrap();
        let layer = id_of(&made);
        std::fs::rename(&made, store.directory().layer(layer)).unwrap();
        let name = store.catalog().change(|change| {
            let row = change.volume(volume)?.unwrap();
            change.put_volume(volume, Some(&VolumeRow { layer: Some(layer), ..row }))
        });
        name.unwrap();
        Self { _folder: folder, store: Arc::new(store), io, counters }
    }

    /// What an action costs.
    fn cost<F: Future<Output = sapwood_store::Result<()>>>(
        &self,
        action: impl FnOnce(Arc<Store<HostStorage, Engine>>, Io<Engine>) -> F + 'static,
    ) -> (Counts, Duration) {
        let (store, io) = (Arc::clone(&self.store), self.io.clone());
        let (before, start) = (self.counters.now(), Instant::now());
        block_on(&self.io, async move { action(store, io).await }).unwrap();
        (self.counters.now() - before, start.elapsed())
    }
}

fn at(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

/// What each step costs on a disk of `size` bytes.
fn story(size: u64) -> Vec<(&'static str, Counts, Duration)> {
    let lab = Lab::new(size);
    let mut costs = Vec::new();
    let mut note = |what, (counts, took)| costs.push((what, counts, took));
    note("snapshot", lab.cost(|store, io| async move { store.snapshot(&io, &at("big@s")).await.map(drop) }));
    note(
        "create over it",
        lab.cost(|store, io| async move {
            let attachment = store.attach(&io, "big").await?;
            store.detach(attachment, None)
        }),
    );
    note(
        "clone",
        lab.cost(|store, _| async move { store.clone_snapshot(&at("big@s"), &["copy"]).map(drop) }),
    );
    note("switch", lab.cost(|store, io| async move { store.switch(&io, "copy", &at("big@s"), true).await }));
    note(
        "delete the clone",
        lab.cost(|store, io| async move { store.delete_volume(&io, "copy", false).await }),
    );
    note("delete all", lab.cost(|store, io| async move { store.delete_volume(&io, "big", true).await }));
    costs
}

#[test]
fn what_is_done_with_snapshots_does_not_depend_on_the_size_of_the_disk() {
    let (small, large) = (story(1 << 30), story(1 << 40));
    for ((what, small, quick), (_, large, slow)) in small.into_iter().zip(large) {
        println!("{what}: {small:?} in {quick:?} at 1 GiB, {large:?} in {slow:?} at 1 TiB");
        assert!(large.reads <= small.reads + 16, "{what}: {small:?} became {large:?}");
        assert!(large.writes <= small.writes + 8, "{what}: {small:?} became {large:?}");
        assert!(large.read_bytes <= small.read_bytes + (1 << 20), "{what}: {small:?} became {large:?}");
        assert!(
            large.written_bytes <= small.written_bytes + (64 << 10),
            "{what}: {small:?} became {large:?}"
        );
    }
}

/// Writes one block, as a guest does.
fn write(volume: &Arc<Volume<Engine>>, block: u64) {
    let mut queue = volume.queue(engine(&Arc::default()));
    let command = Command::Write(SharedBuf::heap(BLOCK_SIZE as usize).into());
    queue.submit(Request { tag: 0, offset: GuestOffset(block * BLOCK_SIZE), len: BLOCK_SIZE, command });
    let mut done = Vec::new();
    drain(&mut queue, &mut done);
    assert!(done.len() == 1 && done[0].result.is_ok());
}

/// What each of so many snapshots of an attached volume costs, with a write before each; without the catalog.
fn costs_of_live_snapshots(count: u64) -> Vec<Counts> {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let counters = Arc::<Counters>::default();
    let io = Io::new(engine(&counters));
    let (inner, storage) = (io.clone(), CountingStorage(Arc::clone(&counters)));
    block_on(&io, async move {
        let (io, options, catalog) = (inner, StoreOptions::default(), || engine(&Arc::default()));
        directory::init(&storage, &io, catalog(), &root, &options).await.unwrap();
        let store = Store::open(&storage, &io, catalog(), &root, options).await.unwrap();
        store.create("v", 1 << 30).unwrap();
        let mut attachment = store.attach(&io, "v").await.unwrap();
        let volume = store.open_volume(&io, &attachment, Tuning::default()).await.unwrap();
        let mut costs = Vec::new();
        for n in 0..count {
            write(&volume, n * 77);
            let before = counters.now();
            store.snapshot_volume(&io, &mut attachment, &volume, &format!("s{n}")).await.unwrap();
            costs.push(counters.now() - before);
            assert_eq!(volume.layer().info().depth as u64, n + 1);
        }
        volume.close(&io).await.unwrap();
        store.detach(attachment, None).unwrap();
        costs
    })
}

#[test]
fn a_live_snapshot_opens_and_reads_the_same_at_any_depth() {
    let costs = costs_of_live_snapshots(201);
    let [shallow, deep] = [5, 200].map(|n| (costs[n].opens, costs[n].reads, costs[n].read_bytes));
    println!("{:?} after 5, {:?} after 200", costs[5], costs[200]);
    assert_eq!(shallow, deep, "opens, reads, bytes read");
    assert!(shallow.0 <= 6 && shallow.1 <= 12, "{shallow:?}");
}

#[test]
#[ignore = "prints times: of qcow2's internal snapshots, for docs/performance.md"]
fn the_same_with_qcow2() {
    for size in [1u64 << 30, 1 << 40] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        let qemu_img = |arguments: &[&str]| {
            let start = Instant::now();
            let status = process::Command::new("qemu-img").args(arguments).arg(&image).status().unwrap();
            assert!(status.success(), "{arguments:?}");
            start.elapsed()
        };
        let start = Instant::now();
        let made = process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"])
            .arg(&image)
            .arg(size.to_string())
            .status()
            .unwrap();
        assert!(made.success());
        println!("{} GiB: made in {:?}", size >> 30, start.elapsed());
        for [what, option] in [["snapshot", "-c"], ["switch", "-a"], ["delete", "-d"]] {
            println!("{} GiB: {what} {:?}", size >> 30, qemu_img(&["snapshot", option, "s"]));
        }
    }
}
