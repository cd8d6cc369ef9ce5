//! Operations on volumes that guests may be using: attaching, detaching, snapshots, changes of size.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_store::catalog::Look;
use sapwood_store::{Id, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Done, Made, Resized, Serving};
use super::attached::{Attached, Serve, read_alone, resize_alone, tuning};
use super::operation::{Long, Quick, operation};
use super::service::Service;
use super::transfer::check_absolute;
use crate::control::jobs::Job;
use crate::control::wire::Failure;

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
    /// Only until the daemon ends: the next one does not attach it again.
    #[serde(default)]
    pub transient: bool,
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

/// What is asked for of how to serve something.
#[derive(Default)]
struct Asked {
    socket: Option<PathBuf>,
    queues: Option<u16>,
    map_cache: Option<u64>,
    transient: bool,
}

operation!(AttachVolume: Post "/v1/volumes/{volume}/attach" -> Serving);
operation!(AttachSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/attach" -> Serving);
operation!(DetachSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/detach" -> Done);
operation!(DetachVolume: Post "/v1/volumes/{volume}/detach" -> Done);
operation!(TakeSnapshot: Post "/v1/volumes/{volume}/snapshots" -> Made);
operation!(ResizeVolume: Post "/v1/volumes/{volume}/resize" -> Resized);
operation!(ReadVolume: Post "/v1/volumes/{volume}/read" -> Data);

/// How to serve what is called `name`. What is not given is as it was where it could not be attached again, unless it is to be
/// served for a while only.
fn how(service: &Service, id: Id, name: &str, asked: Asked) -> Result<Serve, Failure> {
    let sockets = sockets(service, name)?;
    let recorded = service.memory().filter(|_| !asked.transient).and_then(|memory| memory.recorded(id));
    let mut serve = recorded.unwrap_or_else(|| Serve {
        socket: sockets.join(format!("{name}.sock")),
        queues: 1,
        serial: name.to_owned(),
        tuning: tuning(),
        transient: asked.transient,
    });
    if let Some(socket) = asked.socket {
        check_absolute(&socket)?;
        serve.socket = socket;
    }
    serve.queues = asked.queues.unwrap_or(serve.queues);
    serve.tuning.map_cache_bytes = asked.map_cache.unwrap_or(serve.tuning.map_cache_bytes);
    Ok(serve)
}

/// The folder for sockets; none where nothing can be attached.
fn sockets<'a>(service: &'a Service, name: &str) -> Result<&'a Path, Failure> {
    service.sockets().ok_or_else(|| {
        let text =
            "a volume is attached by the daemon of its store: start sapwood daemon, or use sapwood serve";
        Failure::new("no-daemon", format!("{name}: {text}"))
    })
}

impl Quick for AttachVolume {
    fn run(self, service: &Arc<Service>) -> Result<Serving, Failure> {
        let Self { volume, socket, queues, map_cache, transient } = self;
        sockets(service, &volume)?;
        let id = service.volume(&volume)?;
        let serve = how(service, id, &volume, Asked { socket, queues, map_cache, transient })?;
        served(service, &volume, Attached::volume(service, &volume, serve)?)
    }
}

impl Quick for AttachSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Serving, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let shown = name.to_string();
        sockets(service, &shown)?;
        let id = service.snapshot(&name)?;
        if service.attached(id).is_some() {
            return Err(attached_already(shown));
        }
        let asked = Asked { socket: self.socket, queues: self.queues, ..Asked::default() };
        let serve = how(service, id, &shown, asked)?;
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
    if !attached.serve().transient {
        forget(service, attached.id());
    }
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
    // Whoever had it for a while only does not know how it was attached before.
    let is_transient = attached.as_ref().is_some_and(|attached| attached.serve().transient);
    let was_there = !is_transient && forget(service, id) || attached.is_some();
    // Also where it was not there: it may be that it could not be written down when it was detached.
    let remembered = service.remember();
    if let Some(attached) = attached {
        attached.detach(service)?;
    }
    remembered?;
    if !was_there {
        return Err(Failure::new("not-found", format!("{name}: it is not attached")));
    }
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
