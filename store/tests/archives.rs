//! What leaves a store, on the host's files: archives, which go from store to store, and lists of what differs.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, Command};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{Layer, OpenLayer};
use sapwood_image::sealed::{Exported, Hash, SealStats, Step, Workers};
use sapwood_store::catalog::Look;
use sapwood_store::rows::NodeState;
use sapwood_store::tree::State;
use sapwood_store::{
    Exporting, Imported, Importing, Name, NotesChange, SnapshotName, Store, StoreOptions, directory,
};

const BLOCK: usize = 4096;
const BLOCKS: usize = 300;

type Open = Arc<Store<HostStorage, BlockingEngine>>;
/// The kind and the text of an error.
type Told<T> = Result<T, (String, String)>;

fn engine() -> BlockingEngine {
    BlockingEngine::new().unwrap()
}

fn at(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

fn go(_: &SealStats) -> Step {
    Step::Go
}

/// A block that begins with its number, and compresses badly; 0 is zeroes.
fn noise(number: u32) -> Vec<u8> {
    let mut next = number;
    let mut words = Vec::new();
    while words.len() < BLOCK {
        words.extend(next.to_le_bytes());
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223 * number.min(1)).rotate_left(7);
    }
    words
}

/// One store.
struct Lab {
    folder: tempfile::TempDir,
    io: Io<BlockingEngine>,
    store: Option<Open>,
}

impl Lab {
    fn new() -> Self {
        let mut lab = Self { folder: tempfile::tempdir().unwrap(), io: Io::new(engine()), store: None };
        let (io, root) = (lab.io.clone(), lab.folder.path().join("store"));
        let options = StoreOptions { segment_size: 64 << 10, ..StoreOptions::default() };
        let made = options.clone();
        block_on(&lab.io, async move { directory::init(&HostStorage, &io, engine(), &root, &made).await })
            .unwrap();
        let (io, root) = (lab.io.clone(), lab.folder.path().join("store"));
        let opened = async move { Store::open(&HostStorage, &io, engine(), &root, options).await };
        lab.store = Some(Arc::new(block_on(&lab.io, opened).unwrap()));
        lab
    }

    fn store(&self) -> &Open {
        self.store.as_ref().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn with<T: 'static, F: Future<Output = sapwood_store::Result<T>>>(
        &self,
        action: impl FnOnce(Open, Io<BlockingEngine>) -> F + 'static,
    ) -> Told<T> {
        let (store, io) = (Arc::clone(self.store()), self.io.clone());
        let done = block_on(&self.io, async move { action(store, io).await });
        done.map_err(|error| (error.kind.name().to_owned(), error.to_string()))
    }

    /// Writes blocks that no other number fills.
    fn write(&self, volume: &'static str, writes: &[(usize, u32)]) {
        self.resize_and_write(volume, None, writes);
    }

    fn resize_and_write(&self, volume: &'static str, size: Option<u64>, writes: &[(usize, u32)]) {
        let attachment = self.with(move |store, io| async move { store.attach(&io, volume).await }).unwrap();
        let path = attachment.path.clone();
        let opened = self.with(move |store, io| async move {
            let options = OpenLayer::default();
            Ok(Layer::open_in_store(&HostStorage, &io, &path, &options, &store.resolver()).await?)
        });
        let layer = opened.unwrap();
        if let Some(size) = size {
            let layer = Arc::clone(&layer);
            self.with(move |_, io| async move { Ok(layer.resize(&io, size).await?) }).unwrap();
        }
        let mut queue = layer.queue_on(self.io.clone());
        for (block, number) in writes {
            let buf = SharedBuf::heap(BLOCK);
            buf.write_at(0, &noise(*number));
            let offset = GuestOffset((block * BLOCK) as u64);
            device::run(&mut queue, offset, BLOCK as u64, Command::Write(buf.into())).unwrap();
        }
        drop(queue);
        self.with(move |_, io| async move { Ok(layer.close(&io).await?) }).unwrap();
        self.store().detach(attachment, size).unwrap();
    }

    fn snapshot(&self, name: &str) {
        let name = at(name);
        self.with(|store, io| async move { store.snapshot(&io, &name).await }).unwrap();
    }

    /// The number in each block.
    fn contents(&self, name: &str) -> Vec<u32> {
        let number = |block: &[u8]| u32::from_le_bytes(block[..4].try_into().unwrap());
        self.bytes(name).chunks(BLOCK).map(number).collect()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let reader = self.store().read_snapshot(&at(name)).unwrap();
        let size = reader.size;
        let disk = self.with(|store, io| async move { store.open_snapshot(&io, &reader).await }).unwrap();
        let buf = SharedBuf::heap(size as usize);
        let mut queue = disk.queue_on(self.io.clone());
        device::run(&mut queue, GuestOffset(0), size, Command::Read(buf.clone().into())).unwrap();
        let mut bytes = vec![0; size as usize];
        buf.read_at(0, &mut bytes);
        bytes
    }

    fn export(&self, of: &str, since: Option<&str>, file: &str) -> Told<(Exported, PathBuf)> {
        let (of, since, path) = (at(of), since.map(at), self.path(file));
        let exported = self.with({
            let path = path.clone();
            |store, io| async move {
                let workers = Workers::inline(1).unwrap();
                let exporting = Exporting { of: &of, since: since.as_ref(), workers: &workers };
                store.export_archive(&io, &exporting, &path, &mut go).await
            }
        });
        Ok((exported?, path))
    }

    fn import(&self, path: &std::path::Path, name: &str) -> Told<Imported> {
        let (path, name) = (path.to_owned(), at(name));
        self.with(|store, io| async move {
            let workers = Workers::inline(1).unwrap();
            let importing = Importing { name: &name, workers: &workers };
            store.import_archive(&io, &importing, &path, &mut go).await
        })
    }

    /// By what a sealed snapshot is known; none of one that is not sealed.
    fn hash(&self, name: &str) -> Option<Hash> {
        let (tree, view) = (self.store().tree().unwrap(), self.store().catalog().view().unwrap());
        let entry = tree.entries.values().find(|entry| entry.name == name).unwrap();
        let row = view.node(entry.id).unwrap().unwrap();
        match row.state {
            NodeState::Sealed(top) => Some(top.root(row.size).hash()),
            _ => None,
        }
    }

    /// All that there is: what the tree says, and the files.
    fn everything(&self) -> (String, Vec<String>) {
        let tree = serde_json::to_string(&self.store().tree().unwrap()).unwrap();
        let directory = self.store().directory();
        let mut files = Vec::new();
        for folder in [directory.packs(), directory.index(), directory.layers()] {
            files.extend(fs::read_dir(folder).unwrap().map(|entry| format!("{:?}", entry.unwrap().path())));
        }
        files.sort();
        (tree, files)
    }

    /// The blocks in which snapshots differ, and how many of them were compared.
    fn diff(&self, from: Option<&str>, to: &str) -> (Vec<usize>, u64) {
        let (from, to) = (from.map(at), at(to));
        let (found, ranges) = self
            .with(|store, io| async move {
                let mut ranges = Vec::new();
                let found = store.diff(&io, from.as_ref(), &to, &mut |range| ranges.push(range)).await?;
                Ok((found, ranges))
            })
            .unwrap();
        assert_eq!(found.extents, ranges.len() as u64);
        assert_eq!(found.bytes, ranges.iter().map(|range| range.end - range.start).sum::<u64>());
        assert!(ranges.is_sorted_by(|a, b| a.end < b.start), "{ranges:?}");
        let blocks = ranges.iter().flat_map(|r| r.start as usize / BLOCK..(r.end as usize).div_ceil(BLOCK));
        (blocks.collect(), found.blocks_compared)
    }

    /// The same by reading everything.
    fn compared(&self, from: Option<&str>, to: &str) -> Vec<usize> {
        let (mut old, mut new) = (from.map(|from| self.bytes(from)).unwrap_or_default(), self.bytes(to));
        let blocks = old.len().max(new.len()).div_ceil(BLOCK);
        [&mut old, &mut new].into_iter().for_each(|disk| disk.resize(blocks * BLOCK, 0));
        let differs = |n: &usize| old[n * BLOCK..][..BLOCK] != new[n * BLOCK..][..BLOCK];
        (0..blocks).filter(differs).collect()
    }

    fn seal(&self, name: &str) {
        let name = at(name);
        let seal = |store: Open, io| async move {
            let workers = Workers::inline(1).unwrap();
            store.seal(&io, &name, &workers, &mut go).await
        };
        self.with(seal).unwrap();
    }

    /// What lies below an entry of the tree.
    fn below(&self, name: &str) -> Option<String> {
        let tree = self.store().tree().unwrap();
        let entry = tree.entries.values().find(|entry| entry.name == name).unwrap();
        entry.parent.map(|parent| tree.entries[&parent].name.clone())
    }
}

/// A volume `web` with the snapshots `a` and `b`.
fn made() -> Lab {
    let lab = Lab::new();
    lab.store().create("web", (BLOCKS * BLOCK) as u64).unwrap();
    lab.write("web", &(0..200).map(|block| (block, 1 + block as u32)).collect::<Vec<_>>());
    lab.snapshot("web@a");
    lab.write("web", &[(3, 5000), (250, 5001), (7, 0)]);
    lab.snapshot("web@b");
    lab
}

#[test]
fn a_snapshot_is_the_same_elsewhere() {
    let (here, there) = (made(), Lab::new());
    here.store()
        .note(&Name::Snapshot(at("web@b")), &[NotesChange::Describe("the second".to_owned())])
        .unwrap();
    assert_eq!((here.hash("web@a"), here.hash("web@b")), (None, None));
    let (exported, path) = here.export("web@b", None, "b.sapwood").unwrap();
    assert_eq!((exported.info.name.as_str(), exported.info.description.as_str()), ("web@b", "the second"));
    assert_eq!(fs::metadata(&path).unwrap().len(), exported.bytes);
    assert_eq!(here.hash("web@b"), Some(exported.info.root), "it was sealed");

    let imported = there.import(&path, "copy@first").unwrap();
    assert_eq!(imported.hash, exported.info.root);
    assert_eq!(there.hash("copy@first"), Some(exported.info.root));
    assert_eq!(there.contents("copy@first"), here.contents("web@b"));
    assert_eq!(there.below("copy"), Some("copy@first".to_owned()));
    let tree = there.store().tree().unwrap();
    assert_eq!(tree.entries[&imported.snapshot].notes.description, "the second");

    // Back again: the same archive but for the ids in it.
    let (again, other) = there.export("copy@first", None, "again.sapwood").unwrap();
    assert_eq!((again.info.root, again.bytes), (exported.info.root, exported.bytes));
    let files = there.everything().1;
    let twice = there.import(&other, "more@first").unwrap();
    assert_eq!((twice.pack_bytes, twice.hash), (0, exported.info.root));
    assert_eq!(there.everything().1, files, "nothing new is stored");
    assert_eq!(there.contents("more@first"), here.contents("web@b"));

    let (kind, text) = there.import(&path, "copy@other").unwrap_err();
    assert_eq!(kind, "exists", "{text}");
    let (kind, text) = here.export("web@b", None, "b.sapwood").unwrap_err();
    assert_eq!(kind, "io", "{text}");
    assert!(text.contains("b.sapwood"), "{text}");
}

#[test]
fn increments_follow_each_other_as_they_are_received() {
    let (here, there) = (made(), Lab::new());
    here.snapshot("web@c");
    let (whole, a) = here.export("web@a", None, "a").unwrap();
    let (step, b) = here.export("web@b", Some("web@a"), "b").unwrap();
    let (_, c) = here.export("web@c", Some("web@b"), "c").unwrap();
    assert_eq!(step.info.base, Some(whole.info.root));
    assert_eq!(step.stats.unique, 2, "{:?}", step.stats);

    let nothing = there.everything();
    let (kind, text) = there.import(&b, "copy@b").unwrap_err();
    assert_eq!(kind, "base", "{text}");
    assert!(text.contains(&whole.info.root.to_string()), "it says what is wanted: {text}");
    assert_eq!(there.everything(), nothing);

    there.import(&a, "copy@a").unwrap();
    there.import(&b, "copy@b").unwrap();
    // A volume over a snapshot that holds nothing itself, and with a layer that holds nothing.
    there.snapshot("copy@bare");
    there.write("copy", &[]);
    there.import(&c, "copy@c").unwrap();
    for (name, of) in [("copy@a", "web@a"), ("copy@b", "web@b"), ("copy@bare", "web@b"), ("copy@c", "web@c")]
    {
        assert_eq!(there.contents(name), here.contents(of), "{name}");
    }
    assert_eq!(there.hash("copy@b"), here.hash("web@b"));
    let line = ["copy", "copy@c", "copy@bare", "copy@b", "copy@a"];
    for pair in line.windows(2) {
        assert_eq!(there.below(pair[0]).as_deref(), Some(pair[1]));
    }
    assert_eq!(there.below("copy@a"), None);
    assert!(there.everything().1.iter().all(|file| !file.contains(".layer")), "the empty layer went");
    // The volume goes on from there, and another one may lie over the same base.
    there.write("copy", &[(1, 9)]);
    there.import(&b, "other@b").unwrap();
    assert_eq!(there.below("other@b"), Some("copy@a".to_owned()));
}

#[test]
fn a_volume_that_is_something_else_receives_nothing() {
    let (here, there) = (made(), Lab::new());
    let (_, a) = here.export("web@a", None, "a").unwrap();
    let (_, b) = here.export("web@b", Some("web@a"), "b").unwrap();
    there.import(&a, "copy@a").unwrap();
    there.store().clone_snapshot(&at("copy@a"), &["written", "moved"]).unwrap();
    there.write("written", &[(0, 7)]);
    there.write("moved", &[(0, 7)]);
    there.snapshot("moved@on");
    there.store().create("fresh", (BLOCKS * BLOCK) as u64).unwrap();
    let attached = there.with(|store, io| async move { store.attach(&io, "copy").await }).unwrap();
    let before = there.everything();
    for (name, wanted) in [
        ("written@b", "unsaved"),
        ("moved@b", "exists"),
        ("fresh@b", "exists"),
        ("copy@b", "in-use"),
        ("copy@a", "exists"),
        ("a/b@c", "invalid"),
    ] {
        let name = match name.parse() {
            Ok(name) => name,
            Err(_) => SnapshotName { volume: "a/b".to_owned(), snapshot: "c".to_owned() },
        };
        let path = b.clone();
        let done = there.with(|store, io| async move {
            let workers = Workers::inline(1).unwrap();
            let importing = Importing { name: &name, workers: &workers };
            store.import_archive(&io, &importing, &path, &mut go).await
        });
        let (kind, text) = done.unwrap_err();
        assert_eq!(kind, wanted, "{text}");
        assert_eq!(there.everything(), before);
    }
    there.store().detach(attached, None).unwrap();
    there.import(&b, "copy@b").unwrap();
}

#[test]
fn a_flipped_bit_is_an_error_and_leaves_nothing() {
    let (here, there) = (made(), Lab::new());
    let (_, path) = here.export("web@b", None, "b").unwrap();
    let good = fs::read(&path).unwrap();
    let (bits, mut refused) = (good.len() * 8, 0);
    for n in 0..150 {
        let bit = (n * 7919 * 8191 + n) % bits;
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        let before = there.everything();
        match there.import(&path, "copy@b") {
            Err((kind, text)) => {
                assert!(["corrupt", "unsupported", "io"].contains(&kind.as_str()), "{kind}: {text}");
                assert_eq!(there.everything(), before, "bit {bit}");
                refused += 1;
            }
            // What lies between records, and lists of what is in them, is not needed.
            Ok(_) => {
                assert_eq!(there.contents("copy@b"), here.contents("web@b"), "bit {bit}");
                let delete = |store: Open, io| async move { store.delete_volume(&io, "copy", true).await };
                there.with(delete).unwrap();
            }
        }
    }
    // Nine tenths of the file are records.
    assert!(refused > 120, "{refused} of 150 were refused");
}

#[test]
fn what_is_stopped_leaves_nothing_and_deleted_snapshots_can_be_waited_for() {
    let (here, there) = (made(), Lab::new());
    let (_, path) = here.export("web@b", None, "b").unwrap();
    let nothing = there.everything();
    let from = path.clone();
    let stopped = there.with(|store, io| async move {
        let workers = Workers::inline(1).unwrap();
        let name = at("copy@b");
        let importing = Importing { name: &name, workers: &workers };
        store.import_archive(&io, &importing, &from, &mut |_: &SealStats| Step::Stop).await
    });
    assert_eq!(stopped.unwrap_err().0, "cancelled");
    assert_eq!(there.everything(), nothing);

    // While it is written the snapshot is deleted with its volume.
    let (to, of) = (here.path("late"), at("web@b"));
    let exported = here.with({
        let to = to.clone();
        |store, io| async move {
            let workers = Workers::inline(1).unwrap();
            let exporting = Exporting { of: &of, since: None, workers: &workers };
            let (other, mut is_gone) = (Arc::clone(&store), false);
            let inner = io.clone();
            let mut watch = Deleting(|| (Arc::clone(&other), inner.clone()), &mut is_gone);
            store.export_archive(&io, &exporting, &to, &mut watch).await
        }
    });
    let exported = exported.unwrap();
    assert!(here.store().list().unwrap().is_empty(), "it was deleted meanwhile");
    assert_eq!(there.import(&to, "copy@b").unwrap().hash, exported.info.root);
    here.with(|store, io| async move { store.tidy(&io).await }).unwrap();
    assert_eq!(here.store().tree().unwrap().nameless, 0);
}

/// Deletes `web` when it is asked first.
struct Deleting<'a, F>(F, &'a mut bool);

impl<F: Fn() -> (Open, Io<BlockingEngine>)> sapwood_image::sealed::Watch for Deleting<'_, F> {
    async fn between(&mut self, _: &SealStats) -> Step {
        if !std::mem::replace(self.1, true) {
            let (store, io) = (self.0)();
            store.delete_volume(&io, "web", true).await.unwrap();
        }
        Step::Go
    }
}

#[test]
fn a_disk_of_zeroes_and_what_follows_it_go_elsewhere() {
    let (here, there) = (Lab::new(), Lab::new());
    here.store().create("new", (BLOCKS * BLOCK) as u64).unwrap();
    here.snapshot("new@empty");
    here.write("new", &[(9, 9)]);
    here.snapshot("new@full");
    let (_, empty) = here.export("new@empty", None, "empty").unwrap();
    let (_, full) = here.export("new@full", Some("new@empty"), "full").unwrap();
    there.store().create("base", (BLOCKS * BLOCK) as u64).unwrap();
    there.snapshot("base@zero");
    there.import(&full, "base@full").unwrap();
    assert_eq!(there.below("base@full"), Some("base@zero".to_owned()));
    there.import(&empty, "copy@empty").unwrap();
    assert_eq!(there.contents("base@full"), here.contents("new@full"));
    assert_eq!(there.contents("copy@empty"), vec![0; BLOCKS]);
    let tree = there.store().tree().unwrap();
    assert!(tree.entries.values().any(|entry| entry.state == State::Sealed));
}

#[test]
fn what_differs_is_known_to_the_block_whatever_the_sizes_are() {
    let lab = made();
    let bytes = |blocks: usize| Some((blocks * BLOCK) as u64 - 1024);
    lab.store().clone_snapshot(&at("web@a"), &["side"]).unwrap();
    // Smaller, and larger again: what was cut off stays cut off. Block 3 is what it was in web@a again.
    lab.resize_and_write("web", bytes(100), &[(3, 4), (50, 6000)]);
    lab.snapshot("web@small");
    lab.snapshot("web@bare");
    lab.resize_and_write("web", bytes(6000), &[(150, 6001), (5998, 6002)]);
    lab.snapshot("web@large");
    lab.write("side", &[(0, 7000), (199, 0)]);
    lab.snapshot("side@one");
    lab.store().create("other", (10 * BLOCK) as u64).unwrap();
    lab.snapshot("other@zero");
    let names = ["web@a", "web@b", "web@small", "web@bare", "web@large", "side@one", "other@zero"];
    let check = |state: &str| {
        for to in names {
            for from in names.iter().map(|name| Some(*name)).chain([None]) {
                assert_eq!(lab.diff(from, to).0, lab.compared(from, to), "{state}: from {from:?} to {to}");
            }
        }
    };
    check("frozen");
    let (differ, compared) = lab.diff(Some("web@a"), "web@b");
    assert_eq!((differ, compared), (vec![3, 7, 250], 3), "what both lie over is not looked at");
    lab.seal("web@b");
    check("sealed up to web@b");
    let (differ, compared) = lab.diff(Some("web@b"), "side@one");
    assert!(differ.contains(&250) && compared <= 5, "{compared} were compared");
    lab.seal("web@large");
    lab.seal("side@one");
    check("sealed");
    let all: u64 = names.iter().map(|to| lab.diff(Some("web@a"), to).1).sum();
    assert_eq!(all, 0, "the trees tell");
}
