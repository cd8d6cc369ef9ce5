//! What is attached, written down: the next daemon of the store attaches it again, at the same sockets.
//!
//! The file lies in the folder for sockets and is replaced whole: another one is written, synced and renamed over it. It says
//! what is attached by id, so that a name may change meanwhile. Whoever reads it believes nothing in it: it is
//! bounded, and what it says is attached in the same way as what is asked for at the control socket.
//!
//! A store may be moved or copied with the file in it: sockets in the folder are named without it, and others are only
//! used where the store still is where it was. A copy must not take the sockets of the original.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use sapwood_image::layer::Tuning;
use sapwood_store::catalog::{Look, View};
use sapwood_store::{Id, Name, SnapshotName};
use serde::{Deserialize, Serialize};

use super::attached::{Attached, Serve, tuning};
use super::live::enter;
use super::service::Service;
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
struct Record {
    /// The volume or snapshot.
    id: Id,
    /// Where the store was.
    root: PathBuf,
    /// A name in the folder for sockets, or an absolute path.
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
    /// Where the store is, without links.
    root: PathBuf,
    /// The folder for sockets.
    folder: PathBuf,
    path: PathBuf,
    /// Whoever writes the file has the lock.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What could not be attached again, and why: it stays written down.
    failed: BTreeMap<Id, (Record, String)>,
    /// What the file says; none: nobody knows.
    written: Option<Vec<Record>>,
    /// It could not be read, and is kept under another name.
    is_odd: bool,
}

impl Memory {
    /// The file of the daemon of the store in `root`, in its folder for sockets, which another store may use, too.
    pub fn new(root: &Path, folder: &Path, store: Id) -> io::Result<Self> {
        let path = folder.join(format!("attached-{store}.json"));
        Ok(Self { root: root.canonicalize()?, folder: folder.to_owned(), path, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why something could not be attached again.
    pub fn failure(&self, id: Id) -> Option<String> {
        self.state().failed.get(&id).map(|(_, why)| why.clone())
    }

    /// How something was attached that could not be attached again; none where that may be the business of another store.
    pub fn recorded(&self, id: Id) -> Option<Serve> {
        self.state().failed.get(&id).and_then(|(record, _)| self.serve(record).ok())
    }

    /// Forgets what could not be attached again, as far as `save` goes; whether there was such a thing.
    pub fn forget(&self, id: Id) -> bool {
        self.state().failed.remove(&id).is_some()
    }

    /// What is written down of something.
    fn record(&self, id: Id, serve: Serve) -> Record {
        let Serve { socket, queues, serial, tuning, .. } = serve;
        let inside = socket.file_name().filter(|_| socket.parent() == Some(&self.folder));
        let socket = inside.map(PathBuf::from).unwrap_or(socket);
        Record { id, root: self.root.clone(), socket, queues, serial, map_cache: tuning.map_cache_bytes }
    }

    /// How to serve something again.
    fn serve(&self, record: &Record) -> Result<Serve, Failure> {
        let Record { root, socket, queues, serial, map_cache, .. } = record.clone();
        let invalid = |text: String| Failure::new("invalid", format!("{}: {text}", socket.display()));
        let is_name = socket.file_name() == Some(OsStr::new(&socket));
        if !is_name && !socket.is_absolute() {
            return Err(invalid("that is neither an absolute path nor a name".to_owned()));
        }
        let is_own = is_name && self.folder.canonicalize().is_ok_and(|folder| folder.starts_with(&self.root));
        if !is_own && root != self.root {
            let text = format!("the store was at {}, and may still be: attach it anew", root.display());
            return Err(invalid(text));
        }
        let tuning = Tuning { map_cache_bytes: map_cache, ..tuning() };
        Ok(Serve { socket: self.folder.join(&socket), queues, serial, tuning, transient: false })
    }

    /// Writes down what is attached now, and what could not be attached again, unless the file says that already.
    pub fn save(&self, attached: impl FnOnce() -> Vec<(Id, Serve)>) -> Result<(), Failure> {
        let mut state = self.state();
        let lasting = attached().into_iter().filter(|(_, serve)| !serve.transient);
        let mut records: Vec<Record> = lasting.map(|(id, serve)| self.record(id, serve)).collect();
        records.extend(state.failed.values().map(|(record, _)| record.clone()));
        records.sort_by_key(|record| record.id);
        if state.written.as_ref() == Some(&records) {
            return Ok(());
        }
        state.written = None;
        self.write(&mut state, &records).map_err(|error| {
            let text = format!("{}: cannot write down what is attached: {error}", self.path.display());
            Failure::new("io", text)
        })?;
        state.written = Some(records);
        Ok(())
    }

    fn write(&self, state: &mut State, records: &[Record]) -> io::Result<()> {
        if state.is_odd {
            fs::rename(&self.path, self.kept())?;
            state.is_odd = false;
        }
        let text = serde_json::to_vec(&Contents { version: VERSION, attached: records.to_vec() })?;
        let new = self.path.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// What a file is called that could not be read.
    fn kept(&self) -> PathBuf {
        self.path.with_extension("json.bad")
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
    pub fn restore(&self, service: &Service) {
        let records = match self.read() {
            Ok(records) => {
                self.state().written = Some(records.clone());
                records
            }
            Err(error) => {
                let (path, kept) = (self.path.display(), self.kept());
                let text = format!("{path}: nothing is attached again, see {}: {error}", kept.display());
                service.warn("attach-failed", text);
                self.state().is_odd = true;
                Vec::new()
            }
        };
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
        self.state().failed.retain(|id, _| service.attached(*id).is_none());
        if let Err(error) = service.remember() {
            service.warn("attach-failed", error.message);
        }
    }

    fn restore_one(&self, service: &Service, record: Record) {
        let socket = record.socket.display();
        match self.attach(service, &record) {
            Ok(Some(name)) => service.note("attached", format!("{name} is attached again at {socket}")),
            Ok(None) => log::info!("{}: it was attached at {socket}, and is deleted", record.serial),
            Err(error) => {
                let text = format!("{} at {socket}: it cannot be attached again: {error}", record.serial);
                service.warn("attach-failed", text);
                self.state().failed.insert(record.id, (record, error.message));
            }
        }
    }

    /// Attaches something again; its name, unless it is deleted.
    fn attach(&self, service: &Service, record: &Record) -> Result<Option<Name>, Failure> {
        let Some(name) = name_of(&service.store().catalog().view()?, record.id)? else { return Ok(None) };
        let serve = self.serve(record)?;
        let attached: Arc<Attached> = match &name {
            Name::Volume(name) => Attached::volume(service, name, serve)?,
            Name::Snapshot(name) => Attached::snapshot(service, name, serve)?,
        };
        enter(service, &attached, &name)?;
        Ok(Some(name))
    }
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

    fn id(n: u8) -> Id {
        Id([n; 16])
    }

    fn serve(socket: impl Into<PathBuf>) -> Serve {
        Serve { socket: socket.into(), queues: 2, serial: "före".into(), tuning: tuning(), transient: false }
    }

    fn memory(root: &Path) -> Memory {
        fs::create_dir_all(root.join("sockets")).unwrap();
        Memory::new(root, &root.join("sockets"), id(7)).unwrap()
    }

    #[test]
    fn what_was_written_down_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(folder.path());
        assert_eq!(memory.read().unwrap(), []);
        let record = |n: u8| memory.record(id(n), serve(format!("/run/{n}")));
        memory.state().failed.insert(id(2), (record(2), "why".into()));
        let attached = || vec![(id(1), serve("/run/1")), (id(3), serve("/run/3"))];
        memory.save(attached).unwrap();
        assert_eq!(memory.read().unwrap(), [record(1), record(2), record(3)]);
        // There is nothing new to write.
        fs::remove_file(&memory.path).unwrap();
        memory.save(attached).unwrap();
        assert!(!memory.path.exists());
        assert!(memory.forget(id(2)) && !memory.forget(id(2)));
        memory
            .save(|| vec![(id(1), serve("/run/1")), (id(4), Serve { transient: true, ..serve("/run/4") })])
            .unwrap();
        assert_eq!(memory.read().unwrap(), [record(1)]);
        assert_eq!(fs::read_dir(&memory.folder).unwrap().count(), 1, "nothing else is left");
        // Nobody knows what is there when writing has failed.
        fs::create_dir(memory.path.with_extension("json.new")).unwrap();
        assert!(memory.save(Vec::new).is_err());
        fs::remove_dir(memory.path.with_extension("json.new")).unwrap();
        memory.save(|| vec![(id(1), serve("/run/1"))]).unwrap();
        assert_eq!(memory.read().unwrap(), [record(1)]);
    }

    #[test]
    fn a_copy_takes_no_socket_of_the_original() {
        let folder = tempfile::tempdir().unwrap();
        let original = memory(&folder.path().join("vms"));
        let copy = memory(&folder.path().join("copy"));
        let inside = original.record(id(1), serve(original.folder.join("a.sock")));
        assert_eq!(inside.socket, Path::new("a.sock"));
        assert_eq!(copy.serve(&inside).unwrap().socket, copy.folder.join("a.sock"));
        let outside = original.record(id(1), serve("/run/a.sock"));
        assert_eq!(original.serve(&outside).unwrap().socket, Path::new("/run/a.sock"));
        assert!(copy.serve(&outside).unwrap_err().message.contains("anew"));
        // A folder that both use.
        let shared = |root: &str| Memory::new(&folder.path().join(root), folder.path(), id(7)).unwrap();
        let inside = shared("vms").record(id(1), serve(folder.path().join("a.sock")));
        assert!(shared("vms").serve(&inside).is_ok() && shared("copy").serve(&inside).is_err());
        for socket in ["../a.sock", ".", "..", "", "./a.sock"] {
            let record = Record { socket: socket.into(), ..inside.clone() };
            assert!(shared("vms").serve(&record).unwrap_err().message.contains("absolute"), "{socket}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(folder.path());
        memory.save(|| vec![(id(1), serve("/run/1"))]).unwrap();
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
