//! Volumes whose layers a store prepares. The store is a table of what snapshots are; a snapshot is "sealed" by a
//! copy of its file, which has the same disk; and a file goes when nothing keeps it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::sync::Mutex;

use sapwood_blockdev::storage::{HostFile, OpenOptions, Storage};

use super::*;
use crate::layer::{CreateInStore, LayerId, Resolved, StoreBase, Tuning, create_in_store};

const STORE: [u8; 16] = [7; 16];
const SIZE: u64 = 1 << 20;

type LayerOf = Layer<BlockingEngine>;
type Resolver = Arc<dyn ResolveBase<BlockingEngine>>;

/// Removes a file when nothing keeps it any more.
struct Kept(PathBuf);

impl Drop for Kept {
    fn drop(&mut self) {
        // The folder may have gone.
        fs::remove_file(&self.0).ok();
    }
}

/// A layer's file, its id, and who reads it.
type Entry = (PathBuf, LayerId, Arc<Kept>);

/// What snapshots are, by their ids.
#[derive(Default)]
struct Catalog(Mutex<BTreeMap<[u8; 16], Entry>>);

impl ResolveBase<BlockingEngine> for Catalog {
    fn resolve(&self, base: &StoreBase) -> Result<Resolved<BlockingEngine>, String> {
        let rows = self.0.lock().unwrap();
        let (path, layer, kept) = rows.get(&base.snapshot).ok_or("there is no such snapshot")?;
        Ok(Resolved::Frozen { path: path.clone(), layer: *layer, kept: Arc::clone(kept) as _ })
    }
}

fn id(number: u8) -> [u8; 16] {
    [number; 16]
}

impl Catalog {
    fn freeze(&self, number: u8, path: &Path, layer: u8) {
        let row = (path.to_owned(), id(layer), Arc::new(Kept(path.to_owned())));
        self.0.lock().unwrap().insert(id(number), row);
    }

    /// The snapshot of this number becomes something else.
    fn seal(&self, number: u8) {
        let old = self.0.lock().unwrap()[&id(number)].0.clone();
        let new = old.with_extension("sealed");
        fs::copy(&old, &new).unwrap();
        self.freeze(number, &new, number);
    }
}

type Hook = Box<dyn FnOnce() + Send>;

/// The host's files; does something before it opens one of them.
#[derive(Clone, Default)]
struct Hooked(Arc<Mutex<Option<(PathBuf, Hook)>>>);

impl Storage for Hooked {
    type File = HostFile;

    fn open(&self, path: &Path, options: OpenOptions) -> std::io::Result<HostFile> {
        let hook = self.0.lock().unwrap().take_if(|(at, _)| at == path);
        if let Some((_, hook)) = hook {
            hook();
        }
        HostStorage.open(path, options)
    }

    fn random(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        HostStorage.random(bytes)
    }

    fn create_directory(&self, path: &Path) -> std::io::Result<()> {
        HostStorage.create_directory(path)
    }

    fn list_directory(&self, path: &Path) -> std::io::Result<Vec<OsString>> {
        HostStorage.list_directory(path)
    }
}

struct Store {
    storage: Hooked,
    folder: TempDir,
    catalog: Arc<Catalog>,
    volume: Arc<Volume<BlockingEngine>>,
    control: Io<BlockingEngine>,
}

impl Store {
    /// A volume on layer 0. No more than a file of those below is open at a time, while it is read.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let catalog = Arc::<Catalog>::default();
        prepare(folder.path(), 0, SIZE, None);
        let layer = open_layer(folder.path(), 0, &catalog).unwrap();
        let control = Io::new(BlockingEngine::new().unwrap());
        Self { storage: Hooked::default(), folder, catalog, volume: Volume::new(layer), control }
    }

    fn path(&self, number: u8) -> PathBuf {
        path(self.folder.path(), number)
    }

    fn resolver(&self) -> Resolver {
        Arc::clone(&self.catalog) as _
    }

    /// Prepares a layer over the snapshot before.
    fn prepare(&self, number: u8, size: u64) {
        prepare(self.folder.path(), number, size, Some(number - 1));
    }

    /// Goes on with the layer of this number; the one before becomes the snapshot of its number, which the store says
    /// is `frozen`.
    fn follow(&self, number: u8, frozen: u8) -> Result<(), ImageError> {
        let next = Successor::Prepared { path: self.path(number), resolver: self.resolver() };
        let (volume, io, catalog) =
            (Arc::clone(&self.volume), self.control.clone(), Arc::clone(&self.catalog));
        let (path, storage) = (self.path(frozen), self.storage.clone());
        block_on(&self.control, async move {
            let commit = async || {
                catalog.freeze(number - 1, &path, frozen);
                Ok(())
            };
            volume.snapshot(&storage, &io, &next, commit).await
        })
    }

    fn snapshot(&self, number: u8) {
        self.prepare(number, SIZE);
        self.follow(number, number - 1).unwrap();
    }

    fn reopen(&self) -> Result<(), ImageError> {
        let (volume, io, resolver) = (Arc::clone(&self.volume), self.control.clone(), self.resolver());
        block_on(&self.control, async move { volume.reopen_base(&HostStorage, &io, &resolver).await })
    }

    fn queue(&self) -> Queue {
        self.volume.queue(BlockingEngine::new().unwrap())
    }

    /// Which files there are.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn path(folder: &Path, number: u8) -> PathBuf {
    folder.join(number.to_string())
}

fn prepare(folder: &Path, number: u8, size: u64, base: Option<u8>) {
    let base = base.map(|snapshot| StoreBase { store: STORE, snapshot: id(snapshot), size });
    let options = CreateInStore { id: id(number), size, base, segment_size: 64 << 10 };
    let (io, path) = (io(), path(folder, number));
    block_on(&io.clone(), async move { create_in_store(&HostStorage, &io, &path, &options).await.unwrap() });
}

fn open_layer(folder: &Path, number: u8, catalog: &Arc<Catalog>) -> Result<Arc<LayerOf>, ImageError> {
    let (io, path, resolver) = (io(), path(folder, number), Arc::clone(catalog) as Resolver);
    let tuning = Tuning { files_max: 1, ..Tuning::default() };
    let options = OpenLayer { tuning, ..OpenLayer::default() };
    block_on(
        &io.clone(),
        async move { Layer::open_in_store(&HostStorage, &io, &path, &options, &resolver).await },
    )
}

fn reopen(layer: &Arc<LayerOf>, catalog: &Arc<Catalog>) {
    let (io, layer, resolver) = (io(), Arc::clone(layer), Arc::clone(catalog) as Resolver);
    let inner = io.clone();
    block_on(&io, async move { layer.reopen_base(&HostStorage, &inner, &resolver).await.unwrap() });
}

/// Writes a block, and lets the thread sleep.
fn put(queue: &mut Queue, block: u64, byte: u8) {
    write(queue, block, byte);
    let mut done = Vec::new();
    drain(queue, &mut done);
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    queue.wait(Some(Time::ZERO));
}

/// Reads a block, and lets the thread sleep.
fn get(queue: &mut Queue, block: u64) -> u8 {
    let byte = read(queue, block);
    queue.wait(Some(Time::ZERO));
    byte
}

#[test]
fn a_layer_that_was_prepared_follows_and_lies_over_what_the_store_says() {
    let store = Store::new();
    let mut queue = store.queue();
    put(&mut queue, 0, 1);
    put(&mut queue, 1, 1);
    for number in 1..=3 {
        store.snapshot(number);
        put(&mut queue, u64::from(number), number + 1);
    }
    let all = |queue: &mut Queue| [0, 1, 2, 3, 4].map(|block| get(queue, block));
    assert_eq!(all(&mut queue), [1, 2, 3, 4, 0]);
    let info = store.volume.layer().info();
    let base = StoreBase { store: STORE, snapshot: id(2), size: SIZE };
    assert_eq!((info.depth, info.store_base), (3, Some(base)), "its record stays as it was made");
    drop(queue);
    let (volume, io) = (Arc::clone(&store.volume), io());
    block_on(&io.clone(), async move { volume.close(&io).await.unwrap() });
    let Store { folder, catalog, volume, .. } = store;
    drop(volume);
    let volume = Volume::new(open_layer(folder.path(), 3, &catalog).unwrap());
    assert_eq!(all(&mut volume.queue(BlockingEngine::new().unwrap())), [1, 2, 3, 4, 0]);
}

#[test]
fn a_layer_that_does_not_fit_is_refused_before_anything_is_committed() {
    let store = Store::new();
    let mut queue = store.queue();
    put(&mut queue, 0, 1);
    store.prepare(1, 2 * SIZE);
    let refused = store.follow(1, 0).unwrap_err();
    assert!(refused.to_string().contains("a disk of 1048576 bytes"), "{refused}");
    prepare(store.folder.path(), 2, SIZE, None);
    assert!(store.follow(2, 0).is_err(), "it lies over nothing");

    store.prepare(3, SIZE);
    store.catalog.freeze(2, &store.path(2), 2);
    let other = open_layer(store.folder.path(), 3, &store.catalog).unwrap();
    let volume = Volume::new(Arc::clone(&other));
    put(&mut volume.queue(BlockingEngine::new().unwrap()), 5, 5);
    let io = io();
    block_on(&io.clone(), async move { other.close(&io).await.unwrap() });
    drop(volume);
    let refused = store.follow(3, 0).unwrap_err();
    assert!(refused.to_string().contains("holds something already"), "{refused}");

    assert!(store.catalog.0.lock().unwrap().get(&id(0)).is_none(), "nothing was committed");
    assert_eq!((get(&mut queue, 0), store.volume.path()), (1, store.path(0)));
    assert_eq!(store.files(), ["0", "1", "2", "3"], "what was prepared is the store's");
    prepare(store.folder.path(), 4, SIZE, Some(0));
    let next = Successor::Prepared { path: store.path(4), resolver: store.resolver() };
    let (volume, io, catalog) =
        (Arc::clone(&store.volume), store.control.clone(), Arc::clone(&store.catalog));
    let frozen = store.path(0);
    block_on(&store.control, async move {
        let commit = async || {
            catalog.freeze(0, &frozen, 0);
            Ok(())
        };
        volume.snapshot(&HostStorage, &io, &next, commit).await.unwrap();
    });
    assert_eq!((get(&mut queue, 0), store.volume.path()), (1, store.path(4)));
}

#[test]
fn a_store_that_says_another_layer_is_not_believed() {
    let store = Store::new();
    let mut queue = store.queue();
    put(&mut queue, 0, 1);
    prepare(store.folder.path(), 9, SIZE, None);
    store.prepare(1, SIZE);
    let refused = store.follow(1, 9).unwrap_err();
    assert!(refused.to_string().contains("is another layer than"), "{refused}");
    assert_eq!(store.volume.path(), store.path(1), "the switch is done");
    assert_eq!(get(&mut queue, 0), 1, "of the old layer, which is open still");
    let refused = store.volume.layer();
    let (io, resolver) = (io(), store.resolver());
    let refused =
        block_on(
            &io.clone(),
            async move { refused.reopen_base(&HostStorage, &io, &resolver).await.unwrap_err() },
        );
    assert!(matches!(refused.kind, ErrorKind::Unfinished(_)), "{refused}");
    assert!(store.reopen().is_err(), "it says so still");
    store.catalog.freeze(0, &store.path(0), 0);
    store.reopen().unwrap();
    assert_eq!(get(&mut queue, 0), 1);
    assert_eq!(store.volume.layer().info().depth, 1);
    assert_eq!(store.files(), ["0", "1"], "nothing keeps the other one");
}

#[test]
fn what_lies_below_is_read_from_where_it_is_now_and_its_files_go() {
    let store = Store::new();
    let mut queue = store.queue();
    for number in 1..=4 {
        put(&mut queue, u64::from(number), number);
        store.snapshot(number);
    }
    let all = |queue: &mut Queue| [1, 2, 3, 4].map(|block| get(queue, block));
    store.catalog.seal(1);
    store.catalog.seal(3);
    assert_eq!(store.files(), ["0", "1", "1.sealed", "2", "3", "3.sealed", "4"], "it reads them still");
    assert_eq!(all(&mut queue), [1, 2, 3, 4]);
    store.reopen().unwrap();
    assert_eq!(store.files(), ["0", "1.sealed", "2", "3.sealed", "4"]);
    assert_eq!(all(&mut queue), [1, 2, 3, 4]);
    store.snapshot(5);
    assert_eq!(all(&mut queue), [1, 2, 3, 4]);
}

/// Answers the first question with what was true before the snapshot was sealed, and the disk was told so.
struct Slow {
    catalog: Arc<Catalog>,
    layer: Arc<LayerOf>,
    was_asked: Mutex<bool>,
}

impl ResolveBase<BlockingEngine> for Slow {
    fn resolve(&self, base: &StoreBase) -> Result<Resolved<BlockingEngine>, String> {
        let answer = self.catalog.resolve(base);
        if !std::mem::replace(&mut *self.was_asked.lock().unwrap(), true) {
            self.catalog.seal(0);
            reopen(&self.layer, &self.catalog);
        }
        answer
    }
}

#[test]
fn what_is_opened_later_is_not_lost_to_what_was_opened_before() {
    let store = Store::new();
    let mut queue = store.queue();
    put(&mut queue, 0, 1);
    store.snapshot(1);
    let layer = store.volume.layer();
    let slow =
        Slow { catalog: Arc::clone(&store.catalog), layer: Arc::clone(&layer), was_asked: Mutex::default() };
    let (io, slow) = (io(), Arc::new(slow) as Resolver);
    block_on(&io.clone(), async move { layer.reopen_base(&HostStorage, &io, &slow).await.unwrap() });
    assert_eq!(store.files(), ["0.sealed", "1"], "the old answer is not used");
    assert_eq!(get(&mut queue, 0), 1);
}

#[test]
fn a_read_that_has_begun_keeps_the_files_that_it_has_yet_to_open() {
    let store = Store::new();
    let mut queue = store.queue();
    put(&mut queue, 0, 1);
    store.snapshot(1);
    put(&mut queue, 1, 2);
    store.snapshot(2);
    let (layer, catalog) = (store.volume.layer(), Arc::clone(&store.catalog));
    let files = [0, 1].map(|number| store.path(number));
    let hook = move || {
        (0..2).for_each(|number| catalog.seal(number));
        reopen(&layer, &catalog);
        assert!(files.iter().all(|file| file.exists()), "the read needs them");
    };
    *store.storage.0.lock().unwrap() = Some((store.path(0), Box::new(hook)));
    // Files of two layers below, neither of which is open, are needed one after the other.
    let buf = SharedBuf::heap(2 * BLOCK);
    let command = Command::Read(buf.clone().into());
    queue.submit(Request { tag: 0, offset: GuestOffset(0), len: 2 * BLOCK as u64, command });
    let mut done = Vec::new();
    drain(&mut queue, &mut done);
    assert_eq!(done[0].result, Ok(()));
    let mut bytes = vec![0; 2 * BLOCK];
    buf.read_at(0, &mut bytes);
    assert_eq!((bytes[0], bytes[BLOCK]), (1, 2));
    assert!(store.storage.0.lock().unwrap().is_none(), "it was opened again in the middle of the read");
    assert_eq!(store.files(), ["0.sealed", "1.sealed", "2"], "nobody reads the others");
    assert_eq!((get(&mut queue, 0), get(&mut queue, 1)), (1, 2));
}

#[test]
fn a_file_below_stays_as_it_was_opened() {
    let rig = Rig::new();
    rig.begin(1, true);
    rig.end().unwrap();
    let (volume, io, resolver) =
        (Arc::clone(&rig.volume), io(), Arc::new(Catalog::default()) as Arc<dyn ResolveBase<_>>);
    let refused =
        block_on(
            &io.clone(),
            async move { volume.reopen_base(&HostStorage, &io, &resolver).await.unwrap_err() },
        );
    assert!(refused.to_string().contains("its base is a file"), "{refused}");
}
