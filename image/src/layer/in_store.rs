//! A layer in a store: its base is a snapshot by id, and what that is now somebody else knows.
//!
//! The record of such a layer names the store and the snapshot. Whoever opens it passes a resolver,
//! which says what the snapshot is at the moment: so a snapshot can become something else, and no layer
//! over it has to be written.
//!
//! What the resolver answers can be kept: a layer's file stays as long as anybody has a chain with it.

use std::any::Any;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::base::{OpenBase, hex};
use super::base_record::{BaseRecord, BaseRef};
use super::create::create_with;
use super::device::Layer;
use super::layout::LayerId;
use super::{OpenLayer, Tuning};
use crate::error::{ErrorKind, ImageError};
use crate::sealed::{Packs, Root};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

/// A snapshot of a store, as a layer over it names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreBase {
    /// The store's id.
    pub store: [u8; 16],
    /// The snapshot's id.
    pub snapshot: [u8; 16],
    /// Size of its disk in bytes.
    pub size: u64,
}

impl fmt::Display for StoreBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot {} of store {}", hex(&self.snapshot), hex(&self.store))
    }
}

/// Keeps what was resolved where it is, until it is dropped: by whoever has used it last, perhaps in the middle of a read
/// and under locks of a layer, so that dropping it must not wait for anything that a disk does.
pub type Kept = Arc<dyn Any + Send + Sync>;

/// What a snapshot of a store is now.
#[non_exhaustive]
pub enum Resolved<E: Engine> {
    /// A layer that nobody writes any more.
    Frozen {
        /// Its file.
        path: PathBuf,
        /// The id by which it is recognised.
        layer: LayerId,
        /// Dropped when nobody opens the file by this answer any more. What has it open then may still read it.
        kept: Kept,
    },
    /// A sealed snapshot: below it is nothing.
    Sealed {
        /// Where its content is.
        packs: Arc<Packs<E>>,
        /// Its size, and the top of its tree.
        root: Root,
    },
}

impl<E: Engine> Clone for Resolved<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Frozen { path, layer, kept } => {
                Self::Frozen { path: path.clone(), layer: *layer, kept: Arc::clone(kept) }
            }
            Self::Sealed { packs, root } => Self::Sealed { packs: Arc::clone(packs), root: *root },
        }
    }
}

/// Knows what the snapshots of a store are.
pub trait ResolveBase<E: Engine>: Send + Sync {
    /// What the snapshot is now. Its content stays at least until the layer that names it is closed; a file, as long as
    /// what keeps it is.
    ///
    /// # Errors
    /// Another store's snapshot, one that is not there, what the catalog says.
    fn resolve(&self, base: &StoreBase) -> Result<Resolved<E>, String>;
}

/// What a new layer in a store is to be.
#[derive(Clone, Copy, Debug)]
pub struct CreateInStore {
    /// Its id, by which the store's catalog names it.
    pub id: LayerId,
    /// Guest-visible size in bytes, a multiple of 512.
    pub size: u64,
    /// What lies below.
    pub base: Option<StoreBase>,
    /// Size of a segment in bytes: a power of two from 64 KiB to 64 MiB.
    pub segment_size: u32,
}

/// Creates a layer at `path`, a file that does not exist; durable when it returns. The base is not looked
/// at.
///
/// # Errors
/// An impossible size, an existing file, what the storage says. No file is left behind.
pub async fn create_in_store<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    options: &CreateInStore,
) -> Result<(), ImageError> {
    let base = options.base.map(BaseRef::of_store);
    let id = Some(options.id);
    create_with(storage, io, path, (options.size, options.segment_size, false), id, base).await
}

impl<E: Engine> Layer<E> {
    /// As [`Layer::open`], of a layer in a store; a layer outside of any opens as well.
    ///
    /// # Errors
    /// As [`Layer::open`], and what the resolver says.
    pub async fn open_in_store<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
        resolver: &Arc<dyn ResolveBase<E>>,
    ) -> Result<Arc<Self>, ImageError> {
        Self::open_with(storage, io, path, options, OpenBase::Opened, Some(&**resolver)).await
    }

    /// Opens a layer of a store, read-only, for what it holds itself: what lies below it is not opened, and cannot be read.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub async fn open_alone<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        tuning: Tuning,
    ) -> Result<Arc<Self>, ImageError> {
        let options = OpenLayer { read_only: true, tuning };
        Self::open_with(storage, io, path, &options, OpenBase::UnlessInStore, None).await
    }
}

/// What a snapshot is that the layer at `layer` names.
pub(crate) fn resolve<E: Engine>(
    layer: &Path,
    base: &StoreBase,
    resolver: Option<&dyn ResolveBase<E>>,
) -> Result<Resolved<E>, ImageError> {
    let Some(resolver) = resolver else { return Err(refuse(layer, base)) };
    let resolved = resolver.resolve(base);
    resolved.map_err(|text| ImageError::new(layer, ErrorKind::Base(format!("its base {base}: {text}"))))
}

/// Refuses what only the store can do with its layers.
pub(super) fn check_is_alone(layer: &Path, record: &BaseRecord) -> Result<(), ImageError> {
    match record.base.as_ref().and_then(BaseRef::in_store) {
        Some(base) => Err(refuse(layer, base)),
        None => Ok(()),
    }
}

fn refuse(layer: &Path, base: &StoreBase) -> ImageError {
    let detail =
        format!("it belongs to a store and lies over {base}: go through the store, by the volume's name");
    ImageError::new(layer, ErrorKind::Base(detail))
}
