//! Small layers with known contents, to be damaged.

use std::path::{Path, PathBuf};

use sapwood_blockdev::device::Command;
use sapwood_image::Format;
use sapwood_image::layer::{BaseSpec, CreateLayer};

use super::lab::{Bench, create};
use super::memory::MemoryStorage;

/// Guest-visible size of every specimen, in bytes: three map leaves.
pub const SIZE: u64 = 5 << 20;
/// Size of its segments in bytes.
pub const SEGMENT: u32 = 64 << 10;
const BLOCK: usize = 4096;

/// A layer file and what its disk holds.
#[derive(Clone)]
pub struct Specimen {
    /// The file.
    pub bytes: Vec<u8>,
    /// The disk.
    pub disk: Vec<u8>,
    /// The disk after each of the last writes, oldest first, when the layer was left without
    /// being closed: each is one record of the log.
    pub history: Vec<Vec<u8>>,
}

/// Where specimens are made.
pub fn path() -> PathBuf {
    PathBuf::from("disk")
}

/// Contents of a raw base, for layers over one named "base".
pub fn base() -> Vec<u8> {
    (0..3 * BLOCK as u32 + 700).map(|i| (i / 512) as u8 + 1).collect()
}

struct Maker {
    storage: MemoryStorage,
    bench: Bench<MemoryStorage>,
    disk: Vec<u8>,
    history: Vec<Vec<u8>>,
}

impl Maker {
    fn new(base: Option<BaseSpec>) -> Self {
        let storage = MemoryStorage::new(1 << 20);
        let mut disk = self::base();
        storage.install(Path::new("base"), &disk);
        if base.is_none() {
            disk.clear();
        }
        disk.resize(SIZE as usize, 0);
        let options = CreateLayer { size: Some(SIZE), base, segment_size: SEGMENT, overwrite: false };
        create(&storage, &path(), &options).expect("a layer");
        let bench = Bench::open(&storage, &path(), false).expect("an open layer");
        Self { storage, bench, disk, history: Vec::new() }
    }

    /// Writes blocks that begin with a mark and are zero otherwise: seeds of them stay small.
    fn write(&mut self, block: usize, count: usize, mark: u8) {
        let mut bytes = vec![0; count * BLOCK];
        bytes.chunks_mut(BLOCK).for_each(|b| b[..8].fill(mark));
        self.bench.write((block * BLOCK) as u64, &bytes).expect("a write");
        self.disk[block * BLOCK..][..bytes.len()].copy_from_slice(&bytes);
    }

    fn step(&mut self, block: usize, mark: u8) {
        self.history.push(self.disk.clone());
        self.write(block, 1, mark);
    }

    fn zero(&mut self, block: usize, count: usize) {
        let (offset, len) = (block * BLOCK, count * BLOCK);
        self.bench.command(offset as u64, len as u64, Command::WriteZeroes).expect("zeroes");
        self.disk[offset..offset + len].fill(0);
    }

    fn fill(&mut self) {
        self.write(3, 9, 0x11);
        self.write(700, 2, 0x22);
        for i in 0..12 {
            self.write(1000 + 7 * i, 1, 0x30 + i as u8);
        }
        self.zero(5, 2);
    }

    fn close(self) -> Specimen {
        self.bench.close().expect("a clean end");
        let bytes = self.storage.contents(&path()).expect("the layer");
        Specimen { bytes, disk: self.disk, history: self.history }
    }

    fn abandon(mut self) -> Specimen {
        self.history.push(self.disk.clone());
        let Self { storage, bench, disk, history } = self;
        drop(bench);
        let bytes = storage.contents(&path()).expect("the layer");
        Specimen { bytes, disk, history }
    }
}

/// As it was created.
pub fn empty() -> Specimen {
    Maker::new(None).close()
}

/// Written and closed; without a base.
pub fn written() -> Specimen {
    let mut maker = Maker::new(None);
    maker.fill();
    maker.close()
}

/// Written and closed; over the raw file "base".
pub fn over_base() -> Specimen {
    let mut maker = Maker::new(Some(BaseSpec::new("base", Format::Raw)));
    maker.fill();
    maker.bench.command(0, 8 * BLOCK as u64, Command::Discard).expect("a discard");
    maker.disk[..8 * BLOCK].fill(0);
    maker.close()
}

/// Written, a checkpoint made, then written record by record and left.
pub fn abandoned() -> Specimen {
    let mut maker = Maker::new(None);
    maker.fill();
    maker.bench.checkpoint().expect("a checkpoint");
    for i in 0..20 {
        maker.step(40 * i, 0x80 + i as u8);
    }
    maker.abandon()
}
