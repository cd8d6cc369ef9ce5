//! The files of a store, making one, and the lock.
//!
//! Order of making one: the directories; the lock; the catalog under another name, closed; the directory is
//! synced; the catalog gets its name, which is the commit point; the directory is synced again. A directory
//! without a catalog is no store, and making one there goes on where an earlier attempt was cut off.

use std::io::ErrorKind::{AlreadyExists, NotFound};
use std::path::{Path, PathBuf};

use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, LockError, OpenOptions, Storage, StorageFile};

use crate::catalog::{Catalog, Change};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::{StoreOptions, breaks, random_id};

/// Where the files of a store are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// That of the store in `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The catalog.
    pub fn catalog(&self) -> PathBuf {
        self.root.join("catalog.redb")
    }

    /// The catalog while it is made.
    pub(crate) fn catalog_new(&self) -> PathBuf {
        self.root.join("catalog.redb.new")
    }

    /// The file that is locked by whoever has the store open.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// The folder of the layers.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// The folder of the packs.
    pub fn packs(&self) -> PathBuf {
        self.root.join("packs")
    }

    /// The folder of the exact index.
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    /// A layer.
    pub fn layer(&self, id: Id) -> PathBuf {
        self.layers().join(format!("{id}.layer"))
    }

    /// Which layer a file in the folder of the layers is.
    pub(crate) fn layer_of(name: &str) -> Option<Id> {
        name.strip_suffix(".layer")?.parse().ok()
    }
}

/// Makes a store in a directory that does not exist, or is empty but for what an earlier attempt left.
/// `engine` is for the catalog alone.
///
/// # Errors
/// There is a store already, or something else; what the storage says.
pub async fn init<S: Storage, E: Engine<File = S::File>, C: Engine<File = S::File> + Send>(
    storage: &S,
    io: &Io<E>,
    engine: C,
    root: &Path,
    options: &StoreOptions,
) -> Result<Id> {
    let store = random_id(storage, root)?;
    let (directory, _lock) = begin(storage, root)?;
    end(storage, io, engine, &directory, store, options, |_| Ok(())).await?;
    Ok(store)
}

/// The directories of a store that is to be made, and its lock: whoever makes it has it to the end.
pub(crate) fn begin<S: Storage>(storage: &S, root: &Path) -> Result<(Directory, S::File)> {
    let directory = Directory::new(root);
    make_directory(storage, root)?;
    check_is_free(storage, &directory)?;
    for folder in [directory.layers(), directory.packs(), directory.index()] {
        make_directory(storage, &folder)?;
    }
    let lock = match storage.open(&directory.lock(), OpenOptions::CREATE.buffered()) {
        Err(error) if error.kind() == AlreadyExists => open_locked(storage, &directory.lock())?,
        Err(error) => return Err(StoreError::io(&directory.lock(), "make", error)),
        Ok(file) => locked(file)?,
    };
    // Somebody may have been faster.
    check_is_free(storage, &directory)?;
    Ok((directory, lock))
}

/// Makes a store of directories that [`begin`] has made, with a catalog that `fill` fills.
pub(crate) async fn end<S: Storage, E: Engine<File = S::File>, C: Engine<File = S::File> + Send>(
    storage: &S,
    io: &Io<E>,
    engine: C,
    directory: &Directory,
    store: Id,
    options: &StoreOptions,
    fill: impl FnOnce(&mut Change) -> Result<()>,
) -> Result<()> {
    let root = directory.root();
    let (new, path) = (directory.catalog_new(), directory.catalog());
    remove(io, &new).await?;
    let file = storage.open(&new, OpenOptions::CREATE.buffered());
    let file = file.map_err(|error| StoreError::io(&new, "make", error))?;
    Catalog::create(locked(file)?, engine, store, !breaks!(options, CatalogWithoutSync), fill)?;
    sync_directory(io, root).await?;
    let renamed = io.run(Op::Rename { from: new, to: path.clone() }).await.result;
    renamed.map_err(|errno| StoreError::errno(&path, "rename", errno))?;
    if !breaks!(options, RenameWithoutDirectorySync) {
        sync_directory(io, root).await?;
    }
    let above = root.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_directory(io, above).await
}

fn make_directory<S: Storage>(storage: &S, path: &Path) -> Result<()> {
    match storage.create_directory(path) {
        Err(error) if error.kind() == AlreadyExists => Ok(()),
        made => made.map_err(|error| StoreError::io(path, "make the directory", error)),
    }
}

/// Refuses a directory that holds anything but what an interrupted making leaves.
fn check_is_free<S: Storage>(storage: &S, directory: &Directory) -> Result<()> {
    let root = directory.root();
    let names = match storage.list_directory(root) {
        Err(error) if error.kind() == NotFound => return Ok(()),
        listed => listed.map_err(|error| StoreError::io(root, "list", error))?,
    };
    if names.iter().any(|name| name == "catalog.redb") {
        let text = "there is a store already".to_owned();
        return Err(StoreError::new(root.display(), StoreErrorKind::Exists(text)));
    }
    let ours = ["layers", "packs", "index", "lock", "catalog.redb.new"];
    match names.iter().find(|name| !ours.iter().any(|ours| name == ours)) {
        Some(other) => {
            let text = format!("the directory is not empty ({} is there): name another", other.display());
            Err(StoreError::new(root.display(), StoreErrorKind::Exists(text)))
        }
        None => Ok(()),
    }
}

/// Locks a file, saying who is in the way.
pub(crate) fn locked<F: StorageFile>(file: F) -> Result<F> {
    match file.lock(Lock::Exclusive) {
        Ok(()) => Ok(file),
        Err(LockError::Held(holder)) => {
            let holder = holder.unwrap_or_else(|| "another process".to_owned());
            let subject = file.path().parent().unwrap_or(file.path()).display().to_string();
            Err(StoreError::new(subject, StoreErrorKind::Locked { holder }))
        }
        Err(LockError::Io(error)) => Err(StoreError::io(file.path(), "lock", error)),
    }
}

pub(crate) fn open_locked<S: Storage>(storage: &S, path: &Path) -> Result<S::File> {
    let file = storage.open(path, OpenOptions::WRITE.buffered());
    locked(file.map_err(|error| StoreError::io(path, "open", error))?)
}

/// Removes a file that may not be there.
pub(crate) async fn remove<E: Engine>(io: &Io<E>, path: &Path) -> Result<()> {
    match io.run(Op::Unlink { path: path.to_owned() }).await.result {
        Ok(_) | Err(sapwood_blockdev::Errno::NOENT) => Ok(()),
        Err(errno) => Err(StoreError::errno(path, "remove", errno)),
    }
}

pub(crate) async fn sync_directory<E: Engine>(io: &Io<E>, path: &Path) -> Result<()> {
    let synced = io.run(Op::SyncDirectory { path: path.to_owned() }).await.result;
    synced.map(drop).map_err(|errno| StoreError::errno(path, "sync", errno))
}
