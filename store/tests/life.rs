//! A store on the host's files: what a user does with it, and what it refuses.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, Command};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ErrorKind;
use sapwood_image::info::info;
use sapwood_image::layer::{CreateInStore, Layer, OpenLayer, create_in_store};
use sapwood_store::catalog::Look;
use sapwood_store::rows::{IndexRow, PackKind, PackRow, SpaceSettings};
use sapwood_store::tree::State;
use sapwood_store::{
    AllLimits, LimitsChange, Name, NotesChange, SnapshotName, SnapshotReader, Store, StoreOptions, directory,
};

const BLOCK: usize = 4096;
const SIZE: u64 = 1 << 20;

struct Lab {
    folder: tempfile::TempDir,
    io: Io<BlockingEngine>,
    store: Option<Arc<Store<HostStorage, BlockingEngine>>>,
}

fn engine() -> BlockingEngine {
    BlockingEngine::new().unwrap()
}

fn at(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut lab = Self { folder, io: Io::new(engine()), store: None };
        let (io, root) = (lab.io.clone(), lab.root());
        let made = async move {
            directory::init(&HostStorage, &io, engine(), &root, &StoreOptions::default()).await
        };
        lab.run(made).unwrap();
        lab.open();
        lab
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn open(&mut self) {
        self.store = None;
        let options = StoreOptions { segment_size: 64 << 10, ..StoreOptions::default() };
        self.store = Some(Arc::new(self.try_open(self.root(), options).unwrap()));
    }

    fn try_open(
        &self,
        root: PathBuf,
        options: StoreOptions,
    ) -> sapwood_store::Result<Store<HostStorage, BlockingEngine>> {
        let io = self.io.clone();
        self.run(async move { Store::open(&HostStorage, &io, engine(), &root, options).await })
    }

    fn store(&self) -> Arc<Store<HostStorage, BlockingEngine>> {
        Arc::clone(self.store.as_ref().unwrap())
    }

    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        block_on(&self.io, task)
    }

    /// Does something with the store, to its end; the error's kind and text.
    fn with<T: 'static, F: Future<Output = sapwood_store::Result<T>>>(
        &self,
        action: impl FnOnce(Arc<Store<HostStorage, BlockingEngine>>, Io<BlockingEngine>) -> F + 'static,
    ) -> Result<T, (String, String)> {
        let (store, io) = (self.store(), self.io.clone());
        let done = self.run(async move { action(store, io).await });
        done.map_err(|error| (error.kind.name().to_owned(), error.to_string()))
    }

    fn layer(&self, path: PathBuf, read_only: bool) -> Arc<Layer<BlockingEngine>> {
        let (store, io) = (self.store(), self.io.clone());
        let opened = self.run(async move {
            let options = OpenLayer { read_only, ..OpenLayer::default() };
            Layer::open_in_store(&HostStorage, &io, &path, &options, &store.resolver()).await
        });
        opened.unwrap()
    }

    fn write(&self, volume: &'static str, byte: u8) {
        let attachment = self.with(move |store, io| async move { store.attach(&io, volume).await }).unwrap();
        let layer = self.layer(attachment.path.clone(), false);
        let buf = SharedBuf::heap(BLOCK);
        buf.write_at(0, &[byte; BLOCK]);
        let mut queue = layer.queue_on(self.io.clone());
        device::run(&mut queue, GuestOffset(0), BLOCK as u64, Command::Write(buf.into())).unwrap();
        drop(queue);
        let io = self.io.clone();
        self.run(async move { layer.close(&io).await }).unwrap();
        self.store().detach(attachment, None).unwrap();
    }

    /// The first byte of a layer's disk.
    fn first(&self, path: PathBuf) -> u8 {
        let layer = self.layer(path, true);
        let buf = SharedBuf::heap(BLOCK);
        let mut queue = layer.queue_on(self.io.clone());
        let command = Command::Read(buf.clone().into());
        device::run(&mut queue, GuestOffset(0), BLOCK as u64, command).unwrap();
        let mut byte = [0];
        buf.read_at(0, &mut byte);
        byte[0]
    }

    /// The first byte of a snapshot's disk.
    fn first_of_snapshot(&self, name: &str) -> u8 {
        let reader = self.store().read_snapshot(&at(name)).unwrap();
        self.first_read(reader).0
    }

    fn first_read(&self, reader: SnapshotReader) -> (u8, SnapshotReader) {
        let (store, io) = (self.store(), self.io.clone());
        let (disk, reader) = self.run(async move { (store.open_snapshot(&io, &reader).await, reader) });
        let mut queue = disk.unwrap().queue_on(self.io.clone());
        let buf = SharedBuf::heap(BLOCK);
        device::run(&mut queue, GuestOffset(0), BLOCK as u64, Command::Read(buf.clone().into())).unwrap();
        let mut byte = [0];
        buf.read_at(0, &mut byte);
        (byte[0], reader)
    }

    fn snapshot(&self, name: &str) {
        let name = at(name);
        self.with(|store, io| async move { store.snapshot(&io, &name).await }).unwrap();
    }
}

#[test]
fn volumes_and_snapshots_live_and_go() {
    let mut lab = Lab::new();
    lab.store().create("web", SIZE).unwrap();
    lab.write("web", 1);
    lab.snapshot("web@one");
    lab.write("web", 2);
    lab.store().clone_snapshot(&at("web@one"), &["a", "b"]).unwrap();
    lab.write("a", 3);
    lab.open();
    let read = |name| lab.first_of_snapshot(name);
    assert_eq!(read("web@one"), 1);
    let unsaved = lab.with(|store, io| async move { store.switch(&io, "web", &at("web@one"), false).await });
    let (kind, text) = unsaved.unwrap_err();
    assert_eq!(kind, "unsaved");
    assert!(text.starts_with("web: the volume holds writes that are in no snapshot"), "{text}");
    let back = lab.with(|store, io| async move { store.rollback(&io, "web", true).await }).unwrap();
    assert_eq!(back, at("web@one"));
    let refused = lab.with(|store, io| async move { store.delete_volume(&io, "web", false).await });
    assert_eq!(refused.unwrap_err().0, "has-snapshots");
    lab.with(|store, io| async move { store.delete_volume(&io, "web", true).await }).unwrap();
    let tree = lab.store().tree().unwrap();
    let names: Vec<&str> = tree.entries.values().map(|entry| entry.name.as_str()).collect();
    assert_eq!((tree.roots.len(), tree.nameless, names.len()), (2, 1, 2), "{names:?}");
    assert!(tree.entries.values().all(|entry| entry.state == State::Head && entry.parent.is_none()));
    // What its clones need is still there.
    let attachment = lab.with(|store, io| async move { store.attach(&io, "b").await }).unwrap();
    assert_eq!(lab.first(attachment.path.clone()), 1);
    drop(attachment);
    for name in ["a", "b"] {
        lab.with(move |store, io| async move { store.delete_volume(&io, name, false).await }).unwrap();
    }
    assert!(lab.store().catalog().view().unwrap().nodes().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(lab.store().directory().layers()).unwrap().count(), 0);
}

#[test]
fn a_store_in_use_names_its_user() {
    let lab = Lab::new();
    let error = lab.try_open(lab.root(), StoreOptions::default()).err().unwrap();
    assert_eq!(error.kind.name(), "locked");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    let nowhere = lab.folder.path().join("nowhere");
    let error = lab.try_open(nowhere, StoreOptions::default()).err().unwrap();
    assert_eq!(error.kind.name(), "not-found");
    assert!(error.to_string().contains("make one with init"), "{error}");
    for (root, why) in [(lab.root(), "a store already"), (lab.folder.path().to_owned(), "not empty")] {
        let io = lab.io.clone();
        let made = lab.run(async move {
            directory::init(&HostStorage, &io, engine(), &root, &StoreOptions::default()).await
        });
        let error = made.unwrap_err();
        assert_eq!(error.kind.name(), "exists");
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn ten_thousand_clones_are_one_transaction_and_no_file() {
    let mut lab = Lab::new();
    lab.store().create("gold", SIZE).unwrap();
    lab.write("gold", 7);
    lab.snapshot("gold@1");
    let before = std::fs::metadata(lab.store().directory().catalog()).unwrap().len();
    let names: Vec<String> = (0..10_000).map(|n| format!("clone {n}")).collect();
    let taken = ["clone 10000", "gold"];
    assert_eq!(lab.store().clone_snapshot(&at("gold@1"), &taken).unwrap_err().kind.name(), "exists");
    assert_eq!(lab.store().list().unwrap().len(), 1, "all or none");
    lab.store().clone_snapshot(&at("gold@1"), &names).unwrap();
    lab.open();
    assert_eq!(lab.store().list().unwrap().len(), 10_001);
    let grown = std::fs::metadata(lab.store().directory().catalog()).unwrap().len() - before;
    assert!(grown < 10_000 * 2048, "{grown} bytes");
    assert_eq!(std::fs::read_dir(lab.store().directory().layers()).unwrap().count(), 1);
    let tree = lab.store().tree().unwrap();
    assert_eq!(tree.entries[&tree.roots[0]].children.len(), 10_001);
}

#[test]
fn an_attached_volume_is_refused_to_others() {
    let lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    let attachment = lab.with(|store, io| async move { store.attach(&io, "v").await }).unwrap();
    let (kind, text) = lab.with(|store, io| async move { store.attach(&io, "v").await }).err().unwrap();
    assert_eq!((kind.as_str(), text.contains("the volume is attached")), ("in-use", true), "{text}");
    let taken = lab.with(|store, io| async move { store.snapshot(&io, &at("v@s")).await });
    assert_eq!(taken.unwrap_err().0, "in-use");
    let gone = lab.with(|store, io| async move { store.delete_volume(&io, "v", false).await });
    assert_eq!(gone.unwrap_err().0, "in-use");
    assert_eq!(lab.store().list().unwrap()[0].usage, Some("attached"));
    lab.store().rename_volume("v", "w").unwrap();
    lab.store().detach(attachment, Some(2 * SIZE)).unwrap();
    let listed = lab.store().list().unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].size, listed[0].usage), ("w", 2 * SIZE, None));
}

#[test]
fn a_snapshot_that_is_read_stays_until_then() {
    let lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    lab.write("v", 9);
    lab.snapshot("v@s");
    let reader = lab.store().read_snapshot(&at("v@s")).unwrap();
    lab.with(|store, io| async move { store.delete_volume(&io, "v", true).await }).unwrap();
    let (first, reader) = lab.first_read(reader);
    assert_eq!(first, 9);
    let tidied = lab.with(|store, io| async move { store.tidy(&io).await }).unwrap();
    assert_eq!(tidied.nodes, 0);
    drop(reader);
    let tidied = lab.with(|store, io| async move { store.tidy(&io).await }).unwrap();
    assert_eq!(tidied.nodes, 1);
    assert_eq!(std::fs::read_dir(lab.store().directory().layers()).unwrap().count(), 0);
}

#[test]
fn orphans_are_found_and_removed() {
    let lab = Lab::new();
    let id = sapwood_store::Id([7; 16]);
    let path = lab.store().directory().layer(id);
    let io = lab.io.clone();
    let options = CreateInStore { id: id.0, size: SIZE, base: None, segment_size: 64 << 10 };
    lab.run(async move { create_in_store(&HostStorage, &io, &path, &options).await }).unwrap();
    std::fs::write(lab.store().directory().layers().join("note"), "of somebody else").unwrap();
    assert_eq!(lab.store().orphans().unwrap(), [id]);
    let tidied = lab.with(|store, io| async move { store.tidy(&io).await }).unwrap();
    assert_eq!(tidied.orphans, [id]);
    assert_eq!(lab.store().orphans().unwrap(), []);
    assert!(lab.store().directory().layers().join("note").exists());
}

#[test]
fn notes_settings_and_numbers_are_kept() {
    let mut lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    lab.snapshot("v@s");
    let (volume, snapshot): (Name, Name) = ("v".parse().unwrap(), "v@s".parse().unwrap());
    let note = |name, note| lab.store().note(name, &[note]);
    note(&volume, NotesChange::Describe("the web server".to_owned())).unwrap();
    note(&volume, NotesChange::Label("tier".to_owned(), "gold".to_owned())).unwrap();
    note(&snapshot, NotesChange::Protect(true)).unwrap();
    for wrong in [
        NotesChange::Label("a=b".to_owned(), String::new()),
        NotesChange::Describe("x".repeat(5000)),
        NotesChange::Unlabel("none".to_owned()),
    ] {
        assert_eq!(note(&volume, wrong).unwrap_err().kind.name(), "invalid");
    }
    // All of them or none.
    let both = [NotesChange::Describe("no more".to_owned()), NotesChange::Unlabel("none".to_owned())];
    assert_eq!(lab.store().note(&volume, &both).unwrap_err().kind.name(), "invalid");
    let row = lab.store().catalog().view().unwrap().volumes().unwrap().remove(0).1;
    assert_eq!((row.notes.description.as_str(), row.notes.labels.len()), ("the web server", 1));
    let kept = lab.with(|store, io| async move { store.delete_snapshot(&io, &at("v@s")).await });
    assert_eq!(kept.unwrap_err().0, "protected");
    let kept = lab.with(|store, io| async move { store.delete_volume(&io, "v", true).await });
    assert_eq!(kept.unwrap_err().0, "protected");
    let settings = SpaceSettings { quota: Some(1 << 30), reserve: None, watermarks: vec![80, 95] };
    lab.store().set_space_settings(&settings).unwrap();
    let wrong = SpaceSettings { watermarks: vec![95, 80], ..settings.clone() };
    assert_eq!(lab.store().set_space_settings(&wrong).unwrap_err().kind.name(), "invalid");
    let wrong = SpaceSettings { quota: Some(0), ..settings.clone() };
    assert_eq!(lab.store().set_space_settings(&wrong).unwrap_err().kind.name(), "invalid");
    let pack = PackRow { kind: PackKind::Data, bytes: 64 << 20, entries: 9000, live_bytes: None };
    let run = IndexRow { level: 2, entries: 9000 };
    let numbered = lab.store().catalog().change(|change| {
        change.put_pack(300, Some(&pack))?;
        change.put_pack(2, Some(&pack))?;
        change.put_index_run(5, Some(&run))?;
        change.put_counter("packs", 300)
    });
    numbered.unwrap();
    lab.open();
    let list = lab.store().list().unwrap();
    assert_eq!((list[0].notes.description.as_str(), list[0].snapshots), ("the web server", 1));
    assert_eq!(list[0].notes.labels["tier"], "gold");
    assert_eq!(lab.store().space_settings().unwrap(), settings);
    let view = lab.store().catalog().view().unwrap();
    assert_eq!(view.packs().unwrap(), [(2, pack.clone()), (300, pack)]);
    assert_eq!(view.index_runs().unwrap(), [(5, run)]);
    assert_eq!((view.counter("packs").unwrap(), view.counter("runs").unwrap()), (300, 0));
}

#[test]
fn limits_are_kept_with_the_volume_and_its_groups() {
    let mut lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    let named =
        |pairs: &[(&str, u64)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let set = |pairs: &[(&str, u64)]| LimitsChange { limits: named(pairs), ..LimitsChange::default() };
    let put = |group: &str| LimitsChange { group: Some(Some(group.to_owned())), ..LimitsChange::default() };
    let kind = |result: sapwood_store::Result<()>| result.unwrap_err().kind.name();
    lab.store().limit_volume("v", &set(&[("iops-total", 500), ("iops-total-max", 900)])).unwrap();
    lab.store().limit_volume("v", &set(&[("weight", 200)])).unwrap();
    for wrong in
        [set(&[("iops", 1)]), set(&[("iops", 0)]), set(&[("iops-total-max", 3)]), set(&[("weight", 1 << 40)])]
    {
        assert_eq!(kind(lab.store().limit_volume("v", &wrong)), "invalid");
    }
    assert_eq!(kind(lab.store().limit_volume("v", &put("tenant"))), "not-found");
    assert_eq!(kind(lab.store().limit_volume("w", &set(&[]))), "not-found");
    lab.store().limit_group("tenant", &set(&[("bps-total", 1 << 20)])).unwrap();
    lab.store().limit_group("all", &set(&[])).unwrap();
    lab.store().limit_group("tenant", &put("all")).unwrap();
    lab.store().limit_volume("v", &put("tenant")).unwrap();
    assert_eq!(kind(lab.store().limit_group("all", &put("tenant"))), "invalid", "groups in each other");
    assert_eq!(kind(lab.store().limit_group("a/b", &set(&[]))), "invalid");
    assert_eq!(kind(lab.store().delete_group("all")), "in-use");
    assert_eq!(kind(lab.store().delete_group("tenant")), "in-use");
    // A snapshot, a new name and a new start change nothing of it; a clone has none.
    lab.snapshot("v@s");
    lab.store().rename_volume("v", "w").unwrap();
    lab.store().clone_snapshot(&at("w@s"), &["clone".to_owned()]).unwrap();
    lab.open();
    let limits = lab.store().limits().unwrap();
    let row = &limits.volumes["w"].1;
    assert_eq!(row.limits, named(&[("iops-total", 500), ("iops-total-max", 900), ("weight", 200)]));
    assert_eq!(
        (row.group.as_deref(), limits.groups["tenant"].group.as_deref()),
        (Some("tenant"), Some("all"))
    );
    assert_eq!((limits.volumes.len(), limits.groups.len()), (1, 2));
    let none = LimitsChange { reset: true, group: Some(None), ..LimitsChange::default() };
    lab.store().limit_volume("w", &none).unwrap();
    lab.store().delete_group("tenant").unwrap();
    lab.store().delete_group("all").unwrap();
    assert_eq!(kind(lab.store().delete_group("all")), "not-found");
    assert_eq!(lab.store().limits().unwrap(), AllLimits::default());
    for number in 0..8 {
        lab.store().limit_group(&format!("g{number}"), &set(&[])).unwrap();
    }
    let nest =
        |number: u32| lab.store().limit_group(&format!("g{number}"), &put(&format!("g{}", number + 1)));
    (0..7).for_each(|number| nest(number).unwrap());
    lab.store().limit_group("g8", &set(&[])).unwrap();
    assert_eq!(kind(nest(7)), "invalid", "too deep");
}

#[test]
fn a_view_sees_one_moment() {
    let lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    let view = lab.store().catalog().view().unwrap();
    lab.store().create("w", SIZE).unwrap();
    assert_eq!((view.volumes().unwrap().len(), lab.store().list().unwrap().len()), (1, 2));
}

#[test]
fn a_layer_over_a_snapshot_is_opened_through_the_store_only() {
    let lab = Lab::new();
    lab.store().create("v", SIZE).unwrap();
    lab.write("v", 4);
    lab.snapshot("v@s");
    let attachment = lab.with(|store, io| async move { store.attach(&io, "v").await }).unwrap();
    let (io, path) = (lab.io.clone(), attachment.path.clone());
    let alone =
        lab.run(async move { Layer::open(&HostStorage, &io, &path, &OpenLayer::default()).await.err() });
    let error = alone.unwrap();
    assert!(matches!(error.kind, ErrorKind::Base(_)));
    assert!(error.to_string().contains("go through the store"), "{error}");
    let (io, path) = (lab.io.clone(), attachment.path.clone());
    let described =
        lab.run(async move { info(&HostStorage, &io, &path, None).await }).unwrap().layer.unwrap();
    let base = described.store_base.unwrap();
    assert_eq!((base.store, base.size, described.base), (lab.store().id().0, SIZE, None));
    let text = base.to_string();
    assert!(text.contains(&format!("of store {}", lab.store().id())), "{text}");
    // Another file in the place of the snapshot's layer.
    let view = lab.store().catalog().view().unwrap();
    let node = view.node(sapwood_store::Id(base.snapshot)).unwrap().unwrap();
    let sapwood_store::rows::NodeState::Frozen { layer, .. } = node.state else { panic!("{node:?}") };
    let frozen = lab.store().directory().layer(layer);
    std::fs::remove_file(&frozen).unwrap();
    let (io, other) = (lab.io.clone(), frozen.clone());
    let options = CreateInStore { id: [9; 16], size: SIZE, base: None, segment_size: 64 << 10 };
    lab.run(async move { create_in_store(&HostStorage, &io, &other, &options).await }).unwrap();
    let (store, io, path) = (lab.store(), lab.io.clone(), attachment.path.clone());
    let opened = lab.run(async move {
        let options = OpenLayer::default();
        Layer::open_in_store(&HostStorage, &io, &path, &options, &store.resolver()).await.err()
    });
    let error = opened.unwrap().to_string();
    assert!(error.contains("is not what the catalog says") && error.contains("another layer"), "{error}");
}
