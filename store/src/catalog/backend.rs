//! The file below redb: operations on an engine of its own, one at a time, each to its end.
//!
//! redb calls it from any thread, so the engine is behind a lock. It fails with the error of the
//! operation; redb then refuses everything until the catalog is opened again.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

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
}

impl<E: Engine> Backend<E> {
    /// Over a file that is opened through the page cache, and locked.
    pub(super) fn new(file: E::File, engine: E, synced: bool) -> Self {
        Self { file, engine: Mutex::new(engine), synced }
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
        self.file.size()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        for (n, part) in (0..).zip(out.chunks_mut(TRANSFER_BYTES)) {
            let at = FileOffset(offset + n * TRANSFER_BYTES as u64);
            let outcome = self.run(Op::read(self.file.clone(), at, AlignedBuf::zeroed(part.len())));
            if outcome.result? < part.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            outcome.memory.unwrap_or_default().read_at(0, part);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.run(Op::Truncate { file: self.file.clone(), size: len }).result?;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.synced {
            self.run(Op::Sync { file: self.file.clone() }).result?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (n, part) in (0..).zip(data.chunks(TRANSFER_BYTES)) {
            let at = FileOffset(offset + n * TRANSFER_BYTES as u64);
            self.run(Op::write(self.file.clone(), at, AlignedBuf::from_slice(part))).result?;
        }
        Ok(())
    }
}
