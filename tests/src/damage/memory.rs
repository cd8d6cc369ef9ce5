//! Files in memory, and an engine that works on them at once and counts what it does.
//!
//! Not a simulation: nothing is reordered or fails. It is fast, has nothing outside the process,
//! and bounds the number of operations, so that a loop over hostile bytes is a panic.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::{Completion, Engine, Op, Time, Transfer};
use sapwood_blockdev::storage::{
    Alignment, FileIdentity, Lock, LockError, OpenOptions, Storage, StorageFile,
};

const PAGE: u64 = 4096;
/// Largest file, as on ext4.
const FILE_MAX: u64 = 16 << 40;

#[derive(Default)]
struct Contents {
    pages: BTreeMap<u64, Box<[u8]>>,
    size: u64,
    shared: usize,
    exclusive: bool,
}

#[derive(Default)]
struct Disk {
    files: BTreeMap<PathBuf, Arc<Mutex<Contents>>>,
    operations: u64,
    operations_max: u64,
    randomness: u64,
}

/// A file system in memory; clones are the same one.
#[derive(Clone)]
pub struct MemoryStorage(Arc<Mutex<Disk>>);

/// An open file of a [`MemoryStorage`].
#[derive(Clone, Debug)]
pub struct MemoryFile(Arc<Description>);

struct Description {
    path: PathBuf,
    contents: Arc<Mutex<Contents>>,
    lock: Mutex<Option<Lock>>,
}

impl std::fmt::Debug for Description {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Contents {
    fn of(bytes: &[u8]) -> Self {
        let mut contents = Self::default();
        contents.write(0, bytes);
        contents
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> usize {
        let len = self.size.saturating_sub(offset).min(to.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let (page, skip, n) = part(offset + done as u64, len - done);
            match self.pages.get(&page) {
                Some(bytes) => to[done..done + n].copy_from_slice(&bytes[skip..skip + n]),
                None => to[done..done + n].fill(0),
            }
            done += n;
        }
        len
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let (page, skip, n) = part(offset + done as u64, from.len() - done);
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[skip..skip + n].copy_from_slice(&from[done..done + n]);
            done += n;
        }
        self.size = self.size.max(offset + from.len() as u64);
    }

    fn truncate(&mut self, size: u64) {
        self.pages.split_off(&size.div_ceil(PAGE));
        if let Some(page) = self.pages.get_mut(&(size / PAGE)) {
            page[(size % PAGE) as usize..].fill(0);
        }
        self.size = size;
    }

    fn punch(&mut self, offset: u64, len: u64) {
        let pages: Vec<u64> =
            self.pages.range(offset.div_ceil(PAGE)..(offset + len) / PAGE).map(|(page, _)| *page).collect();
        pages.iter().for_each(|page| drop(self.pages.remove(page)));
    }
}

/// The first page of a range, where in it the range starts, and how much of it lies there.
fn part(offset: u64, len: usize) -> (u64, usize, usize) {
    let skip = (offset % PAGE) as usize;
    (offset / PAGE, skip, len.min(PAGE as usize - skip))
}

impl MemoryStorage {
    /// No files; engines perform at most `operations_max` operations, then they panic.
    pub fn new(operations_max: u64) -> Self {
        Self(Arc::new(Mutex::new(Disk { operations_max, ..Disk::default() })))
    }

    /// Puts a file there.
    pub fn install(&self, path: &Path, bytes: &[u8]) {
        locked(&self.0).files.insert(path.to_owned(), Arc::new(Mutex::new(Contents::of(bytes))));
    }

    /// The bytes of a file.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let contents = locked(&self.0).files.get(path).cloned()?;
        let contents = locked(&contents);
        let mut bytes = vec![0; contents.size as usize];
        contents.read(0, &mut bytes);
        Some(bytes)
    }

    /// An engine on these files.
    pub fn engine(&self) -> MemoryEngine {
        MemoryEngine { storage: self.clone(), done: Vec::new(), now: Time::ZERO, woken: Arc::default() }
    }

    fn perform(&self, op: &mut Op<MemoryFile>) -> Result<usize, Errno> {
        let mut disk = locked(&self.0);
        disk.operations += 1;
        assert!(disk.operations <= disk.operations_max, "more than {} operations", disk.operations_max);
        drop(disk);
        match op {
            Op::Read(transfer) => {
                let mut bytes = vec![0; transfer.wanted()];
                let Transfer { file, offset, memory, done, .. } = transfer;
                let read = locked(&file.0.contents).read(offset.0 + *done as u64, &mut bytes);
                memory.write_at(*done, &bytes[..read]);
                Ok(read)
            }
            Op::Write(transfer) => {
                let mut bytes = vec![0; transfer.wanted()];
                let Transfer { file, offset, memory, done, .. } = transfer;
                memory.read_at(*done, &mut bytes);
                if offset.0 + memory.len() as u64 > FILE_MAX {
                    return Err(Errno::FBIG);
                }
                locked(&file.0.contents).write(offset.0 + *done as u64, &bytes);
                Ok(bytes.len())
            }
            Op::Allocate { offset, len, .. } if offset.0 + *len > FILE_MAX => Err(Errno::FBIG),
            Op::Allocate { file, offset, len } => {
                let mut contents = locked(&file.0.contents);
                contents.size = contents.size.max(offset.0 + *len);
                Ok(0)
            }
            Op::Punch { file, offset, len } | Op::Discard { file, offset, len } => {
                locked(&file.0.contents).punch(offset.0, *len);
                Ok(0)
            }
            Op::Truncate { file, size } => {
                locked(&file.0.contents).truncate(*size);
                Ok(0)
            }
            Op::Unlink { path } => {
                locked(&self.0).files.remove(path);
                Ok(0)
            }
            Op::Sync { .. } | Op::SyncAll { .. } | Op::SyncDirectory { .. } => Ok(0),
            Op::Rename { .. } => Err(Errno::NOSYS),
        }
    }
}

impl Storage for MemoryStorage {
    type File = MemoryFile;

    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<MemoryFile> {
        let mut disk = locked(&self.0);
        let contents = match (disk.files.get(path), options.create_new) {
            (Some(_), true) => return Err(io::ErrorKind::AlreadyExists.into()),
            (None, false) => return Err(io::ErrorKind::NotFound.into()),
            (Some(contents), false) => Arc::clone(contents),
            (None, true) => Arc::clone(disk.files.entry(path.to_owned()).or_default()),
        };
        let description = Description { path: path.to_owned(), contents, lock: Mutex::default() };
        Ok(MemoryFile(Arc::new(description)))
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut disk = locked(&self.0);
        disk.randomness += 1;
        crate::sim::rng::Rng::new(disk.randomness).fill(bytes);
        Ok(())
    }

    /// Every directory is there.
    fn create_directory(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn list_directory(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let disk = locked(&self.0);
        let inside = disk.files.keys().filter(|file| file.parent() == Some(path));
        Ok(inside.filter_map(|file| file.file_name().map(OsString::from)).collect())
    }
}

impl StorageFile for MemoryFile {
    fn path(&self) -> &Path {
        &self.0.path
    }

    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    fn size(&self) -> io::Result<u64> {
        Ok(locked(&self.0.contents).size)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(locked(&self.0.contents).pages.len() as u64 * PAGE)
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { size: self.size()?, mtime_ns: 1 })
    }

    fn alignment(&self) -> Alignment {
        Alignment { memory: 512, offset: 512 }
    }

    fn lock(&self, lock: Lock) -> Result<(), LockError> {
        let mut contents = locked(&self.0.contents);
        let free = !contents.exclusive && (lock == Lock::Shared || contents.shared == 0);
        if !free || locked(&self.0.lock).is_some() {
            return Err(LockError::Held(None));
        }
        *locked(&self.0.lock) = Some(lock);
        match lock {
            Lock::Shared => contents.shared += 1,
            Lock::Exclusive => contents.exclusive = true,
        }
        Ok(())
    }

    fn unlock(&self) -> io::Result<()> {
        self.0.unlock();
        Ok(())
    }
}

impl Description {
    fn unlock(&self) {
        let mut contents = locked(&self.contents);
        match locked(&self.lock).take() {
            Some(Lock::Shared) => contents.shared -= 1,
            Some(Lock::Exclusive) => contents.exclusive = false,
            None => {}
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        self.unlock();
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Performs each operation when it is submitted. Its clock moves only while a thread sleeps.
pub struct MemoryEngine {
    storage: MemoryStorage,
    done: Vec<Completion<MemoryFile>>,
    now: Time,
    woken: Arc<Woken>,
}

impl Engine for MemoryEngine {
    type File = MemoryFile;

    fn submit(&mut self, token: u64, mut op: Op<MemoryFile>) {
        let result = self.storage.perform(&mut op);
        self.done.push(Completion { token, result, op });
    }

    fn collect(&mut self, done: &mut Vec<Completion<MemoryFile>>) {
        done.append(&mut self.done);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        if !self.done.is_empty() || self.woken.0.swap(false, Ordering::AcqRel) {
            return;
        }
        self.now = deadline.expect("nothing will ever happen: a task waits for nobody").max(self.now);
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn now(&self) -> Time {
        self.now
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.woken))
    }
}
