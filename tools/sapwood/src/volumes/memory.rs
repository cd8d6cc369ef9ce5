//! What is attached, written down: the next daemon of the store attaches it again, at the same sockets.
//!
//! The file lies in the folder for sockets and is replaced whole: another one is written, synced and renamed over it. It says
//! what is attached by id, so that a name may change meanwhile. Whoever reads it believes nothing in it: it is
//! bounded, and what it says is attached in the same way as what is asked for at the control socket.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use sapwood_image::layer::Tuning;
use sapwood_store::catalog::{Look, View};
use sapwood_store::{Id, Name, SnapshotName};
use serde::{Deserialize, Serialize};

use super::attached::{Attached, Serve};
use super::live::enter;
use super::service::Service;
use super::transfer::check_absolute;
use crate::control::wire::Failure;

/// The only version of the file that there is.
const VERSION: u32 = 0;
/// Longest file in bytes: some ten thousand volumes.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// What is attached again at the same time: opening one waits for storage.
const RESTORED_AT_ONCE: usize = 8;

/// Something that was attached, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Record {
    /// The volume or snapshot.
    id: Id,
    socket: PathBuf,
    queues: u16,
    /// What guests see as the disk's serial number: its name when it was attached.
    serial: String,
    /// Memory for the map of a volume's layer, in bytes.
    map_cache: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Contents {
    version: u32,
    attached: Vec<Record>,
}

/// The file of one daemon.
pub struct Memory {
    path: PathBuf,
    /// What could not be attached again, and why: it stays written down. Whoever writes the file has the lock.
    failed: Mutex<BTreeMap<Id, (Record, String)>>,
}

impl Record {
    /// Something that is served.
    pub fn new(id: Id, serve: &Serve) -> Self {
        let Serve { socket, queues, serial, tuning } = serve.clone();
        Self { id, socket, queues, serial, map_cache: tuning.map_cache_bytes }
    }

    fn serve(&self) -> Serve {
        let Self { socket, queues, serial, map_cache, .. } = self.clone();
        Serve { socket, queues, serial, tuning: Tuning { map_cache_bytes: map_cache, ..Tuning::default() } }
    }
}

impl Memory {
    /// The file of the daemon of a store, in its folder for sockets, which another store may use, too.
    pub fn new(sockets: &Path, store: Id) -> Self {
        Self { path: sockets.join(format!("attached-{store}.json")), failed: Mutex::default() }
    }

    fn failed(&self) -> MutexGuard<'_, BTreeMap<Id, (Record, String)>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why something could not be attached again.
    pub fn failure(&self, id: Id) -> Option<String> {
        self.failed().get(&id).map(|(_, why)| why.clone())
    }

    /// Forgets what could not be attached again, as far as `save` goes; whether there was such a thing.
    pub fn forget(&self, id: Id) -> bool {
        self.failed().remove(&id).is_some()
    }

    /// Writes down what is attached now, and what could not be attached again.
    pub fn save(&self, attached: impl FnOnce() -> Vec<Record>) -> Result<(), Failure> {
        let failed = self.failed();
        let mut attached = attached();
        attached.extend(failed.values().map(|(record, _)| record.clone()));
        self.write(attached).map_err(|error| {
            let text = format!("{}: cannot write down what is attached: {error}", self.path.display());
            Failure::new("io", text)
        })
    }

    fn write(&self, attached: Vec<Record>) -> io::Result<()> {
        let text = serde_json::to_vec(&Contents { version: VERSION, attached })?;
        let new = self.path.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }

    fn read(&self) -> io::Result<Vec<Record>> {
        let mut text = Vec::new();
        match self.path.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Ok(metadata) if !metadata.is_file() => return Err(io::Error::other("it is no file")),
            _ => File::open(&self.path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?,
        };
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(io::Error::other(format!("it is longer than {FILE_BYTES_MAX} bytes")));
        }
        let contents: Contents = serde_json::from_slice(&text)?;
        match contents.version {
            VERSION => Ok(contents.attached),
            other => Err(io::Error::other(format!("version {other} is not known"))),
        }
    }

    /// Attaches everything again that is written down. What is not in the store any more is forgotten; what cannot be attached
    /// keeps nothing else from it.
    pub fn restore(&self, service: &Service) -> Result<(), Failure> {
        let records = self.read().unwrap_or_else(|error| {
            let text = format!("{}: nothing is attached again: {error}", self.path.display());
            service.warn("attach-failed", text);
            Vec::new()
        });
        let next = Mutex::new(records.into_iter());
        let take = || next.lock().unwrap_or_else(PoisonError::into_inner).next();
        thread::scope(|scope| {
            for _ in 0..RESTORED_AT_ONCE {
                scope.spawn(|| {
                    while let Some(record) = take() {
                        self.restore_one(service, record);
                    }
                });
            }
        });
        // What was written down twice.
        self.failed().retain(|id, _| service.attached(*id).is_none());
        service.remember()
    }

    fn restore_one(&self, service: &Service, record: Record) {
        let socket = record.socket.display();
        match attach(service, &record) {
            Ok(Some(name)) => service.note("attached", format!("{name} is attached again at {socket}")),
            Ok(None) => log::info!("{}: it was attached at {socket}, and is deleted", record.serial),
            Err(error) => {
                service.warn("attach-failed", format!("{socket}: it cannot be attached again: {error}"));
                self.failed().insert(record.id, (record, error.message));
            }
        }
    }
}

/// Attaches something again; its name, unless it is deleted.
fn attach(service: &Service, record: &Record) -> Result<Option<Name>, Failure> {
    check_absolute(&record.socket)?;
    let Some(name) = name_of(&service.store().catalog().view()?, record.id)? else { return Ok(None) };
    let attached: Arc<Attached> = match &name {
        Name::Volume(name) => Attached::volume(service, name, record.serve())?,
        Name::Snapshot(name) => Attached::snapshot(service, name, record.serve())?,
    };
    enter(service, &attached, &name)?;
    Ok(Some(name))
}

/// What has this id; none: nothing that has a name.
fn name_of(view: &View, id: Id) -> Result<Option<Name>, Failure> {
    if let Some(row) = view.volume(id)? {
        return Ok(Some(Name::Volume(row.name)));
    }
    let Some(row) = view.node(id)? else { return Ok(None) };
    let (Some(snapshot), Some(volume)) = (row.name, row.volume) else { return Ok(None) };
    let volume = view.volume(volume)?;
    Ok(volume.map(|row| Name::Snapshot(SnapshotName { volume: row.name, snapshot })))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn record(n: u8) -> Record {
        let socket = format!("/run/{n}.sock").into();
        Record { id: Id([n; 16]), socket, queues: 2, serial: "före".into(), map_cache: 1 << 20 }
    }

    #[test]
    fn what_was_written_down_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::new(folder.path(), Id([7; 16]));
        assert_eq!(memory.read().unwrap(), []);
        memory.failed().insert(Id([3; 16]), (record(3), "why".into()));
        memory.save(|| vec![record(1), record(2)]).unwrap();
        assert_eq!(memory.read().unwrap(), [record(1), record(2), record(3)]);
        assert!(memory.forget(Id([3; 16])) && !memory.forget(Id([3; 16])));
        memory.save(|| vec![record(1)]).unwrap();
        assert_eq!(memory.read().unwrap(), [record(1)]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::new(folder.path(), Id([7; 16]));
        memory.save(|| vec![record(1)]).unwrap();
        let sound = fs::read_to_string(&memory.path).unwrap();
        let wrong = |text: &str, why: &str| {
            fs::write(&memory.path, text).unwrap();
            let error = memory.read().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        };
        wrong("", "EOF");
        wrong(&sound[..sound.len() - 1], "EOF");
        wrong(&sound.replace(r#""version":0"#, r#""version":1"#), "version 1");
        wrong(&sound.replace(r#""queues":2"#, r#""queues":65536"#), "65536");
        wrong(&sound.replace(r#""queues""#, r#""colour":1,"queues""#), "colour");
        wrong(&" ".repeat(FILE_BYTES_MAX as usize + 1), "longer than");
        fs::remove_file(&memory.path).unwrap();
        symlink("elsewhere", &memory.path).unwrap();
        assert_eq!(memory.read().unwrap_err().to_string(), "it is no file");
    }
}
