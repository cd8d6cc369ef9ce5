//! Sealed snapshots made by hand: packs and nodes of a disk's blocks, in the order of the disk; and labs to read them in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_image::ImageError;
use sapwood_image::sealed::index::Index;
use sapwood_image::sealed::{
    Child, Coder, Entry, FANOUT, Hash, NewRecord, Node, PackKind, PackWriter, Packs, PacksTuning, Place,
    Root, height_of, pack_name,
};

use crate::counting::{Counters, CountingEngine};
use crate::damage::lab::Lab;
use crate::sim::engine::SimEngine;
use crate::sim::rng::Rng;
use crate::sim::storage::SimStorage;
use crate::sim::world::{ProcessId, World};

const BLOCK: usize = 4096;

/// How a snapshot is stored.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The number of the first pack.
    pub first_pack: u32,
    /// Blocks in a frame.
    pub frame_blocks: usize,
    /// Frames in a pack.
    pub pack_frames: usize,
    /// Whether nodes say where their children are.
    pub places: bool,
}

impl Shape {
    /// Packs from this number on.
    pub fn from(first_pack: u32) -> Self {
        Self { first_pack, frame_blocks: 16, pack_frames: 12, places: true }
    }
}

/// A snapshot that was made.
#[derive(Clone, Debug)]
pub struct Made {
    /// Its root.
    pub root: Root,
    /// The numbers of its packs: those with data, and the one with the nodes last.
    pub packs: Vec<u32>,
    /// All that is in them.
    pub entries: Vec<Entry>,
    /// Frames, and nodes.
    pub frames: usize,
    /// Nodes.
    pub nodes: usize,
}

/// A disk with data, repeated data and zeroes, in runs of random length.
pub fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut disk = vec![0; size];
    let mut at = 0;
    while at < size {
        let end = size.min(at + BLOCK * rng.between(1, 40) as usize);
        match rng.below(4) {
            0 => {}
            1 => (at..end).for_each(|i| disk[i] = (i % BLOCK / 7) as u8 | 1),
            _ => {
                let mut word = [0; 64];
                for block in disk[at..end].chunks_mut(BLOCK) {
                    rng.fill(&mut word);
                    block.iter_mut().enumerate().for_each(|(i, byte)| *byte = word[i % 64] ^ (i / 64) as u8);
                }
            }
        }
        at = end;
    }
    disk
}

/// A disk in which all blocks differ from each other and from zero.
pub fn dense(blocks: usize) -> Vec<u8> {
    let block = |n: usize| (0..BLOCK / 8).flat_map(move |i| ((n as u64 + 1) << 16 | i as u64).to_le_bytes());
    (0..blocks).flat_map(block).collect()
}

/// Stores a disk in packs in a directory.
///
/// # Errors
/// What making packs says.
pub async fn make<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    directory: &Path,
    disk: &[u8],
    shape: Shape,
) -> Result<Made, ImageError> {
    let mut made = Made {
        root: Root { size: disk.len() as u64, tree: Child::ZERO },
        packs: Vec::new(),
        entries: Vec::new(),
        frames: 0,
        nodes: 0,
    };
    let blocks: Vec<Vec<u8>> = disk
        .chunks(BLOCK)
        .map(|block| {
            let mut block = block.to_vec();
            block.resize(BLOCK, 0);
            block
        })
        .collect();
    let places = store_blocks(storage, io, directory, &blocks, shape, &mut made).await?;
    let number = shape.first_pack + made.packs.len() as u32;
    let mut writer = PackWriter::create(storage, io, directory, number, PackKind::Nodes)?;
    let level = height_of(blocks.len() as u64);
    let mut tree = Tree { writer: &mut writer, blocks: &blocks, places: &places, shape, made: &mut made };
    let top = tree.store(level, 0);
    made.root.tree = top;
    made.packs.push(number);
    writer.finish().await?;
    Ok(made)
}

async fn store_blocks<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    directory: &Path,
    blocks: &[Vec<u8>],
    shape: Shape,
    made: &mut Made,
) -> Result<HashMap<Hash, Place>, ImageError> {
    let mut coder = Coder::new(1).map_err(|e| ImageError::io(directory, "compress in", e))?;
    let mut places = HashMap::new();
    let mut unique: Vec<(Hash, &Vec<u8>)> = Vec::new();
    for block in blocks {
        let hash = Hash::of_block(block);
        if !hash.is_zero() && places.insert(hash, Place::NONE).is_none() {
            unique.push((hash, block));
        }
    }
    for frames in unique.chunks(shape.frame_blocks * shape.pack_frames) {
        let number = shape.first_pack + made.packs.len() as u32;
        let mut writer = PackWriter::create(storage, io, directory, number, PackKind::Data)?;
        for frame in frames.chunks(shape.frame_blocks) {
            let raw: Vec<u8> = frame.iter().flat_map(|(_, block)| block.iter().copied()).collect();
            let hashes: Vec<Hash> = frame.iter().map(|(hash, _)| *hash).collect();
            let place = writer.push(NewRecord::frame(&mut coder, &raw), &hashes);
            for (index, hash) in hashes.into_iter().enumerate() {
                let place = place.with_index(index);
                places.insert(hash, place);
                made.entries.push(Entry { hash, place });
            }
            made.frames += 1;
        }
        writer.finish().await?;
        made.packs.push(number);
    }
    Ok(places)
}

/// A tree that is being stored, each node after those below it.
struct Tree<'a, E: Engine> {
    writer: &'a mut PackWriter<E>,
    blocks: &'a [Vec<u8>],
    places: &'a HashMap<Hash, Place>,
    shape: Shape,
    made: &'a mut Made,
}

impl<E: Engine> Tree<'_, E> {
    /// Stores what begins with block `first`: a node of this level, or the block itself.
    fn store(&mut self, level: u32, first: usize) -> Child {
        let Some(block) = self.blocks.get(first) else { return Child::ZERO };
        if level == 0 {
            let hash = Hash::of_block(block);
            let place = self.places.get(&hash).filter(|_| self.shape.places);
            return Child { hash, place: place.copied().unwrap_or(Place::NONE) };
        }
        let mut node = Node::zero(level);
        for (i, child) in node.children.iter_mut().enumerate() {
            *child = self.store(level - 1, first + i * FANOUT.pow(level - 1));
        }
        let hash = node.hash();
        if hash.is_zero() {
            return Child::ZERO;
        }
        let stored = self.writer.push(NewRecord::node(&node), &[hash]);
        self.made.entries.push(Entry { hash, place: stored });
        self.made.nodes += 1;
        Child { hash, place: if self.shape.places { stored } else { Place::NONE } }
    }
}

/// The packs in a directory.
pub fn packs<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    directory: &Path,
    tuning: &PacksTuning,
    index: &Arc<Index<E>>,
) -> Arc<Packs<E>> {
    let (storage, at): (S, PathBuf) = (storage.clone(), directory.to_owned());
    Packs::with_index(directory, tuning, Arc::clone(index), move |number| {
        let path = at.join(pack_name(number));
        let file = storage.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
        let size = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
        Ok((file, 0..size))
    })
}

/// A process of the simulated world.
#[derive(Clone)]
pub struct SimLab {
    /// The world.
    pub world: World,
    process: ProcessId,
}

impl SimLab {
    /// A new process.
    pub fn new(world: &World) -> Self {
        Self { world: world.clone(), process: world.process() }
    }
}

impl Lab for SimLab {
    type Storage = SimStorage;
    type Engine = SimEngine;

    fn storage(&self) -> SimStorage {
        self.world.storage(self.process)
    }

    fn engine(&self) -> SimEngine {
        self.world.engine(self.process)
    }
}

/// A lab that counts what its engines are asked to do.
#[derive(Clone)]
pub struct CountingLab<L> {
    /// The lab.
    pub lab: L,
    /// The counts.
    pub counters: Arc<Counters>,
}

impl<L: Lab> Lab for CountingLab<L> {
    type Storage = L::Storage;
    type Engine = CountingEngine<L::Engine>;

    fn storage(&self) -> L::Storage {
        self.lab.storage()
    }

    fn engine(&self) -> CountingEngine<L::Engine> {
        CountingEngine::new(self.lab.engine(), Arc::clone(&self.counters))
    }
}
