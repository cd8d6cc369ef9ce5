//! What it costs to take, clone, switch to and delete snapshots: not more for a large disk than for a small one. Counted; and
//! timed beside qcow2's internal snapshots, for the documents, when asked to.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::layer::{Layer, OpenLayer};
use sapwood_store::catalog::Look;
use sapwood_store::rows::VolumeRow;
use sapwood_store::{Id, SnapshotName, Store, StoreOptions, directory};
use sapwood_tests::counting::{Counters, CountingEngine, Counts};
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
        let (after, took) = (self.counters.now(), start.elapsed());
        let counts = Counts {
            writes: after.writes - before.writes,
            written_bytes: after.written_bytes - before.written_bytes,
            reads: after.reads - before.reads,
            read_bytes: after.read_bytes - before.read_bytes,
        };
        (counts, took)
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

#[test]
#[ignore = "prints times: of qcow2's internal snapshots, for docs/performance.md"]
fn the_same_with_qcow2() {
    for size in [1u64 << 30, 1 << 40] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        let qemu_img = |arguments: &[&str]| {
            let start = Instant::now();
            let status = Command::new("qemu-img").args(arguments).arg(&image).status().unwrap();
            assert!(status.success(), "{arguments:?}");
            start.elapsed()
        };
        let start = Instant::now();
        let made = Command::new("qemu-img")
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
