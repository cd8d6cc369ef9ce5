//! A process that has a store open.

use std::cell::Cell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command, DeviceError, DeviceQueue};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ImageError;
use sapwood_image::layer::{Layer, OpenLayer};
use sapwood_image::sealed::collect::Limits;
use sapwood_image::sealed::{MemoryBlock, MemorySource, SealStats, Step, Workers};
use sapwood_store::catalog::Look;
use sapwood_store::rows::NodeState;
use sapwood_store::tree::State;
use sapwood_store::{
    Attachment, Collected, Importing, Name, NotesChange, SnapshotName, Store, StoreError, StoreOptions,
    Tidied, directory,
};
use std::collections::BTreeSet;

use super::action::{Action, Progress, Writes};
use super::model::{self, BLOCKS};
use crate::sim::engine::SimEngine;
use crate::sim::storage::SimStorage;
use crate::sim::world::{ProcessId, World};

const BLOCK: usize = 4096;
/// Packs are small, so that a disk has several.
const PACK_BYTES: u64 = 512;

/// What went wrong, in the store, an image or a device.
#[derive(Debug)]
pub struct Failure {
    /// The kind, by name.
    pub kind: String,
    /// What was said.
    pub text: String,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self { kind: error.kind.name().to_owned(), text: error.to_string() }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self { kind: error.kind.name().to_owned(), text: error.to_string() }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self { kind: "device".to_owned(), text: error.to_string() }
    }
}

/// The result of something that is done.
pub type Done<T = ()> = Result<T, Failure>;

/// The directory of the store.
pub fn root() -> PathBuf {
    PathBuf::from("/stores/store")
}

/// A process of one thread.
pub struct Rig {
    /// The world.
    pub world: World,
    /// The process.
    pub process: ProcessId,
    storage: SimStorage,
    io: Io<SimEngine>,
    options: StoreOptions,
    store: Option<Arc<Store<SimStorage, SimEngine>>>,
    /// How far the write under way has come.
    pub progress: Cell<Progress>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.io.abandon_tasks();
    }
}

fn inline() -> Workers {
    Workers::inline(1).expect("there is memory for tables")
}

fn snapshot_name(volume: &str, snapshot: &str) -> SnapshotName {
    SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() }
}

impl Rig {
    /// A process that has nothing open.
    pub fn new(world: &World, options: &StoreOptions) -> Self {
        let process = world.process();
        Self {
            world: world.clone(),
            process,
            storage: world.storage(process),
            io: Io::new(world.engine(process)),
            options: StoreOptions {
                segment_size: 64 << 10,
                pack_bytes: PACK_BYTES,
                clock: || 1,
                ..options.clone()
            },
            store: None,
            progress: Cell::default(),
        }
    }

    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        block_on(&self.io, task)
    }

    /// Makes the store.
    ///
    /// # Errors
    /// What the store says.
    pub fn init(&self) -> Done {
        let (storage, io, options) = (self.storage.clone(), self.io.clone(), self.options.clone());
        let engine = self.world.engine(self.process);
        Ok(self
            .run(async move { directory::init(&storage, &io, engine, &root(), &options).await })
            .map(drop)?)
    }

    /// Opens the store, and takes away what a crash has left.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(&mut self) -> Done<Tidied> {
        self.store = None;
        let engine = self.world.engine(self.process);
        let (io, storage, options) = (self.io.clone(), self.storage.clone(), self.options.clone());
        let opened = self.run(async move { Store::open(&storage, &io, engine, &root(), options).await });
        let store = Arc::new(opened?);
        self.store = Some(Arc::clone(&store));
        let io = self.io.clone();
        Ok(self.run(async move { store.tidy(&io).await })?)
    }

    /// The open store.
    ///
    /// # Panics
    /// If it is not open.
    pub fn store(&self) -> Arc<Store<SimStorage, SimEngine>> {
        Arc::clone(self.store.as_ref().expect("an open store"))
    }

    fn open_layer(&self, path: &Path, read_only: bool) -> Done<Arc<Layer<SimEngine>>> {
        let (storage, io, store) = (self.storage.clone(), self.io.clone(), self.store());
        let path = path.to_owned();
        Ok(self.run(async move {
            let options = OpenLayer { read_only, ..OpenLayer::default() };
            Layer::open_in_store(&storage, &io, &path, &options, &store.resolver()).await
        })?)
    }

    fn close(&self, layer: Arc<Layer<SimEngine>>) -> Done {
        let io = self.io.clone();
        Ok(self.run(async move { layer.close(&io).await })?)
    }

    fn attach(&self, volume: &str) -> Done<Attachment> {
        let (io, store, volume) = (self.io.clone(), self.store(), volume.to_owned());
        Ok(self.run(async move { store.attach(&io, &volume).await })?)
    }

    fn write(&self, layer: &Arc<Layer<SimEngine>>, writes: &Writes) -> Done {
        let mut queue = layer.queue_on(self.io.clone());
        for (n, (block, mark)) in writes.iter().enumerate() {
            let buf = SharedBuf::heap(BLOCK);
            buf.write_at(0, &mark.to_le_bytes().repeat(BLOCK / 4));
            let at = GuestOffset((block * BLOCK) as u64);
            device::run(&mut queue, at, BLOCK as u64, Command::Write(buf.into()))?;
            self.progress.set(Progress { reported: n + 1, is_flushed: false });
        }
        device::run(&mut queue, GuestOffset(0), 0, Command::Flush)?;
        self.progress.set(Progress { reported: writes.len(), is_flushed: true });
        Ok(())
    }

    fn contents(&self, mut queue: impl DeviceQueue, size: u64) -> Done<Vec<u32>> {
        let len = size as usize;
        let buf = SharedBuf::heap(len);
        device::run(&mut queue, GuestOffset(0), len as u64, Command::Read(buf.clone().into()))?;
        let mut bytes = vec![0; len];
        buf.read_at(0, &mut bytes);
        let mark = |block: &[u8]| {
            let mark = u32::from_le_bytes(block[..4].try_into().expect("4 bytes"));
            let whole = block.chunks(4).all(|word| word == mark.to_le_bytes());
            if whole { mark } else { u32::MAX }
        };
        Ok(bytes.chunks(BLOCK).map(mark).collect())
    }

    /// What a volume holds; it is attached for that.
    ///
    /// # Errors
    /// What the store says.
    pub fn read_volume(&self, volume: &str) -> Done<Vec<u32>> {
        let attachment = self.attach(volume)?;
        let layer = self.open_layer(&attachment.path, false)?;
        let contents = self.contents(layer.queue_on(self.io.clone()), layer.geometry().size)?;
        self.close(layer)?;
        self.store().detach(attachment, None)?;
        Ok(contents)
    }

    /// What a snapshot holds.
    ///
    /// # Errors
    /// What the store says.
    pub fn read_snapshot(&self, volume: &str, snapshot: &str) -> Done<Vec<u32>> {
        let reader = self.store().read_snapshot(&snapshot_name(volume, snapshot))?;
        let (io, store) = (self.io.clone(), self.store());
        let (disk, reader) = self.run(async move { (store.open_snapshot(&io, &reader).await, reader) });
        let contents = self.contents(disk?.queue_on(self.io.clone()), reader.size);
        drop(reader);
        contents
    }

    /// The blocks in which a snapshot differs from another, or from zeroes.
    ///
    /// # Errors
    /// What the store says.
    pub fn diff(&self, from: Option<&(String, String)>, to: &(String, String)) -> Done<Vec<usize>> {
        let name = |(volume, snapshot): &(String, String)| snapshot_name(volume, snapshot);
        let (io, store, from, to) = (self.io.clone(), self.store(), from.map(name), name(to));
        let found = self.run(async move {
            let mut ranges = Vec::new();
            let found = store.diff(&io, from.as_ref(), &to, &mut |range| ranges.push(range)).await;
            found.map(|found| (found, ranges))
        });
        let (found, ranges) = found?;
        assert_eq!(found.extents, ranges.len() as u64);
        assert!(ranges.is_sorted_by(|a, b| a.end < b.start), "apart, and in order: {ranges:?}");
        let blocks =
            ranges.into_iter().flat_map(|range| range.start as usize / BLOCK..range.end as usize / BLOCK);
        Ok(blocks.collect())
    }

    fn write_volume(&self, volume: &str, writes: &Writes, closed: bool) -> Done {
        let attachment = self.attach(volume)?;
        let layer = self.open_layer(&attachment.path, false)?;
        self.write(&layer, writes)?;
        if closed {
            self.close(layer)?;
        }
        self.store().detach(attachment, None)?;
        Ok(())
    }

    fn live(&self, volume: &str, snapshot: &str, before: &Writes, after: &Writes) -> Done {
        let attachment = self.attach(volume)?;
        let old = self.open_layer(&attachment.path, false)?;
        // As the daemon does: a name that is taken is found before anything is written for it.
        let size = old.geometry().size;
        if self.store().read_snapshot(&snapshot_name(volume, snapshot)).is_ok() {
            self.close(old)?;
            let text = "taken".to_owned();
            return Err(Failure { kind: "exists".to_owned(), text });
        }
        self.write(&old, before)?;
        let (io, store, name) = (self.io.clone(), self.store(), snapshot.to_owned());
        let (prepared, mut attachment) = self.run(async move {
            let prepared = store.prepare(&io, &attachment, &name, size).await;
            (prepared, attachment)
        });
        let prepared = prepared?;
        let store = self.store();
        let node = store.commit(&mut attachment, &prepared)?;
        self.close(old)?;
        let new = self.open_layer(&attachment.path, false)?;
        self.write(&new, after)?;
        store.settled(node)?;
        self.close(new)?;
        store.detach(attachment, None)?;
        Ok(())
    }

    /// Seals whatever can be sealed, until that was asked `stop_after` times for a next segment.
    fn seal(&self, stop_after: u64) -> Done {
        let (io, store) = (self.io.clone(), self.store());
        Ok(self.run(async move {
            let workers = inline();
            let mut left = stop_after;
            while left > 0 {
                let mut watch = |_: &SealStats| {
                    left = left.saturating_sub(1);
                    if left == 0 { Step::Stop } else { Step::Go }
                };
                if store.seal_next(&io, &workers, &mut watch).await?.is_none() {
                    break;
                }
            }
            store.sweep(&io).await;
            Ok::<_, StoreError>(())
        })?)
    }

    /// Frees what nobody needs: packs that went, and those that had to stay.
    ///
    /// # Errors
    /// What the store says.
    pub fn collect(&self, live_percent: u32) -> Done<Collected> {
        let (io, store) = (self.io.clone(), self.store());
        let limits = Limits { live_percent, ..Limits::default() };
        Ok(self.run(async move { store.collect(&io, &Arc::default(), limits).await })?)
    }

    fn import(&self, volume: &str, snapshot: &str, marks: &[u32]) -> Done {
        let (io, store, name) = (self.io.clone(), self.store(), snapshot_name(volume, snapshot));
        let block = |mark: &u32| match mark {
            0 => MemoryBlock::Zero,
            mark => MemoryBlock::Data(mark.to_le_bytes().repeat(BLOCK / 4)),
        };
        let mut source = MemorySource::new((BLOCKS * BLOCK) as u64, marks.iter().map(block).collect());
        self.run(async move {
            let workers = inline();
            let importing = Importing { name: &name, workers: &workers };
            store.import(&io, &importing, &mut source, &mut |_: &SealStats| Step::Go).await
        })
        .map(drop)?;
        Ok(())
    }

    /// Does something.
    ///
    /// # Errors
    /// What the store, an image or a device says.
    pub fn perform(&mut self, action: &Action) -> Done {
        self.progress.take();
        let (io, store) = (self.io.clone(), self.store());
        match action.clone() {
            Action::Create(name) => drop(store.create(&name, (BLOCKS * BLOCK) as u64)?),
            Action::Write(volume, writes, closed) => self.write_volume(&volume, &writes, closed)?,
            Action::Live(volume, snapshot, before, after) => {
                self.live(&volume, &snapshot, &before, &after)?
            }
            Action::Snapshot(volume, name) => {
                self.run(async move { store.snapshot(&io, &snapshot_name(&volume, &name)).await })
                    .map(drop)?;
            }
            Action::Clone(volume, name, names) => {
                store.clone_snapshot(&snapshot_name(&volume, &name), &names).map(drop)?;
            }
            Action::Switch(volume, (of, name), discard) => self
                .run(async move { store.switch(&io, &volume, &snapshot_name(&of, &name), discard).await })?,
            Action::Rollback(volume, discard) => {
                self.run(async move { store.rollback(&io, &volume, discard).await }).map(drop)?;
            }
            Action::RenameVolume(from, to) => store.rename_volume(&from, &to)?,
            Action::RenameSnapshot(volume, from, to) => {
                store.rename_snapshot(&snapshot_name(&volume, &from), &to)?;
            }
            Action::DeleteVolume(name, all) => {
                self.run(async move { store.delete_volume(&io, &name, all).await })?;
            }
            Action::DeleteSnapshot(volume, name) => {
                self.run(async move { store.delete_snapshot(&io, &snapshot_name(&volume, &name)).await })?;
            }
            Action::ProtectVolume(name, on) => {
                store.note(&Name::Volume(name), &[NotesChange::Protect(on)])?
            }
            Action::ProtectSnapshot(volume, name, on) => {
                store.note(&Name::Snapshot(snapshot_name(&volume, &name)), &[NotesChange::Protect(on)])?;
            }
            Action::Seal(stop_after) => self.seal(stop_after)?,
            Action::Collect(percent) => drop(self.collect(percent)?),
            Action::Import(volume, snapshot, marks) => self.import(&volume, &snapshot, &marks)?,
            Action::Reopen => {
                drop(store);
                self.open()?;
            }
        }
        Ok(())
    }

    /// What the store says is there, as [`model::Model::summary`] does.
    ///
    /// # Errors
    /// What the store says.
    pub fn summary(&self) -> Done<BTreeSet<String>> {
        let tree = self.store().tree()?;
        let name = |id| tree.entries.get(&id).map_or_else(|| format!("{id}?"), |entry| entry.name.clone());
        let lines = tree.entries.values().map(|entry| {
            let is_head = entry.state == State::Head;
            model::line(&entry.name, entry.parent.map(name), entry.notes.protected, is_head)
        });
        Ok(lines.collect())
    }

    /// Compares the files with what the catalog names, and looks for nodes that nothing needs.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check_files(&self) -> Result<(), String> {
        let store = self.store();
        let told = |error: StoreError| error.to_string();
        let view = store.catalog().view().map_err(told)?;
        let mut named = BTreeSet::new();
        for (_, row) in view.volumes().map_err(told)? {
            named.extend(row.layer);
        }
        for (id, row) in view.nodes().map_err(told)? {
            if let NodeState::Frozen { layer, .. } = row.state {
                named.insert(layer);
            }
            if row.name.is_none() && !view.has_children(id).map_err(told)? {
                return Err(format!("nothing needs node {id}"));
            }
        }
        let folder = store.directory().layers();
        self.compare_files(&folder, named.iter().map(|id| format!("{id}.layer")).collect())?;
        let packs = view.packs().map_err(told)?.into_iter().map(|(number, _)| format!("{number:08x}.pack"));
        self.compare_files(&store.directory().packs(), packs.collect())?;
        let runs = view.index_runs().map_err(told)?.into_iter();
        let runs = runs.map(|(number, _)| format!("{number:08x}.index"));
        self.compare_files(&store.directory().index(), runs.collect())
    }

    fn compare_files(&self, folder: &Path, named: BTreeSet<String>) -> Result<(), String> {
        let found = self.storage.list_directory(folder).map_err(|error| error.to_string())?;
        let found: BTreeSet<String> = found.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        if found == named {
            return Ok(());
        }
        let (too_many, missing) = (&found - &named, &named - &found);
        Err(format!("{}: {too_many:?} without a name, {missing:?} without a file", folder.display()))
    }
}
