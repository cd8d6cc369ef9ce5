//! Snapshots of an attached volume, while its guest writes.
//!
//! Order: [`Store::prepare`] makes an empty layer over the snapshot that is to be, durably;
//! [`Store::commit`] is the commit point: the catalog makes the layer in use the snapshot, and names the
//! new one; then the disk goes on with the new layer; when the old one was closed,
//! [`Store::settled`] notes it. A crash before the commit leaves a file that nothing names; after
//! it, the volume is the new layer, still empty, over the old one.

use std::path::PathBuf;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::ImageError;
use sapwood_image::volume::{Successor, Volume};

use crate::attach::Attachment;
use crate::catalog::Look;
use crate::catalog::rows::{NodeRow, NodeState};
use crate::directory::remove;
use crate::error::Result;
use crate::id::Id;
use crate::name::SnapshotName;
use crate::snapshot::{Freeze, check_snapshot_is_new};
use crate::store::{Store, volume};
use crate::usage::Hold;

/// What is ready for a snapshot of an attached volume.
pub struct Prepared {
    /// The id that the snapshot will have.
    pub snapshot: Id,
    /// The new layer.
    pub layer: Id,
    /// Its file.
    pub path: PathBuf,
    /// Size of the disk in bytes.
    pub size: u64,
    name: SnapshotName,
    volume: Id,
    _making: Hold,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Makes the layer that the guest of an attached volume is to write after the snapshot. `size` is that of its
    /// disk, which must not change before the commit.
    ///
    /// # Errors
    /// A name that is taken or is none, what the storage says.
    pub async fn prepare(
        &self,
        io: &Io<E>,
        attachment: &Attachment,
        snapshot: &str,
        size: u64,
    ) -> Result<Prepared> {
        self.check_room(0)?;
        let view = self.catalog.view()?;
        let row = view.volume(attachment.volume)?;
        let named = row.map_or_else(|| attachment.name.clone(), |row| row.name);
        let (volume, _) = volume(&view, &named)?;
        let name = SnapshotName { volume: named, snapshot: snapshot.to_owned() };
        check_snapshot_is_new(&view, volume, &name)?;
        drop(view);
        let (id, layer) = (self.random_id()?, self.random_id()?);
        let making = self.usage.keep_layer(layer);
        self.create_layer(io, layer, size, Some(self.base(id, size))).await?;
        let path = self.directory.layer(layer);
        Ok(Prepared { snapshot: id, layer, path, size, name, volume, _making: making })
    }

    /// Makes the snapshot: from here on the volume's guest must write the new layer only.
    ///
    /// # Errors
    /// A name that is taken, what the catalog says. The layer is to be [abandoned](Store::abandon) then, unless
    /// the storage failed: then the store is to be closed, since nobody knows which layer is the volume's.
    pub fn commit(&self, attachment: &mut Attachment, prepared: &Prepared) -> Result<Id> {
        let node = prepared.snapshot;
        self.catalog.change(|change| {
            let row = change.volume(prepared.volume)?;
            let current = row.map_or_else(|| prepared.name.volume.clone(), |row| row.name);
            let name = SnapshotName { volume: current, snapshot: prepared.name.snapshot.clone() };
            change.freeze(&Freeze {
                volume: prepared.volume,
                node,
                name: &name,
                size: prepared.size,
                created_ms: self.now_ms(),
                settled: false,
                next: Some(prepared.layer),
            })
        })?;
        attachment.layer = prepared.layer;
        attachment.path.clone_from(&prepared.path);
        attachment.size = prepared.size;
        Ok(node)
    }

    /// Takes a snapshot of an attached volume whose disk is in use: `volume` goes on with a new layer.
    ///
    /// # Errors
    /// A name that is taken or is none; what the storage says. When it fails after the commit, the snapshot is there, and
    /// its layer is closed by the next one, or when the store is opened.
    pub async fn snapshot_volume(
        &self,
        io: &Io<E>,
        attachment: &mut Attachment,
        volume: &Volume<E>,
        snapshot: &str,
    ) -> Result<Id> {
        let size = volume.geometry().size;
        let prepared = self.prepare(io, attachment, snapshot, size).await?;
        let next = Successor::Prepared { path: prepared.path.clone(), resolver: self.resolver() };
        let mut committed = None;
        let commit = async || {
            let done = self.commit(attachment, &prepared);
            let told = match &done {
                Ok(_) => Ok(()),
                Err(error) => Err(ImageError::invalid(self.directory.root(), error)),
            };
            committed = Some(done);
            told
        };
        let taken = volume.snapshot(&self.storage, io, &next, commit).await;
        match (committed, taken) {
            (Some(Ok(id)), Ok(())) => {
                self.settled(id)?;
                Ok(id)
            }
            (Some(Err(error)), _) => {
                if !self.catalog.is_unknown() {
                    self.abandon(io, prepared).await?;
                }
                Err(error)
            }
            (None, Err(error)) => {
                self.abandon(io, prepared).await?;
                Err(error.into())
            }
            (Some(Ok(_)), Err(error)) => Err(error.into()),
            (None, Ok(())) => unreachable!("a snapshot is committed"),
        }
    }

    /// Removes a layer that was prepared and is not wanted.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn abandon(&self, io: &Io<E>, prepared: Prepared) -> Result<()> {
        remove(io, &prepared.path).await
    }

    /// Notes that the layer of a snapshot was closed properly.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn settled(&self, snapshot: Id) -> Result<()> {
        self.catalog.change(|change| match change.node(snapshot)? {
            Some(NodeRow { state: NodeState::Frozen { layer, settled: false, sealing }, .. }) => {
                let row = change.needed_node(snapshot)?;
                let state = NodeState::Frozen { layer, settled: true, sealing };
                change.put_node(snapshot, Some(&NodeRow { state, ..row }))
            }
            _ => Ok(()),
        })
    }
}
