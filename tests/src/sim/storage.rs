//! Files of a simulated world: opening, locking, identifying.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::storage::{
    Alignment, FileIdentity, Lock, LockError, OpenOptions, Storage, StorageFile,
};

use super::names::FileId;
use super::world::{ProcessId, World};

/// An open file description: what clones of a [`SimFile`] share, and what a lock belongs to.
pub struct Description {
    /// Distinguishes descriptions.
    pub id: u64,
    /// The file.
    pub file: FileId,
    /// Who opened it. When the process dies only operations in flight keep the description open,
    /// whatever a test still holds.
    pub process: ProcessId,
    /// Whether it was opened for writing.
    pub write: bool,
    path: PathBuf,
    alignment: Alignment,
}

/// The file system of a world as one process sees it.
#[derive(Clone)]
pub struct SimStorage {
    world: World,
    process: ProcessId,
}

/// An open file of a world.
#[derive(Clone)]
pub struct SimFile {
    world: World,
    description: Arc<Description>,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.description.path.display(), self.description.id)
    }
}

impl SimFile {
    /// What the clones share.
    pub fn description(&self) -> &Arc<Description> {
        &self.description
    }
}

impl SimStorage {
    pub(super) fn new(world: World, process: ProcessId) -> Self {
        Self { world, process }
    }

    /// Removes a name at once, if the process is alive and it is there.
    pub fn unlink_now(&self, path: &Path) {
        let mut state = self.world.state();
        if state.check_alive(self.process).is_ok() && state.names.get(path).is_some() {
            state.names.unlink(path);
        }
    }

    /// The world.
    pub fn world(&self) -> &World {
        &self.world
    }
}

impl Storage for SimStorage {
    type File = SimFile;

    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<SimFile> {
        let mut state = self.world.state();
        state.check_alive(self.process)?;
        let file = match (state.names.get(path), options.create_new) {
            (Some(_), true) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(file), false) => file,
            (None, false) => return Err(io::ErrorKind::NotFound.into()),
            (None, true) => state.create(path),
        };
        let unit = if options.direct { state.config.alignment } else { 1 };
        let description = Arc::new(Description {
            id: state.next_id(),
            file,
            process: self.process,
            write: options.write,
            path: path.to_owned(),
            alignment: Alignment { memory: unit, offset: unit },
        });
        state.opened(&description);
        drop(state);
        Ok(SimFile { world: self.world.clone(), description })
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.world.state().random.fill(bytes);
        Ok(())
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.world.state();
        state.check_alive(self.process)?;
        match state.names.make_directory(path) {
            true => Ok(()),
            false => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn list_directory(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let names = self.world.state().names.list(path);
        names.map(|names| names.into_iter().collect()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl StorageFile for SimFile {
    fn path(&self) -> &Path {
        &self.description.path
    }

    fn is_device(&self) -> bool {
        self.world.state().files[self.description.file].is_device
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.description) > 1
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.world.state().files[self.description.file].medium.size())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.world.state().files[self.description.file].medium.allocated())
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        let state = self.world.state();
        let file = &state.files[self.description.file];
        let mtime_ns = if file.is_device { 0 } else { file.mtime_ns };
        Ok(FileIdentity { size: file.medium.size(), mtime_ns })
    }

    fn alignment(&self) -> Alignment {
        self.description.alignment
    }

    fn lock(&self, lock: Lock) -> Result<(), LockError> {
        let mut state = self.world.state();
        match state.lock(&self.description, lock) {
            None => Ok(()),
            Some(holder) => Err(LockError::Held(Some(format!("process {holder}")))),
        }
    }

    fn unlock(&self) -> io::Result<()> {
        self.world.state().unlock(&self.description);
        Ok(())
    }
}
