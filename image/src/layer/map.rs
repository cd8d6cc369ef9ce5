//! The map in memory: for each guest block, where its contents are.
//!
//! A radix tree of fixed shape: the root names branches of 1 GiB, a branch names leaves of 2 MiB,
//! a leaf holds 512 entries. What the root says is always in memory. Other nodes are loaded when they are
//! needed and are either *active* (changed since the last checkpoint, part of a running one, or
//! pinned by somebody who is about to use them) or clean, in a cache of bounded size that may
//! drop them. A node stays in the cache while it is active, so that the cache goes on knowing how often
//! it is used; what is active is looked at first. Whoever finds a node missing gets its key, loads it (see `paging`) and tries again.
//!
//! Invariants: a cached node that is not active is what the node above it names. A branch with
//! active leaves is active. References are changed by checkpoints only: they name what the newest
//! complete checkpoint stored, or will store once the running one has placed its nodes.

mod freeze;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::sync::Arc;

use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};

use super::leaf::{Leaf, LeafTable};
use super::node::{BRANCH_LEAVES, Entry, LEAF_ENTRIES, NodeRef};
use super::segments::Segments;
pub(super) use freeze::Frozen;

/// Guest blocks of a branch.
pub(super) const BRANCH_BLOCKS: u64 = (BRANCH_LEAVES * LEAF_ENTRIES) as u64;
/// Guest blocks of a leaf.
pub(super) const LEAF_BLOCKS: u64 = LEAF_ENTRIES as u64;
/// What a cached node costs beside its contents: about what the cache itself needs for it.
const NODE_OVERHEAD: usize = 128;

/// A node below the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum NodeKey {
    Branch(u32),
    Leaf(u32),
}

/// The references of one branch.
pub(super) type BranchRefs = [NodeRef; BRANCH_LEAVES];

/// The contents of a loaded node.
#[derive(Clone)]
pub(super) enum Node {
    Branch(Arc<BranchRefs>),
    Leaf(Leaf),
}

#[derive(Clone)]
struct Weight;

impl Weighter<NodeKey, Node> for Weight {
    fn weight(&self, _: &NodeKey, node: &Node) -> u64 {
        let bytes = match node {
            Node::Branch(_) => size_of::<BranchRefs>(),
            Node::Leaf(leaf) => leaf.bytes(),
        };
        (bytes + NODE_OVERHEAD) as u64
    }
}

type Clean = Cache<NodeKey, Node, Weight, BuildHasherDefault<DefaultHasher>>;

struct ActiveLeaf {
    leaf: Leaf,
    pins: u32,
    dirty: bool,
    /// The running checkpoint has yet to say where it is stored.
    frozen: bool,
}

struct ActiveBranch {
    refs: Arc<BranchRefs>,
    /// Active leaves below it, and pins.
    users: u32,
    dirty: bool,
    frozen: bool,
}

/// The map of one layer.
pub(super) struct Map {
    /// The references of the root.
    roots: Vec<NodeRef>,
    branches: BTreeMap<u32, ActiveBranch>,
    leaves: BTreeMap<u32, ActiveLeaf>,
    clean: Clean,
    /// Leaves whose `dirty` flag is up.
    dirty_leaves: BTreeSet<u32>,
    /// A checkpoint is placing nodes.
    frozen: bool,
    /// The root must be stored anew although no branch changed.
    root_dirty: bool,
}

/// Splits `range` at multiples of `unit`: (unit index, part inside the unit).
pub(super) fn pieces(range: Range<u64>, unit: u64) -> impl Iterator<Item = (u32, Range<u64>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        (at < range.end).then(|| {
            let index = at / unit;
            let end = range.end.min((index + 1) * unit);
            let part = at - index * unit..end - index * unit;
            at = end;
            (index as u32, part)
        })
    })
}

/// Splits blocks where branches end.
pub(super) fn by_branch(blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    pieces(blocks, BRANCH_BLOCKS).map(|(branch, part)| {
        let base = u64::from(branch) * BRANCH_BLOCKS;
        base + part.start..base + part.end
    })
}

/// The leaves that hold the entries of some guest blocks.
pub(super) fn leaves_of(blocks: &Range<u64>) -> Range<u32> {
    if blocks.is_empty() {
        return 0..0;
    }
    (blocks.start / LEAF_BLOCKS) as u32..blocks.end.div_ceil(LEAF_BLOCKS) as u32
}

/// The branch of a leaf and its index there.
fn split(leaf: u32) -> (u32, usize) {
    (leaf / BRANCH_LEAVES as u32, leaf as usize % BRANCH_LEAVES)
}

impl Map {
    /// The map that a root with these references describes, with a cache for so many bytes of
    /// clean nodes.
    pub(super) fn new(roots: Vec<NodeRef>, cache_bytes: u64) -> Self {
        let options = OptionsBuilder::new()
            .weight_capacity(cache_bytes)
            .estimated_items_capacity((cache_bytes / size_of::<LeafTable>() as u64).max(1) as usize)
            .build()
            .expect("every option is given");
        let clean =
            Cache::with_options(options, Weight, BuildHasherDefault::default(), DefaultLifecycle::default());
        Self {
            roots,
            branches: BTreeMap::new(),
            leaves: BTreeMap::new(),
            clean,
            dirty_leaves: BTreeSet::new(),
            frozen: false,
            root_dirty: false,
        }
    }

    /// Memory that nodes take which cannot be dropped before a checkpoint, in bytes.
    pub(super) fn dirty_bytes(&self) -> u64 {
        (self.dirty_leaves.len() * (size_of::<LeafTable>() + NODE_OVERHEAD)
            + self.branches.len() * (size_of::<BranchRefs>() + NODE_OVERHEAD)) as u64
    }

    /// Memory that nodes take, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.clean.weight() + self.dirty_bytes()
    }

    /// The reference to a branch.
    pub(super) fn root_ref(&self, branch: u32) -> NodeRef {
        self.roots.get(branch as usize).copied().unwrap_or(NodeRef::ABSENT)
    }

    /// The reference to a leaf; the key of its branch when that is not in memory.
    pub(super) fn reference(&self, leaf: u32) -> Result<NodeRef, NodeKey> {
        let (branch, index) = split(leaf);
        if let Some(active) = self.branches.get(&branch) {
            return Ok(active.refs[index]);
        }
        let root = self.root_ref(branch);
        if root.uniform().is_some() {
            return Ok(root);
        }
        match self.clean.get(&NodeKey::Branch(branch)) {
            Some(Node::Branch(refs)) => Ok(refs[index]),
            _ => Err(NodeKey::Branch(branch)),
        }
    }

    /// Calls `f` with a leaf; returns the key of the node that is missing.
    fn with_leaf<R>(&self, leaf: u32, f: impl FnOnce(&Leaf) -> R) -> Result<R, NodeKey> {
        if let Some(active) = self.leaves.get(&leaf) {
            return Ok(f(&active.leaf));
        }
        if let Some(Node::Leaf(found)) = self.clean.get(&NodeKey::Leaf(leaf)) {
            return Ok(f(found));
        }
        match self.reference(leaf)?.uniform() {
            Some(entry) => Ok(f(&Leaf::Uniform(entry))),
            None => Err(NodeKey::Leaf(leaf)),
        }
    }

    /// The entry of one block, or the node to load first.
    pub(super) fn lookup(&self, block: u64) -> Result<Entry, NodeKey> {
        self.with_leaf((block / LEAF_BLOCKS) as u32, |leaf| leaf.entry((block % LEAF_BLOCKS) as usize))
    }

    /// Calls `f(start, count, entry)` for stretches of equal uniform entries or of rising places
    /// that together cover `range`, in order. Stretches end at leaf boundaries at the latest
    /// where there is a leaf. Stops where a node has to be loaded first.
    pub(super) fn for_each_run(
        &self,
        range: Range<u64>,
        mut f: impl FnMut(u64, u64, Entry),
    ) -> Result<(), NodeKey> {
        for (branch, part) in pieces(range, BRANCH_BLOCKS) {
            let base = u64::from(branch) * BRANCH_BLOCKS;
            if let Some(entry) = self.uniform_branch(branch) {
                f(base + part.start, part.end - part.start, entry);
                continue;
            }
            for (leaf, part) in pieces(base + part.start..base + part.end, LEAF_BLOCKS) {
                let start = u64::from(leaf) * LEAF_BLOCKS;
                self.with_leaf(leaf, |leaf| {
                    leaf.for_each_run(part.start as usize..part.end as usize, |at, count, entry| {
                        f(start + at as u64, count as u64, entry);
                    });
                })?;
            }
        }
        Ok(())
    }

    /// Of how many blocks there is no data, whose leaves are in memory.
    pub(super) fn count_unheld(&self, blocks: Range<u64>) -> u64 {
        let mut unheld = 0;
        let known = self.for_each_run(blocks, |_, count, entry| {
            unheld += if entry.place().is_none() { count } else { 0 };
        });
        known.expect("their leaves are pinned");
        unheld
    }

    /// The entry that all blocks of a branch share and nobody is changing, if there is one.
    pub(super) fn uniform_branch(&self, branch: u32) -> Option<Entry> {
        match self.branches.contains_key(&branch) {
            true => None,
            false => self.root_ref(branch).uniform(),
        }
    }

    /// Whether nothing is said of any block, as far as the root tells.
    pub(super) fn is_empty(&self) -> bool {
        self.branches.is_empty() && self.roots.iter().all(|node| node.uniform() == Some(Entry::ABSENT))
    }

    /// Branches that the root names.
    pub(super) fn branch_count(&self) -> u32 {
        self.branches.last_key_value().map_or(0, |(last, _)| last + 1).max(self.roots.len() as u32)
    }

    /// A leaf that is in memory, or the node to load first.
    pub(super) fn leaf(&self, leaf: u32) -> Result<Leaf, NodeKey> {
        self.with_leaf(leaf, Leaf::clone)
    }

    /// Whether a leaf can be pinned without loading anything. A leaf in the cache is not enough: the
    /// branch above it may have been dropped.
    pub(super) fn can_pin(&self, leaf: u32) -> bool {
        let is_known = |reference: NodeRef| {
            reference.uniform().is_some() || self.clean.peek(&NodeKey::Leaf(leaf)).is_some()
        };
        self.leaves.contains_key(&leaf) || self.reference(leaf).is_ok_and(is_known)
    }

    /// Keeps a leaf in memory until as many [`unpin`](Self::unpin)s; or the node to load first.
    pub(super) fn pin(&mut self, leaf: u32) -> Result<(), NodeKey> {
        if let Some(active) = self.leaves.get_mut(&leaf) {
            active.pins += 1;
            return Ok(());
        }
        let contents = match self.reference(leaf)?.uniform() {
            Some(entry) => Leaf::Uniform(entry),
            None => match self.clean.get(&NodeKey::Leaf(leaf)) {
                Some(Node::Leaf(contents)) => contents.clone(),
                _ => return Err(NodeKey::Leaf(leaf)),
            },
        };
        self.activate(leaf, contents);
        Ok(())
    }

    fn activate(&mut self, leaf: u32, contents: Leaf) {
        self.hold_branch(split(leaf).0).expect("the branch of a leaf that was found is in memory");
        self.leaves.insert(leaf, ActiveLeaf { leaf: contents, pins: 1, dirty: false, frozen: false });
    }

    /// Ends a [`pin`](Self::pin).
    pub(super) fn unpin(&mut self, leaf: u32) {
        self.active(leaf).pins -= 1;
        self.settle(leaf);
    }

    /// Keeps a branch in memory until as many [`release_branch`](Self::release_branch)es.
    pub(super) fn hold_branch(&mut self, branch: u32) -> Result<(), NodeKey> {
        if let Some(active) = self.branches.get_mut(&branch) {
            active.users += 1;
            return Ok(());
        }
        let root = self.root_ref(branch);
        let refs = match root.uniform() {
            Some(_) => Arc::new([root; BRANCH_LEAVES]),
            None => match self.clean.get(&NodeKey::Branch(branch)) {
                Some(Node::Branch(refs)) => Arc::clone(refs),
                _ => return Err(NodeKey::Branch(branch)),
            },
        };
        self.branches.insert(branch, ActiveBranch { refs, users: 1, dirty: false, frozen: false });
        Ok(())
    }

    /// Ends a [`hold_branch`](Self::hold_branch).
    pub(super) fn release_branch(&mut self, branch: u32) {
        self.branch(branch).users -= 1;
        self.settle_branch(branch);
    }

    fn active(&mut self, leaf: u32) -> &mut ActiveLeaf {
        self.leaves.get_mut(&leaf).expect("a leaf in use is active")
    }

    fn branch(&mut self, branch: u32) -> &mut ActiveBranch {
        self.branches.get_mut(&branch).expect("a branch in use is active")
    }

    /// Lets a leaf go that nothing keeps in memory any more.
    fn settle(&mut self, leaf: u32) {
        let active = self.active(leaf);
        if active.pins > 0 || active.dirty || active.frozen {
            return;
        }
        let Some(active) = self.leaves.remove(&leaf) else { return };
        let (branch, index) = split(leaf);
        let key = NodeKey::Leaf(leaf);
        match self.branch(branch).refs[index].stored() {
            Some(_) => self.clean.insert(key, Node::Leaf(active.leaf)),
            None => drop(self.clean.remove(&key)),
        }
        self.release_branch(branch);
    }

    fn settle_branch(&mut self, branch: u32) {
        let active = self.branch(branch);
        if active.users > 0 || active.dirty || active.frozen {
            return;
        }
        let Some(active) = self.branches.remove(&branch) else { return };
        let key = NodeKey::Branch(branch);
        match self.root_ref(branch).stored() {
            Some(_) => self.clean.insert(key, Node::Branch(active.refs)),
            None => drop(self.clean.remove(&key)),
        }
    }

    /// Where a node that is missing is stored; `None` when it need not be loaded any more.
    pub(super) fn source(&self, key: NodeKey) -> Option<NodeRef> {
        let is_missing = match key {
            NodeKey::Branch(branch) => !self.branches.contains_key(&branch),
            NodeKey::Leaf(leaf) => !self.leaves.contains_key(&leaf),
        };
        let reference = match key {
            NodeKey::Branch(branch) => self.root_ref(branch),
            NodeKey::Leaf(leaf) => self.reference(leaf).ok()?,
        };
        (is_missing && self.clean.peek(&key).is_none() && reference.stored().is_some()).then_some(reference)
    }

    /// Takes a node that was read from where `from` says, unless it is no longer what is wanted;
    /// says whether it was taken. It may be dropped at once.
    pub(super) fn insert(&mut self, key: NodeKey, from: NodeRef, node: Node) -> bool {
        let wanted = self.source(key) == Some(from);
        if wanted {
            self.clean.insert(key, node);
        }
        wanted
    }

    /// As [`insert`](Self::insert), and pins the leaf or holds the branch.
    pub(super) fn insert_pinned(&mut self, key: NodeKey, from: NodeRef, node: Node) -> bool {
        if self.source(key) != Some(from) {
            return false;
        }
        match (key, node) {
            (NodeKey::Leaf(leaf), Node::Leaf(contents)) => self.activate(leaf, contents),
            (NodeKey::Branch(branch), Node::Branch(refs)) => {
                let active = ActiveBranch { refs, users: 1, dirty: false, frozen: false };
                self.branches.insert(branch, active);
            }
            _ => unreachable!("nodes are loaded by their key"),
        }
        true
    }

    /// Maps `count` blocks from `start` to consecutive places from `place`, and accounts for the
    /// places that they leave and take. Their leaves are pinned. Returns how many of them had no place.
    pub(super) fn set_places(&mut self, start: u64, count: u32, place: u32, segments: &mut Segments) -> u64 {
        segments.take_blocks(place, count);
        let (mut next, mut new) = (place, u64::from(count));
        for (leaf, part) in pieces(start..start + u64::from(count), LEAF_BLOCKS) {
            let range = part.start as usize..part.end as usize;
            let contents = self.touch(leaf);
            contents.for_each_place(range.clone(), |place| {
                segments.release_block(place);
                new -= 1;
            });
            for entry in &mut contents.table_mut()[range] {
                *entry = Entry(next);
                next += 1;
            }
        }
        new
    }

    /// Sets every block of `range` to `entry`, which is absent or zero. Their leaves are pinned.
    pub(super) fn set_uniform(&mut self, range: Range<u64>, entry: Entry, segments: &mut Segments) {
        debug_assert!(entry.place().is_none());
        for (leaf, part) in pieces(range, LEAF_BLOCKS) {
            let range = part.start as usize..part.end as usize;
            if matches!(self.active(leaf).leaf, Leaf::Uniform(old) if old == entry) {
                continue;
            }
            let contents = self.touch(leaf);
            contents.for_each_place(range.clone(), |place| segments.release_block(place));
            if range.len() == LEAF_ENTRIES {
                *contents = Leaf::Uniform(entry);
            } else {
                contents.table_mut()[range].fill(entry);
            }
        }
    }

    /// A pinned leaf that is about to change.
    fn touch(&mut self, leaf: u32) -> &mut Leaf {
        self.dirty_leaf(leaf);
        &mut self.active(leaf).leaf
    }

    /// Makes an active leaf part of the next checkpoint.
    pub(super) fn dirty_leaf(&mut self, leaf: u32) {
        if !std::mem::replace(&mut self.active(leaf).dirty, true) {
            self.dirty_leaves.insert(leaf);
        }
    }

    /// Makes an active branch part of the next checkpoint.
    pub(super) fn dirty_branch(&mut self, branch: u32) {
        self.branch(branch).dirty = true;
    }

    /// Has the next checkpoint store the root anew.
    pub(super) fn dirty_root(&mut self) {
        self.root_dirty = true;
    }
}
