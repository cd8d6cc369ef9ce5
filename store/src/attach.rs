//! Attaching a volume: what to open, and that nobody else does anything with it meanwhile.
//!
//! Order, the first time: the layer is made, durably; then the catalog names it. A crash between the
//! two leaves a file that nothing names.

use std::path::PathBuf;
use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::Disk;
use sapwood_image::layer::{CreateInStore, OpenLayer, StoreBase, Tuning, create_in_store};
use sapwood_image::sealed::{Child, Root};
use sapwood_image::volume::Volume;

use crate::catalog::rows::VolumeRow;
use crate::catalog::{Change, Look};
use crate::directory::remove;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::SnapshotName;
use crate::resolve::holder;
use crate::store::{Store, breaks, snapshot, volume};
use crate::usage::Hold;

/// An attached volume: its layer may be opened, and the volume is refused to others until this is
/// given back ([`Store::detach`]) or dropped.
pub struct Attachment {
    /// The volume's id.
    pub volume: Id,
    /// Its name when it was attached.
    pub name: String,
    /// The layer that its guest writes.
    pub layer: Id,
    /// The file of the layer, to be opened with [`Store::resolver`].
    pub path: PathBuf,
    /// Size of the disk in bytes, as the catalog knows it; the layer knows better.
    pub size: u64,
    _hold: Hold,
}

/// A snapshot that may be read ([`Store::open_snapshot`]), and stays there until this is dropped.
pub struct SnapshotReader {
    /// The snapshot's id.
    pub id: Id,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The node that holds it; none: the disk is zero.
    base: Option<StoreBase>,
    _holds: Vec<Hold>,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Attaches a volume. The first time its layer is made.
    ///
    /// # Errors
    /// No such volume, one that is in use, what the storage says.
    pub async fn attach(&self, io: &Io<E>, name: &str) -> Result<Attachment> {
        let (id, _) = volume(&self.catalog.view()?, name)?;
        let hold = self.usage.take(id, name, "attached")?;
        // As it is now that nobody else has it, whatever its name is by now.
        let row = self.catalog.view()?.volume(id)?.ok_or_else(|| StoreError::not_found(name, "volume"))?;
        let layer = match row.layer {
            Some(layer) => layer,
            None => self.make_layer(io, id, &row).await?,
        };
        let path = self.directory.layer(layer);
        Ok(Attachment { volume: id, name: row.name, layer, path, size: row.size, _hold: hold })
    }

    /// Opens the layer of an attached volume, as a disk that can be snapshotted while it is in use.
    ///
    /// # Errors
    /// It cannot be opened, or is damaged.
    pub async fn open_volume(
        &self,
        io: &Io<E>,
        attachment: &Attachment,
        tuning: Tuning,
    ) -> Result<Arc<Volume<E>>> {
        let options = OpenLayer { read_only: false, tuning };
        let layer = self.open_to_write(io, attachment.layer, &options).await?;
        layer.set_space_gate(&self.gate);
        self.set_gate()?;
        Ok(Volume::new(layer))
    }

    /// Gives a volume back whose layer is closed. `size`, if it is known, is that of its disk now.
    ///
    /// # Errors
    /// What the catalog says; the volume is not attached any more all the same.
    pub fn detach(&self, attachment: Attachment, size: Option<u64>) -> Result<()> {
        let Some(size) = size.filter(|size| *size != attachment.size) else { return Ok(()) };
        self.catalog.change(|change| match change.volume(attachment.volume)? {
            Some(row) => change.put_volume(attachment.volume, Some(&VolumeRow { size, ..row })),
            None => Ok(()),
        })
    }

    /// Notes the size of an attached volume's disk, once it has that: so that it is known after a crash, too.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn resized(&self, volume: Id, size: u64) -> Result<()> {
        self.catalog.change(|change| match change.volume(volume)? {
            Some(row) if row.size != size => change.put_volume(volume, Some(&VolumeRow { size, ..row })),
            _ => Ok(()),
        })
    }

    /// Makes the first layer of a volume that this thread has taken.
    async fn make_layer(&self, io: &Io<E>, volume: Id, row: &VolumeRow) -> Result<Id> {
        self.check_room(0)?;
        let layer = self.random_id()?;
        let _making = self.usage.keep_layer(layer);
        let base = holder(&self.catalog.view()?, row.parent)?;
        let base = base.map(|(id, node)| self.base(id, node.size));
        let name = |change: &mut Change| {
            let now = change.volume(volume)?.filter(|now| now.layer.is_none() && now.parent == row.parent);
            let now = now.ok_or_else(|| {
                let text = "the volume was changed meanwhile: try again".to_owned();
                StoreError::new(&row.name, StoreErrorKind::InUse(text))
            })?;
            change.put_volume(volume, Some(&VolumeRow { layer: Some(layer), ..now }))
        };
        if breaks!(self.options, CommitBeforeLayer) {
            self.catalog.change(name)?;
            self.create_layer(io, layer, row.size, base).await?;
            return Ok(layer);
        }
        self.create_layer(io, layer, row.size, base).await?;
        if let Err(error) = self.catalog.change(name) {
            // Where the storage failed the catalog may name it all the same, once it is opened again.
            if matches!(error.kind, StoreErrorKind::InUse(_)) {
                let _ = remove(io, &self.directory.layer(layer)).await;
            }
            return Err(error);
        }
        Ok(layer)
    }

    /// A snapshot of this store, as a layer names it.
    pub(crate) fn base(&self, snapshot: Id, size: u64) -> StoreBase {
        StoreBase { store: self.id().0, snapshot: snapshot.0, size }
    }

    pub(crate) async fn create_layer(
        &self,
        io: &Io<E>,
        id: Id,
        size: u64,
        base: Option<StoreBase>,
    ) -> Result<()> {
        let options = CreateInStore { id: id.0, size, base, segment_size: self.options.segment_size };
        Ok(create_in_store(&self.storage, io, &self.directory.layer(id), &options).await?)
    }

    /// Takes a snapshot for reading.
    ///
    /// # Errors
    /// No such snapshot, what the catalog says.
    pub fn read_snapshot(&self, name: &SnapshotName) -> Result<SnapshotReader> {
        // So that nobody takes it away between the look and the pin.
        self.catalog.hold_still(|change| {
            let (id, node) = snapshot(change, name)?;
            let mut holds = vec![self.usage.pin(id)];
            let mut base = None;
            if let Some((holder, row)) = holder(change, Some(id))? {
                holds.push(self.usage.pin(holder));
                base = Some(self.base(holder, row.size));
            }
            Ok(SnapshotReader { id, size: node.size, base, _holds: holds })
        })
    }

    /// Opens a snapshot that was taken for reading, as a disk that is only read.
    ///
    /// # Errors
    /// It cannot be opened, or is damaged.
    pub async fn open_snapshot(&self, io: &Io<E>, reader: &SnapshotReader) -> Result<Arc<Disk<E>>> {
        let Some(base) = &reader.base else {
            let zero = Root { size: reader.size, tree: Child::ZERO };
            return Ok(Disk::open_sealed(self.content.packs(), zero)?);
        };
        Ok(Disk::open_in_store(&self.storage, io, base, &*self.resolver()).await?)
    }
}
