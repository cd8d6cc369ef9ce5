//! Importing: a disk from elsewhere becomes a volume over a sealed snapshot.
//!
//! Order: packs and index ([`super::publish`]); one commit that makes the snapshot and the volume over it.

use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::sealed::{ArchiveInfo, Hash, Root, SealStats, Sealed, Source, Step, Watch, Workers};
use serde_json::Map;

use crate::catalog::rows::{NodeRow, NodeState, Notes, Top};
use crate::catalog::{Change, Child};
use crate::error::Result;
use crate::id::Id;
use crate::name::{self, SnapshotName};
use crate::seal::Job;
use crate::store::Store;

/// What a disk is imported as.
#[derive(Clone, Copy, Debug)]
pub struct Importing<'a> {
    /// The new volume, and its snapshot that holds what is imported.
    pub name: &'a SnapshotName,
    /// Who hashes and compresses.
    pub workers: &'a Workers,
}

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The volume.
    pub volume: Id,
    /// Its snapshot.
    pub snapshot: Id,
    /// Size of the disk in bytes.
    pub size: u64,
    /// By what the disk is known, here and anywhere.
    pub hash: Hash,
    /// Bytes of files that were written, the index not counted.
    pub pack_bytes: u64,
    /// Counts.
    pub stats: SealStats,
}

/// A snapshot that comes from elsewhere.
pub(crate) struct NewSealed<'a> {
    pub(crate) name: &'a SnapshotName,
    pub(crate) volume: Id,
    pub(crate) node: Id,
    pub(crate) root: Root,
    /// The node that it lies over.
    pub(crate) parent: Option<Id>,
    pub(crate) created_ms: u64,
    /// What the archive says that it comes from.
    pub(crate) info: Option<&'a ArchiveInfo>,
}

impl Imported {
    pub(crate) fn new(new: &NewSealed<'_>, sealed: &Sealed) -> Self {
        Self {
            volume: new.volume,
            snapshot: new.node,
            size: new.root.size,
            hash: new.root.hash(),
            pack_bytes: sealed.packs.iter().map(|pack| pack.bytes).sum(),
            stats: sealed.stats.clone(),
        }
    }
}

impl Change {
    /// Refuses names under which no new volume with a snapshot can be made.
    pub(crate) fn check_import(&self, name: &SnapshotName) -> Result<()> {
        name::check(&name.snapshot)?;
        self.check_volume_is_new(&name.volume)
    }

    /// Makes a snapshot that is sealed.
    pub(crate) fn add_sealed(&mut self, new: &NewSealed<'_>) -> Result<()> {
        let NewSealed { name, volume, node, root, parent, created_ms, info } = *new;
        let description = info.map(|info| info.description.clone()).unwrap_or_default();
        let row = NodeRow {
            volume: Some(volume),
            name: Some(name.snapshot.clone()),
            parent,
            size: root.size,
            created_ms,
            state: NodeState::Sealed(Top::from(root.tree)),
            notes: Notes { description, ..Notes::default() },
            space: None,
            more: Map::new(),
        };
        self.put_node(node, Some(&row))?;
        self.put_snapshot_name(volume, &name.snapshot, Some(node))?;
        self.add_child(parent, Child::Node(node))
    }
}

/// Half a disk is none.
pub(crate) struct AllOrNothing<'a, W>(pub(crate) &'a mut W);

impl<W: Watch> Watch for AllOrNothing<'_, W> {
    async fn between(&mut self, stats: &SealStats) -> Step {
        match self.0.between(stats).await {
            Step::Stop => Step::Cancel,
            step => step,
        }
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Refuses what [`Self::import`] refuses before it reads anything.
    ///
    /// # Errors
    /// Names that are taken or are none.
    pub fn check_import(&self, name: &SnapshotName) -> Result<()> {
        self.catalog.hold_still(|look| look.check_import(name))
    }

    /// Imports a disk as a new volume over one snapshot, which is sealed. What the store has already is not stored again.
    ///
    /// # Errors
    /// Names that are taken or are none; what reading the source or writing packs says;
    /// [`Cancelled`](sapwood_image::ErrorKind::Cancelled), also when `watch` says to stop: nothing is left behind then.
    pub async fn import(
        &self,
        io: &Io<E>,
        importing: &Importing<'_>,
        source: &mut impl Source,
        watch: &mut impl Watch,
    ) -> Result<Imported> {
        let Importing { name, workers } = *importing;
        self.check_import(name)?;
        self.check_room(self.options.pack_bytes)?;
        let pin = Arc::new(self.content.pins().pin(&[]));
        let job = Job { workers, pin: &pin, base: None, start: 0 };
        let (sealed, mut dedup) = self.seal_source(io, &job, source, &mut AllOrNothing(watch)).await?;
        let root = sealed.root;
        let (volume, node, created_ms) = (self.random_id()?, self.random_id()?, self.now_ms());
        let new = NewSealed { name, volume, node, root, parent: None, created_ms, info: None };
        self.publish(io, &sealed.packs, |change| {
            change.check_import(name)?;
            change.add_sealed(&new)?;
            change.add_volume(volume, &self.new_volume(&name.volume, root.size, Some(node)))
        })
        .await?;
        dedup.publish();
        drop(pin);
        Ok(Imported::new(&new, &sealed))
    }
}
