//! Making, cloning, renaming and deleting volumes.

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::SECTOR_SIZE;
use sapwood_image::layer::SIZE_MAX;
use sapwood_qos::names::Named;
use serde_json::Map;

use crate::catalog::rows::{Notes, VolumeRow};
use crate::catalog::{Change, Child, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::{self, SnapshotName};
use crate::store::{Store, breaks, snapshot, volume};

impl Change {
    pub(crate) fn add_volume(&mut self, id: Id, row: &VolumeRow) -> Result<()> {
        self.check_volume_is_new(&row.name)?;
        self.put_name(&row.name, Some(id))?;
        self.add_child(row.parent, Child::Volume(id))?;
        self.put_volume(id, Some(row))
    }

    pub(crate) fn check_volume_is_new(&self, name: &str) -> Result<()> {
        name::check(name)?;
        if self.volume_named(name)?.is_none() {
            return Ok(());
        }
        let text = "there is a volume of that name: choose another, or delete or rename that one".to_owned();
        Err(StoreError::new(name, StoreErrorKind::Exists(text)))
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    pub(crate) fn new_volume(&self, name: &str, size: u64, parent: Option<Id>) -> VolumeRow {
        VolumeRow {
            name: name.to_owned(),
            created_ms: self.now_ms(),
            size,
            parent,
            layer: None,
            notes: Notes::default(),
            limits: Named::new(),
            group: None,
            space: None,
            more: Map::new(),
        }
    }

    /// Makes an empty volume of `size` bytes, rounded up to 512.
    ///
    /// # Errors
    /// A name that is taken or is none, an impossible size, what the catalog says.
    pub fn create(&self, name: &str, size: u64) -> Result<Id> {
        name::check(name)?;
        let size = size.checked_next_multiple_of(SECTOR_SIZE).filter(|size| (1..=SIZE_MAX).contains(size));
        let size = size.ok_or_else(|| StoreError::invalid(name, "a size is from 1 byte to 64 TiB"))?;
        let id = self.random_id()?;
        let row = self.new_volume(name, size, None);
        self.catalog.change(|change| change.add_volume(id, &row))?;
        Ok(id)
    }

    /// Makes a volume over a snapshot for each name, all of them or none. Their contents are the
    /// snapshot's; nothing is copied, and no file is made.
    ///
    /// # Errors
    /// No such snapshot, a name that is taken or is none, what the catalog says.
    pub fn clone_snapshot(&self, of: &SnapshotName, names: &[impl AsRef<str>]) -> Result<Vec<Id>> {
        let ids = names.iter().map(|_| self.random_id()).collect::<Result<Vec<_>>>()?;
        self.catalog.change(|change| {
            let (parent, node) = snapshot(change, of)?;
            for (name, id) in names.iter().zip(&ids) {
                change.add_volume(*id, &self.new_volume(name.as_ref(), node.size, Some(parent)))?;
            }
            Ok(())
        })?;
        Ok(ids)
    }

    /// Gives a volume another name, attached or not. Its snapshots stay its own.
    ///
    /// # Errors
    /// No such volume, a name that is taken or is none, what the catalog says.
    pub fn rename_volume(&self, from: &str, to: &str) -> Result<()> {
        self.catalog.change(|change| {
            let (id, row) = volume(change, from)?;
            if from == to {
                return Ok(());
            }
            change.check_volume_is_new(to)?;
            change.put_name(from, None)?;
            change.put_name(to, Some(id))?;
            change.put_volume(id, Some(&VolumeRow { name: to.to_owned(), ..row }))
        })
    }

    /// Deletes a volume that is not attached. One that has snapshots is refused unless these are to be
    /// deleted with it; clones of them stay, with all that they need.
    ///
    /// # Errors
    /// No such volume, one that is in use, protected, or has snapshots; what the catalog says.
    pub async fn delete_volume(&self, io: &Io<E>, name: &str, with_snapshots: bool) -> Result<()> {
        let (id, _) = volume(&self.catalog.view()?, name)?;
        let _hold = self.usage.take(id, name, "being deleted")?;
        if breaks!(self.options, UnlinkBeforeCommit) {
            let layer = self.catalog.view()?.volume(id)?.and_then(|row| row.layer);
            self.remove_layers(io, layer.as_slice()).await;
        }
        let layers = self.catalog.change(|change| {
            let mut layers = Vec::new();
            let (found, row) = volume(change, name)?;
            if found != id {
                return Err(StoreError::not_found(name, "volume"));
            }
            check_unprotected(name, &row.notes, "volume")?;
            let snapshots = change.snapshots_of(id)?;
            if let (Some((first, _)), false) = (snapshots.first(), with_snapshots) {
                let text = format!(
                    "the volume has snapshots ({} of them, {name}@{first} for one): delete them first, or with it (--with-snapshots)",
                    snapshots.len()
                );
                return Err(StoreError::new(name, StoreErrorKind::HasSnapshots(text)));
            }
            change.put_name(name, None)?;
            change.put_volume(id, None)?;
            change.remove_child(row.parent, Child::Volume(id))?;
            layers.extend(row.layer);
            for (snapshot, node) in &snapshots {
                self.forget_snapshot(change, id, &row.name, snapshot, *node, &mut layers)?;
            }
            if row.parent.is_some_and(|parent| matches!(change.node(parent), Ok(Some(_)))) {
                change.prune(row.parent, &self.usage, &mut layers)?;
            }
            Ok(layers)
        })?;
        self.remove_layers(io, &layers).await;
        Ok(())
    }
}

/// Refuses to delete what is protected.
pub(crate) fn check_unprotected(name: &str, notes: &Notes, what: &str) -> Result<()> {
    if !notes.protected {
        return Ok(());
    }
    let text = format!("the {what} is protected: take the protection away first");
    Err(StoreError::new(name, StoreErrorKind::Protected(text)))
}
