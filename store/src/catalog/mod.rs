//! The catalog: what the store holds, in one file, changed by transactions.
//!
//! A redb database in the file `catalog.redb`; `docs/store.md` lists its tables and rows. Every change
//! is one transaction with one commit point, in redb's two phases: what was written is durable before
//! the one sector that names it is written. Reading sees one moment and waits for nobody.
//!
//! - `backend` is the file below redb, over an engine;
//! - `meta` says what the store is, and refuses what this program does not know;
//! - `rows` are the rows, `tables` the tables and typed access to them.

mod backend;
mod meta;
pub mod rows;
mod tables;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::{Builder, Database};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::StorageFile;

use crate::error::{Result, StoreError};
use crate::id::Id;
use backend::Backend;
pub(crate) use meta::Meta;
pub use tables::{Change, Child, Look, View};

/// Memory for pages of the database, in bytes.
const CACHE_BYTES: usize = 16 << 20;

/// An open catalog.
pub struct Catalog {
    database: Database,
    path: PathBuf,
    meta: Meta,
    /// A commit has failed, or anything else that was done with the file: what is in memory may not be what is stored.
    is_unknown: Arc<AtomicBool>,
}

impl Catalog {
    /// Makes a catalog in an empty file, with what `fill` puts into it; durable, and closed, when it returns.
    pub(crate) fn create<E: Engine + Send>(
        file: E::File,
        engine: E,
        store: Id,
        synced: bool,
        fill: impl FnOnce(&mut Change) -> Result<()>,
    ) -> Result<()> {
        let path = file.path().to_owned();
        let (database, is_unknown) = Self::database(file, engine, synced)?;
        let catalog = Self { database, path, meta: Meta::new(store), is_unknown };
        catalog.change(|change| {
            change.prepare(&catalog.meta)?;
            fill(change)
        })?;
        let Self { database, path, .. } = catalog;
        database.close().map_err(|error| StoreError::database(&path, "close", error))
    }

    /// Opens the catalog in a file that nobody else uses, recovering it from a crash if there was one.
    pub(crate) fn open<E: Engine + Send>(file: E::File, engine: E, synced: bool) -> Result<Self> {
        let path = file.path().to_owned();
        let size = file.size().map_err(|error| StoreError::io(&path, "measure", error))?;
        if size == 0 {
            return Err(StoreError::database(
                &path,
                "open",
                redb::Error::Corrupted("it is empty".to_owned()),
            ));
        }
        let (database, is_unknown) = Self::database(file, engine, synced)?;
        let view = View::begin(&database, &path)?;
        let meta = Meta::read(&view, &path)?;
        drop(view);
        Ok(Self { database, path, meta, is_unknown })
    }

    /// The database, and whether anything that it did with its file has failed.
    fn database<E: Engine + Send>(
        file: E::File,
        engine: E,
        synced: bool,
    ) -> Result<(Database, Arc<AtomicBool>)> {
        let path = file.path().to_owned();
        let failed = Arc::<AtomicBool>::default();
        let backend = Backend::new(file, engine, synced, Arc::clone(&failed));
        // Damaged pages are found here: later, redb would panic where it meets one.
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
        let database = builder.create_with_backend(backend);
        let database = database.map_err(|error| StoreError::database(&path, "open", error))?;
        Ok((database, failed))
    }

    /// The store's id.
    pub fn store(&self) -> Id {
        self.meta.store
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The catalog as it is now, whatever is changed meanwhile.
    ///
    /// # Errors
    /// What the storage says; a change has failed before.
    pub fn view(&self) -> Result<View> {
        self.check()?;
        View::begin(&self.database, &self.path)
    }

    /// Makes all changes of `change`, or none. They are durable when it returns; changes come one after
    /// the other.
    ///
    /// # Errors
    /// What `change` says: then nothing was changed. What the storage says: then the change was made or
    /// was not, and opening the store again tells: until then nothing can be read or changed.
    pub fn change<T>(&self, change: impl FnOnce(&mut Change) -> Result<T>) -> Result<T> {
        let mut changing = self.begin()?;
        let result = change(&mut changing);
        match result {
            Ok(value) => {
                let committed = changing.commit();
                self.is_unknown.fetch_or(committed.is_err(), Ordering::AcqRel);
                committed.map(|()| value)
            }
            Err(error) => {
                changing.abort();
                Err(error)
            }
        }
    }

    /// Looks at the catalog while nobody changes it.
    ///
    /// # Errors
    /// What `look` or the storage says.
    pub fn hold_still<T>(&self, look: impl FnOnce(&Change) -> Result<T>) -> Result<T> {
        let held = self.begin()?;
        let result = look(&held);
        held.abort();
        result
    }

    /// Whether a commit has failed, so that nobody knows whether it was made, or anything else that was done with the file:
    /// nothing can be read or changed until the store is opened again.
    pub fn is_unknown(&self) -> bool {
        self.is_unknown.load(Ordering::Acquire)
    }

    /// Refuses to go by what is in memory after a failure.
    fn check(&self) -> Result<()> {
        match self.is_unknown() {
            true => Err(StoreError::database(&self.path, "use", redb::Error::PreviousIo)),
            false => Ok(()),
        }
    }

    fn begin(&self) -> Result<Change> {
        self.check()?;
        let begun = self.database.begin_write();
        let mut transaction =
            begun.map_err(|error| StoreError::database(&self.path, "begin a change of", error))?;
        transaction.set_two_phase_commit(true);
        Ok(Change::new(transaction, &self.path))
    }
}
