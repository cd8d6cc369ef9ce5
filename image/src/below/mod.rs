//! What is only read: an image and everything below it.
//!
//! A [`Chain`] holds links from the image that was named down to the one that names no other: layers
//! that others lie over, qcow2 images, and a raw image at the end. It is what a qcow2 disk is served
//! from, and what lies below a layer. It is opened link after link, without recursion.
//!
//! Reading asks *stages*, not links, from the top down:
//!
//! - Layers that follow one another are one stage. What their maps say is read when the chain is opened
//!   and merged into one index (`index`), so that a look-up costs the same below one layer and a
//!   thousand. The index has a bound. A layer that does not fit into it is a stage of its own,
//!   whose map is asked through a cache, as a writable layer's is.
//! - A qcow2 image is a stage; its tables are read through a cache (`cache`). So is a raw image.
//! - A sealed snapshot ([`crate::sealed`]) is a stage, the last one (`sealed`): it answers for every block, whether that
//!   is zero or stored. Its nodes and data are in the caches that belong to its packs, which disks share.
//!
//! [`Chain::plan`] finds the bytes of a range in memory alone, without waiting: pieces that are zero,
//! in a file, compressed, or sealed. When something is missing (a page of a table, nodes of a map, a file that
//! is not open) it says what; [`Chain::load`] brings that, and planning goes on where it stopped.
//!
//! The files of layers are open as far as a bound allows, and are opened again when they are needed
//! (`pool`); one that is not what it was is an error then. Raw and qcow2 images stay open.
//!
//! A layer that is put on a chain that is open makes another chain, which shares all else with that one (`extend`).
//!
//! No link ends a chain's answer but by its size: what a link lacks at its end reads as zeroes above,
//! whatever lies below it. `limits` says for each link how far it is seen.
//!
//! Nothing here is ever changed, so look-ups need no epochs. But an online commit
//! (`image/src/layer/commit_online.rs`) writes the image at the top: only where nobody reads it, since the
//! layer above holds the block itself, and without using anything again that the link refers to. It keeps
//! the link open meanwhile ([`Chain::hold_top`]).

pub(crate) mod cache;
mod disk;
mod extend;
mod index;
mod map;
mod open;
mod plan;
mod pool;
mod queue;
mod read;
mod sealed;

pub use disk::ChainDisk;
pub use open::OpenBelow;
pub(crate) use open::{BackingSpec, NO_FILE, NextLink, open_shared};
pub(crate) use plan::push;
pub use plan::{Compressed, Held, Piece, SealedPart, Source, Stop};
pub(crate) use pool::{Opened, Permit, Permits};
pub use queue::ChainQueue;
pub(crate) use read::{reaches, read_aligned, read_file};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::{FileIdentity, StorageFile};

use crate::error::ImageError;
use crate::layer::frozen::Seal;
use crate::layer::in_store::Kept;
use crate::layer::{LayerId, Tuning, check_size};
use crate::qcow2::image::Image;
use crate::raw::check_growth;
use crate::sealed::Snapshot;
use cache::{ClusterCache, TableCache};
use index::Index;
use pool::Pool;

/// Links of a chain, at most.
pub const LINKS_MAX: usize = 65_535;
/// Backing files of a qcow2 image, at most. All of them are open.
pub const QCOW2_MAX: usize = 100;

/// Opens a file again, and locks it.
type Reopen<F> = Box<dyn Fn(&Path) -> Result<F, ImageError> + Send + Sync>;

/// See the module's documentation. Made by [`Chain::open`] and [`Chain::open_sealed`].
pub struct Chain<E: Engine> {
    /// From the top down; never empty.
    links: Vec<Arc<Link<E>>>,
    /// How many bytes of the disk can be seen of each link: the smallest size down to it.
    limits: Vec<u64>,
    stages: Vec<Stage>,
    /// Shared with the chain of which this one is an extension, as the caches are.
    pool: Arc<Pool<E>>,
    reopen: Reopen<E::File>,
    /// How a layer whose map is asked is opened.
    paged_tuning: Tuning,
    tables: Arc<TableCache>,
    clusters: Arc<ClusterCache>,
    decompressing: Permits,
    /// Damage found while reading has been logged; a guest must not be able to fill the log.
    complained: AtomicBool,
}

/// Who is asked for a block.
enum Stage {
    /// Layers from link `first` on, all at once; the index counts them from there.
    Index { first: usize, index: Arc<Index> },
    /// One link.
    Link(usize),
}

impl Stage {
    /// The uppermost link of it.
    fn first(&self) -> usize {
        match self {
            Self::Index { first, .. } => *first,
            Self::Link(link) => *link,
        }
    }
}

/// One image of a chain.
pub(crate) enum Link<E: Engine> {
    /// A raw image: the bytes of the disk, as they are.
    Raw {
        file: E::File,
        identity: FileIdentity,
        /// Size of the disk in bytes, in whole sectors.
        size: u64,
    },
    /// A qcow2 image.
    Qcow2(Box<Image<E>>),
    /// A layer that is only read.
    Layer(Box<LayerLink>),
    /// A sealed snapshot, below which is nothing.
    Sealed(Snapshot<E>),
}

/// What is known of a layer while its file is closed.
pub(crate) struct LayerLink {
    path: Arc<Path>,
    /// Size of the disk in bytes.
    size: u64,
    segment_blocks: u32,
    seal: Seal,
    /// Its map is not in the index.
    is_paged: bool,
    /// Keeps its file where it is.
    _kept: Option<Kept>,
}

impl LayerLink {
    fn id(&self) -> &LayerId {
        &self.seal.id
    }
}

impl<E: Engine> Link<E> {
    fn path(&self) -> &Path {
        match self {
            Self::Raw { file, .. } => file.path(),
            Self::Qcow2(image) => image.path(),
            Self::Layer(layer) => &layer.path,
            Self::Sealed(snapshot) => snapshot.packs().path(),
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(image) => image.size(),
            Self::Layer(layer) => layer.size,
            Self::Sealed(snapshot) => snapshot.root().size,
        }
    }
}

impl<E: Engine> Chain<E> {
    /// Size of the disk in bytes, in whole sectors.
    pub fn size(&self) -> u64 {
        self.links[0].size()
    }

    /// The path of the image at the top.
    pub fn path(&self) -> &Path {
        self.links[0].path()
    }

    /// Of a link, how many there are from it down: it stays the same when something is put on the chain.
    fn height(&self, link: usize) -> usize {
        self.links.len() - link
    }

    /// Images in it.
    pub fn depth(&self) -> usize {
        self.links.len()
    }

    /// Memory that the indexes over layers take, in bytes.
    pub fn index_bytes(&self) -> usize {
        self.index_runs() * index::RUN_BYTES
    }

    fn index_runs(&self) -> usize {
        let indexes = self.stages.iter().map(|stage| match stage {
            Stage::Index { index, .. } => index.len(),
            Stage::Link(_) => 0,
        });
        indexes.sum()
    }

    /// Refuses a size that the image at the top, which is to be written, cannot be given.
    pub(crate) fn check_growth(&self, size: u64) -> Result<(), ImageError> {
        match &*self.links[0] {
            Link::Layer(layer) => check_size(&layer.path, size.max(layer.size), layer.segment_blocks),
            Link::Raw { file, size: old, .. } if *old < size => check_growth(file, size),
            _ => Ok(()),
        }
    }

    /// Raw and qcow2 files, from the top down, and what makes them recognisable.
    pub fn files(&self) -> Vec<(PathBuf, FileIdentity)> {
        let files = self.links.iter().flat_map(|link| match &**link {
            Link::Raw { file, identity, .. } => vec![(file.path().to_owned(), *identity)],
            Link::Qcow2(image) => {
                let data = image.external_data().map(|(file, identity)| (file.path().to_owned(), *identity));
                std::iter::once((image.path().to_owned(), image.identity)).chain(data).collect()
            }
            Link::Layer(_) | Link::Sealed(_) => Vec::new(),
        });
        files.collect()
    }
}
