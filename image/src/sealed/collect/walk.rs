//! Walking over the tree of a root.

use std::ops::Range;

use super::finder::{Finder, Locate, Spot};
use crate::error::{ErrorKind, ImageError};
use crate::sealed::header::PackKind;
use crate::sealed::node::{Child, FANOUT, Node, blocks_below, height_of};
use crate::sealed::packs::Root;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Who is told what a walk finds.
pub(super) trait Visit {
    /// A node: whether to go on below it.
    fn enter(&mut self, spot: &Spot) -> bool;

    /// Everything below a node was visited.
    fn leave(&mut self, _spot: &Spot) {}

    /// A block.
    fn block(&mut self, spot: &Spot);

    /// What these blocks hold cannot be reached: whether to go on.
    fn lost(&mut self, _blocks: Range<u64>, error: ImageError) -> Result<(), ImageError> {
        Err(error)
    }
}

/// A node whose children are being visited.
struct Step {
    spot: Spot,
    node: Node,
    /// The first block of the disk below it.
    first: u64,
    /// The child that comes next.
    next: usize,
}

/// Visits everything that a root reaches, depth first, in the order of the disk.
pub(super) async fn walk<E: Engine, L: Locate<E>>(
    finder: &mut Finder<E, L>,
    root: &Root,
    visit: &mut impl Visit,
) -> Result<(), ImageError> {
    let blocks = root.size.div_ceil(BLOCK_SIZE);
    let mut steps = Vec::new();
    steps.extend(enter(finder, &root.tree, height_of(blocks), 0, blocks, visit).await?);
    while let Some(step) = steps.last_mut() {
        if step.next == FANOUT {
            visit.leave(&step.spot);
            steps.pop();
            continue;
        }
        let child = step.node.children[step.next];
        let level = step.node.level - 1;
        let first = step.first + step.next as u64 * blocks_below(level);
        step.next += 1;
        if level > 0 {
            steps.extend(enter(finder, &child, level, first, blocks, visit).await?);
        } else if !child.hash.is_zero() {
            match finder.find(&child, PackKind::Data).await {
                Ok(spot) => visit.block(&spot),
                Err(error) => lost(visit, first..first + 1, blocks, error)?,
            }
        }
    }
    Ok(())
}

/// Visits a node: the step over its children, if they are to be visited.
async fn enter<E: Engine, L: Locate<E>>(
    finder: &mut Finder<E, L>,
    child: &Child,
    level: u32,
    first: u64,
    blocks: u64,
    visit: &mut impl Visit,
) -> Result<Option<Step>, ImageError> {
    if child.hash.is_zero() {
        return Ok(None);
    }
    finder.pace.go_on(finder.path())?;
    let reach = first..first + blocks_below(level);
    let spot = match finder.find(child, PackKind::Nodes).await {
        Ok(spot) => spot,
        Err(error) => return lost(visit, reach, blocks, error).map(|()| None),
    };
    if !visit.enter(&spot) {
        return Ok(None);
    }
    match finder.node(&spot, &child.hash, level).await {
        Ok(node) => Ok(Some(Step { spot, node, first, next: 0 })),
        Err(error) => {
            lost(visit, reach, blocks, error)?;
            visit.leave(&spot);
            Ok(None)
        }
    }
}

fn lost(visit: &mut impl Visit, reach: Range<u64>, blocks: u64, error: ImageError) -> Result<(), ImageError> {
    if matches!(error.kind, ErrorKind::Cancelled) {
        return Err(error);
    }
    // What a tree has beyond its disk is nobody's block.
    visit.lost(reach.start.min(blocks)..reach.end.min(blocks), error)
}
