//! A layer that others lie over: it is only read, and what lies below it is another's matter.
//!
//! Either all that its map says is read once ([`Layer::scan`]), and only the file is needed from then
//! on; or it is asked block by block ([`Layer::first_run`]), and its map stays on the medium but for
//! a cache.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::base::Below;
use super::base_record::{BaseIdentity, BaseRecord};
use super::core::Core;
use super::device::Layer;
use super::layout::LayerId;
use super::leaf::Leaf;
use super::load::Reader;
use super::map::{BRANCH_BLOCKS, LEAF_BLOCKS, Node, NodeKey};
use super::node::{BRANCH_LEAVES, Entry, LEAF_ENTRIES, NODE_HEADER, NodeRef, RUN_BYTES};
use super::recover::Head;
use super::slot::Slot;
use super::{OpenLayer, Tuning};
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// What a map says of a stretch of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrozenRun {
    pub(crate) start: u64,
    pub(crate) count: u64,
    pub(crate) holds: Holds,
}

/// What a block holds, by one map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Nothing: ask below.
    Nothing,
    /// Zeroes.
    Zero,
    /// The bytes from this block of the file on.
    Place(u32),
}

impl Holds {
    fn of(entry: Entry) -> Self {
        match entry.place() {
            Some(place) => Self::Place(place),
            None if entry == Entry::ZERO => Self::Zero,
            None => Self::Nothing,
        }
    }

    /// Where a block of a layer's file begins, in bytes.
    pub(crate) fn offset(place: u32) -> u64 {
        Core::file_offset(place).0
    }
}

/// By what a frozen layer is recognised when its file is opened again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seal {
    pub(crate) id: LayerId,
    slot: Slot,
}

impl<E: Engine> Layer<E> {
    /// Opens a layer from its open and locked file, for reading, and alone. `is_known` says that
    /// its identity, the number of its newest checkpoint included, is compared with what is known of it.
    pub(crate) async fn open_frozen(
        io: &Io<E>,
        path: &Path,
        file: E::File,
        tuning: Tuning,
        is_known: bool,
    ) -> Result<(Arc<Self>, Seal), ImageError> {
        let head = Head::of(io, path, file).await?;
        let seal = Seal { id: head.header.layer_id, slot: head.slot() };
        let below = Below::over(head.record.clone(), None);
        let options = OpenLayer { read_only: true, tuning };
        let (layer, _) = Self::open_over(io, path, &options, head, below, is_known).await?;
        Ok((layer, seal))
    }

    /// Refuses a file, opened again, that is not the layer it was.
    pub(crate) async fn check_seal(
        io: &Io<E>,
        path: &Path,
        file: E::File,
        seal: &Seal,
    ) -> Result<(), ImageError> {
        let head = Head::<E>::of(io, path, file).await?;
        let (id, slot) = (head.header.layer_id, head.slot());
        if (id, slot) == (seal.id, seal.slot) {
            return Ok(());
        }
        let change = if id == seal.id {
            format!("generation {} became {}", seal.slot.generation, slot.generation)
        } else {
            "it is another layer".to_owned()
        };
        let detail = format!(
            "it has changed while a disk is served from it ({change}): what is read of it cannot be trusted; \
             stop whoever writes it, and the disk"
        );
        Err(ImageError::new(path, ErrorKind::Base(detail)))
    }

    /// What lies below, as recorded.
    pub(crate) fn base_record(&self) -> BaseRecord {
        self.below().record.clone()
    }

    /// By what a layer over this one recognises it.
    pub(crate) fn frozen_identity(&self) -> BaseIdentity {
        self.identity()
    }

    /// The file.
    pub(crate) fn frozen_file(&self) -> E::File {
        self.file()
    }

    /// The size of a segment in blocks.
    pub(crate) fn segment_blocks(&self) -> u32 {
        self.header().segment_blocks
    }

    /// What the map says of the first of `blocks`, and of those after it that go on so, as far as that
    /// is quickly known; `None` where a node has to be loaded first ([`Layer::pin`]).
    pub(crate) fn first_run(&self, blocks: Range<u64>) -> Option<FrozenRun> {
        let core = self.core();
        let branch = (blocks.start / BRANCH_BLOCKS) as u32;
        let unit = if core.map.uniform_branch(branch).is_some() { BRANCH_BLOCKS } else { LEAF_BLOCKS };
        let end = blocks.end.min((blocks.start / unit + 1) * unit);
        let mut first = None;
        let found = core.map.for_each_run(blocks.start..end, |start, count, entry| {
            first.get_or_insert(FrozenRun { start, count, holds: Holds::of(entry) });
        });
        found.ok().and(first)
    }

    /// All that the map says of the first `blocks` blocks: the runs that hold anything, in order;
    /// `None` when they are more than `runs_max`. Takes memory for these and one branch.
    pub(crate) async fn scan(
        self: &Arc<Self>,
        io: &Io<E>,
        blocks: u64,
        runs_max: usize,
    ) -> Result<Option<Vec<FrozenRun>>, ImageError> {
        let mut runs = Vec::new();
        let branches = self.core().map.branch_count().min(blocks.div_ceil(BRANCH_BLOCKS) as u32);
        for branch in 0..branches {
            let start = u64::from(branch) * BRANCH_BLOCKS;
            let uniform = self.core().map.uniform_branch(branch);
            if let Some(entry) = uniform {
                push(&mut runs, start, BRANCH_BLOCKS, entry);
                continue;
            }
            let (mut leaves, stored) = self.with_branch(io, branch, |core| split(core, branch)).await?;
            let least: usize = stored.iter().map(|(_, node)| runs_min(*node)).sum();
            if runs.len() + least > runs_max {
                return Ok(None);
            }
            self.read_leaves(io, stored, &mut leaves).await?;
            for (leaf, contents) in leaves {
                let start = u64::from(leaf) * LEAF_BLOCKS;
                contents.for_each_run(0..LEAF_ENTRIES, |at, count, entry| {
                    push(&mut runs, start + at as u64, count as u64, entry);
                });
            }
            if runs.len() > runs_max {
                return Ok(None);
            }
        }
        while let Some(last) = runs.last_mut() {
            if last.start < blocks {
                last.count = last.count.min(blocks - last.start);
                break;
            }
            runs.pop();
        }
        Ok(Some(runs))
    }

    async fn read_leaves(
        &self,
        io: &Io<E>,
        stored: Vec<(u32, NodeRef)>,
        leaves: &mut BTreeMap<u32, Leaf>,
    ) -> Result<(), ImageError> {
        let file = self.file();
        let reader = Reader { io, file: &file, path: self.path() };
        let read = reader.read_nodes(stored, |leaf, node, bytes| {
            let offset = node.stored().unwrap_or_default().0;
            if let Node::Leaf(contents) = self.decode(&reader, NodeKey::Leaf(leaf), offset, bytes)? {
                leaves.insert(leaf, contents);
            }
            Ok(())
        });
        read.await
    }
}

/// The leaves of a branch that are in memory and hold anything, and where the others are stored.
fn split(core: &Core, branch: u32) -> (BTreeMap<u32, Leaf>, Vec<(u32, NodeRef)>) {
    let (mut leaves, mut stored) = (BTreeMap::new(), Vec::new());
    let first = branch * BRANCH_LEAVES as u32;
    for leaf in first..first + BRANCH_LEAVES as u32 {
        match core.map.leaf(leaf) {
            Ok(Leaf::Uniform(Entry::ABSENT)) => {}
            Ok(contents) => drop(leaves.insert(leaf, contents)),
            Err(_) => stored.extend(core.map.reference(leaf).ok().map(|node| (leaf, node))),
        }
    }
    (leaves, stored)
}

/// How many runs a stored leaf has at least, by its length.
fn runs_min(node: NodeRef) -> usize {
    let (_, len) = node.stored().unwrap_or_default();
    (len.saturating_sub(NODE_HEADER) / RUN_BYTES).min(LEAF_ENTRIES / 2)
}

/// Appends a run that holds anything, joined to the one before where that goes on.
fn push(runs: &mut Vec<FrozenRun>, start: u64, count: u64, entry: Entry) {
    let holds = Holds::of(entry);
    if holds == Holds::Nothing {
        return;
    }
    if let Some(last) = runs.last_mut().filter(|last| last.start + last.count == start) {
        let joins = match (last.holds, holds) {
            (Holds::Zero, Holds::Zero) => true,
            (Holds::Place(a), Holds::Place(b)) => u64::from(a) + last.count == u64::from(b),
            _ => false,
        };
        if joins {
            last.count += count;
            return;
        }
    }
    runs.push(FrozenRun { start, count, holds });
}

/// Blocks of a disk of `bytes`.
pub(crate) fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_SIZE)
}
