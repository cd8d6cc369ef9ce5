//! The layer: a disk that a guest writes, as a log and a map.
//!
//! What a guest writes is appended to the log in checksummed records and entered into the map;
//! nothing is overwritten. A checkpoint stores the map; after a crash the log since the newest
//! checkpoint is replayed. `docs/format-layer.md` is the format's reference, with the commit
//! protocol and a table of every crash case.
//!
//! From the bottom up: `layout`, `header`, `slot`, `base_record`, `record` and `node` are the stored forms;
//! `map`, `segments` and `log` the state in memory; `core` joins them under one lock and says
//! what to do next; `driver` does it; `paging` loads nodes of the map; `queue`, `read` and `merge` serve guests; `checkpoint`,
//! `clean`, `compact` and `maintain` work in the background; `create`, `recover`, `glance` and `check` begin and judge;
//! `copy_up`, `shed`, `switch`, `rebase`, `commit` and `commit_online` change what lies below; `handover` lets a new layer
//! take over from one that is in use; `reopen` looks again what a store has below.

mod age;
pub(crate) mod base;
pub(crate) mod base_record;
mod check;
mod checkpoint;
mod clean;
mod commit;
mod commit_online;
mod compact;
mod copy_up;
mod core;
mod create;
mod device;
#[cfg(feature = "fuzzing")]
pub mod doors;
mod driver;
mod extents;
pub(crate) mod frozen;
mod gate;
mod glance;
pub(crate) mod handover;
mod header;
pub(crate) mod in_store;
mod lanes;
mod layout;
mod leaf;
mod load;
mod log;
mod maintain;
mod map;
mod merge;
#[cfg(feature = "mutations")]
pub mod mutation;
mod node;
mod pace;
pub(crate) mod paging;
mod ports;
mod position;
mod queue;
mod read;
mod rebase;
mod record;
mod recover;
mod reopen;
mod replay;
mod reserve;
mod segments;
mod shed;
mod slot;
mod switch;
#[cfg(feature = "synthetic")]
mod synthetic;
mod traffic;
pub(crate) mod tuning;
mod waiter;

use std::path::{Path, PathBuf};

use crate::below::OpenBelow;
use crate::error::ImageError;
use crate::format::Format;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage};
use sapwood_blockdev::units::SECTOR_SIZE;

pub use check::{CheckReport, check};
pub use commit::{Committed, commit};
pub use compact::{Compacted, compact};
pub use create::create;
pub use device::Layer;
pub use gate::SpaceGate;
pub use glance::{Glance, glance};
pub use in_store::{CreateInStore, Kept, ResolveBase, Resolved, StoreBase, create_in_store};
pub use layout::{LayerId, MAGIC, SEGMENT_SIZE_DEFAULT, SIZE_MAX};
#[cfg(feature = "mutations")]
pub use mutation::Mutation;
pub use queue::LayerQueue;
pub use rebase::{rebase, repoint};
#[cfg(feature = "synthetic")]
pub use synthetic::{Synthetic, synthesize};
pub use traffic::Traffic;
pub use tuning::Tuning;

/// A base by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseSpec {
    /// The file; a relative path starts at the folder of the layer that names it.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// How a qcow2 image is read.
    pub options: OpenBelow,
}

impl BaseSpec {
    /// A base that is read without leave to open what it names.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        Self { path: path.into(), format, options: OpenBelow::default() }
    }
}

/// What a new layer is to be.
#[derive(Clone, Debug)]
pub struct CreateLayer {
    /// Guest-visible size in bytes, rounded up to 512; by default that of the base.
    pub size: Option<u64>,
    /// What lies below.
    pub base: Option<BaseSpec>,
    /// Size of a segment in bytes: a power of two from 64 KiB to 64 MiB.
    pub segment_size: u32,
    /// What a block device holds may be overwritten. A file is never overwritten.
    pub overwrite: bool,
}

impl Default for CreateLayer {
    fn default() -> Self {
        Self { size: None, base: None, segment_size: SEGMENT_SIZE_DEFAULT, overwrite: false }
    }
}

/// How a layer is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenLayer {
    /// Change nothing, not even to finish a recovery: the log is replayed in memory.
    pub read_only: bool,
    /// Bounds of background work.
    pub tuning: Tuning,
}

/// Facts about an open layer.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Guest-visible size in bytes.
    pub size: u64,
    /// The layer's id, 32 hexadecimal digits.
    pub id: String,
    /// Size of a segment in bytes.
    pub segment_size: u64,
    /// The base as the layer names it.
    pub base: Option<BaseSpec>,
    /// The snapshot of a store that is its base; then the layer names no file.
    pub store_base: Option<StoreBase>,
    /// The base's path seen from here.
    pub base_path: Option<PathBuf>,
    /// Whether the map says nothing of any block: all of the disk is what lies below.
    pub is_empty: bool,
    /// Blocks of 4 KiB that the map refers to.
    pub live_blocks: u64,
    /// Bytes of the file that are in use: its start, and the segments that the map or the log uses.
    pub used_bytes: u64,
    /// Bytes that segments may take before guests wait for the cleaner.
    pub allowed_bytes: u64,
    /// Bytes that the file may take beside: the log's own segments, and what is kept back for a full host. The more
    /// of the map has changed since a checkpoint, the more that is.
    pub beside_bytes: u64,
    /// Bytes of segments that are not free, those included that are on their way to be.
    pub occupied_bytes: u64,
    /// What was written since the layer was made.
    pub traffic: Traffic,
    /// Lanes of the log that are open.
    pub lanes: usize,
    /// Blocks in use for anything else: overwritten data, the map itself, the log's own.
    pub dead_blocks: u64,
    /// Number of the newest checkpoint.
    pub generation: u64,
    /// Number of the newest record.
    pub sequence: u64,
    /// Whether it had been closed properly before it was opened.
    pub clean: bool,
    /// Bytes of the map's nodes as the newest checkpoint stored them: a cache of about this size holds
    /// all of them.
    pub map_stored_bytes: u64,
    /// Memory that nodes of the map may take while they are not changed, in bytes.
    pub map_cache_bytes: u64,
    /// Memory that nodes of the map take now, in bytes.
    pub map_bytes: u64,
    /// Reads of the map's nodes since it was opened.
    pub map_reads: u64,
    /// Images below it that are open to it.
    pub depth: usize,
    /// Memory that the index over the layers among them takes, in bytes.
    pub index_bytes: usize,
}

/// Opens a file and takes the lock on that very open file description, before anything is read.
pub(crate) fn open_file<S: Storage>(
    storage: &S,
    path: &Path,
    options: OpenOptions,
    lock: Lock,
) -> Result<S::File, ImageError> {
    let file = storage.open(path, options).map_err(|e| ImageError::open(path, e))?;
    crate::open::lock(&file, lock)?;
    Ok(file)
}

/// Refuses sizes that a layer cannot have.
pub(crate) fn check_size(path: &Path, size: u64, segment_blocks: u32) -> Result<(), ImageError> {
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(ImageError::invalid(
            path,
            format!("the size must be a multiple of {SECTOR_SIZE}, above 0"),
        ));
    }
    if size > SIZE_MAX {
        return Err(ImageError::invalid(path, "the largest size is 64 TiB"));
    }
    if size > layout::size_max(segment_blocks) {
        return Err(ImageError::invalid(path, "the segments are too small for a disk of this size"));
    }
    Ok(())
}
