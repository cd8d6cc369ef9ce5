//! What is stored already: where sealing looks before it stores.

use std::collections::HashMap;

use super::hash::Hash;
use super::header::PackKind;
use super::packs::Packs;
use super::place::Place;
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// Where content may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its whole hash was compared with that of the pack's entry, or of what is stored there.
    Sure(Place),
    /// Only a part of its hash was compared: sealing reads the block first.
    Hint(Place),
}

/// An index for deduplication. It may miss; what it is sure of is true.
pub trait Dedup<E: Engine> {
    /// Gets ready to be asked for the blocks of a segment of the disk, in its order.
    ///
    /// # Errors
    /// When what it would need cannot be read, and it cannot do without.
    fn look_ahead(
        &mut self,
        io: &Io<E>,
        packs: &Packs<E>,
        hashes: &[Hash],
    ) -> impl Future<Output = Result<(), ImageError>>;

    /// Where a block is.
    fn find(&mut self, hash: &Hash) -> Option<Found>;

    /// A block was stored, in a pack that may not be finished yet; `page` is the page of the pack's entries that it
    /// will be in.
    fn insert(&mut self, hash: Hash, place: Place, page: u32);

    /// Where a node is; by default nobody knows.
    fn find_node(&mut self, _hash: &Hash) -> Option<Found> {
        None
    }

    /// A node was stored.
    fn insert_node(&mut self, _hash: Hash, _place: Place) {}
}

/// All hashes in memory: for small stores, and for tests.
#[derive(Clone, Debug, Default)]
pub struct ExactMap {
    blocks: HashMap<Hash, Place>,
    nodes: HashMap<Hash, Place>,
}

impl ExactMap {
    /// Different blocks that it knows.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Where a block is.
    pub fn place_of(&self, hash: &Hash) -> Option<Place> {
        self.blocks.get(hash).copied()
    }

    /// Learns what a pack holds.
    ///
    /// # Errors
    /// When its entries cannot be read, or are damaged.
    pub async fn add_pack<E: Engine>(
        &mut self,
        io: &Io<E>,
        packs: &Packs<E>,
        number: u32,
    ) -> Result<(), ImageError> {
        let pack = packs.pack(io, number).await?;
        let entries = pack.entries_in(io, 0..u32::MAX).await?;
        let map = match pack.kind() {
            PackKind::Data => &mut self.blocks,
            PackKind::Nodes => &mut self.nodes,
        };
        map.extend(entries.into_iter().map(|entry| (entry.hash, entry.place)));
        Ok(())
    }
}

impl<E: Engine> Dedup<E> for ExactMap {
    async fn look_ahead(&mut self, _: &Io<E>, _: &Packs<E>, _: &[Hash]) -> Result<(), ImageError> {
        Ok(())
    }

    fn find(&mut self, hash: &Hash) -> Option<Found> {
        self.blocks.get(hash).copied().map(Found::Sure)
    }

    fn insert(&mut self, hash: Hash, place: Place, _: u32) {
        self.blocks.insert(hash, place);
    }

    fn find_node(&mut self, hash: &Hash) -> Option<Found> {
        self.nodes.get(hash).copied().map(Found::Sure)
    }

    fn insert_node(&mut self, hash: Hash, place: Place) {
        self.nodes.insert(hash, place);
    }
}
