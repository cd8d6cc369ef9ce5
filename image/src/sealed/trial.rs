//! A folder of packs for tests, and disks in memory that say what must come out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cursor::Cursor;
use super::node::{blocks_below, height_of};
use super::*;
use crate::error::ImageError;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Numbers from a seed (SplitMix64).
pub(super) struct Draw(pub(super) u64);

impl Draw {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A disk: what each block holds, by a number; 0 are zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) size: u64,
    pub(super) blocks: Vec<u64>,
}

/// The bytes of a block: whatever its number, they are not zero past the first half of the block.
pub(super) fn block_bytes(number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; BLOCK_BYTES];
    }
    let mut bytes = vec![number as u8 | 1; BLOCK_BYTES];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

impl Model {
    pub(super) fn draw(draw: &mut Draw) -> Self {
        let size = Self::draw_size(draw);
        let mut model = Self { size, blocks: Vec::new() };
        model.blocks.resize(size.div_ceil(BLOCK_SIZE) as usize, 0);
        model.change(draw);
        model
    }

    fn draw_size(draw: &mut Draw) -> u64 {
        let blocks = [1, 15, 16, 17, 200, 256, 300, 1100, 4096, 4200][draw.below(10) as usize];
        blocks * BLOCK_SIZE - [0, 512, 3584][draw.below(3) as usize]
    }

    /// Another size, and other contents at some places.
    pub(super) fn next(&self, draw: &mut Draw) -> Self {
        let mut next = self.clone();
        if draw.below(2) == 0 {
            next.size = Self::draw_size(draw);
            next.blocks.resize(next.size.div_ceil(BLOCK_SIZE) as usize, 0);
        }
        next.change(draw);
        next
    }

    fn change(&mut self, draw: &mut Draw) {
        for _ in 0..draw.below(6) {
            let start = draw.below(self.blocks.len() as u64) as usize;
            let len = [1, 3, 16, 17, 400][draw.below(5) as usize].min(self.blocks.len() - start);
            let kind = draw.below(4);
            let first = 1 + draw.below(50) * 1000;
            for (i, block) in self.blocks[start..start + len].iter_mut().enumerate() {
                *block = match kind {
                    0 => 0,
                    1 => first,
                    _ => first + i as u64,
                };
            }
        }
    }

    /// The bytes of a block; the last one is cut where the disk ends.
    pub(super) fn bytes(&self, at: usize) -> Vec<u8> {
        let mut bytes = block_bytes(self.blocks[at]);
        let end = (self.size - at as u64 * BLOCK_SIZE).min(BLOCK_SIZE) as usize;
        bytes[end..].fill(0);
        bytes
    }

    /// All its blocks, as data or zeroes as the draw says.
    pub(super) fn whole(&self, draw: &mut Draw) -> MemorySource {
        let block = |at: usize| match self.blocks[at] {
            0 if draw.below(4) > 0 => MemoryBlock::Zero,
            _ => MemoryBlock::Data(block_bytes(self.blocks[at])),
        };
        MemorySource::new(self.size, (0..self.blocks.len()).map(block).collect())
    }

    /// What is not as in `base`, and some of what is.
    pub(super) fn changes(&self, base: &Self, draw: &mut Draw) -> MemorySource {
        let block = |at: usize| {
            let before = base.blocks.get(at).copied().unwrap_or(0);
            let is_cut = at + 1 == base.blocks.len() && base.size < self.size;
            let is_same = before == self.blocks[at] && (!is_cut || base.bytes(at) == self.bytes(at));
            match self.blocks[at] {
                _ if is_same && draw.below(8) > 0 => MemoryBlock::Same,
                0 => MemoryBlock::Zero,
                number => MemoryBlock::Data(block_bytes(number)),
            }
        };
        MemorySource::new(self.size, (0..self.blocks.len()).map(block).collect())
    }

    /// The hash of the disk, from first principles.
    pub(super) fn root_hash(&self) -> Hash {
        let blocks = self.blocks.len() as u64;
        root_hash(self.size, &self.tree_hash(height_of(blocks), 0))
    }

    fn tree_hash(&self, level: u32, index: u64) -> Hash {
        if index * blocks_below(level) >= self.blocks.len() as u64 {
            return Hash::ZERO;
        }
        if level == 0 {
            return Hash::of_block(&self.bytes(index as usize));
        }
        let mut node = Node::zero(level);
        for (i, child) in (0..).zip(&mut node.children) {
            child.hash = self.tree_hash(level - 1, index * FANOUT as u64 + i);
        }
        node.hash()
    }
}

/// A folder of packs.
pub(super) struct Trial {
    pub(super) io: Io<BlockingEngine>,
    pub(super) directory: tempfile::TempDir,
    pub(super) packs: Arc<Packs<BlockingEngine>>,
    pub(super) known: ExactMap,
    pub(super) workers: Workers,
    numbers: u32,
    pub(super) pack_bytes: u64,
}

/// Opens packs of a folder.
pub(super) fn packs_in(directory: PathBuf) -> Arc<Packs<BlockingEngine>> {
    Packs::new(&directory.clone(), move |number| {
        let path = directory.join(pack_name(number));
        let file = HostStorage.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
        let size = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
        Ok((file, 0..size))
    })
}

impl Trial {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            io: Io::new(BlockingEngine::new().unwrap()),
            packs: packs_in(directory.path().to_owned()),
            directory,
            known: ExactMap::default(),
            workers: Workers::inline(1).unwrap(),
            numbers: 0,
            pack_bytes: PACK_BYTES,
        }
    }

    /// Seals, from a block on, under somebody's eyes.
    pub(super) fn seal_watched<Src: Source + 'static>(
        &mut self,
        source: Src,
        base: Option<Root>,
        start: u64,
        watch: impl FnMut(&SealStats) -> Step + 'static,
    ) -> Result<Sealed, ImageError> {
        let known = std::mem::take(&mut self.known);
        let (sealed, known) = self.seal_with(known, source, base, start, watch);
        self.known = known;
        sealed
    }

    /// Seals with any index.
    pub(super) fn seal_with<Src: Source + 'static, D: Dedup<BlockingEngine> + 'static>(
        &mut self,
        mut dedup: D,
        mut source: Src,
        base: Option<Root>,
        start: u64,
        mut watch: impl FnMut(&SealStats) -> Step + 'static,
    ) -> (Result<Sealed, ImageError>, D) {
        let (io, packs) = (self.io.clone(), Arc::clone(&self.packs));
        let directory = self.directory.path().to_owned();
        let workers = std::mem::replace(&mut self.workers, Workers::inline(0).unwrap());
        let (mut number, pack_bytes) = (self.numbers, self.pack_bytes);
        let (sealed, dedup, workers, number) = block_on(&self.io, async move {
            let sealing = Sealing {
                storage: &HostStorage,
                io: &io,
                directory: &directory,
                packs: &packs,
                dedup: &mut dedup,
                workers: &workers,
                base,
                frame_blocks: 4,
                pack_bytes,
                start,
            };
            let numbers = || {
                number += 1;
                Ok(number)
            };
            let sealed = seal(sealing, &mut source, numbers, &mut watch).await;
            (sealed, dedup, workers, number)
        });
        (self.workers, self.numbers) = (workers, number);
        (sealed, dedup)
    }

    /// Seals.
    pub(super) fn seal<Src: Source + 'static>(&mut self, source: Src, base: Option<Root>) -> Sealed {
        self.seal_watched(source, base, 0, |_| Step::Go).unwrap()
    }

    /// Writes an archive.
    pub(super) fn export(
        &self,
        path: &Path,
        root: Root,
        base: Option<Root>,
        step: Step,
    ) -> Result<Exported, ImageError> {
        let (io, packs, path) = (self.io.clone(), Arc::clone(&self.packs), path.to_owned());
        block_on(&self.io, async move {
            let workers = Workers::inline(1).unwrap();
            let (name, description) = ("disk", "for a test");
            let (storage, io, packs, workers) = (&HostStorage, &io, &packs, &workers);
            let disk = Export { storage, io, packs, workers, root, base, name, description };
            export(disk, &path, &mut |_: &SealStats| step).await
        })
    }

    /// Opens an archive.
    pub(super) fn open(&self, path: &Path) -> Result<Archive<BlockingEngine>, ImageError> {
        let (io, path) = (self.io.clone(), path.to_owned());
        block_on(&self.io, async move { Archive::open(&HostStorage, &io, &path).await })
    }

    /// Imports an archive.
    pub(super) fn import(&mut self, path: &Path, base: Option<Root>) -> Result<Sealed, ImageError> {
        let archive = self.open(path)?;
        let source = archive.source(&self.io, base.map(|base| (&self.packs, base)))?;
        self.seal_watched(source, base, 0, |_| Step::Go)
    }

    /// Reads every block of a disk, and compares.
    pub(super) fn check(&self, root: &Root, model: &Model) {
        check(&self.io, &self.packs, root, model);
    }

    /// Different blocks in the packs.
    pub(super) fn known_blocks(&self) -> u64 {
        self.known.blocks()
    }

    /// Files in the folder.
    pub(super) fn files(&self) -> usize {
        std::fs::read_dir(self.directory.path()).unwrap().count()
    }
}

/// Reads every block of a disk in `packs`, and compares.
pub(super) fn check(io: &Io<BlockingEngine>, packs: &Arc<Packs<BlockingEngine>>, root: &Root, model: &Model) {
    assert_eq!(root.size, model.size);
    let (reading, packs, root, model) = (io.clone(), Arc::clone(packs), *root, model.clone());
    block_on(io, async move {
        let mut cursor = Cursor::new(Arc::clone(&packs), &reading, root);
        for at in 0..model.blocks.len() {
            let child = cursor.child(0, at as u64).await.unwrap().unwrap();
            cursor.forget_before(at as u64);
            let wanted = model.bytes(at);
            if child.hash.is_zero() {
                assert!(wanted.iter().all(|byte| *byte == 0), "block {at} is not zero");
                continue;
            }
            let found = packs.block(&reading, &child.hash, child.place).await.unwrap();
            assert!(found.bytes() == wanted, "block {at}");
        }
    });
}
