//! Operations on volumes that guests may be using: attaching, detaching, snapshots, changes of size.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use sapwood_image::layer::Tuning;
use sapwood_store::catalog::Look;
use sapwood_store::{Id, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Done, Made, Resized, Serving};
use super::attached::{Attached, Serve, read_alone, resize_alone};
use super::operation::{Long, Quick, operation};
use super::service::Service;
use super::transfer::check_absolute;
use crate::control::jobs::Job;
use crate::control::wire::Failure;
use crate::host::serving;

/// Serves a volume at a socket of its own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AttachVolume {
    /// The volume.
    pub volume: String,
    /// Where a virtual machine connects; by default in the daemon's folder for sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Virtqueues, 1 to 256; by default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Memory for the map of the volume's layer, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_cache: Option<u64>,
}

/// Serves a snapshot, for reading, at a socket of its own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AttachSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// Where a virtual machine connects; by default in the daemon's folder for sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Virtqueues, 1 to 256; by default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// Ends the serving of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DetachSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
}

/// Ends the serving of a volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DetachVolume {
    /// The volume.
    pub volume: String,
}

/// Takes a snapshot of a volume, attached or not.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TakeSnapshot {
    /// The volume.
    pub volume: String,
    /// The name of the snapshot, without that of the volume.
    pub name: String,
}

/// Changes the size of a volume, and tells its guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ResizeVolume {
    /// The volume.
    pub volume: String,
    /// The new size in bytes; either this or the difference is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The difference to the size that the volume has then, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<i64>,
    /// Allow the disk to become smaller.
    #[serde(default)]
    pub shrink: bool,
}

/// Reads bytes of a volume as its guest does, whether it is attached or nobody has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ReadVolume {
    /// The volume.
    pub volume: String,
    /// Where to begin, in bytes: a multiple of 512.
    pub start: u64,
    /// How many bytes: a multiple of 512, at most 1 MiB.
    pub length: u64,
}

/// Bytes of a volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Data {
    /// Two hexadecimal digits for each.
    pub data: String,
}

impl From<&[u8]> for Data {
    fn from(bytes: &[u8]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        Self { data: digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect() }
    }
}

impl Data {
    /// The bytes; none when they make no sense.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pairs = self.data.as_bytes().chunks(2);
        pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?)).collect()
    }
}

/// Bytes that are read at once, at most.
pub const READ_BYTES_MAX: u64 = 1 << 20;

operation!(AttachVolume: Post "/v1/volumes/{volume}/attach" -> Serving);
operation!(AttachSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/attach" -> Serving);
operation!(DetachSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/detach" -> Done);
operation!(DetachVolume: Post "/v1/volumes/{volume}/detach" -> Done);
operation!(TakeSnapshot: Post "/v1/volumes/{volume}/snapshots" -> Made);
operation!(ResizeVolume: Post "/v1/volumes/{volume}/resize" -> Resized);
operation!(ReadVolume: Post "/v1/volumes/{volume}/read" -> Data);

/// Disks that a daemon can serve before their files of layers below reach its limit of open files.
const DISKS: u64 = 512;

/// The path of the socket of what is called `name`, unless another is given.
fn socket(service: &Service, name: &str, given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let sockets = service.sockets().ok_or_else(|| {
        let text =
            "a volume is attached by the daemon of its store: start sapwood daemon, or use sapwood serve";
        Failure::new("no-daemon", format!("{name}: {text}"))
    })?;
    let Some(socket) = given else { return Ok(sockets.join(format!("{name}.sock"))) };
    check_absolute(&socket)?;
    Ok(socket)
}

impl Quick for AttachVolume {
    fn run(self, service: &Arc<Service>) -> Result<Serving, Failure> {
        let mut tuning = serving(DISKS);
        tuning.map_cache_bytes = self.map_cache.unwrap_or(tuning.map_cache_bytes);
        let socket = socket(service, &self.volume, self.socket)?;
        let serial = self.volume.clone();
        let serve = Serve { socket, queues: self.queues.unwrap_or(1), serial, tuning };
        served(service, &self.volume, Attached::volume(service, &self.volume, serve)?)
    }
}

impl Quick for AttachSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Serving, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let shown = name.to_string();
        let socket = socket(service, &shown, self.socket)?;
        let id = service.snapshot(&name)?;
        if service.attached(id).is_some() {
            return Err(attached_already(shown));
        }
        let (queues, serial) = (self.queues.unwrap_or(1), shown.clone());
        let serve = Serve { socket, queues, serial, tuning: Tuning::default() };
        served(service, &shown, Attached::snapshot(service, &name, serve)?)
    }
}

fn attached_already(name: impl Display) -> Failure {
    Failure::new("in-use", format!("{name}: it is attached already"))
}

/// Enters what was attached, unless somebody was faster.
pub fn enter(service: &Service, attached: &Arc<Attached>, name: impl Display) -> Result<(), Failure> {
    if service.add(attached) {
        return Ok(());
    }
    attached.detach(service)?;
    Err(attached_already(name))
}

/// Enters what was attached, and writes it down.
fn served(service: &Service, name: &str, attached: Arc<Attached>) -> Result<Serving, Failure> {
    let serving = attached.serving();
    enter(service, &attached, name)?;
    forget(service, attached.id());
    if let Err(error) = service.remember() {
        // Nobody uses it yet, and nobody is to rely on it.
        if let Some(attached) = service.remove(attached.id()) {
            attached.detach(service)?;
        }
        return Err(error);
    }
    service.note("attached", format!("{name} is attached at {}", serving.socket.display()));
    Ok(serving)
}

/// Forgets what could not be attached again; whether there was such a thing.
fn forget(service: &Service, id: Id) -> bool {
    service.memory().is_some_and(|memory| memory.forget(id))
}

/// Ends the serving of what has this id, and forgets it.
fn detach(service: &Service, id: Id, name: &str) -> Result<Done, Failure> {
    let attached = service.remove(id);
    if !forget(service, id) && attached.is_none() {
        return Err(Failure::new("not-found", format!("{name}: it is not attached")));
    }
    let remembered = service.remember();
    if let Some(attached) = attached {
        attached.detach(service)?;
    }
    remembered?;
    service.changed();
    service.note("detached", format!("{name} is detached"));
    Ok(Done {})
}

impl Quick for DetachVolume {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let id = service.volume(&self.volume)?;
        detach(service, id, &self.volume)
    }
}

impl Quick for DetachSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let id = service.snapshot(&name)?;
        detach(service, id, &name.to_string())
    }
}

impl Quick for TakeSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Made, Failure> {
        let volume = service.volume(&self.volume)?;
        let name = SnapshotName { volume: self.volume, snapshot: self.name };
        let shown = name.to_string();
        let id = match service.attached(volume) {
            Some(attached) => attached.take_snapshot(service, &name.snapshot)?,
            None => service.run(|store, io| async move { store.snapshot(&io, &name).await })?,
        };
        let virtual_size = service.store().catalog().view()?.needed_node(id)?.size;
        service.note("snapshot", format!("{shown} is taken"));
        service.changed();
        service.background().wake();
        Ok(Made { name: shown, id, virtual_size })
    }
}

impl Quick for ReadVolume {
    fn run(self, service: &Arc<Service>) -> Result<Data, Failure> {
        let Self { volume, start, length } = self;
        if length > READ_BYTES_MAX {
            let text = format!("{volume}: at most {READ_BYTES_MAX} bytes are read at once");
            return Err(Failure::new("invalid", text));
        }
        let bytes = match service.attached(service.volume(&volume)?) {
            Some(attached) => attached.read(service, start, length)?,
            None => read_alone(service, &volume, start, length)?,
        };
        Ok(Data::from(&*bytes))
    }
}

impl Long for ResizeVolume {
    const KIND: &'static str = "resize";

    fn about(&self) -> String {
        self.volume.clone()
    }

    fn run(self, service: &Arc<Service>, _: &Arc<Job>) -> Result<Resized, Failure> {
        let id = service.volume(&self.volume)?;
        let (old_size, size) = match service.attached(id) {
            Some(attached) => attached.resize(service, |old| self.new_size(old))?,
            None => resize_alone(service, &self.volume, |old| self.new_size(old))?,
        };
        Ok(Resized { old_size, size })
    }
}

impl ResizeVolume {
    /// The size to change to from `old`.
    fn new_size(&self, old: u64) -> Result<u64, Failure> {
        let Self { volume, size, difference, shrink } = self;
        let invalid = |text: String| Err(Failure::new("invalid", format!("{volume}: {text}")));
        let new = match (*size, *difference) {
            (Some(size), None) => Some(size),
            (None, Some(difference)) => old.checked_add_signed(difference),
            _ => return invalid("give either the new size or the difference".to_owned()),
        };
        match new {
            None => invalid(format!("the disk has {old} bytes, which cannot be changed by so many")),
            Some(new) if new < old && !shrink => invalid(format!(
                "shrinking from {old} to {new} bytes loses what lies past the new end: shrink the file system inside \
                 first, then pass --shrink"
            )),
            Some(new) => Ok(new),
        }
    }
}
