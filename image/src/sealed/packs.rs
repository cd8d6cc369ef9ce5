//! The packs of a store, or of an archive: reading by hash, with places as hints.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::hash::Hash;
use super::node::{Child, Node};
use super::pack::Pack;
use super::place::Place;
use super::record::Frame;
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// Opens the file that holds a pack, and says which bytes of it the pack is.
type OpenPack<F> = Box<dyn Fn(u32) -> Result<(F, Range<u64>), ImageError> + Send + Sync>;

/// See the module's documentation.
pub struct Packs<E: Engine> {
    /// For messages: the store's folder, or the archive.
    path: PathBuf,
    open: OpenPack<E::File>,
    opened: Mutex<HashMap<u32, Pack<E::File>>>,
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
    frame: Arc<Frame>,
    index: usize,
}

impl FoundBlock {
    /// Its 4096 bytes.
    pub fn bytes(&self) -> &[u8] {
        self.frame.block(self.index).expect("it was checked when it was found")
    }
}

impl<E: Engine> Packs<E> {
    /// Packs that `open` finds by their number.
    pub fn new(
        path: &Path,
        open: impl Fn(u32) -> Result<(E::File, Range<u64>), ImageError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { path: path.to_owned(), open: Box::new(open), opened: Mutex::default() })
    }

    /// Pack `number`.
    ///
    /// # Errors
    /// When it cannot be opened, or is damaged.
    pub async fn pack(&self, io: &Io<E>, number: u32) -> Result<Pack<E::File>, ImageError> {
        if let Some(pack) = self.opened.lock().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Ok(pack.clone());
        }
        let (file, range) = (self.open)(number)?;
        let pack = Pack::open(io, file, range, number).await?;
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(opened.entry(number).or_insert(pack).clone())
    }

    /// The node that `child` stands for, which is not zero.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is nowhere.
    pub async fn node(&self, io: &Io<E>, child: &Child) -> Result<Arc<Node>, ImageError> {
        if !child.place.is_none() {
            let pack = self.pack(io, child.place.pack()).await?;
            let node = pack.node(io, child.place).await?;
            if node.hash() == child.hash {
                return Ok(Arc::new(node));
            }
        }
        Err(self.missing(&child.hash))
    }

    /// The block with this hash, which is not zero.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is nowhere.
    pub async fn block(&self, io: &Io<E>, hash: &Hash, place: Place) -> Result<FoundBlock, ImageError> {
        if !place.is_none() {
            let pack = self.pack(io, place.pack()).await?;
            let frame = pack.frame(io, place).await?;
            if frame.block(place.index()).is_some_and(|block| Hash::of_block(block) == *hash) {
                return Ok(FoundBlock { frame: Arc::new(frame), index: place.index() });
            }
        }
        Err(self.missing(hash))
    }

    fn missing(&self, hash: &Hash) -> ImageError {
        ImageError::corrupt(&self.path, "content", 0, format!("{hash} is in none of the packs"))
    }
}
