//! What sealed disks take, counted from what is in packs and what trees refer to, and compared with what the store says.
//!
//! The store may store content twice (its look-up for duplicates is bounded), and counts each copy. So does this; by their hashes the
//! same blocks are counted once more, against what the disks read as.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use sapwood_image::Disk;
use sapwood_image::sealed::Hash;
use sapwood_image::sealed::collect::{Amount, Detail, RootAccount};
use sapwood_store::catalog::Look;
use sapwood_store::rows::{NodeRow, NodeState};
use sapwood_store::{Account, Id};

use super::history::History;
use super::reached::{Reached, Spot, Stored};
use super::rig::{BLOCK, Done, Rig};

/// A sealed disk.
struct Sealed {
    node: Id,
    /// Whether it is all of a snapshot; else as much of it as was sealed.
    is_whole: bool,
    /// What its blocks read as, each once, and without zeroes.
    marks: BTreeSet<u32>,
    reached: Reached,
}

/// What one of these sets has that no other has; what it has in common with others.
fn parts<T: Ord + Copy>(sets: &[BTreeSet<T>], one: usize) -> [BTreeSet<T>; 2] {
    let others = || sets.iter().enumerate().filter(|(n, _)| *n != one).map(|(_, set)| set);
    let (common, alone) = sets[one].iter().partition(|item| others().any(|set| set.contains(item)));
    [alone, common]
}

fn spots(of: &BTreeMap<Spot, Hash>) -> BTreeSet<Spot> {
    of.keys().copied().collect()
}

fn hashes(of: &BTreeMap<Spot, Hash>) -> BTreeSet<Hash> {
    of.values().copied().collect()
}

/// Whether an amount is so many blocks and nodes, with their bytes.
fn is_amount(amount: &Amount, blocks: &BTreeSet<Spot>, nodes: &BTreeSet<Spot>, stored: &Stored) -> bool {
    (amount.blocks, amount.nodes) == (blocks.len() as u64, nodes.len() as u64)
        && stored.bytes(blocks).contains(&amount.block_bytes)
        && stored.bytes(nodes).contains(&amount.node_bytes)
}

impl Rig {
    /// What everything takes, as the store says.
    fn account(&self) -> Done<Account> {
        let (io, store) = (self.io.clone(), self.store());
        Ok(self.run(async move { store.account(&io, &Default::default(), Detail::Shared).await })?)
    }

    /// All sealed disks.
    fn sealed(&self, stored: &Stored) -> Done<Vec<Sealed>> {
        let store = self.store();
        let mut all = Vec::new();
        for (node, NodeRow { state, size, .. }) in store.catalog().view()?.nodes()? {
            let (top, is_whole) = match state {
                NodeState::Sealed(top) => (top, true),
                NodeState::Frozen { sealing: Some(sealing), .. } => (sealing.top, false),
                _ => continue,
            };
            let root = top.root(size);
            let disk = Disk::open_sealed(store.content().packs(), root)?;
            let marks = self.contents(disk.queue_on(self.io.clone()), size)?;
            let marks = marks.into_iter().filter(|mark| *mark != 0).collect();
            all.push(Sealed { node, is_whole, marks, reached: stored.reached(&root) });
        }
        Ok(all)
    }
}

impl History {
    /// Compares what the store says that sealed disks take with a count.
    pub(super) fn check_accounts(&self) -> Result<(), String> {
        let found = self.rig.account().map_err(|failure| format!("the account: {failure:?}"))?;
        let stored = self.rig.stored().map_err(|failure| format!("what is stored: {failure:?}"))?;
        let all = self.rig.sealed(&stored).map_err(|failure| format!("what is sealed: {failure:?}"))?;
        check_contents(&all)?;
        check_roots(&found, &all, &stored)?;
        check_total(&found, &all, &stored)?;
        self.check_space(&found)
    }

    /// What the store says of each snapshot is what was found.
    fn check_space(&self, found: &Account) -> Result<(), String> {
        let tree = self.rig.store().tree().map_err(|error| error.to_string())?;
        for (id, one) in &found.sealed_nodes {
            let Some(entry) = tree.entries.get(id) else { continue };
            let shared = one.shared.map(|shared| shared.stored_bytes());
            let said = entry.space.map(|space| (space.exclusive, Some(space.shared)));
            if said != Some((one.exclusive.stored_bytes(), shared)) {
                return Err(format!("{}: it is said to take {said:?}, and takes {one:?}", entry.name));
            }
        }
        Ok(())
    }
}

/// What trees refer to, by its hashes, is what the disks read as: alone, and in common.
fn check_contents(all: &[Sealed]) -> Result<(), String> {
    let marks: Vec<_> = all.iter().map(|sealed| sealed.marks.clone()).collect();
    let blocks: Vec<_> = all.iter().map(|sealed| hashes(&sealed.reached.blocks)).collect();
    for (n, sealed) in all.iter().enumerate() {
        let marks = parts(&marks, n).map(|part| part.len());
        let blocks = parts(&blocks, n).map(|part| part.len());
        if marks != blocks {
            let node = sealed.node;
            return Err(format!("{node}: {marks:?} contents alone and in common, and {blocks:?} hashes"));
        }
    }
    Ok(())
}

/// Every copy that is stored counts, for each root that refers to it, and each once.
fn check_roots(found: &Account, all: &[Sealed], stored: &Stored) -> Result<(), String> {
    let blocks: Vec<_> = all.iter().map(|sealed| spots(&sealed.reached.blocks)).collect();
    let nodes: Vec<_> = all.iter().map(|sealed| spots(&sealed.reached.nodes)).collect();
    for (n, sealed) in all.iter().enumerate().filter(|(_, sealed)| sealed.is_whole) {
        let one @ RootAccount { exclusive, shared } = &found.sealed_nodes[&sealed.node];
        let [alone, common] = parts(&blocks, n);
        let [nodes_alone, nodes_common] = parts(&nodes, n);
        let is_so = is_amount(exclusive, &alone, &nodes_alone, stored)
            && shared.is_some_and(|shared| is_amount(&shared, &common, &nodes_common, stored));
        if !is_so {
            return Err(format!(
                "{} refers to {alone:?} alone and to {common:?} in common, with the nodes {nodes_alone:?} and {nodes_common:?}, \
                 and not to {one:?}",
                sealed.node
            ));
        }
    }
    Ok(())
}

/// What is said of everything together.
fn check_total(found: &Account, all: &[Sealed], stored: &Stored) -> Result<(), String> {
    let union = |of: fn(&Reached) -> &BTreeMap<Spot, Hash>| -> BTreeSet<Spot> {
        all.iter().flat_map(|sealed| of(&sealed.reached).keys().copied()).collect()
    };
    let (blocks, nodes) = (union(|reached| &reached.blocks), union(|reached| &reached.nodes));
    let referenced: usize = all.iter().map(|sealed| sealed.reached.blocks.len()).sum();
    let (of_blocks, of_nodes) = (stored.bytes(&blocks), stored.bytes(&nodes));
    let bytes: RangeInclusive<u64> = of_blocks.start() + of_nodes.start()..=of_blocks.end() + of_nodes.end();
    let total = &found.sealed;
    let is_so = total.unique_bytes == (blocks.len() * BLOCK) as u64
        && total.referenced_bytes == Some((referenced * BLOCK) as u64)
        && bytes.contains(&total.stored_bytes);
    if is_so {
        Ok(())
    } else {
        Err(format!("{} blocks, {referenced} times, in {bytes:?}: {total:?}", blocks.len()))
    }
}
