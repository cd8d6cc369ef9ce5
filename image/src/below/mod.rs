//! A disk that is only read: an image and everything below it.
//!
//! A [`Below`] is a chain of open files, from the image that was named down to the one that names
//! no other: qcow2 images, and a raw image at the end. It is what a qcow2 disk is served from, and
//! what may lie under something that is written.
//!
//! - [`Below::plan`] finds the bytes of a range in memory alone, without waiting: pieces that are
//!   zero, in a file, or compressed. When a page of a table is missing it says which.
//! - [`Below::load`] brings that page, and planning goes on where it stopped.
//!
//! Tables and decompressed clusters of all images of a chain share caches of fixed sizes (`cache`).
//! Nothing here is ever changed: whoever writes above records the [`Identity`].

pub(crate) mod cache;
mod map;
mod open;
mod plan;
mod read;

pub(crate) use open::{BackingSpec, open_shared};
pub use open::{Identity, OpenBelow};
pub use plan::{Compressed, Held, Piece, Source, Stop};

use std::path::Path;
use std::sync::atomic::AtomicBool;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::{FileIdentity, StorageFile};

use crate::qcow2::image::Image;
use cache::{ClusterCache, TableCache};

/// Images below one another, at most, in one chain.
pub const DEPTH_MAX: usize = 100;

/// See the module's documentation. Made by [`Below::open`].
pub struct Below<E: Engine> {
    /// From the top down; never empty.
    links: Vec<Link<E>>,
    tables: TableCache,
    clusters: ClusterCache,
    /// Damage found while reading has been logged; a guest must not be able to fill the log.
    complained: AtomicBool,
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
}

impl<E: Engine> Link<E> {
    fn path(&self) -> &Path {
        match self {
            Self::Raw { file, .. } => file.path(),
            Self::Qcow2(image) => image.path(),
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(image) => image.size(),
        }
    }
}

impl<E: Engine> Below<E> {
    /// Size of the disk in bytes, in whole sectors.
    pub fn size(&self) -> u64 {
        self.links[0].size()
    }

    /// The path of the image at the top.
    pub fn path(&self) -> &Path {
        self.links[0].path()
    }

    /// What makes the disk recognisable.
    pub fn identity(&self) -> Identity {
        let files = self.links.iter().flat_map(|link| match link {
            Link::Raw { identity, .. } => vec![*identity],
            Link::Qcow2(image) => image.identities().collect(),
        });
        Identity { size: self.size(), files: files.collect() }
    }
}
