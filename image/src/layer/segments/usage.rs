//! What checkpoints store of the segments: how much of each is in use.
//!
//! A usage node is about 256 segments. A checkpoint stores those that changed, as of its start:
//! what changes while it is being written is kept apart until it ends. Leaves that it stores
//! itself are counted in it, nodes of other kinds are not: they follow from the root.

use super::super::node::{NodeRef, USAGE_SEGMENTS, Usage, UsageTable};
use super::{Segment, Segments};

/// The segments of one usage node.
#[derive(Clone, Default)]
pub(super) struct Group {
    /// Where its usage is stored.
    node: NodeRef,
    /// Its usage is not what is stored.
    dirty: bool,
    /// The running checkpoint stores it.
    frozen: bool,
    /// Its usage as of the running checkpoint, if it has changed since.
    saved: Option<Box<UsageTable>>,
}

impl Segments {
    /// Changes the usage of a segment.
    pub(super) fn change(&mut self, segment: u32, f: impl FnOnce(&mut Segment)) {
        let index = segment as usize / USAGE_SEGMENTS;
        if index >= self.groups.len() {
            self.groups.resize(index + 1, Group::default());
        }
        if self.frozen && self.groups[index].saved.is_none() {
            self.groups[index].saved = Some(Box::new(self.usage(index)));
        }
        self.groups[index].dirty = true;
        self.edit(segment, f);
    }

    /// Counts a leaf that the running checkpoint has stored: its usage nodes count it, too.
    pub(in crate::layer) fn place_leaf(&mut self, leaf: NodeRef) {
        let Some((offset, len)) = leaf.stored() else { return };
        let segment = self.of_offset(offset) as usize;
        let index = segment / USAGE_SEGMENTS;
        if index >= self.groups.len() {
            self.groups.resize(index + 1, Group::default());
        }
        self.edit(segment as u32, |s| s.leaf_bytes += len as u32);
        let group = &mut self.groups[index];
        if let Some(saved) = &mut group.saved {
            saved[segment % USAGE_SEGMENTS].leaf_bytes += len as u32;
        }
        self.freeze_group(index);
    }

    /// The usage of a group now.
    fn usage(&self, group: usize) -> UsageTable {
        let mut table = [Usage::default(); USAGE_SEGMENTS];
        let first = group * USAGE_SEGMENTS;
        let end = self.list.len().min(first + USAGE_SEGMENTS);
        for (usage, segment) in table.iter_mut().zip(self.list.get(first..end).unwrap_or_default()) {
            let Segment { live_blocks, leaf_bytes, written, .. } = *segment;
            // What is empty is said in one way, so that nothing has to be stored for it.
            if live_blocks > 0 || leaf_bytes > 0 {
                *usage = Usage { live_blocks, leaf_bytes, written };
            }
        }
        table
    }

    /// Takes a stored usage node into an empty list: for opening. Says whether there are such segments.
    pub(in crate::layer) fn load_usage(&mut self, group: u32, node: NodeRef, table: &UsageTable) -> bool {
        let first = group as usize * USAGE_SEGMENTS;
        for (i, usage) in table.iter().enumerate().filter(|(_, usage)| **usage != Usage::default()) {
            if first + i >= self.list.len() {
                return false;
            }
            self.edit((first + i) as u32, |segment| {
                segment.live_blocks = usage.live_blocks;
                segment.leaf_bytes = usage.leaf_bytes;
                segment.written = usage.written;
                // So that it is known to have been in use when the log has emptied it.
                segment.last_sequence = 1;
            });
            self.live_blocks += u64::from(usage.live_blocks);
        }
        if group as usize >= self.groups.len() {
            self.groups.resize(group as usize + 1, Group::default());
        }
        self.groups[group as usize].node = node;
        self.take_node(node);
        true
    }

    /// Starts a checkpoint: from here on the usage as it is now is kept. Those that changed since the
    /// last one have their old nodes released. Says whether there are any.
    pub(in crate::layer) fn freeze_usage(&mut self) -> bool {
        self.frozen = true;
        let dirty: Vec<usize> = (0..self.groups.len()).filter(|&i| self.groups[i].dirty).collect();
        for &index in &dirty {
            self.groups[index].dirty = false;
            self.freeze_group(index);
        }
        !dirty.is_empty()
    }

    fn freeze_group(&mut self, index: usize) {
        let group = &mut self.groups[index];
        if !std::mem::replace(&mut group.frozen, true) {
            let old = std::mem::take(&mut group.node);
            self.release_node(old);
        }
    }

    /// The usage nodes that the running checkpoint has to store, once its leaves are placed. `as_of_now`
    /// forgets what has changed since it began, which only a mutation does.
    pub(in crate::layer) fn frozen_usage(&self, as_of_now: bool) -> Vec<(u32, UsageTable)> {
        let frozen = self.groups.iter().enumerate().filter(|(_, group)| group.frozen);
        let table = |(i, group): (usize, &Group)| match &group.saved {
            Some(saved) if !as_of_now => (i as u32, **saved),
            _ => (i as u32, self.usage(i)),
        };
        frozen.map(table).filter(|(_, table)| table.iter().any(|u| *u != Usage::default())).collect()
    }

    /// Records where the running checkpoint stored a usage node.
    pub(in crate::layer) fn place_usage(&mut self, group: u32, node: NodeRef) {
        self.groups[group as usize].node = node;
        self.take_node(node);
    }

    /// The references of the root to usage nodes.
    pub(in crate::layer) fn usage_refs(&self) -> Vec<NodeRef> {
        let end = self.groups.iter().rposition(|g| g.node != NodeRef::ABSENT).map_or(0, |last| last + 1);
        self.groups[..end].iter().map(|group| group.node).collect()
    }

    /// Has the next checkpoint store a usage node anew if it lies at `offset`.
    pub(in crate::layer) fn dirty_usage_at(&mut self, group: u32, offset: u64) {
        if let Some(group) = self.groups.get_mut(group as usize)
            && group.node.stored().is_some_and(|(at, _)| at == offset)
        {
            group.dirty = true;
        }
    }

    /// Ends a checkpoint; one that failed leaves what it took to the next one.
    pub(in crate::layer) fn thaw_usage(&mut self, failed: bool) {
        self.frozen = false;
        for group in &mut self.groups {
            group.dirty |= group.frozen && failed;
            group.frozen = false;
            group.saved = None;
        }
    }
}
