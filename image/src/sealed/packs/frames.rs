//! Decompressed frames in memory.

use std::sync::{Arc, OnceLock};

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use sapwood_blockdev::units::BLOCK_BYTES;

use super::super::hash::Hash;
use super::super::record::{FRAME_BLOCKS_MAX, Frame};

/// What frames mostly are, for the cache's own tables.
const FRAME_BYTES_TYPICAL: u64 = 64 << 10;
/// Memory that an entry of the cache takes beside its blocks, and for each of them, in bytes.
const ENTRY_BYTES: u64 = 128;
const BLOCK_HASH_BYTES: u64 = size_of::<OnceLock<Hash>>() as u64;
/// What the largest frame weighs.
const FRAME_WEIGHT_MAX: u64 = ENTRY_BYTES + FRAME_BLOCKS_MAX as u64 * (BLOCK_BYTES as u64 + BLOCK_HASH_BYTES);

/// A frame, and the hashes of those blocks that were asked for.
#[derive(Debug)]
pub(super) struct CachedFrame {
    pub(super) frame: Frame,
    hashes: Box<[OnceLock<Hash>]>,
}

impl CachedFrame {
    pub(super) fn new(frame: Frame) -> Self {
        let hashes = (0..frame.count()).map(|_| OnceLock::new()).collect();
        Self { frame, hashes }
    }

    /// Whether this is what a block of it holds. Each is hashed once.
    pub(super) fn holds(&self, index: usize, hash: &Hash) -> bool {
        let (Some(block), Some(known)) = (self.frame.block(index), self.hashes.get(index)) else {
            return false;
        };
        known.get_or_init(|| Hash::of_block(block)) == hash
    }
}

/// Weighs frames.
#[derive(Clone)]
struct ByLength;

impl Weighter<(u32, u64), Arc<CachedFrame>> for ByLength {
    fn weight(&self, _: &(u32, u64), frame: &Arc<CachedFrame>) -> u64 {
        ENTRY_BYTES + frame.frame.bytes() as u64 + frame.hashes.len() as u64 * BLOCK_HASH_BYTES
    }
}

/// Frames by the number of their pack and their offset in it.
pub(super) struct Frames(Cache<(u32, u64), Arc<CachedFrame>, ByLength>);

impl Frames {
    /// Takes about `bytes` of memory, and not less than four of the largest frames.
    pub(super) fn new(bytes: u64) -> Self {
        let bytes = bytes.max(4 * FRAME_WEIGHT_MAX);
        let mut options = OptionsBuilder::new();
        options.weight_capacity(bytes);
        options.estimated_items_capacity((bytes / FRAME_BYTES_TYPICAL) as usize);
        // Each shard has its part of the capacity, and must take some of the largest.
        options.shards(((bytes / (32 * FRAME_WEIGHT_MAX)) as usize).clamp(1, 16));
        let options = options.build().expect("capacity and weight are stated");
        Self(Cache::with_options(options, ByLength, DefaultHashBuilder::default(), Default::default()))
    }

    pub(super) fn get(&self, key: (u32, u64)) -> Option<Arc<CachedFrame>> {
        self.0.get(&key)
    }

    /// A frame, which `read` reads when nobody has it or brings it.
    pub(super) async fn bring<T>(
        &self,
        key: (u32, u64),
        read: impl Future<Output = Result<Arc<CachedFrame>, T>>,
    ) -> Result<Arc<CachedFrame>, T> {
        self.0.get_or_insert_async(&key, read).await
    }

    /// Forgets what is in these packs.
    pub(super) fn withdraw(&self, numbers: &[u32]) {
        self.0.retain(|(pack, _), _| !numbers.contains(pack));
    }

    /// Memory taken, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.0.weight()
    }
}
