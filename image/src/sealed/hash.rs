//! Hashes of contents (BLAKE3, 32 bytes).

use std::fmt;

/// What a block, or a subtree, holds: equal contents have equal hashes, and nobody can make others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

/// Keeps root hashes apart from all others (BLAKE3's key derivation, section 2.2 of its paper).
const ROOT_CONTEXT: &str = "sapwood sealed root v1";

impl Hash {
    /// All zeroes: such blocks, and subtrees of nothing else, are not stored.
    pub const ZERO: Self = Self([0; 32]);
    /// Bytes of a hash.
    pub const BYTES: usize = 32;

    /// The hash of a block of 4 KiB.
    pub fn of_block(block: &[u8]) -> Self {
        if is_zero(block) { Self::ZERO } else { Self(blake3::hash(block).into()) }
    }

    /// Whether this stands for zeroes.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Its first 8 bytes, by which indexes are ordered.
    pub fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({:016x}…)", self.prefix())
    }
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// The hash of a whole disk of `size` bytes, whose tree has this hash: what a sealed snapshot is known by.
pub fn root_hash(size: u64, tree: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
    hasher.update(&size.to_le_bytes());
    hasher.update(&tree.0);
    Hash(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_tell_contents_apart() {
        let mut block = vec![0; 4096];
        assert!(Hash::of_block(&block).is_zero());
        block[4095] = 1;
        let one = Hash::of_block(&block);
        assert!(!one.is_zero());
        assert_eq!(one, Hash::of_block(&block.clone()));
        assert_eq!(one.to_string().len(), 64);
        assert_ne!(root_hash(4096, &one), root_hash(8192, &one), "the size is a part of what a disk is");
    }
}
