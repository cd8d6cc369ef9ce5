//! Opening, locking and identifying host files.
//!
//! Set-up work only: every byte read or written afterwards goes through an
//! [`Engine`](crate::engine::Engine). Simulations implement both traits over files in memory.

mod host;
mod lock;
mod once;

pub(crate) use host::WeakHostFile;
pub use host::{HostFile, HostStorage};

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Open for reading and writing; otherwise for reading only.
    pub write: bool,
    /// Create the file; fail when it exists.
    pub create_new: bool,
    /// Bypass the page cache (O_DIRECT) where the file system can; where it cannot the file is
    /// opened buffered and [`StorageFile::alignment`] says so.
    pub direct: bool,
    /// Claim a block device that is opened for writing (open(2), O_EXCL): it is refused while it is
    /// mounted or claimed, and nobody can mount it meanwhile.
    pub claim: bool,
}

impl OpenOptions {
    /// Reading only, direct.
    pub const READ: Self = Self { write: false, create_new: false, direct: true, claim: true };
    /// Reading and writing, direct.
    pub const WRITE: Self = Self { write: true, create_new: false, direct: true, claim: true };
    /// A new file for reading and writing, direct.
    pub const CREATE: Self = Self { write: true, create_new: true, direct: true, claim: true };

    /// The same, through the page cache.
    #[must_use]
    pub const fn buffered(self) -> Self {
        Self { direct: false, ..self }
    }

    /// The same without a claim, for whoever has claimed the device already.
    #[must_use]
    pub const fn unclaimed(self) -> Self {
        Self { claim: false, ..self }
    }
}

/// What operations on a file must be aligned to, in bytes; powers of two (statx(2),
/// `STATX_DIOALIGN`). Both 1 when the file is buffered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Alignment of memory addresses.
    pub memory: usize,
    /// Alignment of file offsets and lengths.
    pub offset: usize,
}

impl Alignment {
    /// No constraint: buffered I/O.
    pub const NONE: Self = Self { memory: 1, offset: 1 };
}

/// What makes a file recognisable: a base whose identity changed is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Size in bytes (of the device, for a block device).
    pub size: u64,
    /// Last modification in nanoseconds since the epoch; 0 for a block device.
    pub mtime_ns: u64,
}

/// The strength of a lock on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Several readers, no writer.
    Shared,
    /// One writer, nobody else.
    Exclusive,
}

/// Why a lock was not granted.
#[derive(Debug)]
pub enum LockError {
    /// Somebody else holds it. The text names the holder as far as the system tells it, for
    /// example `process 4711 (sapwood serve)`.
    Held(Option<String>),
    /// The lock could not be tried.
    Io(io::Error),
}

/// The space of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystemSpace {
    /// All of it, in bytes.
    pub total: u64,
    /// What a program without special rights can still take, in bytes.
    pub free: u64,
}

/// Where files live.
pub trait Storage: Clone + Send + Sync + 'static {
    /// An open file; clones share one open file description.
    type File: StorageFile;

    /// Opens `path` (an existing file or block device) or creates it.
    ///
    /// # Errors
    /// What open(2) says; `AlreadyExists` when a file to be created exists; `ResourceBusy`, with
    /// the holder as its text, when a block device to be written is mounted or in use otherwise.
    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<Self::File>;

    /// Fills `bytes` with randomness for identifiers and nonces.
    ///
    /// # Errors
    /// What getrandom(2) says.
    fn random(&self, bytes: &mut [u8]) -> io::Result<()>;

    /// Makes a directory; durable after a sync of the one that it lies in.
    ///
    /// # Errors
    /// What mkdir(2) says; `AlreadyExists` when something of that name is there.
    fn create_directory(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// What opendir(3) and readdir(3) say.
    fn list_directory(&self, path: &Path) -> io::Result<Vec<OsString>>;

    /// The space of the file system that holds a path; `None` where nobody knows.
    ///
    /// # Errors
    /// What statvfs(3) says.
    fn space(&self, _path: &Path) -> io::Result<Option<FileSystemSpace>> {
        Ok(None)
    }
}

/// An open file. Clones are the same open file description, so a lock taken through one is held
/// until the last clone, including those lent to operations in flight, is gone.
pub trait StorageFile: Clone + Send + Sync + fmt::Debug + 'static {
    /// The path it was opened by, for messages.
    fn path(&self) -> &Path;

    /// Whether this is a block device: its size is fixed and all its space is there.
    fn is_device(&self) -> bool {
        false
    }

    /// Whether there are other clones, for example with operations in flight.
    fn is_shared(&self) -> bool;

    /// Size in bytes now; of the device, for a block device.
    ///
    /// # Errors
    /// What fstat(2) or the device says.
    fn size(&self) -> io::Result<u64>;

    /// Bytes of storage that the file occupies on its file system.
    ///
    /// # Errors
    /// What fstat(2) says.
    fn allocated(&self) -> io::Result<u64>;

    /// The first stretch of `range` that may hold data, by what the file system knows; `None` when
    /// it is all holes, which read as zeroes. May answer with everything.
    ///
    /// # Errors
    /// What lseek(2) says.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }

    /// What makes the file recognisable.
    ///
    /// # Errors
    /// What fstat(2) says.
    fn identity(&self) -> io::Result<FileIdentity>;

    /// What operations must be aligned to.
    fn alignment(&self) -> Alignment;

    /// Whether the storage takes back space that is not needed (a hole in a file, a discard on a
    /// device), as far as it says so without being asked to do it.
    fn gives_space_back(&self) -> Option<bool> {
        None
    }

    /// Notes in the log that it does not: once for each file system or device, since nothing is
    /// wrong and every file there is the same.
    fn note_no_space_back(&self) {}

    /// Takes, strengthens or weakens the lock without waiting.
    ///
    /// # Errors
    /// [`LockError::Held`] with the holder's name when somebody else holds it.
    fn lock(&self, lock: Lock) -> Result<(), LockError>;

    /// Gives the lock up, for another open file description of the same program to take it. Somebody
    /// else can be faster: whoever takes it must look at the file again.
    ///
    /// # Errors
    /// What flock(2) says.
    fn unlock(&self) -> io::Result<()>;
}
