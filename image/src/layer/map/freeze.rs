//! What checkpoints do with the map: take what changed, and say where it was stored.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::leaf::Leaf;
use super::super::node::{NodeRef, encode_branch};
use super::super::segments::Segments;
use super::{Map, split};

/// What a checkpoint has to write: the leaves and branches that changed since the last one.
pub(in crate::layer) struct Frozen {
    pub(in crate::layer) leaves: Vec<(u32, Leaf)>,
    pub(in crate::layer) branches: Vec<u32>,
    /// The root has to be stored too.
    pub(in crate::layer) root_changed: bool,
}

impl Map {
    /// Starts a checkpoint: hands out what changed, as of now. The nodes that it replaces are
    /// released; the new ones are accounted for when they are placed.
    pub(in crate::layer) fn freeze(&mut self, segments: &mut Segments) -> Frozen {
        assert!(!self.frozen, "one checkpoint at a time");
        self.frozen = true;
        let mut frozen = Frozen { leaves: Vec::new(), branches: Vec::new(), root_changed: false };
        for leaf in std::mem::take(&mut self.dirty_leaves) {
            let (branch, index) = split(leaf);
            let active = self.leaves.get_mut(&leaf).expect("dirty leaves are active");
            let above = self.branches.get_mut(&branch).expect("branches of active leaves are active");
            active.dirty = false;
            above.dirty = true;
            let reference = &mut Arc::make_mut(&mut above.refs)[index];
            segments.release_leaf(*reference);
            match &active.leaf {
                Leaf::Uniform(entry) => *reference = NodeRef(entry.0.into()),
                stored => {
                    *reference = NodeRef::ABSENT;
                    active.frozen = true;
                    frozen.leaves.push((leaf, stored.clone()));
                }
            }
            self.settle(leaf);
        }
        self.freeze_branches(&mut frozen, segments);
        frozen.root_changed = std::mem::take(&mut self.root_dirty);
        frozen
    }

    fn freeze_branches(&mut self, frozen: &mut Frozen, segments: &mut Segments) {
        let stored: BTreeSet<u32> = frozen.leaves.iter().map(|(leaf, _)| split(*leaf).0).collect();
        let dirty = self.branches.iter().filter(|(_, b)| b.dirty).map(|(i, _)| *i).collect::<Vec<_>>();
        for branch in dirty {
            self.root_dirty = true;
            let active = self.branch(branch);
            active.dirty = false;
            let first = active.refs[0];
            let uniform = first.uniform().is_some() && active.refs.iter().all(|r| *r == first);
            let reference = match uniform && !stored.contains(&branch) {
                true => first,
                false => {
                    active.frozen = true;
                    frozen.branches.push(branch);
                    NodeRef::ABSENT
                }
            };
            segments.release_node(self.root_ref(branch));
            self.set_root(branch, reference);
            self.settle_branch(branch);
        }
    }

    fn set_root(&mut self, branch: u32, reference: NodeRef) {
        if branch as usize >= self.roots.len() {
            self.roots.resize(branch as usize + 1, NodeRef::ABSENT);
        }
        self.roots[branch as usize] = reference;
    }

    /// Records where the running checkpoint stored a leaf.
    pub(in crate::layer) fn place_leaf(&mut self, leaf: u32, node: NodeRef) {
        let (branch, index) = split(leaf);
        Arc::make_mut(&mut self.branch(branch).refs)[index] = node;
    }

    /// Records where the running checkpoint stored a branch.
    pub(in crate::layer) fn place_branch(&mut self, branch: u32, node: NodeRef) {
        self.set_root(branch, node);
    }

    /// The stored form of a branch as of the freeze, once its leaves are placed.
    pub(in crate::layer) fn encode_branch(&mut self, branch: u32) -> Vec<u8> {
        encode_branch(branch, &self.branch(branch).refs)
    }

    /// The references of the root as of the freeze, once the branches are placed.
    pub(in crate::layer) fn root_refs(&self) -> &[NodeRef] {
        let end = self.roots.iter().rposition(|&node| node != NodeRef::ABSENT).map_or(0, |last| last + 1);
        &self.roots[..end]
    }

    /// Ends a checkpoint; one that failed leaves what it took to the next one.
    pub(in crate::layer) fn thaw(&mut self, frozen: &Frozen, failed: bool) {
        self.frozen = false;
        self.root_dirty |= failed && frozen.root_changed;
        for &(leaf, _) in &frozen.leaves {
            self.active(leaf).frozen = false;
            if failed {
                self.dirty_leaf(leaf);
            }
            self.settle(leaf);
        }
        for &branch in &frozen.branches {
            let active = self.branch(branch);
            active.frozen = false;
            active.dirty |= failed;
            self.settle_branch(branch);
        }
    }
}
