//! Lets a volume go on from a snapshot.

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use crate::catalog::rows::VolumeRow;
use crate::catalog::{Child, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::SnapshotName;
use crate::store::{Store, snapshot, volume};

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Lets a volume that is not attached go on from a snapshot, of itself or of another volume: its disk is what
    /// the snapshot is. What it holds itself is thrown away, which is refused unless `discard` says so, or
    /// nothing was written since the last snapshot. What only deleted snapshots held goes with it, unasked.
    ///
    /// # Errors
    /// No such volume or snapshot, a volume that is in use or holds writes that are in no snapshot, what the
    /// storage says.
    pub async fn switch(&self, io: &Io<E>, name: &str, to: &SnapshotName, discard: bool) -> Result<()> {
        let (id, _) = volume(&self.catalog.view()?, name)?;
        let _hold = self.usage.take(id, name, "being switched")?;
        let row = self.catalog.view()?.volume(id)?.ok_or_else(|| StoreError::not_found(name, "volume"))?;
        if let (Some(layer), false) = (row.layer, discard) {
            self.check_saved(io, name, layer, row.parent).await?;
        }
        let layers = self.catalog.change(|change| {
            let mut layers = Vec::new();
            let (found, row) = volume(change, name)?;
            let (target, node) = snapshot(change, to)?;
            if found != id {
                return Err(StoreError::not_found(name, "volume"));
            }
            change.remove_child(row.parent, Child::Volume(id))?;
            change.add_child(Some(target), Child::Volume(id))?;
            layers.extend(row.layer);
            let parent = row.parent;
            let row = VolumeRow { parent: Some(target), layer: None, size: node.size, space: None, ..row };
            change.put_volume(id, Some(&row))?;
            change.prune(parent, &self.usage, &mut layers)?;
            Ok(layers)
        })?;
        self.remove_layers(io, &layers).await;
        Ok(())
    }

    /// As [`Store::switch`], to the newest snapshot that the volume lies over.
    ///
    /// # Errors
    /// As [`Store::switch`]; there is no such snapshot.
    pub async fn rollback(&self, io: &Io<E>, name: &str, discard: bool) -> Result<SnapshotName> {
        let to = self.newest_snapshot(name)?;
        self.switch(io, name, &to, discard).await?;
        Ok(to)
    }

    fn newest_snapshot(&self, name: &str) -> Result<SnapshotName> {
        let view = self.catalog.view()?;
        let (_, row) = volume(&view, name)?;
        let mut next = row.parent;
        while let Some(id) = next {
            let node = view.needed_node(id)?;
            if let (Some(snapshot), Some(owner)) = (node.name, node.volume)
                && let Some(owner) = view.volume(owner)?
            {
                return Ok(SnapshotName { volume: owner.name, snapshot });
            }
            next = node.parent;
        }
        let text = "the volume lies over no snapshot that it could go back to".to_owned();
        Err(StoreError::new(name, StoreErrorKind::NotFound(text)))
    }

    /// Refuses to throw a volume's layer away when it holds anything.
    pub(crate) async fn check_saved(
        &self,
        io: &Io<E>,
        name: &str,
        layer: Id,
        parent: Option<Id>,
    ) -> Result<()> {
        let below = match parent {
            Some(parent) => Some(self.catalog.view()?.needed_node(parent)?.size),
            None => None,
        };
        let opened = self.open_layer(io, layer, true).await?;
        let (is_empty, size) = (opened.info().is_empty, opened.geometry().size);
        opened.close(io).await?;
        if is_empty && below.is_none_or(|below| below == size) {
            return Ok(());
        }
        let text = "the volume holds writes that are in no snapshot: take one first, or say that they may be discarded (--discard)";
        Err(StoreError::new(name, StoreErrorKind::Unsaved(text.to_owned())))
    }
}
