//! What is done with a store in the background, on the host's files: collection, accounts, scrubbing, checks, room.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, Command, DeviceError};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{Layer, OpenLayer, Tuning};
use sapwood_image::sealed::collect::{Detail, Limits, Pace};
use sapwood_image::sealed::{MemoryBlock, MemorySource, SealStats, Step, Workers};
use sapwood_image::volume::Volume;
use sapwood_store::catalog::{Child, Look};
use sapwood_store::rows::{NodeState, SpaceSettings};
use sapwood_store::{
    Account, Collected, Id, Importing, Problem, Scrubbed, Severity, SnapshotName, Store, StoreOptions,
    Touched, directory,
};

const BLOCK: usize = 4096;
/// Blocks of every disk.
const BLOCKS: usize = 64;

type TestStore = Store<HostStorage, BlockingEngine>;

struct Lab {
    folder: tempfile::TempDir,
    io: Io<BlockingEngine>,
    store: Option<Arc<TestStore>>,
}

fn engine() -> BlockingEngine {
    BlockingEngine::new().unwrap()
}

fn at(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

/// A block that no other mark has, and that does not compress.
fn block(mark: u32) -> Vec<u8> {
    let mut state = u64::from(mark) << 32 | 0x9E37_79B9;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 24) as u32
    };
    let mut bytes: Vec<u8> = (0..BLOCK / 4).flat_map(|_| word().to_le_bytes()).collect();
    bytes[..4].copy_from_slice(&mark.to_le_bytes());
    bytes
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut lab = Self { folder, io: Io::new(engine()), store: None };
        let (io, root) = (lab.io.clone(), lab.root());
        lab.run(async move {
            directory::init(&HostStorage, &io, engine(), &root, &StoreOptions::default()).await
        })
        .unwrap();
        lab.open();
        lab
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn open(&mut self) {
        self.store = None;
        self.store = Some(Arc::new(self.open_at(self.root())));
    }

    fn open_at(&self, root: PathBuf) -> TestStore {
        // Packs are small, so that there are several.
        let options =
            StoreOptions { segment_size: 64 << 10, pack_bytes: 64 << 10, ..StoreOptions::default() };
        let io = self.io.clone();
        self.run(async move {
            let store = Store::open(&HostStorage, &io, engine(), &root, options).await?;
            store.tidy(&io).await?;
            Ok::<_, sapwood_store::StoreError>(store)
        })
        .unwrap()
    }

    fn store(&self) -> Arc<TestStore> {
        Arc::clone(self.store.as_ref().unwrap())
    }

    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        block_on(&self.io, task)
    }

    /// Does something with the store, to its end; the error's kind and text.
    fn with<T: 'static, F: Future<Output = sapwood_store::Result<T>>>(
        &self,
        action: impl FnOnce(Arc<TestStore>, Io<BlockingEngine>) -> F + 'static,
    ) -> Result<T, (String, String)> {
        let (store, io) = (self.store(), self.io.clone());
        let done = self.run(async move { action(store, io).await });
        done.map_err(|error| (error.kind.name().to_owned(), error.to_string()))
    }

    /// Imports a disk whose blocks have these marks; 0 is a block of zeroes.
    fn import(&self, name: &str, marks: &[u32]) -> Result<(), (String, String)> {
        let name = at(name);
        let blocks = marks.iter().map(|mark| match mark {
            0 => MemoryBlock::Zero,
            mark => MemoryBlock::Data(block(*mark)),
        });
        let mut source = MemorySource::new((marks.len() * BLOCK) as u64, blocks.collect());
        self.with(move |store, io| async move {
            let workers = Workers::inline(1).unwrap();
            let importing = Importing { name: &name, workers: &workers };
            store.import(&io, &importing, &mut source, &mut |_: &SealStats| Step::Go).await.map(drop)
        })
    }

    fn layer(&self, path: PathBuf) -> Arc<Layer<BlockingEngine>> {
        let (store, io) = (self.store(), self.io.clone());
        self.run(async move {
            Layer::open_in_store(&HostStorage, &io, &path, &OpenLayer::default(), &store.resolver()).await
        })
        .unwrap()
    }

    fn write(&self, volume: &'static str, writes: &[(usize, u32)]) {
        let attachment = self.with(move |store, io| async move { store.attach(&io, volume).await }).unwrap();
        let layer = self.layer(attachment.path.clone());
        let mut queue = layer.queue_on(self.io.clone());
        for (at, mark) in writes {
            let buf = SharedBuf::heap(BLOCK);
            buf.write_at(0, &block(*mark));
            let offset = GuestOffset((at * BLOCK) as u64);
            device::run(&mut queue, offset, BLOCK as u64, Command::Write(buf.into())).unwrap();
        }
        drop(queue);
        let io = self.io.clone();
        self.run(async move { layer.close(&io).await }).unwrap();
        self.store().detach(attachment, None).unwrap();
    }

    fn snapshot(&self, name: &'static str) -> Result<Id, (String, String)> {
        self.with(move |store, io| async move { store.snapshot(&io, &at(name)).await })
    }

    fn seal_all(&self) {
        self.with(|store, io| async move {
            let workers = Workers::inline(1).unwrap();
            while store.seal_next(&io, &workers, &mut |_: &SealStats| Step::Go).await?.is_some() {}
            Ok(())
        })
        .unwrap();
    }

    fn delete(&self, name: &'static str) {
        self.with(move |store, io| async move {
            match name.contains('@') {
                true => store.delete_snapshot(&io, &at(name)).await,
                false => store.delete_volume(&io, name, true).await,
            }
        })
        .unwrap();
    }

    /// The marks of a snapshot's blocks; each block is compared as a whole.
    fn read(&self, name: &str) -> Vec<u32> {
        let reader = self.store().read_snapshot(&at(name)).unwrap();
        let (store, io) = (self.store(), self.io.clone());
        let (disk, reader) = self.run(async move { (store.open_snapshot(&io, &reader).await, reader) });
        let buf = SharedBuf::heap(reader.size as usize);
        let mut queue = disk.unwrap().queue_on(self.io.clone());
        device::run(&mut queue, GuestOffset(0), reader.size, Command::Read(buf.clone().into())).unwrap();
        let mut bytes = vec![0; reader.size as usize];
        buf.read_at(0, &mut bytes);
        let mark = |bytes: &[u8]| {
            let mark = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            assert!(mark == 0 && bytes.iter().all(|byte| *byte == 0) || bytes == block(mark), "{name}");
            mark
        };
        bytes.chunks(BLOCK).map(mark).collect()
    }

    fn collect(&self, live_percent: u32) -> Collected {
        self.with(move |store, io| async move {
            let limits = Limits { live_percent, ..Limits::default() };
            store.collect(&io, &Arc::default(), limits).await
        })
        .unwrap()
    }

    fn account(&self, detail: Detail) -> Account {
        self.with(move |store, io| async move { store.account(&io, &Arc::default(), detail).await }).unwrap()
    }

    fn scrub(&self) -> Scrubbed {
        self.with(|store, io| async move { store.scrub(&io, &Arc::default(), &mut |_| {}).await }).unwrap()
    }

    fn check(&self) -> Vec<Problem> {
        self.with(|store, io| async move { store.check(&io).await }).unwrap()
    }

    fn packs(&self) -> BTreeSet<u32> {
        self.store()
            .catalog()
            .view()
            .unwrap()
            .packs()
            .unwrap()
            .into_iter()
            .map(|(number, _)| number)
            .collect()
    }

    fn pack_path(&self, number: u32) -> PathBuf {
        self.store().directory().packs().join(format!("{number:08x}.pack"))
    }
}

/// Marks from `first` on, for a whole disk.
fn marks(first: u32) -> Vec<u32> {
    (first..).take(BLOCKS).collect()
}

#[test]
fn a_collection_frees_what_nothing_needs_and_moves_what_something_does() {
    let mut lab = Lab::new();
    lab.import("a@base", &marks(1000)).unwrap();
    lab.import("b@base", &marks(2000)).unwrap();
    // Most of the base's blocks are covered; a few are needed by what lies over it.
    let covered: Vec<(usize, u32)> =
        (0..BLOCKS).filter(|at| at % 5 > 0).map(|at| (at, 3000 + at as u32)).collect();
    lab.write("a", &covered);
    lab.snapshot("a@top").unwrap();
    lab.seal_all();
    assert!(lab.check().is_empty());
    let before = lab.packs();
    assert_eq!(lab.collect(50).packs_dropped, 0, "everything is needed");
    lab.delete("a@base");
    lab.delete("b");
    let collected = lab.collect(50);
    assert!(collected.kept.is_empty() && collected.held.is_empty() && !collected.is_stopped);
    assert!(
        collected.packs_rewritten > 0 && collected.packs_dropped > collected.packs_rewritten,
        "{collected:?}"
    );
    assert!(collected.bytes_freed > 64 * BLOCK as u64 && collected.bytes_freed > collected.bytes_written);
    let mut expected = marks(1000);
    covered.iter().for_each(|(at, mark)| expected[*at] = *mark);
    assert_eq!(lab.read("a@top"), expected);
    let gone: Vec<u32> = before.difference(&lab.packs()).copied().collect();
    assert!(
        gone.len() as u64 == collected.packs_dropped
            && gone.iter().all(|pack| !lab.pack_path(*pack).exists())
    );
    assert_eq!(lab.collect(50).packs_dropped, 0, "nothing is left to be freed");
    let live = lab.store().catalog().view().unwrap().packs().unwrap();
    assert!(live.iter().all(|(_, row)| row.live_bytes.is_some_and(|live| live > 0 && live <= row.bytes)));
    lab.open();
    assert!(lab.check().is_empty());
    assert_eq!(lab.read("a@top"), expected, "also by another process, with the places of now");
    assert!(lab.scrub().is_sound());
}

#[test]
fn a_collection_that_is_stopped_changes_nothing_and_can_be_begun_again() {
    let lab = Lab::new();
    lab.import("a@base", &marks(1000)).unwrap();
    lab.delete("a");
    let stopped = lab.with(|store, io| async move {
        let pace = Arc::new(Pace::default());
        pace.stop();
        store.collect(&io, &pace, Limits::default()).await
    });
    // Nothing is walked over, so there is nothing to stop before the packs are dropped.
    assert!(stopped.unwrap().is_stopped);
    lab.import("b@base", &marks(2000)).unwrap();
    let stopped = lab.with(|store, io| async move {
        let pace = Arc::new(Pace::default());
        pace.stop();
        store.collect(&io, &pace, Limits::default()).await
    });
    assert_eq!(stopped.unwrap_err().0, "cancelled");
    assert!(lab.check().is_empty() && lab.scrub().is_sound());
    lab.collect(50);
    assert_eq!(lab.read("b@base"), marks(2000));
}

#[test]
fn what_is_damaged_and_needed_stays_and_ends_no_other_collection() {
    let lab = Lab::new();
    lab.import("a@base", &marks(1000)).unwrap();
    let covered: Vec<(usize, u32)> =
        (0..BLOCKS).filter(|at| at % 16 > 0).map(|at| (at, 3000 + at as u32)).collect();
    lab.write("a", &covered);
    lab.snapshot("a@top").unwrap();
    lab.seal_all();
    lab.delete("a@base");
    // All records of the first pack are damaged.
    let path = lab.pack_path(*lab.packs().first().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    (BLOCK..64 << 10).step_by(1000).for_each(|at| bytes[at] ^= 1);
    std::fs::write(&path, bytes).unwrap();
    let collected = lab.collect(50);
    assert!(!collected.kept.is_empty() && path.exists(), "{collected:?}");
    assert!(!lab.scrub().touched.is_empty());
}

#[test]
fn what_is_sealed_in_part_is_kept() {
    let lab = Lab::new();
    let blocks = 3000;
    lab.store().create("v", (blocks * BLOCK) as u64).unwrap();
    let writes: Vec<(usize, u32)> = (0..blocks).step_by(100).map(|at| (at, 1 + at as u32)).collect();
    lab.write("v", &writes);
    let id = lab.snapshot("v@s").unwrap();
    lab.with(|store, io| async move {
        let workers = Workers::inline(1).unwrap();
        let mut asked = 0;
        let mut watch = |_: &SealStats| {
            asked += 1;
            if asked > 1 { Step::Stop } else { Step::Go }
        };
        store.seal_next(&io, &workers, &mut watch).await.map(drop)
    })
    .unwrap();
    let row = lab.store().catalog().view().unwrap().node(id).unwrap().unwrap();
    assert!(matches!(row.state, NodeState::Frozen { sealing: Some(_), .. }), "{row:?}");
    assert_eq!(lab.collect(100).packs_dropped, 0);
    lab.seal_all();
    let mut expected = vec![0; blocks];
    writes.iter().for_each(|(at, mark)| expected[*at] = *mark);
    assert_eq!(lab.read("v@s"), expected);
    assert_eq!(lab.check(), []);
}

#[test]
fn a_snapshot_that_cannot_be_sealed_keeps_no_other_from_it() {
    let lab = Lab::new();
    let seal = || {
        lab.with(|store, io| async move {
            let workers = Workers::inline(1).unwrap();
            let sealed = store.seal_next(&io, &workers, &mut |_: &SealStats| Step::Go).await?;
            Ok(sealed.map(|node| node.name.unwrap()))
        })
    };
    let mut ready = Vec::new();
    for (volume, snapshot) in [("a", "a@s"), ("b", "b@s"), ("c", "c@s")] {
        lab.store().create(volume, (BLOCKS * BLOCK) as u64).unwrap();
        lab.write(volume, &[(1, 7)]);
        let id = lab.snapshot(snapshot).unwrap();
        let row = lab.store().catalog().view().unwrap().node(id).unwrap().unwrap();
        let NodeState::Frozen { layer, .. } = row.state else { panic!("{row:?}") };
        ready.push((row.created_ms, id, snapshot, lab.store().directory().layer(layer)));
    }
    // In the order in which they are sealed, whatever the clock has said.
    ready.sort_unstable();
    let damage = |(_, _, _, path): &(u64, Id, &str, PathBuf)| {
        let whole = std::fs::read(path).unwrap();
        let mut bytes = whole.clone();
        bytes[..64 << 10].fill(0x55);
        std::fs::write(path, bytes).unwrap();
        (path.clone(), whole)
    };
    let damaged: Vec<_> = ready[..2].iter().map(damage).collect();
    assert_eq!(seal().unwrap().as_deref(), Some(ready[2].2));
    assert!(seal().unwrap_err().1.contains(damaged[0].0.to_str().unwrap()), "the first one is told");
    damaged.iter().for_each(|(path, whole)| std::fs::write(path, whole).unwrap());
    let sealed = [seal(), seal(), seal()].map(Result::unwrap);
    assert_eq!(sealed.each_ref().map(Option::as_deref), [Some(ready[0].2), Some(ready[1].2), None]);
    assert_eq!(lab.read("a@s")[1], 7);
    assert_eq!(lab.check(), []);
}

#[test]
fn runs_of_the_index_are_merged() {
    let mut lab = Lab::new();
    let names: Vec<String> = (0..20).map(|n| format!("v{n}@base")).collect();
    for (n, name) in names.iter().enumerate() {
        lab.import(name, &marks(1 + n as u32 * 100)).unwrap();
    }
    assert!(lab.store().stat().unwrap().index_runs >= 20);
    let upkeep = lab.with(|store, io| async move { store.upkeep(&io).await }).unwrap();
    assert!(upkeep.runs_merged >= 20);
    assert!(lab.store().stat().unwrap().index_runs < 8);
    assert!(lab.check().is_empty());
    // Half of the volumes go; what is said of them does, too, as runs are merged.
    for n in 0..10 {
        let name: &'static str = Box::leak(format!("v{n}").into_boxed_str());
        lab.delete(name);
    }
    lab.collect(50);
    lab.open();
    assert!(lab.check().is_empty() && lab.scrub().is_sound());
    for (n, name) in names.iter().enumerate().skip(10) {
        assert_eq!(lab.read(name), marks(1 + n as u32 * 100));
    }
}

/// Which snapshots hold each block, by its mark, as it was written.
type Holders = BTreeMap<u32, BTreeSet<Id>>;

/// Writes, snapshots, clones, seals and deletions at random: what each snapshot held, by its node, and how many nodes went.
fn random_snapshots(lab: &Lab, seed: u64) -> (BTreeMap<Id, Vec<u32>>, usize) {
    let mut deleted = 0;
    let mut state = seed * 77 + 1;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n as u64) as usize
    };
    // Every write has a mark of its own, so a block is stored once.
    let mut mark = BLOCKS as u32;
    lab.import("v0@s", &marks(1)).unwrap();
    let id_of = |name: &str| lab.store().read_snapshot(&at(name)).unwrap().id;
    let mut contents = BTreeMap::from([(id_of("v0@s"), marks(1))]);
    let mut names = vec!["v0@s"];
    let mut heads: BTreeMap<&'static str, Vec<u32>> = BTreeMap::from([("v0", marks(1))]);
    for step in 0..10 {
        let volume = *heads.keys().nth(below(heads.len())).unwrap();
        let count = below(12);
        let new = (mark + 1..).take(count);
        let writes: Vec<(usize, u32)> = new.map(|mark| (below(BLOCKS), mark)).collect();
        mark += count as u32;
        let head = heads.get_mut(volume).unwrap();
        writes.iter().for_each(|(at, mark)| head[*at] = *mark);
        let head = head.clone();
        lab.write(volume, &writes);
        let name: &'static str = Box::leak(format!("{volume}@t{step}").into_boxed_str());
        lab.snapshot(name).unwrap();
        lab.seal_all();
        contents.insert(id_of(name), head.clone());
        names.push(name);
        if below(3) == 0 {
            let clone: &'static str = Box::leak(format!("c{step}").into_boxed_str());
            lab.store().clone_snapshot(&at(name), &[clone]).unwrap();
            heads.insert(clone, head);
        }
        if below(3) == 0 {
            let before = lab.store().stat().unwrap().snapshots.sealed;
            lab.delete(names.swap_remove(below(names.len())));
            lab.collect(50);
            deleted += before - lab.store().stat().unwrap().snapshots.sealed;
        }
    }
    (contents, deleted)
}

#[test]
fn accounts_are_what_counting_from_first_principles_gives() {
    let (mut nameless, mut deleted) = (0, 0);
    for seed in 0..8u64 {
        let lab = Lab::new();
        let (mut contents, gone) = random_snapshots(&lab, seed);
        deleted += gone;
        nameless += lab.store().stat().unwrap().snapshots.nameless;
        let account = lab.account(Detail::Shared);
        // Deleted ones over which a volume lies are there without their names.
        let there = lab.store().catalog().view().unwrap().nodes().unwrap();
        contents.retain(|id, _| there.iter().any(|(there, _)| there == id));
        let mut holders = Holders::new();
        for (id, content) in &contents {
            for mark in content {
                holders.entry(*mark).or_default().insert(*id);
            }
        }
        for (id, amount) in &account.sealed_nodes {
            let of = |alone: bool| {
                holders.values().filter(|by| by.contains(id) && (by.len() == 1) == alone).count() as u64
            };
            assert_eq!(amount.exclusive.blocks, of(true), "seed {seed}, {id}: exclusive");
            assert_eq!(amount.shared.unwrap().blocks, of(false), "seed {seed}, {id}: shared");
            let space = account.nodes[id];
            assert_eq!(space.exclusive, amount.exclusive.stored_bytes());
            assert_eq!(space.shared, amount.shared.unwrap().stored_bytes());
            assert!(
                amount.exclusive.block_bytes >= amount.exclusive.blocks * BLOCK as u64,
                "it does not compress"
            );
        }
        let sealed = lab.store().stat().unwrap().snapshots.sealed;
        assert!(account.sealed_nodes.len() == sealed && sealed > 2);
        let unique = holders.len() as u64 * BLOCK as u64;
        assert_eq!(account.sealed.unique_bytes, unique, "seed {seed}");
        let referenced: usize = holders.values().map(BTreeSet::len).sum();
        assert_eq!(account.sealed.referenced_bytes, Some(referenced as u64 * BLOCK as u64));
        let tree = lab.store().tree().unwrap();
        for (id, space) in &account.nodes {
            let entry = tree.entries.get(id);
            assert!(entry.is_none_or(|entry| entry.space == Some(*space)), "it is in the catalog");
        }
    }
    assert!(nameless > 0 && deleted > 0, "{nameless} without names, {deleted} deleted");
}

#[test]
fn layers_count_for_those_that_they_are_of() {
    let lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    lab.write("v", &[(0, 7000), (1, 7001)]);
    lab.snapshot("v@frozen").unwrap();
    lab.write("v", &[(0, 7002)]);
    let account = lab.account(Detail::Exclusive);
    let store = lab.store();
    let frozen = store.read_snapshot(&at("v@frozen")).unwrap().id;
    let allocated = |layer: Id| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(store.directory().layer(layer)).unwrap().blocks() * 512
    };
    let view = store.catalog().view().unwrap();
    let NodeState::Frozen { layer, .. } = view.node(frozen).unwrap().unwrap().state else {
        panic!("not frozen")
    };
    assert_eq!((account.nodes[&frozen].exclusive, account.nodes[&frozen].shared), (allocated(layer), 0));
    let (id, row) = view.volumes().unwrap().pop().unwrap();
    assert_eq!(account.volumes[&id].exclusive, allocated(row.layer.unwrap()));
    let stat = store.stat().unwrap();
    assert_eq!(stat.taken.layers, allocated(layer) + allocated(row.layer.unwrap()));
    assert_eq!((stat.layers, stat.snapshots.frozen, stat.snapshots.sealed), (2, 1, 1));
}

fn touched<'a>(scrubbed: &'a Scrubbed, name: &str) -> Option<&'a Touched> {
    scrubbed.touched.iter().find(|touched| touched.name == name)
}

#[test]
fn a_flipped_bit_in_a_pack_is_named_by_what_it_touches() {
    let lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    lab.store().clone_snapshot(&at("v@base"), &["plain", "covering"]).unwrap();
    lab.import("other@base", &marks(500)).unwrap();
    assert!(lab.scrub().is_sound());
    let first = *lab.packs().first().unwrap();
    let path = lab.pack_path(first);
    let mut bytes = std::fs::read(&path).unwrap();
    // In the second record of the pack, or the first.
    bytes[BLOCK + 700] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let scrubbed = lab.scrub();
    assert_eq!((scrubbed.packs.damage_count, scrubbed.damaged_layers.len()), (1, 0));
    let base = touched(&scrubbed, "v@base").unwrap().clone();
    assert!(base.is_exact && base.through.is_none());
    let [range] = &base.ranges[..] else { panic!("{base:?}") };
    // What is said to be lost cannot be read, and nothing else.
    let lost = range.start as usize / BLOCK..range.end as usize / BLOCK;
    assert!(!lost.is_empty() && lost.end <= 32, "{lost:?}");
    let through = Some("v@base".to_owned());
    for name in ["v", "plain", "covering"] {
        let touched = touched(&scrubbed, name).unwrap();
        assert_eq!((&touched.ranges, &touched.through), (&base.ranges, &through));
    }
    assert!(touched(&scrubbed, "other@base").is_none() && touched(&scrubbed, "other").is_none());
    // Whoever covers what is lost is not touched, and who covers a part by the rest.
    let all: Vec<(usize, u32)> = lost.clone().map(|at| (at, 9000 + at as u32)).collect();
    lab.write("covering", &all);
    lab.write("plain", &all[..1]);
    let scrubbed = lab.scrub();
    assert!(touched(&scrubbed, "covering").is_none());
    let plain = touched(&scrubbed, "plain").unwrap();
    let rest = (lost.start + 1) * BLOCK..lost.end * BLOCK;
    assert_eq!((&plain.ranges[..], plain.is_exact), (&[rest.start as u64..rest.end as u64][..], true));
    // A snapshot of it is touched as it was, and its volume through that which is damaged.
    lab.snapshot("plain@later").unwrap();
    let scrubbed = lab.scrub();
    assert_eq!(touched(&scrubbed, "plain@later").unwrap().through, through);
    assert_eq!(touched(&scrubbed, "plain").unwrap().through, through);
}

#[test]
fn damage_in_a_layer_is_named_by_what_lies_over_it() {
    let lab = Lab::new();
    lab.store().create("v", (BLOCKS * BLOCK) as u64).unwrap();
    lab.write("v", &[(3, 33), (4, 44), (9, 99)]);
    let id = lab.snapshot("v@frozen").unwrap();
    lab.write("v", &[(9, 100)]);
    assert!(lab.scrub().is_sound());
    let view = lab.store().catalog().view().unwrap();
    let NodeState::Frozen { layer, .. } = view.node(id).unwrap().unwrap().state else { panic!("not frozen") };
    let path = lab.store().directory().layer(layer);
    let mut bytes = std::fs::read(&path).unwrap();
    for mark in [44, 99] {
        let wanted = block(mark);
        let found = bytes.chunks(BLOCK).position(|chunk| chunk == wanted).unwrap();
        bytes[found * BLOCK + 1234] ^= 1;
    }
    std::fs::write(&path, &bytes).unwrap();
    let scrubbed = lab.scrub();
    assert_eq!(scrubbed.damaged_layers.len(), 1);
    let range = |at: u64| at * BLOCK as u64..(at + 1) * BLOCK as u64;
    let frozen = touched(&scrubbed, "v@frozen").unwrap();
    assert_eq!(
        (&frozen.ranges[..], frozen.is_exact, &frozen.through),
        (&[range(4), range(9)][..], true, &None)
    );
    let head = touched(&scrubbed, "v").unwrap();
    assert_eq!((&head.ranges[..], head.is_exact), (&[range(4)][..], true), "it covers the other");
    assert_eq!(head.through.as_deref(), Some("v@frozen"));
    std::fs::write(&path, b"no layer").unwrap();
    let frozen = touched(&lab.scrub(), "v@frozen").unwrap().clone();
    assert_eq!((&frozen.ranges[..], frozen.is_exact), (&[0..(BLOCKS * BLOCK) as u64][..], false));
}

#[test]
fn a_damaged_run_of_the_index_is_made_again() {
    let mut lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    let run = std::fs::read_dir(lab.store().directory().index()).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&run).unwrap();
    bytes[BLOCK + 100] ^= 1;
    std::fs::write(&run, &bytes).unwrap();
    let scrubbed = lab.scrub();
    assert!(scrubbed.damaged_runs.len() == 1 && scrubbed.mended && scrubbed.touched.is_empty());
    assert!(lab.scrub().is_sound() && lab.check().is_empty());
    lab.open();
    assert_eq!(lab.read("v@base"), marks(1));
}

#[test]
fn a_check_finds_what_is_missing_and_what_is_left_over() {
    let mut lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    lab.write("v", &[(3, 33)]);
    lab.snapshot("v@frozen").unwrap();
    lab.write("v", &[(9, 100)]);
    assert_eq!(lab.check(), []);
    let store = lab.store();
    let subjects = |severity: Severity| -> Vec<String> {
        let problems = lab.check().into_iter().filter(|problem| problem.severity == severity);
        problems.map(|problem| problem.to_string()).collect()
    };
    // A layer and a file that nothing names.
    let stray = store.directory().layers().join(format!("{}.layer", "0".repeat(32)));
    std::fs::write(&stray, b"x").unwrap();
    assert_eq!((subjects(Severity::Leftover).len(), subjects(Severity::Damage).len()), (1, 0));
    std::fs::remove_file(&stray).unwrap();
    // Files that are missing, or others.
    let view = store.catalog().view().unwrap();
    let layer = view.volumes().unwrap()[0].1.layer.unwrap();
    let path = store.directory().layer(layer);
    let aside = path.with_extension("aside");
    std::fs::rename(&path, &aside).unwrap();
    assert!(subjects(Severity::Damage).iter().any(|text| text.starts_with("v: ")));
    let frozen = view.nodes().unwrap().into_iter().find_map(|(_, row)| match row.state {
        NodeState::Frozen { layer, .. } => Some(layer),
        _ => None,
    });
    std::fs::copy(store.directory().layer(frozen.unwrap()), &path).unwrap();
    assert!(subjects(Severity::Damage)[0].contains("it is layer"));
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(lab.check(), []);
    // Rows that do not fit one another.
    let nodes = view.nodes().unwrap();
    let base = nodes.iter().find(|(_, row)| row.name.as_deref() == Some("base")).unwrap().0;
    let stranger = Id([7; 16]);
    store.catalog().change(|change| change.add_child(Some(base), Child::Volume(stranger))).unwrap();
    assert_eq!(subjects(Severity::Damage).len(), 1);
    store.catalog().change(|change| change.remove_child(Some(base), Child::Volume(stranger))).unwrap();
    store.catalog().change(|change| change.put_name("ghost", Some(stranger))).unwrap();
    assert!(subjects(Severity::Damage)[0].starts_with("ghost: "));
    store.catalog().change(|change| change.put_name("ghost", None)).unwrap();
    store.catalog().change(|change| change.put_counter("pack", 1)).unwrap();
    assert!(subjects(Severity::Damage)[0].starts_with("counter pack: "));
    store.catalog().change(|change| change.put_counter("pack", 1000)).unwrap();
    assert_eq!(lab.check(), []);
    // A pack that is gone.
    drop((view, store));
    let pack = lab.pack_path(*lab.packs().first().unwrap());
    std::fs::remove_file(pack).unwrap();
    lab.open();
    let problems = lab.check();
    assert!(problems.iter().all(|problem| problem.severity == Severity::Damage) && !problems.is_empty());
}

fn limits(quota: Option<u64>, reserve: Option<u64>, watermarks: Vec<u8>) -> SpaceSettings {
    SpaceSettings { quota, reserve, watermarks }
}

#[test]
fn a_store_without_room_refuses_what_takes_room_and_says_what_to_do() {
    let lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    lab.write("v", &[(0, 33)]);
    let store = lab.store();
    assert_eq!(store.watermark().unwrap(), None);
    let taken = store.stat().unwrap().taken.total();
    store.set_space_settings(&limits(Some(taken * 4 / 3), None, vec![70, 90])).unwrap();
    let stat = store.stat().unwrap();
    assert_eq!((stat.watermark, stat.full_percent), (Some(70), Some(75)));
    assert_eq!(store.watermark().unwrap(), Some(70));
    store.set_space_settings(&limits(Some(taken / 2), None, vec![70, 90])).unwrap();
    assert_eq!(store.watermark().unwrap(), Some(90));
    let full = |refused: Result<(), (String, String)>| {
        let (kind, text) = refused.unwrap_err();
        assert_eq!(kind, "full");
        assert!(text.contains("quota") && text.contains("gc"), "{text}");
    };
    full(lab.snapshot("v@now").map(drop));
    full(lab.import("w@base", &marks(400)));
    // A clone takes no file; attaching it does.
    store.clone_snapshot(&at("v@base"), &["clone"]).unwrap();
    full(lab.with(|store, io| async move { store.attach(&io, "clone").await.map(drop) }));
    // What is attached already can be read and written, and deleting goes on.
    lab.with(|store, io| async move { store.attach(&io, "v").await.map(drop) }).unwrap();
    lab.delete("clone");
    lab.collect(50);
    store.set_space_settings(&limits(None, Some(u64::MAX), vec![])).unwrap();
    let (_, text) = lab.snapshot("v@now").unwrap_err();
    assert!(text.contains("reserved"), "{text}");
    store.set_space_settings(&limits(None, Some(1), vec![])).unwrap();
    lab.snapshot("v@now").unwrap();
}

/// Writes blocks at random places of an open volume until one is refused, or so many were written: how many.
fn fill(lab: &Lab, volume: &Arc<Volume<BlockingEngine>>, most: u32) -> u32 {
    let mut queue = volume.queue_on(lab.io.clone());
    for n in 0..most {
        let buf = SharedBuf::heap(BLOCK);
        buf.write_at(0, &block(n));
        let at = GuestOffset(u64::from(n * 7919 % (64 << 8)) * BLOCK as u64);
        if let Err(error) = device::run(&mut queue, at, BLOCK as u64, Command::Write(buf.into())) {
            assert_eq!(error, DeviceError::NoSpace);
            return n;
        }
    }
    most
}

#[test]
fn guests_write_as_far_as_the_room_goes_and_go_on_when_there_is_more() {
    let lab = Lab::new();
    let store = lab.store();
    store.create("v", 64 << 20).unwrap();
    let opened = lab.with(|store, io| async move {
        let mut attachment = store.attach(&io, "v").await?;
        let volume = store.open_volume(&io, &attachment, Tuning::default()).await?;
        store.snapshot_volume(&io, &mut attachment, &volume, "s").await?;
        Ok((attachment, volume))
    });
    let (attachment, volume) = opened.unwrap();
    let quota = store.stat().unwrap().taken.total() + (2 << 20);
    store.set_space_settings(&limits(Some(quota), None, vec![])).unwrap();
    let written = fill(&lab, &volume, 5000);
    assert!((100..600).contains(&written), "{written} blocks of 4 KiB were written into 2 MiB");
    assert_eq!(fill(&lab, &volume, 1), 0, "it is full still");
    let taken = store.stat().unwrap().taken.total();
    // What is kept back for discards and checkpoints was there before.
    assert!(taken <= quota + (512 << 10), "{taken} bytes with a quota of {quota}");
    store.set_space_settings(&limits(Some(quota + (4 << 20)), None, vec![])).unwrap();
    let more = fill(&lab, &volume, 5000);
    assert!((400..1200).contains(&more), "{more} blocks were written into 4 MiB more");
    store.set_space_settings(&limits(None, None, vec![])).unwrap();
    assert_eq!(fill(&lab, &volume, 2000), 2000);
    let io = lab.io.clone();
    lab.run(async move { volume.close(&io).await }).unwrap();
    store.detach(attachment, None).unwrap();
    assert_eq!(lab.check(), []);
}

#[test]
fn an_import_ends_where_the_room_does_and_leaves_nothing() {
    let lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    let store = lab.store();
    let taken = store.stat().unwrap().taken.total();
    store.set_space_settings(&limits(Some(taken + (200 << 10)), None, vec![])).unwrap();
    let large: Vec<u32> = (5000..5000 + 8 * BLOCKS as u32).collect();
    let (kind, text) = lab.import("w@base", &large).unwrap_err();
    assert!(kind == "full" && text.contains("quota"), "{kind}: {text}");
    assert_eq!(lab.check(), []);
    let files = std::fs::read_dir(store.directory().packs()).unwrap().count();
    assert_eq!(files, lab.packs().len(), "what was written is gone");
}

fn backup(lab: &Lab, to: PathBuf, pace: Pace) -> Result<sapwood_store::BackedUp, (String, String)> {
    lab.with(move |store, io| async move {
        let done = store.backup(&io, engine(), &to, &pace).await?;
        assert_eq!(pace.progress(), (done.bytes, done.bytes), "as much as there was to be done");
        Ok(done)
    })
}

/// What others do with a store meanwhile: imports, writes, snapshots, seals, deletions, collections. How often.
fn busy(store: &Arc<TestStore>, is_over: &std::sync::atomic::AtomicBool) -> u32 {
    let io = Io::new(engine());
    let mut lab = Lab { folder: tempfile::tempdir().unwrap(), io, store: Some(Arc::clone(store)) };
    let mut n = 0;
    while n < 3 || !is_over.load(std::sync::atomic::Ordering::Acquire) {
        let name: &'static str = Box::leak(format!("w{n}").into_boxed_str());
        let base = format!("{name}@base");
        lab.import(&base, &marks(10_000 + n * 1000)).unwrap();
        lab.write(name, &[(n as usize % BLOCKS, 500_000 + n)]);
        lab.snapshot(Box::leak(format!("{name}@later").into_boxed_str())).unwrap();
        if n % 2 == 0 {
            lab.seal_all();
        }
        if n > 2 {
            lab.delete(Box::leak(format!("w{}", n - 2).into_boxed_str()));
        }
        let collected = lab.with(|store, io| async move {
            store.collect(&io, &Arc::default(), Limits::default()).await.map(drop)
        });
        assert!(
            collected.is_ok() || collected.as_ref().is_err_and(|(kind, _)| kind == "in-use"),
            "{collected:?}"
        );
        n += 1;
    }
    lab.store = None;
    n
}

#[test]
fn a_backup_of_a_store_in_use_is_a_store_with_all_its_snapshots() {
    let mut lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    lab.write("v", &[(3, 700)]);
    lab.snapshot("v@frozen").unwrap();
    lab.write("v", &[(4, 701)]);
    lab.store().create("fresh", 4096).unwrap();
    for round in 0..3 {
        let to = lab.folder.path().join(format!("backup{round}"));
        let is_over = std::sync::atomic::AtomicBool::new(false);
        let store = lab.store();
        let done = std::thread::scope(|scope| {
            let busy = scope.spawn(|| busy(&store, &is_over));
            // Snapshots are never being closed for long, and neither is a collection.
            let done = loop {
                match backup(&lab, to.clone(), Pace::default()) {
                    Err((kind, _)) if kind == "in-use" => std::thread::yield_now(),
                    done => break done,
                }
            };
            is_over.store(true, std::sync::atomic::Ordering::Release);
            assert!(busy.join().unwrap() >= 3);
            done.unwrap()
        });
        assert!(done.files > 2 && done.without_heads.contains(&"v".to_owned()));
        let copy = Lab {
            folder: tempfile::tempdir().unwrap(),
            io: lab.io.clone(),
            store: Some(Arc::new(lab.open_at(to))),
        };
        assert_eq!(copy.check(), []);
        assert!(copy.scrub().is_sound());
        assert_eq!(copy.store().id(), store.id());
        let mut frozen = marks(1);
        frozen[3] = 700;
        assert_eq!((copy.read("v@base"), copy.read("v@frozen")), (marks(1), frozen));
        let tree = copy.store().tree().unwrap();
        // Every block of every snapshot is one that was written.
        tree.entries
            .values()
            .filter(|entry| entry.name.contains('@'))
            .for_each(|entry| drop(copy.read(&entry.name)));
        copy.write("v", &[(5, 702)]);
        copy.snapshot("v@on").unwrap();
        let mut on = copy.read("v@frozen");
        on[5] = 702;
        assert_eq!(copy.read("v@on"), on, "it goes on from its newest snapshot");
        drop(store);
        for n in 0..200 {
            let name: &'static str = Box::leak(format!("w{n}").into_boxed_str());
            if lab.store().list().unwrap().iter().any(|listed| listed.name == name) {
                lab.delete(name);
            }
        }
    }
    lab.open();
    assert_eq!(lab.check(), []);
}

#[test]
fn a_backup_that_is_cut_off_is_no_store_and_can_be_made_again() {
    let lab = Lab::new();
    lab.import("v@base", &marks(1)).unwrap();
    let to = lab.folder.path().join("backup");
    let pace = Pace::default();
    pace.stop();
    assert_eq!(backup(&lab, to.clone(), pace).unwrap_err().0, "cancelled");
    let opened = {
        let (io, to) = (lab.io.clone(), to.clone());
        lab.run(
            async move { Store::open(&HostStorage, &io, engine(), &to, StoreOptions::default()).await.err() },
        )
    };
    assert_eq!(opened.unwrap().kind.name(), "not-found");
    assert!(backup(&lab, to.clone(), Pace::default()).unwrap().without_heads.is_empty());
    let copy = Lab {
        folder: tempfile::tempdir().unwrap(),
        io: lab.io.clone(),
        store: Some(Arc::new(lab.open_at(to.clone()))),
    };
    assert_eq!((copy.check(), copy.read("v@base")), (vec![], marks(1)));
    drop(copy);
    assert_eq!(backup(&lab, to, Pace::default()).unwrap_err().0, "exists");
}

#[test]
fn a_volume_is_attached_while_its_layer_is_scrubbed() {
    let lab = Lab::new();
    lab.store().create("v", (BLOCKS * BLOCK) as u64).unwrap();
    lab.write("v", &(0..BLOCKS).map(|at| (at, 1 + at as u32)).collect::<Vec<_>>());
    let (mut beside, mut let_go) = (0, 0);
    for steps in 0.. {
        let (is_beside, in_use) = lab
            .with(move |store, io| async move {
                let pace = Arc::default();
                let mut progress = |_| {};
                let mut scrub = pin!(store.scrub(&io, &pace, &mut progress));
                let (mut scrubbed, mut step) = (None, 0);
                let mut is_over = poll_fn(|cx| {
                    if let Poll::Ready(found) = scrub.as_mut().poll(cx) {
                        scrubbed = Some(found);
                    }
                    step += 1;
                    if step > steps || scrubbed.is_some() {
                        Poll::Ready(scrubbed.is_some())
                    } else {
                        Poll::Pending
                    }
                })
                .await;
                let is_beside = !is_over;
                let mut attach = pin!(async {
                    let attachment = store.attach(&io, "v").await?;
                    let volume = store.open_volume(&io, &attachment, Tuning::default()).await?;
                    volume.close(&io).await?;
                    store.detach(attachment, None)
                });
                poll_fn(|cx| {
                    if !is_over && let Poll::Ready(found) = scrub.as_mut().poll(cx) {
                        (scrubbed, is_over) = (Some(found), true);
                    }
                    attach.as_mut().poll(cx)
                })
                .await?;
                let found = match scrubbed {
                    Some(found) => found?,
                    None => scrub.await?,
                };
                assert!(found.is_sound());
                Ok((is_beside, found.in_use.len()))
            })
            .unwrap();
        if !is_beside {
            break;
        }
        (beside, let_go) = (beside + 1, let_go + in_use);
    }
    assert!(beside > 3 && let_go > 0, "attached in {beside} moments of a scrub, which let go in {let_go}");
}
