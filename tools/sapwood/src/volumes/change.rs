//! Operations on volumes and snapshots that are rows of the catalog: making, cloning, naming, deleting, switching.

use std::collections::BTreeMap;
use std::sync::Arc;

use sapwood_store::catalog::Look;
use sapwood_store::{Id, Name, NotesChange, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Done, Made, MadeAll, Switched};
use super::operation::{Quick, operation};
use super::service::Service;
use crate::control::wire::Failure;

/// Makes an empty volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Size of its disk in bytes; rounded up to 512.
    pub size: u64,
}

/// Makes volumes over a snapshot, all of them or none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CloneSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// The names of the new volumes.
    pub names: Vec<String>,
}

/// Gives a volume another name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RenameVolume {
    /// The volume.
    pub volume: String,
    /// Its new name.
    pub to: String,
}

/// Gives a snapshot another name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RenameSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// Its new name, without that of the volume.
    pub to: String,
}

/// Deletes a volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeleteVolume {
    /// The volume.
    pub volume: String,
    /// Its snapshots, too.
    #[serde(default)]
    pub with_snapshots: bool,
}

/// Deletes a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeleteSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
}

/// What is to be said of a volume or snapshot.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Notes {
    /// Whether it is protected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
    /// Its description; an empty one is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels by key, with their values; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
}

/// Changes what is said of a volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NoteVolume {
    /// The volume.
    pub volume: String,
    /// What is to be said of it.
    pub notes: Notes,
}

/// Changes what is said of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NoteSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// What is to be said of it.
    pub notes: Notes,
}

/// Lets a volume go on from a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Switch {
    /// The volume.
    pub volume: String,
    /// The snapshot, of any volume: `volume@snapshot`.
    pub to: String,
    /// Throw away what the volume holds itself.
    #[serde(default)]
    pub discard: bool,
}

/// Lets a volume go back to the newest snapshot that it lies over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rollback {
    /// The volume.
    pub volume: String,
    /// Throw away what the volume holds itself.
    #[serde(default)]
    pub discard: bool,
}

/// Changes the limits of the store's space; what is not named stays as it is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SetSpace {
    /// Most bytes that the store may take; null: no limit.
    #[serde(default, deserialize_with = "said", skip_serializing_if = "Option::is_none")]
    pub quota: Option<Option<u64>>,
    /// Bytes of the file system that are left to others; null: none.
    #[serde(default, deserialize_with = "said", skip_serializing_if = "Option::is_none")]
    pub reserve: Option<Option<u64>>,
    /// Shares of the space in percent, in rising order, at which is warned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watermarks: Option<Vec<u8>>,
}

/// Tells a null from what is missing.
pub fn said<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

operation!(SetSpace: Post "/v1/store/settings" -> Done);
operation!(CreateVolume: Post "/v1/volumes" -> Made);
operation!(CloneSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/clone" -> MadeAll);
operation!(RenameVolume: Post "/v1/volumes/{volume}/rename" -> Done);
operation!(RenameSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/rename" -> Done);
operation!(DeleteVolume: Delete "/v1/volumes/{volume}" -> Done);
operation!(DeleteSnapshot: Delete "/v1/volumes/{volume}/snapshots/{snapshot}" -> Done);
operation!(NoteVolume: Post "/v1/volumes/{volume}/notes" -> Done);
operation!(NoteSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/notes" -> Done);
operation!(Switch: Post "/v1/volumes/{volume}/switch" -> Switched);
operation!(Rollback: Post "/v1/volumes/{volume}/rollback" -> Switched);

impl Quick for SetSpace {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let store = service.store();
        let mut settings = store.space_settings()?;
        settings.quota = self.quota.unwrap_or(settings.quota);
        settings.reserve = self.reserve.unwrap_or(settings.reserve);
        settings.watermarks = self.watermarks.unwrap_or(settings.watermarks);
        store.set_space_settings(&settings)?;
        Ok(Done {})
    }
}

impl Quick for CreateVolume {
    fn run(self, service: &Arc<Service>) -> Result<Made, Failure> {
        let store = service.store();
        let id = store.create(&self.name, self.size)?;
        let made = store.catalog().view()?.volume(id)?;
        Ok(Made { name: self.name, id, virtual_size: made.map_or(self.size, |row| row.size) })
    }
}

impl Quick for CloneSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<MadeAll, Failure> {
        let of = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let store = service.store();
        let ids = store.clone_snapshot(&of, &self.names)?;
        let view = store.catalog().view()?;
        let mut made = Vec::new();
        for (name, id) in self.names.into_iter().zip(ids) {
            let virtual_size = view.volume(id)?.map_or(0, |row| row.size);
            made.push(Made { name, id, virtual_size });
        }
        Ok(MadeAll { made })
    }
}

impl Quick for RenameVolume {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        service.store().rename_volume(&self.volume, &self.to)?;
        Ok(Done {})
    }
}

impl Quick for RenameSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let from = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        service.store().rename_snapshot(&from, &self.to)?;
        Ok(Done {})
    }
}

/// Refuses to take the name off a snapshot that is attached: it could not be detached.
fn check_detached(service: &Service, id: Id, name: &SnapshotName) -> Result<(), Failure> {
    match service.attached(id) {
        Some(_) => Err(Failure::new("in-use", format!("{name}: the snapshot is attached: detach it first"))),
        None => Ok(()),
    }
}

impl Quick for DeleteVolume {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let Self { volume, with_snapshots } = self;
        let id = service.volume(&volume)?;
        for (snapshot, id) in service.store().catalog().view()?.snapshots_of(id)? {
            check_detached(service, id, &SnapshotName { volume: volume.clone(), snapshot })?;
        }
        service.run(|store, io| async move { store.delete_volume(&io, &volume, with_snapshots).await })?;
        service.removed();
        Ok(Done {})
    }
}

impl Quick for DeleteSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        check_detached(service, service.snapshot(&name)?, &name)?;
        service.run(|store, io| async move { store.delete_snapshot(&io, &name).await })?;
        service.removed();
        Ok(Done {})
    }
}

/// Makes all changes of notes, or none.
fn note(service: &Service, name: &Name, notes: Notes) -> Result<Done, Failure> {
    let protected = notes.protected.map(NotesChange::Protect);
    let description = notes.description.map(NotesChange::Describe);
    let labels = notes.labels.into_iter().map(|(key, value)| match value {
        Some(value) => NotesChange::Label(key, value),
        None => NotesChange::Unlabel(key),
    });
    let changes: Vec<NotesChange> = protected.into_iter().chain(description).chain(labels).collect();
    service.store().note(name, &changes)?;
    Ok(Done {})
}

impl Quick for NoteVolume {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        note(service, &Name::Volume(self.volume), self.notes)
    }
}

impl Quick for NoteSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        note(service, &Name::Snapshot(name), self.notes)
    }
}

impl Quick for Switch {
    fn run(self, service: &Arc<Service>) -> Result<Switched, Failure> {
        let Self { volume, to, discard } = self;
        let to: SnapshotName = to.parse()?;
        let name = to.to_string();
        service.run(|store, io| async move { store.switch(&io, &volume, &to, discard).await })?;
        service.removed();
        Ok(Switched { to: name })
    }
}

impl Quick for Rollback {
    fn run(self, service: &Arc<Service>) -> Result<Switched, Failure> {
        let Self { volume, discard } = self;
        let to = service.run(|store, io| async move { store.rollback(&io, &volume, discard).await })?;
        service.removed();
        Ok(Switched { to: to.to_string() })
    }
}
