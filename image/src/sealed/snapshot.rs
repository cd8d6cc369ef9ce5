//! A sealed snapshot as a disk: finding its blocks, and reading them.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{TryStreamExt, stream};

use super::hash::Hash;
use super::node::{Child, FANOUT, Node, blocks_below, height_of};
use super::packs::{FoundBlock, Packs, Root};
use super::place::Place;
use crate::below::Permits;
use crate::counts::{Hits, Lookups};
use crate::error::ImageError;
use crate::layer::SIZE_MAX;
use sapwood_blockdev::buffer::Memory;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_SIZE, SECTOR_SIZE};

/// Frames that are read at a time for one request.
const FRAMES_AT_ONCE: usize = 4;

/// A sealed snapshot of a disk, in packs that others share.
pub struct Snapshot<E: Engine> {
    packs: Arc<Packs<E>>,
    root: Root,
}

/// Why a block could not be looked up in memory.
#[derive(Debug)]
pub(crate) enum Lacking {
    /// This node is not there.
    Node(Child),
    /// The tree makes no sense.
    Damage(ImageError),
}

/// Where looking a block up has ended.
enum Leaf {
    /// All blocks up to this one are zero.
    Zero { end: u64 },
    /// It is one of those of this node, which begin with block `first`.
    Node { node: Arc<Node>, first: u64 },
}

/// A stored block, or a part of one, and where its bytes go.
struct Wanted {
    child: Child,
    /// Bytes of the block before those that are wanted.
    skip: usize,
    /// Where in the reader's memory they go, and how many they are.
    at: usize,
    len: usize,
}

impl<E: Engine> Snapshot<E> {
    /// The snapshot with this root. Nothing is read.
    ///
    /// # Errors
    /// When there can be no such disk.
    pub fn new(packs: &Arc<Packs<E>>, root: Root) -> Result<Self, ImageError> {
        if root.size > SIZE_MAX || !root.size.is_multiple_of(SECTOR_SIZE) {
            let detail = format_args!("a disk cannot have {} bytes", root.size);
            return Err(ImageError::corrupt(packs.path(), "root.size", 0, detail));
        }
        Ok(Self { packs: Arc::clone(packs), root })
    }

    /// The packs in which it lies.
    pub fn packs(&self) -> &Arc<Packs<E>> {
        &self.packs
    }

    /// Its size, and the top of its tree.
    pub fn root(&self) -> Root {
        self.root
    }

    /// Walks down to a block with the nodes that `node` knows.
    fn leaf(&self, block: u64, node: impl Fn(&Child) -> Option<Arc<Node>>) -> Result<Leaf, Lacking> {
        let mut level = height_of(self.root.size.div_ceil(BLOCK_SIZE));
        let (mut child, mut first) = (self.root.tree, 0);
        if child.hash.is_zero() {
            return Ok(Leaf::Zero { end: u64::MAX });
        }
        loop {
            let found = node(&child).ok_or(Lacking::Node(child))?;
            if found.level != level {
                return Err(Lacking::Damage(self.wrong_level(&child, found.level, level)));
            }
            if level == 1 {
                return Ok(Leaf::Node { node: found, first });
            }
            level -= 1;
            let span = blocks_below(level);
            let index = (((block - first) / span) as usize).min(FANOUT - 1);
            child = found.children[index];
            if child.hash.is_zero() {
                let zero = found.children[index..].iter().take_while(|child| child.hash.is_zero());
                return Ok(Leaf::Zero { end: first + (index + zero.count()) as u64 * span });
            }
            first += index as u64 * span;
        }
    }

    fn wrong_level(&self, child: &Child, found: u32, level: u32) -> ImageError {
        let detail = format_args!("node {} is of level {found} and lies at level {level}", child.hash);
        ImageError::corrupt(self.packs.path(), "tree of a sealed snapshot", 0, detail)
    }

    /// Whether a block is stored, not zero, and up to which block that holds, at most `end`: with the nodes that `node`
    /// knows.
    pub(crate) fn run(
        &self,
        block: u64,
        end: u64,
        node: impl Fn(&Child) -> Option<Arc<Node>>,
    ) -> Result<(bool, u64), Lacking> {
        match self.leaf(block, node)? {
            Leaf::Zero { end: until } => Ok((false, until.min(end))),
            Leaf::Node { node, first } => {
                let children = &node.children[(block - first) as usize..];
                let is_stored = !children[0].hash.is_zero();
                let alike = children.iter().take_while(|child| child.hash.is_zero() != is_stored);
                Ok((is_stored, (block + alike.count() as u64).min(end)))
            }
        }
    }

    /// The same as [`Self::leaf`], bringing the nodes that are not in memory.
    async fn load(&self, io: &Io<E>, block: u64) -> Result<Leaf, ImageError> {
        // They count even where the cache has no room for them.
        let mut brought: Vec<(Hash, Arc<Node>)> = Vec::new();
        loop {
            let known = |child: &Child| {
                let here = brought.iter().find(|(hash, _)| *hash == child.hash);
                here.map(|(_, node)| Arc::clone(node)).or_else(|| self.packs.cached_node(child))
            };
            match self.leaf(block, known) {
                Ok(leaf) => return Ok(leaf),
                Err(Lacking::Damage(error)) => return Err(error),
                Err(Lacking::Node(child)) => brought.push((child.hash, self.packs.node(io, &child).await?)),
            }
        }
    }

    /// Reads from byte `start` of the disk into memory of any alignment, with a permit for each frame that is not in memory.
    /// A frame is decompressed once, whichever of its blocks are wanted. `counted` learns which were in memory.
    pub(crate) async fn read(
        &self,
        io: &Io<E>,
        start: u64,
        mut memory: Memory,
        permits: &Permits,
        counted: &Hits,
    ) -> Result<(), ImageError> {
        let mut frames: BTreeMap<(u32, u64), Vec<Wanted>> = BTreeMap::new();
        let (mut at, len) = (0, memory.len());
        while at < len {
            let leaf = self.load(io, (start + at as u64) / BLOCK_SIZE).await?;
            at = split(&leaf, start, at, len, |part| match part {
                Part::Zero { at, len } => memory.zero_at(at, len),
                Part::Stored(wanted) => {
                    frames.entry(frame_of(wanted.child.place)).or_default().push(wanted);
                }
            });
        }
        let memory = &memory;
        stream::iter(frames.into_values().map(Ok))
            .try_for_each_concurrent(FRAMES_AT_ONCE, |blocks| {
                self.read_frame(io, blocks, memory, permits, counted)
            })
            .await
    }

    /// Reads blocks whose places are in one frame.
    async fn read_frame(
        &self,
        io: &Io<E>,
        blocks: Vec<Wanted>,
        memory: &Memory,
        permits: &Permits,
        counted: &Hits,
    ) -> Result<(), ImageError> {
        let mut lookups = Lookups::default();
        let mut last: Option<FoundBlock> = None;
        let mut permit = None;
        for Wanted { child: Child { hash, place }, skip, at, len } in blocks {
            let beside = last.as_ref().and_then(|found| found.beside(place.index(), &hash));
            let cached = beside.or_else(|| self.packs.cached_block(&hash, place));
            lookups.count(cached.is_some());
            let found = match cached {
                Some(found) => found,
                None => {
                    if permit.is_none() {
                        permit = Some(permits.take().await);
                    }
                    self.packs.block(io, &hash, place).await?
                }
            };
            memory.share(at, len).write_at(0, &found.bytes()[skip..skip + len]);
            last = Some(found);
        }
        counted.add(lookups);
        Ok(())
    }

    /// Fills `memory` from byte `start` of the disk on, if all of that is in memory: says whether it was. Then `counted` learns it.
    pub(crate) fn read_cached(&self, start: u64, memory: &mut Memory, counted: &Hits) -> bool {
        let (mut at, len) = (0, memory.len());
        let mut hits = 0;
        let mut is_there = true;
        while at < len && is_there {
            let block = (start + at as u64) / BLOCK_SIZE;
            let Ok(leaf) = self.leaf(block, |child| self.packs.cached_node(child)) else { return false };
            at = split(&leaf, start, at, len, |part| match part {
                Part::Zero { at, len } => memory.zero_at(at, len),
                Part::Stored(Wanted { child, skip, at, len }) if is_there => {
                    match self.packs.cached_block(&child.hash, child.place) {
                        Some(found) => {
                            memory.write_at(at, &found.bytes()[skip..skip + len]);
                            hits += 1;
                        }
                        None => is_there = false,
                    }
                }
                Part::Stored(_) => {}
            });
        }
        if is_there {
            counted.add(Lookups { hits, misses: 0 });
        }
        is_there
    }
}

/// A part of what is read.
enum Part {
    Zero { at: usize, len: usize },
    Stored(Wanted),
}

/// The frame that a place names.
fn frame_of(place: Place) -> (u32, u64) {
    (place.pack(), place.offset())
}

/// Calls `f` for what a leaf says of the `len` bytes from `start` on, from byte `at` of them on. Returns how far that goes.
fn split(leaf: &Leaf, start: u64, at: usize, len: usize, mut f: impl FnMut(Part)) -> usize {
    let (node, first) = match leaf {
        Leaf::Zero { end } => {
            let end = (end.saturating_mul(BLOCK_SIZE) - start).min(len as u64) as usize;
            f(Part::Zero { at, len: end - at });
            return end;
        }
        Leaf::Node { node, first } => (node, *first),
    };
    let mut at = at;
    let skipped = ((start + at as u64) / BLOCK_SIZE - first) as usize;
    for child in &node.children[skipped..] {
        if at >= len {
            break;
        }
        let skip = ((start + at as u64) % BLOCK_SIZE) as usize;
        let part = (BLOCK_SIZE as usize - skip).min(len - at);
        f(match child.hash.is_zero() {
            true => Part::Zero { at, len: part },
            false => Part::Stored(Wanted { child: *child, skip, at, len: part }),
        });
        at += part;
    }
    at
}
