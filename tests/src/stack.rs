//! Stacks of layers on real files, each made alone and then laid over the one before: opening what lies
//! below for every layer that is made would take a time that grows with the square of the depth.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sapwood_blockdev::device::Command;
use sapwood_blockdev::storage::Storage;
use sapwood_image::Format;
use sapwood_image::layer::{BaseSpec, CreateLayer};

use crate::damage::corrupt;
use crate::damage::lab::{Bench, create};
use crate::damage::memory::MemoryStorage;

const BLOCK: usize = 4096;

/// A layer being made, and what it holds itself.
pub struct Maker {
    storage: MemoryStorage,
    bench: Bench<MemoryStorage>,
    /// Contents of the blocks that it holds.
    pub own: BTreeMap<u64, Vec<u8>>,
    /// Size of its disk in bytes.
    pub size: u64,
}

/// A layer that was made.
pub struct Made {
    /// The file.
    pub image: Vec<u8>,
    /// See [`Maker`].
    pub own: BTreeMap<u64, Vec<u8>>,
    /// See [`Maker`].
    pub size: u64,
}

fn path() -> PathBuf {
    PathBuf::from("disk")
}

impl Maker {
    /// An empty layer; its number in the stack makes it different from others.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(number: usize, size: u64, segment_size: u32) -> Self {
        let storage = MemoryStorage::new(1 << 30);
        // Random numbers follow from how many there were; a layer takes two for itself.
        (0..2 * number).for_each(|_| storage.random(&mut [0]).expect("a number"));
        // So that zeroes hide what lies below, whatever that will be.
        storage.install(Path::new("base"), &[0; 512]);
        let base = Some(BaseSpec::new("base", Format::Raw));
        let options = CreateLayer { size: Some(size), base, segment_size, overwrite: false };
        create(&storage, &path(), &options).expect("a layer");
        let bench = Bench::open(&storage, &path(), false).expect("an open layer");
        Self { storage, bench, own: BTreeMap::new(), size }
    }

    /// Fills whole blocks with a byte each.
    ///
    /// # Panics
    /// When the layer reports an error.
    pub fn write(&mut self, block: u64, fill: &[u8]) {
        let bytes: Vec<u8> = fill.iter().flat_map(|byte| [*byte; BLOCK]).collect();
        self.bench.write(block * BLOCK as u64, &bytes).expect("a write");
        self.own.extend((block..).zip(bytes.chunks(BLOCK).map(<[u8]>::to_vec)));
    }

    /// Makes whole blocks read as zeroes.
    ///
    /// # Panics
    /// When the layer reports an error.
    pub fn zero(&mut self, block: u64, count: u64, command: Command) {
        let (offset, len) = (block * BLOCK as u64, count * BLOCK as u64);
        self.bench.command(offset, len, command).expect("zeroes");
        self.own.extend((block..block + count).map(|block| (block, vec![0; BLOCK])));
    }

    /// Changes the size.
    ///
    /// # Panics
    /// When the layer reports an error.
    pub fn resize(&mut self, size: u64) {
        self.bench.resize(size).expect("another size");
        let (low, high) = (size.min(self.size), size.max(self.size));
        for block in low / BLOCK as u64..high.div_ceil(BLOCK as u64) {
            let start = low.saturating_sub(block * BLOCK as u64).min(BLOCK as u64) as usize;
            self.own.entry(block).or_insert_with(|| vec![0; BLOCK])[start..].fill(0);
        }
        self.size = size;
    }

    /// Makes a checkpoint.
    ///
    /// # Panics
    /// When the layer reports an error.
    pub fn checkpoint(&self) {
        self.bench.checkpoint().expect("a checkpoint");
    }

    /// Ends it, in order or not.
    ///
    /// # Panics
    /// When the layer reports an error.
    pub fn end(self, in_order: bool) -> Made {
        let Self { storage, bench, own, size } = self;
        if in_order {
            bench.close().expect("a clean end");
        } else {
            drop(bench);
        }
        Made { image: storage.contents(&path()).expect("the layer"), own, size }
    }
}

/// The name of a layer of a stack.
pub fn name(number: usize) -> String {
    format!("{number}.layer")
}

/// A folder with a stack of layers.
pub struct Stack {
    folder: PathBuf,
    /// What lies at the top, for whoever lies over it.
    below: Option<Made>,
    /// Layers so far.
    pub depth: usize,
}

impl Stack {
    /// An empty stack.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), below: None, depth: 0 }
    }

    /// Lays a layer over what is there.
    ///
    /// # Panics
    /// When its file cannot be written.
    pub fn push(&mut self, mut made: Made) {
        let image = &mut made.image;
        match &self.below {
            Some(below) => corrupt::layer_base(image, &name(self.depth - 1), &below.image, below.size),
            None => corrupt::no_base(image),
        }
        std::fs::write(self.path(self.depth), &made.image).expect("space");
        self.below = Some(made);
        self.depth += 1;
    }

    /// Takes the layer with the next number, which is there already, for the one at the top.
    pub fn adopt(&mut self, image: Vec<u8>, size: u64) {
        self.below = Some(Made { image, own: BTreeMap::new(), size });
        self.depth += 1;
    }

    /// The path of a layer.
    pub fn path(&self, number: usize) -> PathBuf {
        self.folder.join(name(number))
    }
}
