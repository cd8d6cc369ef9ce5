//! What the store takes, and what it may still take.
//!
//! What it takes are the bytes that its files occupy. What it may still take is the least of what its quota leaves and of what the file
//! system has free beyond the reserve. The two together are its *room*, and watermarks are shares of that: with a quota they rise as the
//! store does, and without one also when others fill the file system.

use std::collections::BTreeMap;
use std::path::Path;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_SIZE;
use serde::Serialize;

use crate::catalog::Look;
use crate::catalog::rows::{AccountRow, NodeState, PackKind, SpaceSettings};
use crate::directory::Directory;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::Store;

/// Bytes of the files of a store, as they occupy the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// Layers: what guests write, and snapshots that are not sealed.
    pub layers: u64,
    /// Packs.
    pub packs: u64,
    /// The index.
    pub index: u64,
    /// The catalog.
    pub catalog: u64,
}

impl Taken {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.layers + self.packs + self.index + self.catalog
    }
}

/// Snapshots, by what holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Snapshots {
    /// They hold nothing beyond what their parents do.
    pub bare: usize,
    /// Layers.
    pub frozen: usize,
    /// Sealed.
    pub sealed: usize,
    /// Of all these, those that were deleted and are kept because others need them.
    pub nameless: usize,
}

/// What there is in a store, and how much room it has.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stat {
    /// Volumes.
    pub volumes: usize,
    /// Snapshots.
    pub snapshots: Snapshots,
    /// Layers.
    pub layers: usize,
    /// Packs.
    pub packs: usize,
    /// Runs of the index.
    pub index_runs: usize,
    /// What its files take.
    pub taken: Taken,
    /// Bytes that the files of volumes' layers occupy, by the volumes' names; 0 of one that has none yet.
    pub volume_bytes: BTreeMap<String, u64>,
    /// Bytes of all blocks in packs, as they are uncompressed; those that nobody needs any more included.
    pub block_bytes: u64,
    /// Bytes of packs that are needed, as far as a collection has counted; those that none has looked at count as needed.
    pub live_bytes: u64,
    /// Bytes of blocks for each byte of packs; unknown when there are none.
    pub compression: Option<f64>,
    /// What the last account has found of everything that is sealed.
    pub account: Option<AccountRow>,
    /// Bytes that snapshots hold for each byte of different blocks, by that account.
    pub deduplication: Option<f64>,
    /// The limits.
    pub settings: SpaceSettings,
    /// What the file system has free in bytes, if that is known.
    pub free: Option<u64>,
    /// What the store may still take in bytes; unknown without any limit.
    pub left: Option<u64>,
    /// What it takes, in percent of its room.
    pub full_percent: Option<u8>,
    /// The highest watermark that is reached.
    pub watermark: Option<u8>,
}

/// How much room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    taken: u64,
    free: Option<u64>,
    left: Option<u64>,
}

impl Room {
    fn new(taken: u64, settings: &SpaceSettings, free: Option<u64>) -> Self {
        let of_quota = settings.quota.map(|quota| quota.saturating_sub(taken));
        let of_host = free.map(|free| free.saturating_sub(settings.reserve.unwrap_or_default()));
        let left = of_quota.into_iter().chain(of_host).min();
        Self { taken, free, left }
    }

    /// What is taken, in percent; 100 only when nothing is left.
    fn full_percent(&self) -> Option<u8> {
        let left = self.left?;
        let room = (u128::from(self.taken) + u128::from(left)).max(1);
        Some((u128::from(self.taken) * 100 / room) as u8)
    }

    fn watermark(&self, marks: &[u8]) -> Option<u8> {
        let full = self.full_percent()?;
        marks.iter().copied().filter(|mark| *mark <= full).max()
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// What there is, and how much room. It looks at every file's size.
    ///
    /// # Errors
    /// What the catalog or the storage says.
    pub fn stat(&self) -> Result<Stat> {
        let view = self.catalog.view()?;
        let (nodes, packs, settings) = (view.nodes()?, view.packs()?, view.space_settings()?);
        let mut snapshots = Snapshots::default();
        for (_, row) in &nodes {
            match row.state {
                NodeState::Bare => snapshots.bare += 1,
                NodeState::Frozen { .. } => snapshots.frozen += 1,
                NodeState::Sealed(_) => snapshots.sealed += 1,
            }
            snapshots.nameless += usize::from(row.name.is_none());
        }
        let (taken, layers) = self.taken()?;
        let room = Room::new(taken.total(), &settings, self.free()?);
        let volume_bytes: BTreeMap<String, u64> = view
            .volumes()?
            .into_iter()
            .map(|(_, row)| {
                (row.name, row.layer.and_then(|layer| layers.get(&layer).copied()).unwrap_or_default())
            })
            .collect();
        let data = packs.iter().filter(|(_, row)| row.kind == PackKind::Data);
        let block_bytes = data.clone().map(|(_, row)| row.entries * BLOCK_SIZE).sum();
        let data_bytes = data.map(|(_, row)| row.bytes).sum();
        let account = view.account_row()?;
        let referenced = account.and_then(|row| Some((row.referenced_bytes?, row.unique_bytes)));
        Ok(Stat {
            volumes: volume_bytes.len(),
            snapshots,
            layers: layers.len(),
            packs: packs.len(),
            index_runs: view.index_runs()?.len(),
            taken,
            volume_bytes,
            block_bytes,
            live_bytes: packs.iter().map(|(_, row)| row.live_bytes.unwrap_or(row.bytes)).sum(),
            compression: ratio(block_bytes, data_bytes),
            account,
            deduplication: referenced.and_then(|(all, unique)| ratio(all, unique)),
            free: room.free,
            left: room.left,
            full_percent: room.full_percent(),
            watermark: room.watermark(&settings.watermarks),
            settings,
        })
    }

    /// The highest watermark that is reached.
    ///
    /// # Errors
    /// What the catalog or the storage says.
    pub fn watermark(&self) -> Result<Option<u8>> {
        let settings = self.space_settings()?;
        if settings.watermarks.is_empty() {
            return Ok(None);
        }
        Ok(self.room(&settings)?.watermark(&settings.watermarks))
    }

    /// Refuses what takes room, when `needed` bytes are more than the quota and the reserve leave.
    ///
    /// # Errors
    /// There is no room: the error says how much is needed, left and taken, and what to do; what the catalog or the storage says.
    pub fn check_room(&self, needed: u64) -> Result<()> {
        let settings = self.space_settings()?;
        if settings.quota.is_none() && settings.reserve.is_none() {
            return Ok(());
        }
        let room = self.room(&settings)?;
        match room.left {
            Some(left) if left < needed.max(1) => Err(self.no_room(&room, needed, &settings)),
            _ => Ok(()),
        }
    }

    /// What the store may still take; none, where nobody knows a limit.
    ///
    /// # Errors
    /// What the catalog or the storage says.
    pub(crate) fn left(&self) -> Result<Option<u64>> {
        Ok(self.room(&self.space_settings()?)?.left)
    }

    /// Lets the layers of attached volumes grow for what guests write by what is left, until this is called the next time. Without
    /// quota and reserve there is no limit.
    pub(crate) fn set_gate(&self) -> Result<()> {
        let settings = self.space_settings()?;
        let is_limited = settings.quota.is_some() || settings.reserve.is_some();
        self.gate.set(if is_limited { self.room(&settings)?.left } else { None });
        Ok(())
    }

    fn no_room(&self, room: &Room, needed: u64, settings: &SpaceSettings) -> StoreError {
        let left = room.left.unwrap_or_default();
        let mut text = match needed {
            0 => "there is no room left".to_owned(),
            _ => format!("there is no room for {needed} bytes, {left} are left"),
        };
        text += &format!(": the store takes {} bytes", room.taken);
        if let Some(quota) = settings.quota {
            text += &format!(" of its quota of {quota}");
        }
        if let (Some(free), Some(reserve)) = (room.free, settings.reserve) {
            text += &format!(
                "; its file system has {free} bytes free, {reserve} of which are reserved for others"
            );
        }
        text += ": delete snapshots or volumes and run a collection (gc), seal what is not sealed, or raise the limit";
        StoreError::new(self.directory.root().display(), StoreErrorKind::Full(text))
    }

    fn room(&self, settings: &SpaceSettings) -> Result<Room> {
        // What the files take matters to the quota and to shares only.
        let is_asked = settings.quota.is_some() || !settings.watermarks.is_empty();
        let taken = if is_asked { self.taken()?.0.total() } else { 0 };
        Ok(Room::new(taken, settings, self.free()?))
    }

    fn free(&self) -> Result<Option<u64>> {
        let root = self.directory.root();
        let space = self.storage.space(root);
        let space = space.map_err(|error| StoreError::io(root, "ask for the space of", error))?;
        Ok(space.map(|space| space.free))
    }

    /// What the files take, and what each layer's does.
    fn taken(&self) -> Result<(Taken, BTreeMap<Id, u64>)> {
        let directory = &self.directory;
        let (layers, each) = self.allocated_in(&directory.layers())?;
        let (packs, _) = self.allocated_in(&directory.packs())?;
        let (index, _) = self.allocated_in(&directory.index())?;
        let catalog = self.allocated(&directory.catalog())?;
        Ok((Taken { layers, packs, index, catalog }, each))
    }

    /// What the files in a folder occupy, and of layers each.
    fn allocated_in(&self, folder: &Path) -> Result<(u64, BTreeMap<Id, u64>)> {
        let names = self.storage.list_directory(folder);
        let names = names.map_err(|error| StoreError::io(folder, "list", error))?;
        let (mut sum, mut layers) = (0, BTreeMap::new());
        for name in &names {
            let bytes = self.allocated(&folder.join(name))?;
            sum += bytes;
            layers.extend(name.to_str().and_then(Directory::layer_of).map(|layer| (layer, bytes)));
        }
        Ok((sum, layers))
    }

    /// Bytes that a file occupies; none of one that is gone.
    pub(crate) fn allocated(&self, path: &Path) -> Result<u64> {
        let file = match self.storage.open(path, OpenOptions::READ.buffered()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            opened => opened.map_err(|error| StoreError::io(path, "open", error))?,
        };
        file.allocated().map_err(|error| StoreError::io(path, "measure", error))
    }
}

fn ratio(all: u64, part: u64) -> Option<f64> {
    (part > 0).then(|| all as f64 / part as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_the_least_of_what_quota_and_reserve_leave() {
        let settings = |quota, reserve| SpaceSettings { quota, reserve, watermarks: vec![50, 80, 100] };
        for (quota, reserve, free, left, full, mark) in [
            (None, None, None, None, None, None),
            (Some(100), None, None, Some(60), Some(40), None),
            (Some(100), None, Some(10), Some(10), Some(80), Some(80)),
            (Some(80), Some(20), Some(1000), Some(40), Some(50), Some(50)),
            (None, Some(20), Some(30), Some(10), Some(80), Some(80)),
            (None, Some(20), Some(15), Some(0), Some(100), Some(100)),
            (Some(30), None, Some(1000), Some(0), Some(100), Some(100)),
            (None, None, Some(4000), Some(4000), Some(0), None),
        ] {
            let settings = settings(quota, reserve);
            let room = Room::new(40, &settings, free);
            assert_eq!((room.left, room.full_percent()), (left, full), "{settings:?}");
            assert_eq!(room.watermark(&settings.watermarks), mark, "{settings:?}");
        }
        let room = Room::new(0, &SpaceSettings::default(), Some(0));
        assert_eq!((room.left, room.full_percent()), (Some(0), Some(0)));
    }
}
