//! A process that has a store open.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command, DeviceError, DeviceQueue};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ImageError;
use sapwood_image::layer::{Layer, OpenLayer};
use sapwood_image::sealed::collect::Limits;
use sapwood_image::sealed::{MemoryBlock, MemorySource, SealStats, Step, Workers};
use sapwood_store::{
    Attachment, Collected, Exporting, Importing, Name, NotesChange, SnapshotName, Store, StoreError, Tidied,
    directory,
};

use super::action::{Action, Progress, Writes};
use super::model::{BLOCKS, archive_name};
use super::setup::Setup;
use crate::sim::engine::SimEngine;
use crate::sim::storage::SimStorage;
use crate::sim::turns::Turn;
use crate::sim::world::{ProcessId, World};

pub(super) const BLOCK: usize = 4096;
/// Where archives are.
pub(super) const ARCHIVES: &str = "/archives";

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
    pub(super) storage: SimStorage,
    pub(super) io: Io<SimEngine>,
    pub(super) setup: Setup,
    store: Option<Arc<Store<SimStorage, SimEngine>>>,
    /// How far the write under way has come.
    pub progress: Cell<Progress>,
    /// What was read.
    pub found: RefCell<Option<Vec<u32>>>,
}

/// A process that has a store open, for one more thread of it.
pub struct Seat {
    world: World,
    process: ProcessId,
    setup: Setup,
    store: Option<Arc<Store<SimStorage, SimEngine>>>,
}

impl Seat {
    /// The thread, which takes turns with others.
    pub fn sit(self, turn: &Arc<Turn>) -> Rig {
        let Self { world, process, setup, store } = self;
        let engine = world.engine(process).taking_turns(Arc::clone(turn));
        let mut rig = Rig::of(&world, process, &setup, engine);
        rig.store = store;
        rig
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.io.abandon_tasks();
    }
}

fn inline() -> Workers {
    Workers::inline(1).expect("there is memory for tables")
}

pub(super) fn snapshot_name(volume: &str, snapshot: &str) -> SnapshotName {
    SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() }
}

impl Rig {
    /// A process that has nothing open.
    pub fn new(world: &World, setup: &Setup) -> Self {
        let process = world.process();
        Self::of(world, process, setup, world.engine(process))
    }

    fn of(world: &World, process: ProcessId, setup: &Setup, engine: SimEngine) -> Self {
        Self {
            world: world.clone(),
            process,
            storage: world.storage(process),
            io: Io::new(engine),
            setup: setup.clone(),
            store: None,
            progress: Cell::default(),
            found: RefCell::default(),
        }
    }

    /// For one more thread.
    pub fn seat(&self) -> Seat {
        let (world, setup) = (self.world.clone(), self.setup.clone());
        Seat { world, process: self.process, setup, store: self.store.clone() }
    }

    /// Size of a disk in bytes.
    fn size(&self) -> u64 {
        (BLOCKS * self.setup.spread * BLOCK) as u64
    }

    /// Where a block of the model is.
    fn offset(&self, block: usize) -> GuestOffset {
        GuestOffset((block * self.setup.spread * BLOCK) as u64)
    }

    pub(super) fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        block_on(&self.io, task)
    }

    /// Makes the store.
    ///
    /// # Errors
    /// What the store says.
    pub fn init(&self) -> Done {
        let (storage, io) = (self.storage.clone(), self.io.clone());
        let options = self.setup.options.clone();
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
        let (io, storage) = (self.io.clone(), self.storage.clone());
        let options = self.setup.options.clone();
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

    /// Waits for what is still read ahead.
    fn settle(&self) {
        self.io.poll(&mut Vec::new());
        while self.io.in_flight() > 0 {
            self.io.wait(None);
            self.io.poll(&mut Vec::new());
        }
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
            device::run(&mut queue, self.offset(*block), BLOCK as u64, Command::Write(buf.into()))?;
            self.progress.set(Progress { reported: n + 1, is_flushed: false });
        }
        device::run(&mut queue, GuestOffset(0), 0, Command::Flush)?;
        self.progress.set(Progress { reported: writes.len(), is_flushed: true });
        Ok(())
    }

    pub(super) fn contents(&self, mut queue: impl DeviceQueue, size: u64) -> Done<Vec<u32>> {
        let mark = |block: &[u8]| {
            let mark = u32::from_le_bytes(block[..4].try_into().expect("4 bytes"));
            let whole = block.chunks(4).all(|word| word == mark.to_le_bytes());
            if whole { mark } else { u32::MAX }
        };
        let mut read = |at, len| {
            let buf = SharedBuf::heap(len);
            device::run(&mut queue, at, len as u64, Command::Read(buf.clone().into()))?;
            let mut bytes = vec![0; len];
            buf.read_at(0, &mut bytes);
            Ok::<Vec<u32>, Failure>(bytes.chunks(BLOCK).map(mark).collect())
        };
        if self.setup.spread == 1 {
            return read(GuestOffset(0), size as usize);
        }
        let blocks = size as usize / (self.setup.spread * BLOCK);
        let block = |block| {
            let found = read(self.offset(block), 2 * BLOCK)?;
            Ok(if found[1] == 0 { found[0] } else { u32::MAX })
        };
        (0..blocks).map(block).collect()
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
        // What it has read ahead holds its file for a moment more, for which the store waits, as the daemon does.
        self.settle();
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
        let zeroes = || std::iter::repeat_with(|| MemoryBlock::Zero).take(self.setup.spread - 1);
        let blocks = marks.iter().flat_map(|mark| std::iter::once(block(mark)).chain(zeroes()));
        let mut source = MemorySource::new(self.size(), blocks.collect());
        self.run(async move {
            let workers = inline();
            let importing = Importing { name: &name, workers: &workers };
            store.import(&io, &importing, &mut source, &mut |_: &SealStats| Step::Go).await
        })
        .map(drop)?;
        Ok(())
    }

    fn export(&self, of: &(String, String), since: Option<&(String, String)>, archive: u64) -> Done {
        let name = |(volume, snapshot): &(String, String)| snapshot_name(volume, snapshot);
        let (io, store, of, since) = (self.io.clone(), self.store(), name(of), since.map(name));
        self.run(async move {
            let workers = inline();
            let exporting = Exporting { of: &of, since: since.as_ref(), workers: &workers };
            let path = Path::new(ARCHIVES).join(archive_name(archive));
            store.export_archive(&io, &exporting, &path, &mut |_: &SealStats| Step::Go).await
        })
        .map(drop)?;
        Ok(())
    }

    fn import_archive(&self, volume: &str, snapshot: &str, archive: u64) -> Done {
        let (io, store, name) = (self.io.clone(), self.store(), snapshot_name(volume, snapshot));
        self.run(async move {
            let workers = inline();
            let importing = Importing { name: &name, workers: &workers };
            let path = Path::new(ARCHIVES).join(archive_name(archive));
            store.import_archive(&io, &importing, &path, &mut |_: &SealStats| Step::Go).await
        })
        .map(drop)?;
        Ok(())
    }

    /// Removes layers that were in use when the catalog forgot them.
    pub fn sweep(&self) {
        let (io, store) = (self.io.clone(), self.store());
        self.run(async move { store.sweep(&io).await });
    }

    /// Does something.
    ///
    /// # Errors
    /// What the store, an image or a device says.
    pub fn perform(&mut self, action: &Action) -> Done {
        let done = self.perform_at_once(action);
        self.settle();
        assert!(
            self.io.tasks() == 0 || !self.world.is_alive(self.process),
            "{action:?} leaves what waits for nothing"
        );
        done
    }

    fn perform_at_once(&mut self, action: &Action) -> Done {
        self.progress.take();
        self.found.take();
        let (io, store) = (self.io.clone(), self.store());
        match action.clone() {
            Action::Create(name) => drop(store.create(&name, self.size())?),
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
            Action::Export(of, since, archive) => self.export(&of, since.as_ref(), archive)?,
            Action::ImportArchive(volume, snapshot, archive) => {
                self.import_archive(&volume, &snapshot, archive)?
            }
            Action::Read((volume, snapshot)) => {
                let found = self.read_snapshot(&volume, &snapshot)?;
                self.found.replace(Some(found));
            }
            Action::Reopen => {
                drop(store);
                self.open()?;
            }
        }
        Ok(())
    }
}
