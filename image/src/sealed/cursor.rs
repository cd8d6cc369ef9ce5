//! Reading a tree by position.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::hash::Hash;
use super::node::{Child, FANOUT, HEIGHT_MAX, Node, height_of};
use super::packs::{Packs, Root};
use super::place::Place;
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// The power of two that a node has children.
pub(super) const FANOUT_BITS: u32 = FANOUT.trailing_zeros();

/// The largest disk: what a tree of all levels reaches over, in bytes.
pub const SEALED_BYTES_MAX: u64 = (FANOUT as u64).pow(HEIGHT_MAX) * BLOCK_SIZE;

/// Nodes kept, at most. Sealing looks less far ahead than these reach.
const HELD_MAX: usize = 2048;

/// What a sealed disk holds at a place, with the nodes on the way there kept for what comes next.
pub(super) struct Cursor<E: Engine> {
    packs: Arc<Packs<E>>,
    io: Io<E>,
    root: Root,
    height: u32,
    /// By level, and by number among the nodes of that level.
    held: BTreeMap<(u32, u64), Arc<Node>>,
    /// Whether places are kept to itself: those who are told could not read there.
    hides_places: bool,
    /// Whether a node is read where it is said to be, and not taken from memory because its hash is the same: in an
    /// increment, what lies below one has places at one place of the disk and none at another.
    reads_places: bool,
    /// Nodes read so far.
    pub(super) reads: u64,
}

impl<E: Engine> Cursor<E> {
    pub(super) fn new(packs: Arc<Packs<E>>, io: &Io<E>, root: Root) -> Self {
        let height = height_of(root.blocks());
        Self {
            packs,
            io: io.clone(),
            root,
            height,
            held: BTreeMap::new(),
            hides_places: false,
            reads_places: false,
            reads: 0,
        }
    }

    /// The same, saying only what there is and not where.
    pub(super) fn without_places(self) -> Self {
        Self { hides_places: true, ..self }
    }

    /// The same, for an increment.
    pub(super) fn reading_places(self) -> Self {
        Self { reads_places: true, ..self }
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.root.blocks()
    }

    /// What subtree `index` of those of this level holds; level 0 are blocks. `None` for a node that would be over
    /// the top of the tree: it is stored nowhere.
    pub(super) async fn child(&mut self, level: u32, index: u64) -> Result<Option<Child>, ImageError> {
        let above = |l: u32| index >> ((l - level) * FANOUT_BITS);
        if self.root.tree.hash.is_zero() || (level > self.height && index > 0) {
            return Ok(Some(Child::ZERO));
        }
        if level > self.height {
            return Ok(None);
        }
        if above(self.height) > 0 {
            return Ok(Some(Child::ZERO));
        }
        let is_held = |l: &u32| self.held.contains_key(&(*l, above(*l)));
        let from = (level + 1..=self.height).find(is_held).unwrap_or(self.height);
        let mut child = self.root.tree;
        for l in (level + 1..=from).rev() {
            let node = match self.held.get(&(l, above(l))) {
                Some(node) => Arc::clone(node),
                None => self.load(&child, l, above(l)).await?,
            };
            child = node.children[(above(l - 1) % FANOUT as u64) as usize];
            if child.hash.is_zero() {
                return Ok(Some(Child::ZERO));
            }
        }
        let place = if self.hides_places { Place::NONE } else { child.place };
        Ok(Some(Child { hash: child.hash, place }))
    }

    async fn load(&mut self, child: &Child, level: u32, index: u64) -> Result<Arc<Node>, ImageError> {
        let node = if self.reads_places && !child.place.is_none() {
            let node =
                self.packs.pack(&self.io, child.place.pack()).await?.node(&self.io, child.place).await?;
            if node.hash() != child.hash {
                return Err(misplaced(
                    &self.packs,
                    format!("{:?} is not where it is said to be", child.hash),
                ));
            }
            of_level(&self.packs, Arc::new(node), level)?
        } else {
            load_node(&self.packs, &self.io, child, level).await?
        };
        self.reads += 1;
        if self.held.len() >= HELD_MAX {
            self.held.clear();
        }
        self.held.insert((level, index), Arc::clone(&node));
        Ok(node)
    }

    /// Lets go of what lies before block `at`.
    pub(super) fn forget_before(&mut self, at: u64) {
        self.held.retain(|&(level, index), _| (index + 1) << (level * FANOUT_BITS) > at);
    }
}

/// The node that `child` stands for, which must be of this level: by its hash it could be any.
pub(super) async fn load_node<E: Engine>(
    packs: &Packs<E>,
    io: &Io<E>,
    child: &Child,
    level: u32,
) -> Result<Arc<Node>, ImageError> {
    of_level(packs, packs.node(io, child).await?, level)
}

fn of_level<E: Engine>(packs: &Packs<E>, node: Arc<Node>, level: u32) -> Result<Arc<Node>, ImageError> {
    if node.level == level {
        return Ok(node);
    }
    let why = format!("{:?} is of level {}, and one of level {level} belongs there", node.hash(), node.level);
    Err(misplaced(packs, why))
}

fn misplaced<E: Engine>(packs: &Packs<E>, why: String) -> ImageError {
    ImageError::corrupt(packs.path(), "node", 0, why)
}

impl Root {
    /// Blocks of the disk, a cut one at the end included.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }

    /// What the disk is known by.
    pub fn hash(&self) -> Hash {
        super::hash::root_hash(self.size, &self.tree.hash)
    }
}
