//! What is kept in memory of the images of a chain: pages of tables, and decompressed clusters.
//!
//! Both caches have a fixed bound, whatever the images say. A page or cluster that is being brought is
//! waited for by everybody else who needs it, on any thread, rather than brought again.

use std::sync::Arc;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use sapwood_blockdev::buffer::AlignedBuf;

/// Bytes of a page of tables: the unit in which they are read and kept.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Bytes of tables kept for a chain. With clusters of 64 KiB they map 128 GiB of disk.
const TABLE_BYTES_MAX: usize = 16 << 20;
/// Bytes of decompressed clusters kept for a chain: four of the largest.
const CLUSTER_BYTES_MAX: u64 = 8 << 20;
/// What clusters mostly are, for the cache's own tables.
const CLUSTER_BYTES_TYPICAL: u64 = 64 << 10;

/// A page of a file.
pub(crate) type Page = Arc<AlignedBuf>;
/// A decompressed cluster.
pub(crate) type Cluster = Arc<[u8]>;

/// Pages by the number of their image in the chain, from the bottom up, and their own in the file.
pub(crate) type TableCache = Cache<(usize, u64), Page>;
/// Clusters by the number of their image in the chain, from the bottom up, and the offset of their compressed bytes.
pub(crate) type ClusterCache = Cache<(usize, u64), Cluster, ByLength>;

/// Weighs clusters by their length.
#[derive(Clone)]
pub(crate) struct ByLength;

impl Weighter<(usize, u64), Cluster> for ByLength {
    fn weight(&self, _: &(usize, u64), cluster: &Cluster) -> u64 {
        cluster.len() as u64
    }
}

pub(crate) fn tables() -> TableCache {
    Cache::new(TABLE_BYTES_MAX / PAGE_BYTES)
}

pub(crate) fn clusters() -> ClusterCache {
    let mut options = OptionsBuilder::new();
    options.weight_capacity(CLUSTER_BYTES_MAX);
    options.estimated_items_capacity((CLUSTER_BYTES_MAX / CLUSTER_BYTES_TYPICAL) as usize);
    // Each shard has its part of the capacity, and must take the largest cluster.
    options.shards(1);
    let options = options.build().expect("capacity and weight are stated");
    Cache::with_options(options, ByLength, DefaultHashBuilder::default(), Default::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_hold() {
        let clusters = clusters();
        for offset in 0..100 {
            clusters.insert((0, offset), vec![0; 2 << 20].into());
            assert!(clusters.weight() <= CLUSTER_BYTES_MAX);
        }
        assert!(clusters.len() >= 2, "the largest clusters are kept");
        let tables = tables();
        let page: Page = Arc::new(AlignedBuf::zeroed(PAGE_BYTES));
        (0..100_000).for_each(|number| tables.insert((0, number), Arc::clone(&page)));
        assert!(tables.len() * PAGE_BYTES <= TABLE_BYTES_MAX + TABLE_BYTES_MAX / 8);
    }
}
