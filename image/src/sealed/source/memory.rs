//! Blocks in memory: for tests.

use std::ops::Range;

use super::{Content, Source, SourceBytes, SourceRun};
use crate::error::ImageError;
use sapwood_blockdev::units::BLOCK_BYTES;

/// One block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBlock {
    /// What the base holds.
    Same,
    /// Zeroes.
    Zero,
    /// These 4096 bytes.
    Data(Vec<u8>),
}

/// A disk of blocks in memory.
#[derive(Clone, Debug)]
pub struct MemorySource {
    size: u64,
    blocks: Vec<MemoryBlock>,
}

impl MemorySource {
    /// A disk of `size` bytes.
    ///
    /// # Panics
    /// When there are not as many blocks.
    pub fn new(size: u64, blocks: Vec<MemoryBlock>) -> Self {
        assert_eq!(size.div_ceil(BLOCK_BYTES as u64), blocks.len() as u64, "as many blocks as the disk has");
        Self { size, blocks }
    }

    fn content(&self, at: usize) -> Content {
        match self.blocks[at] {
            MemoryBlock::Same => Content::Same,
            MemoryBlock::Zero => Content::Zero,
            MemoryBlock::Data(_) => Content::Data,
        }
    }
}

impl Source for MemorySource {
    fn size(&self) -> u64 {
        self.size
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        let at = at as usize;
        let content = self.content(at);
        let count = (at..self.blocks.len()).take_while(|at| self.content(*at) == content).count();
        Ok(SourceRun { content, count: count as u64 })
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        let mut bytes = Vec::new();
        for at in ranges.iter().cloned().flatten() {
            let MemoryBlock::Data(block) = &self.blocks[at as usize] else {
                panic!("block {at} holds no data")
            };
            bytes.extend(block);
        }
        Ok(bytes.into())
    }
}
