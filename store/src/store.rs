//! An open store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::layer::{Layer, OpenLayer, ResolveBase, SEGMENT_SIZE_DEFAULT, SpaceGate, Tuning};
use sapwood_image::sealed::PACK_BYTES;
use sapwood_image::{ErrorKind, ImageError};

use crate::catalog::rows::{NodeRow, SpaceSettings, VolumeRow};
use crate::catalog::{Catalog, Look};
use crate::content::Content;
use crate::directory::{Directory, open_locked, remove};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
#[cfg(feature = "mutations")]
use crate::mutation::Mutation;
use crate::name::SnapshotName;
use crate::resolve::Resolver;
use crate::usage::Usage;

/// How often it is looked whether others have let go of a layer.
const LOCKED_PAUSE: Duration = Duration::from_millis(2);
/// How often when nobody has it: what somebody had begun to read may keep its file locked a little longer.
const LOCKED_TRIES: usize = 100;

/// How a store is used.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Size of a segment of new layers, in bytes.
    pub segment_size: u32,
    /// Bounds of background work in layers that the store opens itself.
    pub tuning: Tuning,
    /// Bytes after which a pack is full.
    pub pack_bytes: u64,
    /// Bytes of packs after which a seal publishes what it has so far.
    pub publish_bytes: u64,
    /// Memory for the index of what is stored already, in bytes; the size of the store may ask for more.
    pub dedup_bytes: usize,
    /// Tells the time, in milliseconds since 1970.
    pub clock: fn() -> u64,
    /// The rule that this store breaks.
    #[cfg(feature = "mutations")]
    pub mutation: Option<Mutation>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        let clock = || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        };
        Self {
            segment_size: SEGMENT_SIZE_DEFAULT,
            tuning: Tuning::default(),
            pack_bytes: PACK_BYTES,
            publish_bytes: 1 << 30,
            dedup_bytes: 4 << 20,
            clock,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }
}

/// Whether `$options` break rule `$mutation`; constantly false without the feature.
macro_rules! breaks {
    ($options:expr, $mutation:ident) => {{
        #[cfg(feature = "mutations")]
        let broken = $options.mutation == Some($crate::mutation::Mutation::$mutation);
        #[cfg(not(feature = "mutations"))]
        let broken = {
            let _ = &$options;
            false
        };
        broken
    }};
}
pub(crate) use breaks;

/// An open store. What it is asked from several threads at once is done one after the other where that
/// matters; a volume that something is done with is refused to others.
pub struct Store<S: Storage, E: Engine<File = S::File>> {
    pub(crate) storage: S,
    pub(crate) directory: Directory,
    pub(crate) options: StoreOptions,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) usage: Arc<Usage>,
    pub(crate) content: Content<E>,
    /// What lets the layers of attached volumes grow.
    pub(crate) gate: Arc<SpaceGate>,
    /// Held as long as the store is open; the last to go.
    _lock: S::File,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Opens the store in `root`. `engine` is for the catalog alone. [`Store::tidy`] should follow.
    ///
    /// # Errors
    /// There is no store, it is in use, it is damaged or of a newer format, what the storage says.
    pub async fn open<C: Engine<File = S::File> + Send>(
        storage: &S,
        io: &Io<E>,
        engine: C,
        root: &Path,
        options: StoreOptions,
    ) -> Result<Self> {
        let directory = Directory::new(root);
        let no_store = |error: StoreError| match &error.kind {
            StoreErrorKind::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let text = "there is no store here: make one with init, or name another directory".to_owned();
                StoreError::new(root.display(), StoreErrorKind::NotFound(text))
            }
            _ => error,
        };
        let lock = open_locked(storage, &directory.lock()).map_err(no_store)?;
        // What a dead process has in flight on the catalog itself must have ended, too.
        let file = open_locked(storage, &directory.catalog()).map_err(no_store)?;
        let catalog = Arc::new(Catalog::open(file, engine, !breaks!(options, CatalogWithoutSync))?);
        let content = Content::open(storage, io, &directory, &catalog, &options).await?;
        Ok(Self {
            storage: storage.clone(),
            directory,
            options,
            catalog,
            usage: Arc::default(),
            content,
            gate: Arc::default(),
            _lock: lock,
        })
    }

    /// The store's id.
    pub fn id(&self) -> Id {
        self.catalog.store()
    }

    /// Where its files are.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The catalog, for what goes beyond volumes and snapshots.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Says what the store's snapshots are, to whoever opens layers.
    pub fn resolver(&self) -> Arc<dyn ResolveBase<E>> {
        Arc::new(Resolver {
            catalog: Arc::clone(&self.catalog),
            directory: self.directory.clone(),
            usage: Arc::clone(&self.usage),
            packs: Arc::clone(self.content.packs()),
        })
    }

    /// What is sealed.
    pub fn content(&self) -> &Content<E> {
        &self.content
    }

    /// The limits of space.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn space_settings(&self) -> Result<SpaceSettings> {
        self.catalog.view()?.space_settings()
    }

    /// Sets the limits of space.
    ///
    /// # Errors
    /// Watermarks that are not shares in rising order; a quota of nothing; what the catalog says.
    pub fn set_space_settings(&self, settings: &SpaceSettings) -> Result<()> {
        let marks = &settings.watermarks;
        if !marks.is_sorted_by(|a, b| a < b) || marks.iter().any(|mark| !(1..=100).contains(mark)) {
            let text = "watermarks are shares from 1 to 100 percent, in rising order";
            return Err(StoreError::invalid(self.directory.root().display(), text));
        }
        if settings.quota == Some(0) {
            let text = "with a quota of 0 nothing could be written: say none to have no quota";
            return Err(StoreError::invalid(self.directory.root().display(), text));
        }
        self.catalog.change(|change| change.put_space_settings(settings))?;
        self.set_gate()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        (self.options.clock)()
    }

    pub(crate) fn random_id(&self) -> Result<Id> {
        random_id(&self.storage, self.directory.root())
    }

    /// Opens a layer of the store.
    pub(crate) async fn open_layer(&self, io: &Io<E>, id: Id, read_only: bool) -> Result<Arc<Layer<E>>> {
        let options = OpenLayer { read_only, tuning: self.options.tuning };
        if !read_only {
            return self.open_to_write(io, id, &options).await;
        }
        let path = self.directory.layer(id);
        Ok(Layer::open_in_store(&self.storage, io, &path, &options, &self.resolver()).await?)
    }

    /// Opens a layer of the store for writing. A scrub or check that reads it lets it go.
    pub(crate) async fn open_to_write(
        &self,
        io: &Io<E>,
        id: Id,
        options: &OpenLayer,
    ) -> Result<Arc<Layer<E>>> {
        let (path, _wanted) = (self.directory.layer(id), self.usage.want(id));
        // Also when nobody is seen to examine it: who did may have left just before.
        let mut tries = LOCKED_TRIES;
        loop {
            if self.usage.is_examined(id) {
                tries = LOCKED_TRIES;
            }
            match Layer::open_in_store(&self.storage, io, &path, options, &self.resolver()).await {
                Err(ImageError { kind: ErrorKind::Locked { .. }, .. }) if tries > 0 => {
                    tries -= 1;
                    io.sleep_until(io.now() + LOCKED_PAUSE).await;
                }
                opened => return Ok(opened?),
            }
        }
    }

    /// Removes layers that the catalog does not name any more; those that are in use later ([`Store::sweep`]). What
    /// stays behind after a failure or a crash is an orphan ([`Store::tidy`]).
    pub(crate) async fn remove_layers(&self, io: &Io<E>, layers: &[Id]) {
        for layer in layers.iter().filter(|layer| self.may_go(**layer)) {
            if let Err(error) = remove(io, &self.directory.layer(*layer)).await {
                log::warn!("{error}: it is not needed, and will be removed when the store is opened");
            }
        }
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Takes note of a layer that the catalog does not name any more; whether its file may go now.
    fn may_go(&self, layer: Id) -> bool {
        self.usage.leave(layer) || breaks!(self.options, UnlinkWhileRead)
    }

    /// Removes layers that the catalog had forgotten while they were in use, and that are not any more. To be
    /// called now and then, and after a snapshot was sealed. How many.
    pub async fn sweep(&self, io: &Io<E>) -> usize {
        let left = self.usage.take_left();
        self.remove_layers(io, &left).await;
        left.len()
    }
}

pub(crate) fn random_id<S: Storage>(storage: &S, root: &Path) -> Result<Id> {
    let mut id = [0; 16];
    storage.random(&mut id).map_err(|error| StoreError::io(root, "make an id in", error))?;
    Ok(Id(id))
}

/// A volume by name.
pub(crate) fn volume(look: &impl Look, name: &str) -> Result<(Id, VolumeRow)> {
    let Some(id) = look.volume_named(name)? else {
        crate::name::check(name)?;
        return Err(StoreError::not_found(name, "volume"));
    };
    let row = look.volume(id)?;
    Ok((id, row.ok_or_else(|| gone(look.path(), "volume", name))?))
}

/// A snapshot by name.
pub(crate) fn snapshot(look: &impl Look, name: &SnapshotName) -> Result<(Id, NodeRow)> {
    let (volume, _) = volume(look, &name.volume)?;
    let Some(id) = look.snapshot_named(volume, &name.snapshot)? else {
        crate::name::check(&name.snapshot)?;
        return Err(StoreError::not_found(name, "snapshot"));
    };
    let row = look.node(id)?;
    Ok((id, row.ok_or_else(|| gone(look.path(), "snapshot", &name.to_string()))?))
}

fn gone(path: &Path, what: &str, name: &str) -> StoreError {
    let text = format!("the catalog is damaged: the {what} {name} has a name and no row");
    StoreError::new(path.display(), StoreErrorKind::Corrupt(text))
}
