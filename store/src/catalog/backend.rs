//! The file below redb: operations on an engine of its own, one at a time, each to its end.
//!
//! redb calls it from any thread, so the engine is behind a lock. It fails with the error of the
//! operation; redb then refuses everything until the catalog is opened again, and whoever has the catalog is told.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use redb::StorageBackend;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::{Outcome, perform};
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::FileOffset;

/// Most bytes of one operation.
const TRANSFER_BYTES: usize = 1 << 20;

/// A file for redb.
pub(super) struct Backend<E: Engine> {
    file: E::File,
    engine: Mutex<E>,
    /// Whether a sync is one.
    synced: bool,
    /// Whether anything has failed.
    failed: Arc<AtomicBool>,
}

impl<E: Engine> Backend<E> {
    /// Over a file that is opened through the page cache, and locked.
    pub(super) fn new(file: E::File, engine: E, synced: bool, failed: Arc<AtomicBool>) -> Self {
        Self { file, engine: Mutex::new(engine), synced, failed }
    }

    /// Takes note of a failure.
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        self.failed.fetch_or(result.is_err(), Ordering::AcqRel);
        result
    }

    fn run(&self, op: Op<E::File>) -> Outcome {
        // An engine is left between two operations, whatever happened.
        perform(&mut *self.engine.lock().unwrap_or_else(PoisonError::into_inner), op)
    }
}

impl<E: Engine> fmt::Debug for Backend<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Backend").field(&self.file).finish()
    }
}

impl<E: Engine + Send> StorageBackend for Backend<E> {
    fn len(&self) -> io::Result<u64> {
        self.noted(self.file.size())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        for (n, part) in (0..).zip(out.chunks_mut(TRANSFER_BYTES)) {
            let at = FileOffset(offset + n * TRANSFER_BYTES as u64);
            let outcome = self.run(Op::read(self.file.clone(), at, AlignedBuf::zeroed(part.len())));
            if self.noted(outcome.result.map_err(Into::into))? < part.len() {
                return self.noted(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            outcome.memory.unwrap_or_default().read_at(0, part);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let done = self.run(Op::Truncate { file: self.file.clone(), size: len }).result;
        self.noted(done.map(drop).map_err(Into::into))
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.synced {
            let done = self.run(Op::Sync { file: self.file.clone() }).result;
            self.noted(done.map_err(Into::into))?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (n, part) in (0..).zip(data.chunks(TRANSFER_BYTES)) {
            let at = FileOffset(offset + n * TRANSFER_BYTES as u64);
            let done = self.run(Op::write(self.file.clone(), at, AlignedBuf::from_slice(part))).result;
            self.noted(done.map_err(Into::into))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sapwood_blockdev::engine::BlockingEngine;
    use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage};

    use super::*;

    #[test]
    fn whatever_fails_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [7; 512]).unwrap();
        let open = |options: OpenOptions| {
            let failed = Arc::<AtomicBool>::default();
            let file = HostStorage.open(&path, options.buffered()).unwrap();
            (Backend::new(file, BlockingEngine::new().unwrap(), true, Arc::clone(&failed)), failed)
        };
        let (backend, failed) = open(OpenOptions::READ);
        let mut bytes = [0; 512];
        backend.read(0, &mut bytes).unwrap();
        assert_eq!((bytes, backend.len().unwrap(), failed.load(Ordering::Acquire)), ([7; 512], 512, false));
        assert!(backend.read(512, &mut bytes).is_err(), "beyond its end");
        assert!(failed.load(Ordering::Acquire));
        backend.read(0, &mut bytes).unwrap();
        assert!(failed.load(Ordering::Acquire), "for good");
        let (backend, failed) = open(OpenOptions::READ);
        assert!(backend.write(0, &bytes).is_err() && failed.load(Ordering::Acquire), "only for reading");
        let (backend, failed) = open(OpenOptions::READ);
        assert!(backend.set_len(0).is_err() && failed.load(Ordering::Acquire));
    }
}
