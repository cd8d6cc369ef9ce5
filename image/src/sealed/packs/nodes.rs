//! Nodes in memory: as they are stored, in pages, and those that were asked for, decoded and verified.
//!
//! Nodes that lie beside one another on the disk lie beside one another in a pack. So a page of a pack is read at once and kept,
//! and whoever goes over a tree in the order of the disk reads one page for about 24 nodes.

use std::sync::Arc;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::super::hash::Hash;
use super::super::header::PackId;
use super::super::node::{Child, Node};
use super::super::place::Place;
use super::super::record::{NODE_RECORD_MAX, Record, decode_record};

/// Bytes of a pack in which the nodes of a page begin.
pub(super) const PAGE_BYTES: u64 = 16 << 10;
/// Bytes that are kept of a page: a node that begins in it may end in the next.
pub(super) const KEPT_BYTES: u64 = PAGE_BYTES + NODE_RECORD_MAX as u64;

/// Memory for pages, as a part of all: one of so many.
const PAGES_PART: u64 = 4;
/// Memory that an entry of a cache takes beside its content, in bytes.
const ENTRY_BYTES: u64 = 128;
/// Memory that a decoded node takes, in bytes.
pub(super) const NODE_BYTES: u64 = size_of::<Node>() as u64 + ENTRY_BYTES;

/// The part of a pack in which nodes are found.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) pack: PackId,
    /// Where in the pack it begins.
    pub(super) start: u64,
    pub(super) bytes: Box<[u8]>,
}

impl Page {
    /// The node at a place in it, if there is one.
    fn node(&self, place: Place) -> Option<Node> {
        let at = place.offset().checked_sub(self.start)?;
        let bytes = self.bytes.get(at as usize..)?;
        match decode_record(&self.pack, place.offset(), bytes) {
            Ok((Record::Node(node), _)) => Some(*node),
            _ => None,
        }
    }
}

/// Weighs pages.
#[derive(Clone)]
struct ByLength;

impl Weighter<(u32, u64), Arc<Page>> for ByLength {
    fn weight(&self, _: &(u32, u64), page: &Arc<Page>) -> u64 {
        page.bytes.len() as u64 + ENTRY_BYTES
    }
}

/// See the module's documentation.
pub(super) struct Nodes {
    /// By the number of the pack and their own in it.
    pages: Cache<(u32, u64), Arc<Page>, ByLength>,
    /// By what they hold: a node is the same wherever it was found.
    nodes: Cache<Hash, Arc<Node>>,
}

/// The page that a node is in.
fn page_of(place: Place) -> (u32, u64) {
    (place.pack(), place.offset() / PAGE_BYTES)
}

impl Nodes {
    /// Takes about `bytes` of memory, and not less than four pages.
    pub(super) fn new(bytes: u64) -> Self {
        let page_bytes = (bytes / PAGES_PART).max(4 * (KEPT_BYTES + ENTRY_BYTES));
        let mut options = OptionsBuilder::new();
        options.weight_capacity(page_bytes);
        options.estimated_items_capacity((page_bytes / KEPT_BYTES) as usize);
        // Each shard has its part of the capacity, and must take some pages.
        options.shards(((page_bytes >> 20) as usize).clamp(1, 16));
        let options = options.build().expect("capacity and weight are stated");
        let nodes = (bytes - bytes / PAGES_PART) / NODE_BYTES;
        Self {
            pages: Cache::with_options(options, ByLength, DefaultHashBuilder::default(), Default::default()),
            nodes: Cache::new(nodes.max(64) as usize),
        }
    }

    /// A node that is in memory.
    pub(super) fn get(&self, child: &Child) -> Option<Arc<Node>> {
        self.nodes.get(&child.hash).or_else(|| {
            let page = self.pages.get(&page_of(child.place)).filter(|_| !child.place.is_none())?;
            self.take(&page, &child.hash, child.place)
        })
    }

    /// The node with this hash, if it is at that place of a page.
    pub(super) fn take(&self, page: &Page, hash: &Hash, place: Place) -> Option<Arc<Node>> {
        let node = page.node(place).filter(|node| node.hash() == *hash)?;
        Some(self.keep(hash, node))
    }

    /// Keeps a node that has this hash.
    pub(super) fn keep(&self, hash: &Hash, node: Node) -> Arc<Node> {
        let node = Arc::new(node);
        self.nodes.insert(*hash, Arc::clone(&node));
        node
    }

    /// The page of a place, which `read` reads when nobody has it or brings it.
    pub(super) async fn page<T>(
        &self,
        place: Place,
        read: impl Future<Output = Result<Arc<Page>, T>>,
    ) -> Result<Arc<Page>, T> {
        self.pages.get_or_insert_async(&page_of(place), read).await
    }

    /// Forgets the page of a place, in which damage was found: the next one reads it again.
    pub(super) fn forget(&self, place: Place) {
        self.pages.remove(&page_of(place));
    }

    /// Forgets what is in these packs, and the nodes that say that something is there.
    pub(super) fn withdraw(&self, numbers: &[u32]) {
        let is_there = |child: &Child| !child.place.is_none() && numbers.contains(&child.place.pack());
        self.pages.retain(|(pack, _), _| !numbers.contains(pack));
        self.nodes.retain(|_, node| !node.children.iter().any(is_there));
    }

    /// Memory taken, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.pages.weight() + self.nodes.len() as u64 * NODE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_hold() {
        const BYTES: u64 = 4 << 20;
        let nodes = Nodes::new(BYTES);
        for n in 0..20_000u64 {
            let hash = Hash(std::array::from_fn(|i| n.to_le_bytes()[i % 8]));
            nodes.keep(&hash, Node::zero(1));
            let bytes = vec![0; KEPT_BYTES as usize].into();
            nodes.pages.insert((1, n), Arc::new(Page { pack: PackId([0; 16]), start: 0, bytes }));
            assert!(nodes.bytes() <= BYTES + BYTES / 8, "{n}: {}", nodes.bytes());
        }
        assert!(nodes.bytes() > BYTES / 2, "and they are used");
    }
}
