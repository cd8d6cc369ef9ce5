//! What there is in a store, for people and programs to read: a list of volumes, and the tree.

use std::collections::BTreeMap;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;
use serde::Serialize;

use crate::catalog::Look;
use crate::catalog::rows::{NodeRow, NodeState, Notes, Space, VolumeRow};
use crate::error::Result;
use crate::id::Id;
use crate::store::Store;

/// A volume in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: Id,
    /// Its name.
    pub name: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Size of its disk in bytes.
    pub size: u64,
    /// How many snapshots it has.
    pub snapshots: usize,
    /// What this process does with it, as in "attached".
    pub usage: Option<&'static str>,
    /// What users say of it.
    #[serde(flatten)]
    pub notes: Notes,
    /// What it takes, and when that was found.
    pub space: Option<Space>,
}

/// What an entry of the tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A volume, which its guest writes.
    Head,
    /// A snapshot that holds nothing beyond what its parent does.
    Bare,
    /// A snapshot whose contents are a layer.
    Frozen,
    /// A snapshot whose contents are sealed.
    Sealed,
}

/// A snapshot or a volume in the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its id.
    pub id: Id,
    /// `volume` or `volume@snapshot`.
    pub name: String,
    /// What it is.
    pub state: State,
    /// The snapshot that it was made over; deleted ones are left out.
    pub parent: Option<Id>,
    /// What was made over it, by time.
    pub children: Vec<Id>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Size of the disk in bytes.
    pub size: u64,
    /// What users say of it.
    #[serde(flatten)]
    pub notes: Notes,
    /// What it takes, and when that was found.
    pub space: Option<Space>,
}

/// The trees of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tree {
    /// What lies over nothing, by time.
    pub roots: Vec<Id>,
    /// All snapshots that have a name, and all volumes.
    pub entries: BTreeMap<Id, Entry>,
    /// Deleted snapshots that are kept because others need them.
    pub nameless: usize,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// All volumes, by name.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let view = self.catalog.view()?;
        let mut snapshots = BTreeMap::<Id, usize>::new();
        for (_, row) in view.nodes()? {
            if let Some(volume) = row.volume {
                *snapshots.entry(volume).or_default() += 1;
            }
        }
        let listed = |(id, row): (Id, VolumeRow)| Listed {
            id,
            name: row.name,
            created_ms: row.created_ms,
            size: row.size,
            snapshots: snapshots.get(&id).copied().unwrap_or_default(),
            usage: self.usage.of_volume(id),
            notes: row.notes,
            space: row.space,
        };
        let mut list: Vec<_> = view.volumes()?.into_iter().map(listed).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// The trees of all volumes.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn tree(&self) -> Result<Tree> {
        let view = self.catalog.view()?;
        let volumes: BTreeMap<Id, VolumeRow> = view.volumes()?.into_iter().collect();
        let nodes: BTreeMap<Id, NodeRow> = view.nodes()?.into_iter().collect();
        Ok(build(&volumes, &nodes))
    }
}

fn build(volumes: &BTreeMap<Id, VolumeRow>, nodes: &BTreeMap<Id, NodeRow>) -> Tree {
    let mut named = Named { nodes, known: BTreeMap::new() };
    let mut entries = BTreeMap::new();
    for (id, row) in nodes {
        let (Some(name), Some(owner)) = (&row.name, row.volume.and_then(|id| volumes.get(&id))) else {
            continue;
        };
        let state = match row.state {
            NodeState::Bare => State::Bare,
            NodeState::Frozen { .. } => State::Frozen,
            NodeState::Sealed(_) => State::Sealed,
        };
        entries.insert(
            *id,
            Entry {
                id: *id,
                name: format!("{}@{name}", owner.name),
                state,
                parent: named.at_or_below(row.parent),
                children: Vec::new(),
                created_ms: row.created_ms,
                size: row.size,
                notes: row.notes.clone(),
                space: row.space,
            },
        );
    }
    for (id, row) in volumes {
        entries.insert(
            *id,
            Entry {
                id: *id,
                name: row.name.clone(),
                state: State::Head,
                parent: named.at_or_below(row.parent),
                children: Vec::new(),
                created_ms: row.created_ms,
                size: row.size,
                notes: row.notes.clone(),
                space: row.space,
            },
        );
    }
    let mut order: Vec<_> =
        entries.values().map(|entry| (entry.created_ms, entry.id, entry.parent)).collect();
    order.sort_unstable();
    let mut tree = Tree { roots: Vec::new(), entries, nameless: 0 };
    for (_, id, parent) in order {
        match parent.and_then(|parent| tree.entries.get_mut(&parent)) {
            Some(parent) => parent.children.push(id),
            None => tree.roots.push(id),
        }
    }
    tree.nameless = nodes.values().filter(|row| row.name.is_none()).count();
    tree
}

/// Finds the snapshots with names.
struct Named<'a> {
    nodes: &'a BTreeMap<Id, NodeRow>,
    /// Of nodes without a name: the next one below that has one.
    known: BTreeMap<Id, Option<Id>>,
}

impl Named<'_> {
    /// The first node from `id` down that has a name.
    fn at_or_below(&mut self, id: Option<Id>) -> Option<Id> {
        let (mut next, mut passed) = (id, Vec::new());
        let found = loop {
            let Some(id) = next else { break None };
            if let Some(found) = self.known.get(&id) {
                break *found;
            }
            let Some(row) = self.nodes.get(&id) else { break None };
            if row.name.is_some() {
                break Some(id);
            }
            passed.push(id);
            next = row.parent;
        };
        self.known.extend(passed.into_iter().map(|id| (id, found)));
        found
    }
}
