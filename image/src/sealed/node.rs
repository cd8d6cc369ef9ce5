//! Nodes of the tree of hashes over a disk.

use super::hash::Hash;
use super::place::Place;
use crate::bytes::{array, get_u16, get_u64, put};

/// Children of a node. Hashes do not compress, and a changed block costs a new node on every level: with 16, about 0.8 KiB
/// where one block in a hundred has changed (with 64 it would be 2 KiB).
pub const FANOUT: usize = 16;

/// Keeps hashes of nodes apart from those of blocks (BLAKE3's key derivation, section 2.2 of its paper).
const NODE_CONTEXT: &str = "sapwood sealed node v1";
/// Levels that a tree can have: more than a disk of 64 TiB needs.
pub(super) const HEIGHT_MAX: u32 = 10;

const N_LEVEL: usize = 0;
const N_BITMAP: usize = 2;
const N_CHILDREN: usize = 4;
/// Bytes of the longest stored node.
pub(super) const NODE_BYTES_MAX: usize = N_CHILDREN + FANOUT * (Hash::BYTES + 8);

/// One child: what it holds, and where it may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its content; zero when there is nothing but zeroes.
    pub hash: Hash,
    /// A hint.
    pub place: Place,
}

impl Child {
    /// Nothing but zeroes.
    pub const ZERO: Self = Self { hash: Hash::ZERO, place: Place::NONE };
}

/// A node: what `FANOUT` consecutive blocks hold (level 1), or as many nodes of the level below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its height above the blocks, from 1 on.
    pub level: u32,
    /// Its children in the order of the disk.
    pub children: [Child; FANOUT],
}

/// Levels of the tree over a disk of so many blocks: the least that reach over all.
pub fn height_of(blocks: u64) -> u32 {
    (1..HEIGHT_MAX).find(|&height| blocks <= blocks_below(height)).unwrap_or(HEIGHT_MAX)
}

/// Blocks that a node of this level reaches over.
pub(super) fn blocks_below(level: u32) -> u64 {
    (FANOUT as u64).pow(level)
}

impl Node {
    /// A node over zeroes.
    pub fn zero(level: u32) -> Self {
        Self { level, children: [Child::ZERO; FANOUT] }
    }

    /// What it holds, as a hash: of its level and its children's hashes, not of where they are.
    pub fn hash(&self) -> Hash {
        let bitmap = self.bitmap();
        if bitmap == 0 {
            return Hash::ZERO;
        }
        let mut hasher = blake3::Hasher::new_derive_key(NODE_CONTEXT);
        hasher.update(&[self.level as u8]);
        hasher.update(&bitmap.to_le_bytes());
        for child in self.stored_children() {
            hasher.update(&child.hash.0);
        }
        Hash(hasher.finalize().into())
    }

    /// The children that are not zero.
    pub fn stored_children(&self) -> impl Iterator<Item = &Child> {
        self.children.iter().filter(|child| !child.hash.is_zero())
    }

    /// Which children are not zero.
    fn bitmap(&self) -> u16 {
        let bits = (0..).zip(&self.children).filter(|(_, child)| !child.hash.is_zero());
        bits.fold(0, |bitmap, (i, _)| bitmap | 1 << i)
    }

    /// The stored form.
    pub(super) fn encode(&self) -> Vec<u8> {
        let count = self.stored_children().count();
        let mut bytes = vec![0; N_CHILDREN + count * (Hash::BYTES + 8)];
        bytes[N_LEVEL] = self.level as u8;
        put(&mut bytes, N_BITMAP, &self.bitmap().to_le_bytes());
        for (i, child) in self.stored_children().enumerate() {
            put(&mut bytes, N_CHILDREN + i * Hash::BYTES, &child.hash.0);
            let places = N_CHILDREN + count * Hash::BYTES;
            put(&mut bytes, places + i * 8, &child.place.to_bits().to_le_bytes());
        }
        bytes
    }

    /// From the stored form.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        if bytes.len() < N_CHILDREN {
            return Err("it is too short");
        }
        let (level, bitmap) = (u32::from(bytes[N_LEVEL]), get_u16(bytes, N_BITMAP));
        let count = bitmap.count_ones() as usize;
        if level == 0 || level > HEIGHT_MAX || bytes[N_LEVEL + 1] != 0 || count == 0 {
            return Err("its head makes no sense");
        }
        if bytes.len() != N_CHILDREN + count * (Hash::BYTES + 8) {
            return Err("it does not have the length that its children take");
        }
        let mut node = Self::zero(level);
        let places = N_CHILDREN + count * Hash::BYTES;
        for (i, at) in (0..FANOUT).filter(|at| bitmap >> at & 1 == 1).enumerate() {
            let hash = Hash(array(bytes, N_CHILDREN + i * Hash::BYTES));
            if hash.is_zero() {
                return Err("a child is marked and has no hash");
            }
            node.children[at] = Child { hash, place: Place::from_bits(get_u64(bytes, places + i * 8)) };
        }
        Ok(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(n: u8) -> Child {
        Child { hash: Hash([n; 32]), place: Place::new(u32::from(n), 4096, 700, 0) }
    }

    #[test]
    fn a_hash_depends_on_content_alone() {
        let mut node = Node::zero(2);
        assert!(node.hash().is_zero());
        node.children[3] = child(7);
        node.children[15] = child(9);
        let hash = node.hash();
        node.children[3].place = Place::NONE;
        assert_eq!(node.hash(), hash, "where a child is stored does not matter");
        let mut moved = node.clone();
        moved.children.swap(3, 4);
        assert_ne!(moved.hash(), hash);
        assert_ne!(Node { level: 1, ..node.clone() }.hash(), hash);
        let stored = node.encode();
        assert_eq!(stored.len(), N_CHILDREN + 2 * 40);
        assert_eq!(Node::decode(&stored), Ok(node));
    }

    #[test]
    fn damaged_nodes_are_refused() {
        let mut node = Node::zero(1);
        node.children[0] = child(1);
        let stored = node.encode();
        let change = |at: usize, byte: u8| {
            let mut bytes = stored.clone();
            bytes[at] = byte;
            Node::decode(&bytes)
        };
        assert!(change(N_LEVEL, 0).is_err());
        assert!(change(N_LEVEL, 11).is_err());
        assert!(change(N_BITMAP, 0).is_err());
        assert!(change(N_BITMAP, 3).is_err());
        assert!(Node::decode(&stored[..3]).is_err());
        assert!(Node::decode(&stored[..stored.len() - 1]).is_err());
    }

    #[test]
    fn trees_are_as_high_as_their_disk_needs() {
        assert_eq!(height_of(1), 1);
        assert_eq!(height_of(16), 1);
        assert_eq!(height_of(17), 2);
        assert_eq!(height_of(1 << 28), 7, "1 TiB");
        assert!(blocks_below(HEIGHT_MAX) >= 64 << 28);
    }
}
