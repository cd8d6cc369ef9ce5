//! What each root holds alone, and what it shares.
//!
//! A root *reaches* a block or node as it is stored, by the walk from its top. What is reached by one root only is
//! *exclusive* to it: deleting that root, and nothing else, lets a collection free it. What is reached by a second root
//! is *shared*, for each of those that reach it. Everything counts once for a root, however often its disk holds it. Content
//! that was stored twice, because the look-up for duplicates may miss, counts as two. Two equal roots hold nothing alone.
//!
//! The first pass tells what is shared: a node that a second root reaches is shared with everything below it, and is not
//! walked a third time. The second pass adds up what is not. So both visit each node twice at most, however many roots share it.
//! What is shared of each root can be had by a third pass only, which walks over the whole tree of every root: where that is
//! not asked for, it is left out.

use std::collections::HashMap;

use super::bits::Bits;
use super::finder::{Finder, Locate, Spot};
use super::walk::{Visit, walk};
use crate::error::ImageError;
use crate::sealed::packs::Root;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// An amount of stored content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Blocks.
    pub blocks: u64,
    /// Their stored bytes, compressed: of a record, the part of its blocks that count.
    pub block_bytes: u64,
    /// Nodes of the trees.
    pub nodes: u64,
    /// Their stored bytes.
    pub node_bytes: u64,
}

impl Amount {
    /// Bytes that its blocks hold.
    pub fn logical_bytes(&self) -> u64 {
        self.blocks * BLOCK_SIZE
    }

    /// Bytes that it takes in packs.
    pub fn stored_bytes(&self) -> u64 {
        self.block_bytes + self.node_bytes
    }

    fn add_block(&mut self, spot: &Spot) {
        self.blocks += 1;
        self.block_bytes += u64::from(spot.bytes);
    }

    fn add_node(&mut self, spot: &Spot) {
        self.nodes += 1;
        self.node_bytes += u64::from(spot.bytes);
    }

    fn without(&self, part: &Self) -> Self {
        Self {
            blocks: self.blocks - part.blocks,
            block_bytes: self.block_bytes - part.block_bytes,
            nodes: self.nodes - part.nodes,
            node_bytes: self.node_bytes - part.node_bytes,
        }
    }
}

/// What a root holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootAccount {
    /// What no other root reaches.
    pub exclusive: Amount,
    /// What another one reaches, too; where that was asked for.
    pub shared: Option<Amount>,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    /// For each root, in the order in which they were given.
    pub roots: Vec<RootAccount>,
    /// Everything that is reached by any root.
    pub total: Amount,
}

/// How much is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// What roots hold alone.
    Exclusive,
    /// And what they share, which takes a walk over every tree that is not equal to another root's.
    Shared,
}

/// Counts what roots hold alone and what they share.
///
/// # Errors
/// When anything that a root reaches cannot be read.
pub async fn account<E: Engine, L: Locate<E>>(
    finder: &mut Finder<E, L>,
    roots: &[Root],
    detail: Detail,
) -> Result<Accounts, ImageError> {
    let mut sharing = Sharing::default();
    for root in roots {
        sharing.here.clear();
        walk(finder, root, &mut sharing).await?;
    }
    let Sharing { shared, total, .. } = sharing;
    let mut accounts = Accounts { roots: Vec::with_capacity(roots.len()), total };
    let mut counted = Bits::default();
    for root in roots {
        let mut count = Count { skipped: Some(&shared), counted: &mut counted, amount: Amount::default() };
        walk(finder, root, &mut count).await?;
        accounts.roots.push(RootAccount { exclusive: count.amount, shared: None });
    }
    if detail == Detail::Shared {
        let mut wholes = HashMap::new();
        for (root, account) in roots.iter().zip(&mut accounts.roots) {
            let key = (root.size, root.tree.hash, root.tree.place);
            let whole = match wholes.get(&key) {
                Some(whole) => *whole,
                None => {
                    counted.clear();
                    let mut count = Count { skipped: None, counted: &mut counted, amount: Amount::default() };
                    walk(finder, root, &mut count).await?;
                    *wholes.entry(key).or_insert(count.amount)
                }
            };
            account.shared = Some(whole.without(&account.exclusive));
        }
    }
    Ok(accounts)
}

/// The first pass.
#[derive(Default)]
struct Sharing {
    /// What any root has reached.
    seen: Bits,
    /// What a second root has reached; then so it has everything below.
    shared: Bits,
    /// What this root was the first to reach.
    here: Bits,
    total: Amount,
}

impl Sharing {
    /// Whether the walk must go on below.
    fn visit(&mut self, spot: &Spot, add: fn(&mut Amount, &Spot)) -> bool {
        let (pack, number, entries) = (spot.pack(), spot.number, spot.entries);
        if self.seen.set(pack, number, entries) {
            self.here.set(pack, number, entries);
            add(&mut self.total, spot);
            return true;
        }
        !self.here.is_set(pack, number) && self.shared.set(pack, number, entries)
    }
}

impl Visit for Sharing {
    fn enter(&mut self, spot: &Spot) -> bool {
        self.visit(spot, Amount::add_node)
    }

    fn block(&mut self, spot: &Spot) {
        self.visit(spot, Amount::add_block);
    }
}

/// Adds up what was not counted before.
struct Count<'a> {
    /// Is not counted, nor visited.
    skipped: Option<&'a Bits>,
    counted: &'a mut Bits,
    amount: Amount,
}

impl Count<'_> {
    fn is_new(&mut self, spot: &Spot) -> bool {
        let is_skipped = self.skipped.is_some_and(|skipped| skipped.is_set(spot.pack(), spot.number));
        !is_skipped && self.counted.set(spot.pack(), spot.number, spot.entries)
    }
}

impl Visit for Count<'_> {
    fn enter(&mut self, spot: &Spot) -> bool {
        let is_new = self.is_new(spot);
        if is_new {
            self.amount.add_node(spot);
        }
        is_new
    }

    fn block(&mut self, spot: &Spot) {
        if self.is_new(spot) {
            self.amount.add_block(spot);
        }
    }
}
