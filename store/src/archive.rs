//! Importing an archive: a new snapshot, under a new volume or, of an increment, of the volume that lies over its base.
//!
//! Order: packs and index ([`super::publish`]); one commit that makes the snapshot and lets the volume lie over it; the
//! volume's layer goes, if it had an empty one.
//!
//! What the archive holds is sealed over what the store has of it: for an increment its base, for a whole one a snapshot
//! that is the same disk, if there is one. Then nothing is stored but the rows.

use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::sealed::collect::Pin;
use sapwood_image::sealed::{Archive, ArchiveInfo, Child as Content, Hash, Root, Watch};
use sapwood_image::{ErrorKind, ImageError};

use crate::catalog::rows::{NodeState, VolumeRow};
use crate::catalog::{Change, Child, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::import::{AllOrNothing, Imported, Importing, NewSealed};
use crate::name::{self, SnapshotName};
use crate::resolve::sealed_root;
use crate::seal::Job;
use crate::snapshot::check_snapshot_is_new;
use crate::store::Store;
use crate::usage::Hold;

/// Where an archive goes.
struct Target {
    /// What it is sealed over.
    base: Option<Root>,
    /// The node that the new one lies over.
    parent: Option<Id>,
    /// The volume, if it is there already.
    volume: Option<Existing>,
    pin: Arc<Pin>,
    _parent: Option<Hold>,
}

/// A volume that gets a snapshot from elsewhere.
struct Existing {
    id: Id,
    layer: Option<Id>,
    _hold: Hold,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Imports an archive as a snapshot, which is sealed. A whole one becomes a new volume over it. An increment needs a sealed
    /// snapshot that is its base, and the new snapshot lies over that: under a new volume, or under a volume that lies over the
    /// base and has nothing of its own. What the store has already is not stored again.
    ///
    /// # Errors
    /// Names that are taken or are none; a file that is no archive, or damaged; a base that is not there; a volume that is in use,
    /// holds writes, or lies over something else; what reading or writing says;
    /// [`Cancelled`](sapwood_image::ErrorKind::Cancelled), also when `watch` says to stop. Nothing is left behind then.
    pub async fn import_archive(
        &self,
        io: &Io<E>,
        importing: &Importing<'_>,
        path: &Path,
        watch: &mut impl Watch,
    ) -> Result<Imported> {
        let Importing { name, workers } = *importing;
        name::check(&name.volume)?;
        name::check(&name.snapshot)?;
        let archive = Archive::open(&self.storage, io, path).await?;
        let info = archive.info();
        let target = self.catalog.hold_still(|look| self.target(look, name, info, path))?;
        if let Some(Existing { layer: Some(layer), .. }) = target.volume {
            self.check_saved(io, &name.volume, layer, target.parent).await?;
        }
        let base = target.base.map(|root| (self.content.packs(), root));
        let mut source = archive.source(io, base)?;
        let job = Job { workers, pin: &target.pin, base: target.base, start: 0 };
        let (sealed, mut dedup) = self.seal_source(io, &job, &mut source, &mut AllOrNothing(watch)).await?;
        let root = sealed.root;
        let volume = target.volume.as_ref().map_or_else(|| self.random_id(), |volume| Ok(volume.id))?;
        let (node, created_ms) = (self.random_id()?, self.now_ms());
        let new = NewSealed { name, volume, node, root, parent: target.parent, created_ms, info: Some(info) };
        self.publish(io, &sealed.packs, |change| match &target.volume {
            Some(_) => change.receive(&new),
            None => {
                change.check_import(name)?;
                change.add_sealed(&new)?;
                change.add_volume(volume, &self.new_volume(&name.volume, root.size, Some(node)))
            }
        })
        .await?;
        dedup.publish();
        let layer = target.volume.as_ref().and_then(|volume| volume.layer);
        self.remove_layers(io, layer.as_slice()).await;
        Ok(Imported::new(&new, &sealed))
    }

    /// Where an archive goes, and that it stays there.
    fn target(&self, look: &Change, name: &SnapshotName, info: &ArchiveInfo, path: &Path) -> Result<Target> {
        let found = find_sealed(look, &info.base.unwrap_or(info.root))?;
        let pin = |base: Option<Root>| Arc::new(self.content.pins().pin(base.as_slice()));
        let is_new = look.volume_named(&name.volume)?.is_none();
        let (id, root) = match (info.base, found) {
            (None, found) => {
                look.check_import(name)?;
                let base = found.map(|(_, root)| root);
                return Ok(Target { base, parent: None, volume: None, pin: pin(base), _parent: None });
            }
            (Some(_), Some(found)) => found,
            (Some(wanted), None) => {
                let detail = format!(
                    "it is an increment over a disk with the root hash {wanted}, and no sealed snapshot of the store is \
                     that: import its base first, or seal the snapshot that should be it"
                );
                return Err(ImageError::new(path, ErrorKind::Base(detail)).into());
            }
        };
        let (parent, volume) = match is_new {
            true => {
                look.check_import(name)?;
                (Some(id), None)
            }
            false => {
                let (parent, volume) = self.existing(look, name, &root)?;
                (parent, Some(volume))
            }
        };
        let _parent = parent.map(|parent| self.usage.pin(parent));
        Ok(Target { base: Some(root), parent, volume, pin: pin(Some(root)), _parent })
    }

    /// Takes a volume for an increment over `base`; what it lies over is the answer, too.
    fn existing(&self, look: &Change, name: &SnapshotName, base: &Root) -> Result<(Option<Id>, Existing)> {
        let (id, _) = crate::store::volume(look, &name.volume)?;
        check_snapshot_is_new(look, id, name)?;
        let hold = self.usage.take(id, &name.volume, "receiving a snapshot")?;
        let row = look.volume(id)?.ok_or_else(|| StoreError::not_found(&name.volume, "volume"))?;
        let below = match row.parent {
            Some(parent) => sealed_root(look, parent)?,
            None => None,
        };
        if below.is_none_or(|below| below.hash() != base.hash()) {
            let text = "there is a volume of that name, and what it lies over is not the archive's base, or not sealed: choose \
                        another name, or let the volume go on from the base first";
            return Err(StoreError::new(&name.volume, StoreErrorKind::Exists(text.to_owned())));
        }
        Ok((row.parent, Existing { id, layer: row.layer, _hold: hold }))
    }
}

impl Change {
    /// Lets a volume, which has been taken and is what its parent is, go on from a new snapshot.
    fn receive(&mut self, new: &NewSealed<'_>) -> Result<()> {
        let row = self.volume(new.volume)?;
        let row = row.ok_or_else(|| StoreError::not_found(&new.name.volume, "volume"))?;
        check_snapshot_is_new(self, new.volume, new.name)?;
        self.add_sealed(new)?;
        self.remove_child(new.parent, Child::Volume(new.volume))?;
        self.add_child(Some(new.node), Child::Volume(new.volume))?;
        let row = VolumeRow { parent: Some(new.node), layer: None, size: new.root.size, space: None, ..row };
        self.put_volume(new.volume, Some(&row))
    }
}

/// A sealed snapshot by its root hash: of several, one that has a name, and the oldest.
fn find_sealed(look: &impl Look, wanted: &Hash) -> Result<Option<(Id, Root)>> {
    let mut found = None;
    for (id, row) in look.nodes()? {
        let root = match row.state {
            NodeState::Sealed(top) => top.root(row.size),
            NodeState::Bare if row.parent.is_none() => Root { size: row.size, tree: Content::ZERO },
            _ => continue,
        };
        let order = (row.name.is_none(), row.created_ms, id);
        if root.hash() == *wanted && found.is_none_or(|(best, _)| order < best) {
            found = Some((order, root));
        }
    }
    Ok(found.map(|((.., id), root)| (id, root)))
}
