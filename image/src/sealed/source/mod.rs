//! What is sealed: any disk, the changes of a frozen layer, blocks in memory, or a tree from elsewhere.

mod bytes;
mod disk;
mod frozen;
mod memory;
mod spare;
#[cfg(test)]
mod tests;
mod tree;

pub use bytes::SourceBytes;
pub use disk::DiskSource;
pub use frozen::FrozenSource;
pub use memory::{MemoryBlock, MemorySource};
pub use tree::TreeSource;

use std::ops::Range;

use super::hash::Hash;
use crate::error::ImageError;

/// What blocks hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the base holds there: zeroes without one.
    Same,
    /// Zeroes.
    Zero,
    /// What reading them gives, which may be anything.
    Data,
}

/// Consecutive blocks that hold the same kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRun {
    /// What they hold.
    pub content: Content,
    /// How many they are, at least one.
    pub count: u64,
}

/// A disk to be sealed. It does not change meanwhile.
pub trait Source {
    /// Size of the disk in bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// What the disk must turn out to be, where that is known: else sealing fails.
    fn expected(&self) -> Option<Hash> {
        None
    }

    /// What the blocks from `at` on hold, as far as that is one thing and quickly known. `at` lies before the disk's end, and
    /// the run does not go beyond it.
    ///
    /// # Errors
    /// When the source cannot be asked.
    fn next(&mut self, at: u64) -> impl Future<Output = Result<SourceRun, ImageError>>;

    /// The bytes of ranges of blocks that hold data, one after the other: not more than a segment, apart and in order.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&mut self, ranges: &[Range<u64>]) -> impl Future<Output = Result<SourceBytes, ImageError>>;

    /// Of how many segments the source wants to know that they will be read, before they are.
    const AHEAD: usize = 0;

    /// These ranges will be read next, after those announced before, unless sealing stops.
    fn announce(&mut self, _ranges: &[Range<u64>]) {}

    /// Takes back what [`read`](Self::read) gave, so that its memory can be used again.
    fn take_back(&mut self, _bytes: SourceBytes) {}
}
