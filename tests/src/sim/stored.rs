//! A disk in use whose layers a store prepares, and whose snapshots are sealed under it.
//!
//! Layers and commits are as in [`live`](super::live). Snapshot *n* is layer *n*, until a file says its root: then it is
//! sealed, and layer *n* goes as soon as nothing keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::device::{BlockDevice, Geometry};
use sapwood_blockdev::engine::{Op, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, FileOffset};
use sapwood_image::below::Chain;
use sapwood_image::layer::{self, CreateInStore, Layer, OpenLayer, ResolveBase, Resolved, StoreBase};
use sapwood_image::sealed::{
    Child, ExactMap, FRAME_BLOCKS, Hash, MemoryBlock, MemorySource, PACK_BYTES, Packs, Place, Root,
    SealStats, Sealing, Step, Workers, pack_name, seal,
};
use sapwood_image::volume::{Successor, Volume, VolumeQueue};
use sapwood_image::{ErrorKind, ImageError};

use super::engine::SimEngine;
use super::layer::LayerSubject;
use super::live::{commit, committed, layer_path, name_path, open_error, read_chain, sync_names};
use super::medium::SECTOR;
use super::plan::Shape;
use super::storage::SimStorage;
use super::subject::{Control, Disk, OpenError, Subject, Task};

/// Before what was refused, because something else is under way, is tried again.
const PAUSE: Time = Time::from_millis(1);
const FOLDER: &str = "/images";
const STORE: [u8; 16] = [0x5a; 16];

/// Volumes over layers that a store prepares.
#[derive(Clone, Debug, Default)]
pub struct StoredSubject {
    /// How layers are opened.
    pub layers: LayerSubject,
    /// A layer goes when its snapshot is sealed, whoever keeps it.
    pub careless: bool,
}

fn id(number: u64) -> [u8; 16] {
    (u128::from(number) + 1).to_le_bytes()
}

fn base(number: u64, size: u64) -> StoreBase {
    StoreBase { store: STORE, snapshot: id(number), size }
}

fn root_path(number: u64) -> PathBuf {
    name_path(number).with_extension("root")
}

fn encode(root: &Root) -> AlignedBuf {
    let mut bytes = root.size.to_le_bytes().to_vec();
    bytes.extend(root.tree.hash.0);
    bytes.extend(root.tree.place.to_bits().to_le_bytes());
    bytes.resize(BLOCK_BYTES, 0);
    AlignedBuf::from_slice(&bytes)
}

fn decode(bytes: &[u8]) -> Root {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let hash = Hash(bytes[8..40].try_into().expect("a hash"));
    Root { size: number(0), tree: Child { hash, place: Place::from_bits(number(40)) } }
}

/// What one process knows of the store.
struct Shelf {
    storage: SimStorage,
    packs: Arc<Packs<SimEngine>>,
    careless: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    sealed: BTreeMap<u64, Root>,
    /// Snapshots whose layer was closed.
    settled: BTreeSet<u64>,
    kept: BTreeMap<u64, Weak<Kept>>,
    is_sealing: bool,
    pack: u32,
}

/// Keeps the layer of a snapshot.
struct Kept {
    number: u64,
    storage: SimStorage,
    state: Arc<Mutex<State>>,
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("nobody panics with it")
}

impl Drop for Kept {
    fn drop(&mut self) {
        if locked(&self.state).sealed.contains_key(&self.number) {
            self.storage.unlink_now(&layer_path(self.number));
        }
    }
}

impl ResolveBase<SimEngine> for Shelf {
    fn resolve(&self, base: &StoreBase) -> Result<Resolved<SimEngine>, String> {
        let number = (u128::from_le_bytes(base.snapshot) - 1) as u64;
        let mut state = locked(&self.state);
        if let Some(root) = state.sealed.get(&number) {
            return Ok(Resolved::Sealed { packs: Arc::clone(&self.packs), root: *root });
        }
        let held = state.kept.get(&number).and_then(Weak::upgrade);
        let kept = held.unwrap_or_else(|| {
            let (storage, state) = (self.storage.clone(), Arc::clone(&self.state));
            Arc::new(Kept { number, storage, state })
        });
        state.kept.insert(number, Arc::downgrade(&kept));
        Ok(Resolved::Frozen { path: layer_path(number), layer: id(number), kept })
    }
}

impl Shelf {
    /// What the files say.
    fn new(storage: &SimStorage, careless: bool) -> Arc<Self> {
        let files = storage.clone();
        let packs = Packs::new(Path::new(FOLDER), move |number| {
            let path = Path::new(FOLDER).join(pack_name(number));
            let file = files.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
            let size = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
            Ok((file, 0..size))
        });
        let mut state = State::default();
        for number in committed(storage) {
            if let Some(bytes) = storage.world().contents(&root_path(number)) {
                state.sealed.insert(number, decode(&bytes));
            }
        }
        let names = storage.list_directory(Path::new(FOLDER)).unwrap_or_default();
        let numbers = names.iter().filter_map(|name| {
            // Whole, or left by a process that died while it was made.
            let (number, _) = name.to_str()?.split_once(".pack")?;
            u32::from_str_radix(number, 16).ok()
        });
        state.pack = numbers.max().unwrap_or(0);
        Arc::new(Self { storage: storage.clone(), packs, careless, state: Arc::new(Mutex::new(state)) })
    }

    fn resolver(self: &Arc<Self>) -> Arc<dyn ResolveBase<SimEngine>> {
        Arc::clone(self) as _
    }

    async fn read(&self, io: &Io<SimEngine>, number: u64) -> Result<Vec<u8>, ImageError> {
        let chain = Chain::open_in_store(&self.storage, io, &base(number, 0), self).await?;
        read_chain(&chain, io).await
    }

    /// Seals the oldest snapshot that can be.
    async fn seal_next(&self, io: &Io<SimEngine>) -> Result<(), ImageError> {
        let top = committed(&self.storage).pop();
        let next = {
            let state = locked(&self.state);
            let mut open = state.settled.iter().filter(|number| !state.sealed.contains_key(number));
            open.find(|number| Some(**number) != top).copied()
        };
        let Some(number) = next else { return Ok(()) };
        let root = self.seal(io, number).await?;
        let (new, storage) = (root_path(number).with_extension("new-root"), &self.storage);
        storage.unlink_now(&new);
        let file = storage.open(&new, OpenOptions::CREATE).map_err(|e| ImageError::io(&new, "create", e))?;
        let written = io.run(Op::write(file, FileOffset(0), encode(&root))).await.result;
        written.map_err(|errno| ImageError::errno(&new, "write", errno))?;
        commit(storage, io, &new, &root_path(number)).await?;
        let kept = {
            let mut state = locked(&self.state);
            state.sealed.insert(number, root);
            state.kept.get(&number).and_then(Weak::upgrade)
        };
        if kept.is_none() || self.careless {
            storage.unlink_now(&layer_path(number));
        }
        Ok(())
    }

    async fn seal(&self, io: &Io<SimEngine>, number: u64) -> Result<Root, ImageError> {
        let disk = self.read(io, number).await?;
        let blocks = disk.chunks(BLOCK_BYTES).map(|block| {
            let mut block = block.to_vec();
            block.resize(BLOCK_BYTES, 0);
            if block.iter().all(|byte| *byte == 0) { MemoryBlock::Zero } else { MemoryBlock::Data(block) }
        });
        let mut source = MemorySource::new(disk.len() as u64, blocks.collect());
        let workers = Workers::inline(0).map_err(|e| ImageError::io(FOLDER, "compress in", e))?;
        let sealing = Sealing {
            storage: &self.storage,
            io,
            directory: Path::new(FOLDER),
            packs: &self.packs,
            dedup: &mut ExactMap::default(),
            workers: &workers,
            base: None,
            frame_blocks: FRAME_BLOCKS,
            pack_bytes: PACK_BYTES,
            start: 0,
        };
        let numbers = || {
            let mut state = locked(&self.state);
            state.pack += 1;
            Ok(state.pack)
        };
        let sealed = seal(sealing, &mut source, numbers, &mut |_: &SealStats| Step::Go).await?;
        sync_names(io).await?;
        Ok(sealed.root)
    }

    /// What a dead process has left: layers of snapshots that are sealed, and those that were not closed.
    async fn tidy(self: &Arc<Self>, io: &Io<SimEngine>, options: &OpenLayer) -> Result<(), ImageError> {
        let mut numbers = committed(&self.storage);
        numbers.pop();
        for number in numbers {
            if locked(&self.state).sealed.contains_key(&number) {
                self.storage.unlink_now(&layer_path(number));
                continue;
            }
            let open = async |read_only| {
                let (path, options) = (layer_path(number), OpenLayer { read_only, ..options.clone() });
                Layer::open_in_store(&self.storage, io, &path, &options, &self.resolver()).await
            };
            if !open(true).await?.info().clean {
                open(false).await?.close(io).await?;
            }
            locked(&self.state).settled.insert(number);
        }
        Ok(())
    }
}

/// A volume, and the store that it is in.
pub struct Stored {
    volume: Arc<Volume<SimEngine>>,
    shelf: Arc<Shelf>,
    segment_size: u32,
}

impl Subject for StoredSubject {
    type Disk = Stored;

    fn queues_max(&self) -> usize {
        3
    }

    fn spare_sector(&self, _: SimStorage, _: Io<SimEngine>) -> Task<Option<u64>> {
        Box::pin(async { None })
    }

    fn create(&self, storage: SimStorage, io: Io<SimEngine>, shape: Shape) -> Task<Result<(), String>> {
        Box::pin(async move {
            let (size, segment_size) = (shape.sectors * SECTOR, shape.segment_size);
            let options = CreateInStore { id: id(0), size, base: None, segment_size };
            let made = layer::create_in_store(&storage, &io, &layer_path(0), &options).await;
            made.map_err(|error| error.to_string())
        })
    }

    fn open(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Task<Result<Arc<Stored>, OpenError>> {
        let (options, careless) = (self.layers.options(&shape), self.careless);
        Box::pin(async move {
            sync_names(&io).await.map_err(open_error)?;
            let shelf = Shelf::new(&storage, careless);
            shelf.tidy(&io, &options).await.map_err(open_error)?;
            let number = committed(&storage).pop().unwrap_or(0);
            let resolver = shelf.resolver();
            let layer = Layer::open_in_store(&storage, &io, &layer_path(number), &options, &resolver).await;
            let volume = Volume::new(layer.map_err(open_error)?);
            Ok(Arc::new(Stored { volume, shelf, segment_size: shape.segment_size }))
        })
    }

    fn check(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Result<Vec<String>, OpenError>> {
        Box::pin(async move {
            let mut errors = Vec::new();
            for number in committed(&storage) {
                let path = layer_path(number);
                if storage.world().contents(&root_path(number)).is_some() {
                    continue;
                }
                let found = layer::check(&storage, &io, &path).await.map_err(open_error)?.errors;
                if found.iter().any(|error| error.contains("in use by")) {
                    return Err(OpenError::Locked);
                }
                errors.extend(found.iter().map(|error| format!("{}: {error}", path.display())));
            }
            Ok(errors)
        })
    }

    fn snapshot(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        number: u64,
    ) -> Task<Result<Option<Vec<u8>>, OpenError>> {
        Box::pin(async move {
            let below = committed(&storage).into_iter().rev().skip_while(|other| *other != number).nth(1);
            let Some(below) = below else { return Ok(None) };
            Shelf::new(&storage, false).read(&io, below).await.map(Some).map_err(open_error)
        })
    }
}

impl BlockDevice for Stored {
    type Engine = SimEngine;
    type Queue = VolumeQueue<SimEngine>;

    fn geometry(&self) -> Geometry {
        self.volume.geometry()
    }

    fn queue(self: &Arc<Self>, engine: SimEngine) -> VolumeQueue<SimEngine> {
        self.volume.queue(engine)
    }

    fn set_write_cache(&self, enabled: bool) {
        self.volume.set_write_cache(enabled);
    }
}

impl Stored {
    async fn snapshot(&self, io: &Io<SimEngine>, number: u64) -> Result<(), ImageError> {
        let (storage, size) = (&self.shelf.storage, self.volume.geometry().size);
        let below = committed(storage).pop().unwrap_or(0);
        let (path, segment_size) = (layer_path(number), self.segment_size);
        let options = CreateInStore { id: id(number), size, base: Some(base(below, size)), segment_size };
        layer::create_in_store(storage, io, &path, &options).await?;
        let next = Successor::Prepared { path, resolver: self.shelf.resolver() };
        let name = name_path(number);
        let new = name.with_extension("new");
        loop {
            let commit = async || {
                storage.open(&new, OpenOptions::CREATE).map_err(|e| ImageError::io(&new, "create", e))?;
                commit(storage, io, &new, &name).await
            };
            match self.volume.snapshot(storage, io, &next, commit).await {
                // What lies below was being opened again.
                Err(ImageError { kind: ErrorKind::Unfinished(_), .. }) => {
                    io.sleep_until(io.now() + PAUSE).await;
                }
                taken => break taken?,
            }
        }
        locked(&self.shelf.state).settled.insert(below);
        Ok(())
    }

    /// Changes the size, perhaps after what lies below was opened again.
    async fn resize(&self, io: &Io<SimEngine>, size: u64) -> Result<(), ImageError> {
        loop {
            match self.volume.resize(io, size).await {
                Err(ImageError { kind: ErrorKind::Unfinished(_), .. }) => {
                    io.sleep_until(io.now() + PAUSE).await;
                }
                resized => return resized,
            }
        }
    }

    /// Seals a snapshot, and has the disk look what lies below.
    async fn seal(&self, io: &Io<SimEngine>) -> Result<(), ImageError> {
        if std::mem::replace(&mut locked(&self.shelf.state).is_sealing, true) {
            return Ok(());
        }
        let sealed = self.shelf.seal_next(io).await;
        locked(&self.shelf.state).is_sealing = false;
        sealed?;
        match self.volume.reopen_base(&self.shelf.storage, io, &self.shelf.resolver()).await {
            // It is told the next time.
            Err(ImageError { kind: ErrorKind::Unfinished(_), .. }) => Ok(()),
            reopened => reopened,
        }
    }
}

impl Disk for Stored {
    fn queue_on(self: &Arc<Self>, io: Io<SimEngine>) -> VolumeQueue<SimEngine> {
        self.volume.queue_on(io)
    }

    fn maintain(self: Arc<Self>, io: Io<SimEngine>) -> Task<()> {
        Box::pin(Volume::maintain(Arc::clone(&self.volume), io))
    }

    fn control(self: Arc<Self>, _: SimStorage, io: Io<SimEngine>, what: Control) -> Task<Result<(), String>> {
        Box::pin(async move {
            let result = match what {
                Control::Flatten | Control::Rebase | Control::Commit => Ok(()),
                Control::Checkpoint => self.volume.layer().checkpoint(&io).await,
                Control::Clean => self.volume.layer().clean(&io).await.map(drop),
                Control::Compact => self.volume.layer().compact(&io, |_, _| {}).await.map(drop),
                Control::Resize(size) => self.resize(&io, size).await,
                Control::Snapshot(number) => self.snapshot(&io, number).await,
                Control::Seal => self.seal(&io).await,
                Control::Close => self.volume.close(&io).await,
            };
            result.map_err(|error| error.to_string())
        })
    }
}
