//! Taking, renaming and deleting snapshots.

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::layer::glance;
use serde_json::Map;

use crate::catalog::rows::{NodeRow, NodeState, Notes, VolumeRow};
use crate::catalog::{Change, Child, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::{self, SnapshotName};
use crate::store::{Store, breaks, snapshot, volume};
use crate::volume::check_unprotected;

/// A snapshot that is to be: what the volume's layer holds gets this id.
pub(crate) struct Freeze<'a> {
    pub(crate) volume: Id,
    pub(crate) node: Id,
    pub(crate) name: &'a SnapshotName,
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    pub(crate) created_ms: u64,
    /// Whether the layer was closed properly.
    pub(crate) settled: bool,
    /// The layer that guests write from now on, where there is one already.
    pub(crate) next: Option<Id>,
}

impl Change {
    /// Makes what a volume holds a snapshot, and lets the volume lie over it.
    pub(crate) fn freeze(&mut self, freeze: &Freeze) -> Result<()> {
        let Freeze { volume: id, node, name, size, .. } = *freeze;
        let (found, row) = volume(self, &name.volume)?;
        if found != id {
            return Err(StoreError::not_found(&name.volume, "volume"));
        }
        check_snapshot_is_new(self, id, name)?;
        let state = match row.layer {
            Some(layer) => NodeState::Frozen { layer, settled: freeze.settled, sealing: None },
            None => NodeState::Bare,
        };
        let snapshot = NodeRow {
            volume: Some(id),
            name: Some(name.snapshot.clone()),
            parent: row.parent,
            size,
            created_ms: freeze.created_ms,
            state,
            notes: Notes::default(),
            space: None,
            more: Map::new(),
        };
        self.put_node(node, Some(&snapshot))?;
        self.put_snapshot_name(id, &name.snapshot, Some(node))?;
        self.remove_child(row.parent, Child::Volume(id))?;
        self.add_child(row.parent, Child::Node(node))?;
        self.add_child(Some(node), Child::Volume(id))?;
        let row = VolumeRow { parent: Some(node), layer: freeze.next, size, space: None, ..row };
        self.put_volume(id, Some(&row))
    }
}

/// Refuses a name that is none, or that another snapshot of the volume has.
pub(crate) fn check_snapshot_is_new(look: &impl Look, volume: Id, name: &SnapshotName) -> Result<()> {
    name::check(&name.snapshot)?;
    if look.snapshot_named(volume, &name.snapshot)?.is_none() {
        return Ok(());
    }
    let text = "there is a snapshot of that name: choose another, or delete or rename that one".to_owned();
    Err(StoreError::new(name, StoreErrorKind::Exists(text)))
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Takes a snapshot of a volume that is not attached. What its guest had written is durable then.
    ///
    /// # Errors
    /// No such volume, one that is in use, a name that is taken or is none, what the storage says.
    pub async fn snapshot(&self, io: &Io<E>, name: &SnapshotName) -> Result<Id> {
        let (id, row) = volume(&self.catalog.view()?, &name.volume)?;
        name::check(&name.snapshot)?;
        self.check_room(0)?;
        let _hold = self.usage.take(id, &name.volume, "being snapshotted")?;
        // As it is now that nobody else has it.
        let row = self.catalog.view()?.volume(id)?.unwrap_or(row);
        let size = match row.layer {
            Some(_) if breaks!(self.options, SnapshotWithoutSync) => row.size,
            Some(layer) => self.settle(io, layer).await?,
            None => row.size,
        };
        let node = self.random_id()?;
        let created_ms = self.now_ms();
        let freeze = Freeze { volume: id, node, name, size, created_ms, settled: true, next: None };
        self.catalog.change(|change| change.freeze(&freeze))?;
        Ok(node)
    }

    /// Sees to it that a layer that nobody uses was closed properly: all that was written to it is durable, and
    /// its map is stored. The size of its disk.
    pub(crate) async fn settle(&self, io: &Io<E>, layer: Id) -> Result<u64> {
        let found = glance(&self.storage, io, &self.directory.layer(layer)).await?;
        if found.is_clean {
            return Ok(found.size);
        }
        let opened = self.open_layer(io, layer, false).await?;
        let size = opened.geometry().size;
        opened.close(io).await?;
        Ok(size)
    }

    /// Gives a snapshot another name, without that of its volume.
    ///
    /// # Errors
    /// No such snapshot, a name that is taken or is none, what the catalog says.
    pub fn rename_snapshot(&self, from: &SnapshotName, to: &str) -> Result<()> {
        self.catalog.change(|change| {
            let (owner, _) = volume(change, &from.volume)?;
            let (id, row) = snapshot(change, from)?;
            if from.snapshot == to {
                return Ok(());
            }
            let named = SnapshotName { volume: from.volume.clone(), snapshot: to.to_owned() };
            check_snapshot_is_new(change, owner, &named)?;
            change.put_snapshot_name(owner, &from.snapshot, None)?;
            change.put_snapshot_name(owner, to, Some(id))?;
            change.put_node(id, Some(&NodeRow { name: Some(to.to_owned()), ..row }))
        })
    }

    /// Deletes a snapshot, whatever lies over it: that keeps its contents. The name is gone at once; the
    /// space, when nothing needs it any more.
    ///
    /// # Errors
    /// No such snapshot, one that is protected, what the catalog says.
    pub async fn delete_snapshot(&self, io: &Io<E>, name: &SnapshotName) -> Result<()> {
        if breaks!(self.options, UnlinkBeforeCommit)
            && let (id, row) = snapshot(&self.catalog.view()?, name)?
            && let NodeState::Frozen { layer, .. } = row.state
            && !self.catalog.view()?.has_children(id)?
        {
            self.remove_layers(io, &[layer]).await;
        }
        let layers = self.catalog.change(|change| {
            let mut layers = Vec::new();
            let (owner, row) = volume(change, &name.volume)?;
            let (node, _) = snapshot(change, name)?;
            self.forget_snapshot(change, owner, &row.name, &name.snapshot, node, &mut layers)?;
            Ok(layers)
        })?;
        self.remove_layers(io, &layers).await;
        Ok(())
    }

    /// Takes the name off a snapshot, and the snapshot away if nothing needs it.
    pub(crate) fn forget_snapshot(
        &self,
        change: &mut Change,
        owner: Id,
        volume: &str,
        name: &str,
        node: Id,
        layers: &mut Vec<Id>,
    ) -> Result<()> {
        let row = change.needed_node(node)?;
        check_unprotected(&format!("{volume}@{name}"), &row.notes, "snapshot")?;
        change.put_snapshot_name(owner, name, None)?;
        let nameless = NodeRow { volume: None, name: None, notes: Notes::default(), ..row };
        change.put_node(node, Some(&nameless))?;
        change.prune(Some(node), &self.usage, layers)
    }
}
