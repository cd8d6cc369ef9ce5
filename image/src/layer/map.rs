//! The map in memory: for each guest block, where its contents are.
//!
//! A radix tree of fixed shape: the root holds branches of 1 GiB, a branch holds leaves of 2 MiB,
//! a leaf holds 512 entries. Stretches that are all absent or all zero take no table. Leaf tables
//! are shared with a running checkpoint and copied when written meanwhile, so that a checkpoint
//! is the map as of one sequence number.
//!
//! Invariant: a node reference (`node`) is changed by checkpoints only; it names what the newest
//! complete checkpoint stored, or will store once the running one has placed its nodes.

use std::ops::Range;
use std::sync::Arc;

use super::node::{BRANCH_LEAVES, Entry, LEAF_ENTRIES, NodeKind, NodeRef, encode_refs, run_length};
use super::segments::Segments;
use sapwood_blockdev::units::BLOCK_SIZE;

/// The 512 entries of one leaf.
pub(super) type LeafTable = [Entry; LEAF_ENTRIES];

/// Guest blocks of a branch.
const BRANCH_BLOCKS: u64 = (BRANCH_LEAVES * LEAF_ENTRIES) as u64;
const LEAF_BLOCKS: u64 = LEAF_ENTRIES as u64;

enum Leaf {
    Uniform(Entry),
    Table(Arc<LeafTable>),
}

struct LeafSlot {
    leaf: Leaf,
    node: NodeRef,
    dirty: bool,
}

enum Branch {
    Uniform(Entry),
    Table(Vec<LeafSlot>),
}

struct BranchSlot {
    branch: Branch,
    node: NodeRef,
    dirty: bool,
}

/// The map of one layer.
#[derive(Default)]
pub(super) struct Map {
    branches: Vec<BranchSlot>,
    /// Leaves whose `dirty` flag is up, once each; may name leaves that have gone since.
    dirty_leaves: Vec<u32>,
    /// A checkpoint is placing nodes: branches must keep their tables.
    frozen: bool,
    /// The root must be stored anew although no branch changed.
    root_dirty: bool,
}

/// What a checkpoint has to write: the leaves and branches that changed since the last one.
pub(super) struct Frozen {
    pub(super) leaves: Vec<(u32, Arc<LeafTable>)>,
    pub(super) branches: Vec<u32>,
    /// The root has to be stored too.
    pub(super) root_changed: bool,
}

impl BranchSlot {
    const ABSENT: Self = Self { branch: Branch::Uniform(Entry::ABSENT), node: NodeRef::ABSENT, dirty: false };

    /// The leaves, made from the uniform value where there were none.
    fn table(&mut self) -> &mut Vec<LeafSlot> {
        if let Branch::Uniform(entry) = self.branch {
            let leaf =
                || LeafSlot { leaf: Leaf::Uniform(entry), node: NodeRef(entry.0.into()), dirty: false };
            self.branch = Branch::Table((0..BRANCH_LEAVES).map(|_| leaf()).collect());
        }
        match &mut self.branch {
            Branch::Table(leaves) => leaves,
            Branch::Uniform(_) => unreachable!("made a table above"),
        }
    }
}

impl LeafSlot {
    fn entry(&self, index: usize) -> Entry {
        match &self.leaf {
            Leaf::Uniform(entry) => *entry,
            Leaf::Table(table) => table[index],
        }
    }

    /// The entries, to be changed; copied when a checkpoint still reads them.
    fn table(&mut self) -> &mut LeafTable {
        if let Leaf::Uniform(entry) = self.leaf {
            self.leaf = Leaf::Table(Arc::new([entry; LEAF_ENTRIES]));
        }
        match &mut self.leaf {
            Leaf::Table(table) => Arc::make_mut(table),
            Leaf::Uniform(_) => unreachable!("made a table above"),
        }
    }

    fn release_places(&self, range: Range<usize>, segments: &mut Segments) {
        if let Leaf::Table(table) = &self.leaf {
            for place in table[range].iter().filter_map(|entry| entry.place()) {
                segments.release_block(place);
            }
        }
    }
}

/// Splits `range` at multiples of `unit`: (unit index, part inside the unit).
fn pieces(range: Range<u64>, unit: u64) -> impl Iterator<Item = (usize, Range<u64>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        (at < range.end).then(|| {
            let index = at / unit;
            let end = range.end.min((index + 1) * unit);
            let part = at - index * unit..end - index * unit;
            at = end;
            (index as usize, part)
        })
    })
}

impl Map {
    /// The entry of one block.
    pub(super) fn lookup(&self, block: u64) -> Entry {
        let Some(slot) = self.branches.get((block / BRANCH_BLOCKS) as usize) else { return Entry::ABSENT };
        match &slot.branch {
            Branch::Uniform(entry) => *entry,
            Branch::Table(leaves) => {
                let inside = (block % BRANCH_BLOCKS) as usize;
                leaves[inside / LEAF_ENTRIES].entry(inside % LEAF_ENTRIES)
            }
        }
    }

    /// Calls `f(start, count, entry)` for stretches of equal uniform entries or of rising places
    /// that together cover `range`, in order. Stretches end at leaf boundaries at the latest
    /// where there is a table.
    pub(super) fn for_each_run(&self, range: Range<u64>, mut f: impl FnMut(u64, u64, Entry)) {
        for (branch, part) in pieces(range, BRANCH_BLOCKS) {
            let base = branch as u64 * BRANCH_BLOCKS;
            match self.branches.get(branch).map(|slot| &slot.branch) {
                None => f(base + part.start, part.end - part.start, Entry::ABSENT),
                Some(Branch::Uniform(entry)) => f(base + part.start, part.end - part.start, *entry),
                Some(Branch::Table(leaves)) => {
                    for (leaf, inner) in pieces(part, LEAF_BLOCKS) {
                        let start = base + leaf as u64 * LEAF_BLOCKS;
                        Self::leaf_runs(&leaves[leaf], start, inner, &mut f);
                    }
                }
            }
        }
    }

    fn leaf_runs(slot: &LeafSlot, base: u64, range: Range<u64>, f: &mut impl FnMut(u64, u64, Entry)) {
        match &slot.leaf {
            Leaf::Uniform(entry) => f(base + range.start, range.end - range.start, *entry),
            Leaf::Table(table) => {
                let mut rest = &table[range.start as usize..range.end as usize];
                let mut at = range.start;
                while let Some(first) = rest.first() {
                    let len = run_length(rest);
                    f(base + at, len as u64, *first);
                    at += len as u64;
                    rest = &rest[len..];
                }
            }
        }
    }

    /// Maps `count` blocks from `start` to consecutive places from `place`, and accounts for the
    /// places that they leave and take.
    pub(super) fn set_places(&mut self, start: u64, count: u32, place: u32, segments: &mut Segments) {
        segments.take_blocks(place, count);
        let mut next = place;
        for (leaf, part) in pieces(start..start + u64::from(count), LEAF_BLOCKS) {
            let range = part.start as usize..part.end as usize;
            let slot = self.touch(leaf);
            slot.release_places(range.clone(), segments);
            for entry in &mut slot.table()[range] {
                *entry = Entry(next);
                next += 1;
            }
        }
    }

    /// Sets every block of `range` to `entry`, which is absent or zero.
    pub(super) fn set_uniform(&mut self, range: Range<u64>, entry: Entry, segments: &mut Segments) {
        debug_assert!(entry.place().is_none());
        for (index, part) in pieces(range, BRANCH_BLOCKS) {
            if entry == Entry::ABSENT && index >= self.branches.len() {
                return;
            }
            let whole = part.end - part.start == BRANCH_BLOCKS;
            let frozen = self.frozen;
            let slot = self.branch(index);
            match &slot.branch {
                Branch::Uniform(old) if *old == entry => {}
                Branch::Uniform(_) if whole => {
                    slot.branch = Branch::Uniform(entry);
                    slot.dirty = true;
                }
                Branch::Table(leaves) if whole && !frozen => {
                    for leaf in leaves {
                        leaf.release_places(0..LEAF_ENTRIES, segments);
                        segments.release_node(leaf.node);
                    }
                    slot.branch = Branch::Uniform(entry);
                    slot.dirty = true;
                }
                _ => {
                    let base = index as u64 * BRANCH_BLOCKS;
                    self.set_leaves_uniform(base + part.start..base + part.end, entry, segments);
                }
            }
        }
    }

    fn set_leaves_uniform(&mut self, range: Range<u64>, entry: Entry, segments: &mut Segments) {
        for (leaf, part) in pieces(range, LEAF_BLOCKS) {
            let range = part.start as usize..part.end as usize;
            let slot = self.touch(leaf);
            slot.release_places(range.clone(), segments);
            if range.len() == LEAF_ENTRIES {
                slot.leaf = Leaf::Uniform(entry);
            } else {
                slot.table()[range].fill(entry);
            }
        }
    }

    fn branch(&mut self, index: usize) -> &mut BranchSlot {
        if index >= self.branches.len() {
            self.branches.resize_with(index + 1, || BranchSlot::ABSENT);
        }
        &mut self.branches[index]
    }

    /// The slot of a leaf that is about to change.
    fn touch(&mut self, leaf: usize) -> &mut LeafSlot {
        let branch = leaf / BRANCH_LEAVES;
        self.branch(branch);
        let slot = &mut self.branches[branch];
        slot.dirty = true;
        let slot = &mut slot.table()[leaf % BRANCH_LEAVES];
        if !slot.dirty {
            slot.dirty = true;
            self.dirty_leaves.push(leaf as u32);
        }
        slot
    }

    /// Makes every node stored in the given segment part of the next checkpoint, so that the
    /// segment can be emptied.
    pub(super) fn dirty_nodes_in(&mut self, in_segment: impl Fn(u64) -> bool) {
        let stored_there = |node: NodeRef| node.stored().is_some_and(|(offset, _)| in_segment(offset));
        for (b, slot) in self.branches.iter_mut().enumerate() {
            slot.dirty |= stored_there(slot.node);
            let Branch::Table(leaves) = &mut slot.branch else { continue };
            for (l, leaf) in leaves.iter_mut().enumerate() {
                if !leaf.dirty && stored_there(leaf.node) {
                    leaf.dirty = true;
                    slot.dirty = true;
                    self.dirty_leaves.push((b * BRANCH_LEAVES + l) as u32);
                }
            }
        }
    }

    /// Starts a checkpoint: hands out what changed, as of now. The nodes that it replaces are
    /// released; the new ones are accounted for when they are placed.
    pub(super) fn freeze(&mut self, segments: &mut Segments) -> Frozen {
        assert!(!self.frozen, "one checkpoint at a time");
        self.frozen = true;
        let root_changed = std::mem::take(&mut self.root_dirty);
        let mut frozen = Frozen { leaves: Vec::new(), branches: Vec::new(), root_changed };
        for leaf in std::mem::take(&mut self.dirty_leaves) {
            let Some(slot) = self.leaf_slot(leaf).filter(|slot| slot.dirty) else { continue };
            slot.dirty = false;
            segments.release_node(slot.node);
            slot.node = match &slot.leaf {
                Leaf::Uniform(entry) => NodeRef(entry.0.into()),
                Leaf::Table(table) => {
                    frozen.leaves.push((leaf, Arc::clone(table)));
                    NodeRef::ABSENT
                }
            };
        }
        for (index, slot) in self.branches.iter_mut().enumerate().filter(|(_, slot)| slot.dirty) {
            slot.dirty = false;
            frozen.root_changed = true;
            segments.release_node(slot.node);
            slot.node = match &slot.branch {
                Branch::Uniform(entry) => NodeRef(entry.0.into()),
                Branch::Table(_) => {
                    frozen.branches.push(index as u32);
                    NodeRef::ABSENT
                }
            };
        }
        frozen
    }

    /// Records where the running checkpoint stored a leaf.
    pub(super) fn place_leaf(&mut self, leaf: u32, node: NodeRef, segments: &mut Segments) {
        self.leaf_slot(leaf).expect("branches keep their tables while frozen").node = node;
        segments.take_node(node);
    }

    /// Records where the running checkpoint stored a branch.
    pub(super) fn place_branch(&mut self, branch: u32, node: NodeRef, segments: &mut Segments) {
        self.branches[branch as usize].node = node;
        segments.take_node(node);
    }

    /// The stored form of a branch as of the freeze, once its leaves are placed.
    pub(super) fn encode_branch(&self, branch: u32) -> Vec<u8> {
        let Branch::Table(leaves) = &self.branches[branch as usize].branch else {
            unreachable!("branches keep their tables while frozen")
        };
        let refs: Vec<NodeRef> = leaves.iter().map(|slot| slot.node).collect();
        encode_refs(NodeKind::Branch, branch, &refs)
    }

    /// The stored form of the root as of the freeze, once the branches are placed; empty when
    /// nothing is mapped.
    pub(super) fn encode_root(&self) -> Vec<u8> {
        let refs: Vec<NodeRef> = self.branches.iter().map(|slot| slot.node).collect();
        match refs.iter().rposition(|&node| node != NodeRef::ABSENT) {
            Some(last) => encode_refs(NodeKind::Root, 0, &refs[..=last]),
            None => Vec::new(),
        }
    }

    /// Gives back what a failed checkpoint took, for the next one.
    pub(super) fn refreeze(&mut self, frozen: &Frozen) {
        for &(leaf, _) in &frozen.leaves {
            self.touch(leaf as usize);
        }
        for &branch in &frozen.branches {
            self.branches[branch as usize].dirty = true;
        }
        self.root_dirty |= frozen.root_changed;
    }

    /// Has the next checkpoint store the root anew.
    pub(super) fn dirty_root(&mut self) {
        self.root_dirty = true;
    }

    /// Ends a checkpoint.
    pub(super) fn thaw(&mut self) {
        self.frozen = false;
    }

    /// Puts a stored branch into an empty map: for loading.
    pub(super) fn load_branch(&mut self, index: usize, node: NodeRef, segments: &mut Segments) {
        segments.take_node(node);
        let slot = self.branch(index);
        slot.node = node;
        if let Some(entry) = node.uniform() {
            slot.branch = Branch::Uniform(entry);
        }
    }

    /// Puts a stored leaf into a loaded branch; `table` is `None` for a uniform one.
    pub(super) fn load_leaf(
        &mut self,
        leaf: u32,
        node: NodeRef,
        table: Option<LeafTable>,
        segments: &mut Segments,
    ) {
        segments.take_node(node);
        let loaded = match (table, node.uniform()) {
            (Some(table), _) => {
                for place in table.iter().filter_map(|entry| entry.place()) {
                    segments.take_blocks(place, 1);
                }
                Leaf::Table(Arc::new(table))
            }
            (None, uniform) => Leaf::Uniform(uniform.unwrap_or(Entry::ABSENT)),
        };
        let slot = &mut self.branch(leaf as usize / BRANCH_LEAVES).table()[leaf as usize % BRANCH_LEAVES];
        *slot = LeafSlot { leaf: loaded, node, dirty: false };
    }

    /// A place in the file that the map refers to and that `f` is true of, if there is one: of a
    /// mapped block, or of the first block of a stored node.
    pub(super) fn find_place(&self, f: impl Fn(u32) -> bool) -> Option<u32> {
        let of_node = |node: NodeRef| {
            let place = (node.stored()?.0 / BLOCK_SIZE) as u32;
            f(place).then_some(place)
        };
        let of_leaf = |slot: &LeafSlot| {
            of_node(slot.node).or_else(|| match &slot.leaf {
                Leaf::Uniform(_) => None,
                Leaf::Table(table) => table.iter().filter_map(|entry| entry.place()).find(|&place| f(place)),
            })
        };
        self.branches.iter().find_map(|slot| {
            of_node(slot.node).or_else(|| match &slot.branch {
                Branch::Uniform(_) => None,
                Branch::Table(leaves) => leaves.iter().find_map(of_leaf),
            })
        })
    }

    fn leaf_slot(&mut self, leaf: u32) -> Option<&mut LeafSlot> {
        match &mut self.branches.get_mut(leaf as usize / BRANCH_LEAVES)?.branch {
            Branch::Table(leaves) => Some(&mut leaves[leaf as usize % BRANCH_LEAVES]),
            Branch::Uniform(_) => None,
        }
    }
}
