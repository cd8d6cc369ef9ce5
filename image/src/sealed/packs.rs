//! The packs of a store, or of an archive: reading by hash, with places as hints.
//!
//! What is found at a place counts when it has the hash that was asked for. When it has not, when it is damaged or its pack
//! cannot be opened, the exact index ([`super::index`]) is asked for other places, and what is found there is verified as well. What
//! is nowhere is an error that says what was wrong with the place.
//!
//! In memory, all bounded by [`PacksTuning`]: packs that are open (`pool`), nodes (`nodes`) and decompressed frames
//! (`frames`). What one reader brings, on whatever thread, others who need it wait for.

mod frames;
mod nodes;
mod pool;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::hash::Hash;
use super::index::Index;
use super::node::{Child, Node};
use super::pack::Pack;
use super::place::Place;
use crate::error::ImageError;
use frames::{CachedFrame, Frames};
use nodes::{KEPT_BYTES, Nodes, PAGE_BYTES, Page};
use pool::{Lease, Pool};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// Opens the file that holds a pack, and says which bytes of it the pack is.
type OpenPack<F> = Box<dyn Fn(u32) -> Result<(F, Range<u64>), ImageError> + Send + Sync>;

/// Bounds of what packs keep in memory, for all disks that are read from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacksTuning {
    /// Packs that are open at a time, at least two.
    pub files_max: usize,
    /// Memory for decompressed frames in bytes; not less than 0.5 MB, four of the largest, is used.
    pub frame_bytes: u64,
    /// Memory for nodes in bytes, a quarter of it for pages of packs; 64 MiB hold the nodes of about 4 GiB of a
    /// disk's blocks. Not less than 0.1 MB is used.
    pub node_bytes: u64,
}

impl Default for PacksTuning {
    fn default() -> Self {
        Self { files_max: 128, frame_bytes: 64 << 20, node_bytes: 64 << 20 }
    }
}

/// See the module's documentation.
pub struct Packs<E: Engine> {
    /// For messages: the store's folder, or the archive.
    path: PathBuf,
    open: OpenPack<E::File>,
    index: Arc<Index<E>>,
    pool: Pool<E::File>,
    nodes: Nodes,
    frames: Frames,
}

/// A sealed disk: its size, and the top of its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// The node at the top; zero when the disk is.
    pub tree: Child,
}

/// A block that was found: whole, and with the hash that was asked for.
#[derive(Clone, Debug)]
pub struct FoundBlock {
    frame: Arc<CachedFrame>,
    index: usize,
}

impl FoundBlock {
    /// Its 4096 bytes.
    pub fn bytes(&self) -> &[u8] {
        self.frame.frame.block(self.index).expect("it was checked when it was found")
    }

    /// Another block of the same frame, if it is what has this hash.
    pub(super) fn beside(&self, index: usize, hash: &Hash) -> Option<Self> {
        let frame = Arc::clone(&self.frame);
        frame.holds(index, hash).then_some(Self { frame, index })
    }
}

impl<E: Engine> Packs<E> {
    /// Packs that `open` finds by their number, with the default bounds and no index beside them.
    pub fn new(
        path: &Path,
        open: impl Fn(u32) -> Result<(E::File, Range<u64>), ImageError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Self::with_index(path, &PacksTuning::default(), Arc::default(), open)
    }

    /// Packs that `open` finds by their number, and an index that knows the places of what is in them.
    pub fn with_index(
        path: &Path,
        tuning: &PacksTuning,
        index: Arc<Index<E>>,
        open: impl Fn(u32) -> Result<(E::File, Range<u64>), ImageError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            path: path.to_owned(),
            open: Box::new(open),
            index,
            pool: Pool::new(tuning.files_max),
            nodes: Nodes::new(tuning.node_bytes),
            frames: Frames::new(tuning.frame_bytes),
        })
    }

    /// For messages: the store's folder, or the archive.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The exact index beside the packs.
    pub fn index(&self) -> &Arc<Index<E>> {
        &self.index
    }

    /// Pack `number`. Its file is open as long as the answer is kept, beside the bound.
    ///
    /// # Errors
    /// When it cannot be opened, or is damaged.
    pub async fn pack(&self, io: &Io<E>, number: u32) -> Result<Pack<E::File>, ImageError> {
        Ok(Pack::clone(&self.lease(io, number).await?.pack))
    }

    async fn lease(&self, io: &Io<E>, number: u32) -> Result<Lease<E::File>, ImageError> {
        let open = async {
            let (file, range) = (self.open)(number)?;
            Pack::open(io, file, range, number).await
        };
        self.pool.lease(number, open).await
    }

    /// The node that `child` stands for, if it is in memory.
    pub fn cached_node(&self, child: &Child) -> Option<Arc<Node>> {
        self.nodes.get(child)
    }

    /// The block with this hash, if the frame at `place` is in memory and holds it.
    pub fn cached_block(&self, hash: &Hash, place: Place) -> Option<FoundBlock> {
        let frame = self.frames.get((place.pack(), place.offset()))?;
        let index = place.index();
        frame.holds(index, hash).then_some(FoundBlock { frame, index })
    }

    /// Whether the frame at a place is in memory.
    pub fn cached_frame(&self, place: Place) -> bool {
        self.frames.get((place.pack(), place.offset())).is_some()
    }

    /// The node that `child` stands for, which is not zero.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is nowhere.
    pub async fn node(&self, io: &Io<E>, child: &Child) -> Result<Arc<Node>, ImageError> {
        match self.cached_node(child) {
            Some(node) => Ok(node),
            None => {
                let at = async |place| self.node_at(io, &child.hash, place).await;
                self.anywhere(io, &child.hash, child.place, at).await
            }
        }
    }

    /// The block with this hash, which is not zero.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is nowhere.
    pub async fn block(&self, io: &Io<E>, hash: &Hash, place: Place) -> Result<FoundBlock, ImageError> {
        match self.cached_block(hash, place) {
            Some(found) => Ok(found),
            None => {
                let at = async |place| self.block_at(io, hash, place).await;
                self.anywhere(io, hash, place, at).await
            }
        }
    }

    /// What `at` finds at a place, or else at one of those that the index knows.
    async fn anywhere<T>(
        &self,
        io: &Io<E>,
        hash: &Hash,
        place: Place,
        at: impl AsyncFn(Place) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let mut first = None;
        if !place.is_none() {
            match at(place).await {
                Ok(found) => return Ok(found),
                Err(error) => first = Some(error),
            }
        }
        loop {
            let asked = self.index.asked();
            for run in &asked.runs {
                let places = match self.index.look_up_in(io, &asked, run, hash).await {
                    Ok(places) => places,
                    Err(error) => {
                        first.get_or_insert(error);
                        continue;
                    }
                };
                for other in places.into_iter().filter(|other| *other != place) {
                    match at(other).await {
                        Ok(found) => return Ok(found),
                        Err(error) => drop(first.get_or_insert(error)),
                    }
                }
            }
            // What was moved meanwhile is where the runs of now say.
            if Arc::ptr_eq(&asked, &self.index.asked()) {
                return Err(first.unwrap_or_else(|| self.missing(hash)));
            }
        }
    }

    async fn node_at(&self, io: &Io<E>, hash: &Hash, place: Place) -> Result<Arc<Node>, ImageError> {
        let read = async {
            let Lease { pack, .. } = &self.lease(io, place.pack()).await?;
            let start = place.offset() / PAGE_BYTES * PAGE_BYTES;
            let bytes = pack.stored(io, start..start + KEPT_BYTES).await?;
            Ok::<_, ImageError>(Arc::new(Page { pack: pack.id(), start, bytes }))
        };
        let page = self.nodes.page(place, read).await?;
        if let Some(node) = self.nodes.take(&page, hash, place) {
            return Ok(node);
        }
        // Alone, to be able to say what is wrong.
        self.nodes.forget(place);
        let Lease { pack, .. } = &self.lease(io, place.pack()).await?;
        let node = pack.node(io, place).await?;
        if node.hash() != *hash {
            return Err(pack.holds_other(place, hash));
        }
        Ok(self.nodes.keep(hash, node))
    }

    async fn block_at(&self, io: &Io<E>, hash: &Hash, place: Place) -> Result<FoundBlock, ImageError> {
        let read = async {
            let Lease { pack, .. } = &self.lease(io, place.pack()).await?;
            Ok::<_, ImageError>(Arc::new(CachedFrame::new(pack.frame(io, place).await?)))
        };
        let frame = self.frames.bring((place.pack(), place.offset()), read).await?;
        let index = place.index();
        if frame.holds(index, hash) {
            return Ok(FoundBlock { frame, index });
        }
        Err(self.lease(io, place.pack()).await?.pack.holds_other(place, hash))
    }

    /// Packs that are not to be used any more: they are closed, and what was kept of them is forgotten. Readers that are under
    /// way end well, because their file stays open until then.
    pub fn withdraw(&self, numbers: &[u32]) {
        self.pool.withdraw(numbers);
        self.nodes.withdraw(numbers);
        self.frames.withdraw(numbers);
    }

    /// Memory taken by nodes and frames, in bytes.
    pub fn cached_bytes(&self) -> u64 {
        self.nodes.bytes() + self.frames.bytes()
    }

    /// Packs that are kept open.
    pub fn open_packs(&self) -> usize {
        self.pool.len()
    }

    /// The error for content that is nowhere.
    pub(super) fn missing(&self, hash: &Hash) -> ImageError {
        ImageError::corrupt(&self.path, "content", 0, format!("{hash} is in none of the packs"))
    }
}
