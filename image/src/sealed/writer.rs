//! Making packs.
//!
//! A pack is written under a name of its own, synced, and then given its name; it is never changed afterwards. Its name is
//! durable when the directory has been synced, which whoever publishes packs does once for all of them.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use super::entries::EntryPages;
use super::hash::Hash;
use super::header::{PackHeader, PackId, PackKind};
use super::place::{PACK_BYTES_MAX, Place};
use super::record::NewRecord;
use super::trailer::Trailer;
use crate::error::ImageError;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::{Io, Outcome};
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};

/// Bytes of records after which a pack is full.
pub const PACK_BYTES: u64 = 64 << 20;
const _: () = assert!(PACK_BYTES + (Place::LEN_MAX as u64) < PACK_BYTES_MAX);

/// Blocks or nodes after which a pack is full, however small they have become: their list takes 18 MiB.
const PACK_ENTRIES: u32 = 1 << 19;

/// Bytes written at a time, and how many times so many are in flight, at most.
const CHUNK_LEN: usize = 1 << 20;
const WRITES: usize = 2;

/// A pack that is being made.
pub struct PackWriter<E: Engine> {
    io: Io<E>,
    file: E::File,
    /// Where the pack begins in it.
    start: u64,
    header: PackHeader,
    /// Its name when it is whole, and until then.
    path: PathBuf,
    unfinished: PathBuf,
    /// What has not been written, from byte `written` on.
    tail: Vec<u8>,
    /// Up to where writing was begun, and what of that has not ended.
    written: u64,
    writes: VecDeque<Pin<Box<dyn Future<Output = Outcome>>>>,
    /// The memory of a write that has ended.
    spare: Option<AlignedBuf>,
    records: u32,
    pages: EntryPages,
    /// In which page the entries of the last record begin, and how many are in it.
    last: (u32, usize),
}

/// A pack that is whole, and durable but for its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its number.
    pub number: u32,
    /// Its id.
    pub id: PackId,
    /// What it holds.
    pub kind: PackKind,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Blocks or nodes in it.
    pub entries: u32,
    /// The file.
    pub path: PathBuf,
}

impl<E: Engine> PackWriter<E> {
    /// Begins pack `number` in a directory.
    ///
    /// # Errors
    /// When the file exists, or cannot be made.
    pub fn create<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        directory: &Path,
        number: u32,
        kind: PackKind,
    ) -> Result<Self, ImageError> {
        let path = directory.join(pack_name(number));
        // Whoever has read a pack of that number goes on believing what it was.
        if storage.open(&path, OpenOptions::READ.buffered()).is_ok() {
            return Err(ImageError::open(&path, std::io::ErrorKind::AlreadyExists.into()));
        }
        let unfinished = path.with_extension("pack.tmp");
        let mut id = PackId([0; 16]);
        storage.random(&mut id.0).map_err(|e| ImageError::io(&path, "choose an id for", e))?;
        let file =
            storage.open(&unfinished, OpenOptions::CREATE).map_err(|e| ImageError::open(&unfinished, e))?;
        Ok(Self::of(io, file, PackHeader { id, kind, number }, path, unfinished))
    }

    /// Begins a pack that becomes a part of a file.
    pub(super) fn section(io: &Io<E>, file: E::File, header: PackHeader) -> Self {
        let path = file.path().to_owned();
        Self::of(io, file, header, path.clone(), path)
    }

    fn of(io: &Io<E>, file: E::File, header: PackHeader, path: PathBuf, unfinished: PathBuf) -> Self {
        let (tail, pages) = (header.encode(), EntryPages::default());
        let (start, written, records) = (0, 0, 0);
        Self {
            io: io.clone(),
            file,
            start,
            header,
            path,
            unfinished,
            tail,
            written,
            writes: VecDeque::new(),
            spare: None,
            records,
            pages,
            last: (0, 0),
        }
    }

    /// Says where in the file the pack begins, a multiple of 4096, before any of it is written.
    pub(super) fn begin_at(&mut self, start: u64) {
        assert!(self.written == 0 && start.is_multiple_of(BLOCK_SIZE), "before anything is written");
        self.start = start;
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.header.number
    }

    /// What it holds.
    pub fn kind(&self) -> PackKind {
        self.header.kind
    }

    /// Bytes of the records in it.
    pub fn bytes(&self) -> u64 {
        self.written + self.tail.len() as u64 - BLOCK_SIZE
    }

    /// Whether it should be finished and another one begun.
    pub fn is_full(&self) -> bool {
        self.is_full_at(PACK_BYTES)
    }

    /// As [`is_full`](Self::is_full), of a pack of so many bytes.
    pub(super) fn is_full_at(&self, bytes: u64) -> bool {
        self.bytes() >= bytes || self.pages.entries >= PACK_ENTRIES
    }

    /// Appends a record whose blocks, or node, have these hashes: the place of the first. It is in memory until
    /// [`write_out`](Self::write_out) or [`finish`](Self::finish).
    ///
    /// # Panics
    /// When there are not as many hashes as blocks, or the pack was full long ago.
    pub fn push(&mut self, record: NewRecord, hashes: &[Hash]) -> Place {
        assert_eq!(record.count, hashes.len(), "a hash for each block");
        let offset = self.written + self.tail.len() as u64;
        let place = Place::new(self.header.number, offset, record.len(), 0);
        self.last = self.pages.push(&self.header.id, offset, record.len(), hashes);
        self.tail.extend(record.place(&self.header.id, offset));
        self.records += 1;
        place
    }

    /// The page of entries that a block of the record will be in that was pushed last.
    pub fn page_of(&self, index: usize) -> u32 {
        self.last.0 + u32::from(index >= self.last.1)
    }

    /// Begins to write what has gathered, when that is much; waits for what was begun before when that is much, too.
    ///
    /// # Errors
    /// What the storage said of this write or an earlier one.
    pub async fn write_out(&mut self) -> Result<(), ImageError> {
        while self.tail.len() >= CHUNK_LEN {
            self.write_chunk(CHUNK_LEN).await?;
        }
        Ok(())
    }

    /// Begins to write the first `len` bytes of the tail, a multiple of 4096.
    async fn write_chunk(&mut self, len: usize) -> Result<(), ImageError> {
        self.wait(WRITES - 1).await?;
        let buf = match self.spare.take().filter(|spare| spare.len() == len) {
            Some(mut spare) => {
                spare.copy_from_slice(&self.tail[..len]);
                spare
            }
            None => AlignedBuf::from_slice(&self.tail[..len]),
        };
        self.tail.drain(..len);
        let write = Op::write(self.file.clone(), FileOffset(self.start + self.written), buf);
        self.written += len as u64;
        self.writes.push_back(Box::pin(self.io.run(write)));
        Ok(())
    }

    /// Waits until no more writes than so many are in flight.
    async fn wait(&mut self, writes: usize) -> Result<(), ImageError> {
        while self.writes.len() > writes {
            let Some(write) = self.writes.pop_front() else { break };
            let outcome = write.await;
            outcome.result.map_err(|e| ImageError::errno(&self.unfinished, "write", e))?;
            self.spare = outcome.memory.map(Memory::into_buf);
        }
        Ok(())
    }

    /// Completes the pack, makes it durable and gives it its name.
    ///
    /// # Errors
    /// What the storage says; then there is no such pack, but maybe an unfinished file.
    pub async fn finish(mut self) -> Result<Written, ImageError> {
        let written = self.complete().await?;
        let sync = Op::Sync { file: self.file.clone() };
        self.io.run(sync).await.result.map_err(|e| ImageError::errno(&self.unfinished, "sync", e))?;
        let rename = Op::Rename { from: self.unfinished.clone(), to: self.path.clone() };
        self.io.run(rename).await.result.map_err(|e| ImageError::errno(&self.unfinished, "rename", e))?;
        Ok(written)
    }

    /// Writes everything that is missing.
    pub(super) async fn complete(&mut self) -> Result<Written, ImageError> {
        let align = |tail: &mut Vec<u8>| tail.resize(tail.len().next_multiple_of(BLOCK_BYTES), 0);
        align(&mut self.tail);
        let entries_at = self.written + self.tail.len() as u64;
        let entries = self.pages.entries;
        let pages = std::mem::take(&mut self.pages).finish(&self.header.id);
        let trailer = Trailer {
            id: self.header.id,
            entries_at,
            pages: (pages.len() / BLOCK_BYTES) as u32,
            entries,
            records: self.records,
        };
        self.tail.extend(pages);
        self.tail.extend(trailer.encode());
        self.write_out().await?;
        self.write_chunk(self.tail.len()).await?;
        self.wait(0).await?;
        let PackHeader { id, kind, number } = self.header;
        Ok(Written { number, id, kind, bytes: self.written, entries, path: self.path.clone() })
    }

    /// Gives the pack up: the unfinished file is removed.
    pub async fn abandon(self) {
        for write in self.writes {
            write.await;
        }
        // What cannot be removed is found as garbage later.
        let _ = self.io.run(Op::Unlink { path: self.unfinished }).await;
    }
}

/// The file name of a pack.
pub fn pack_name(number: u32) -> String {
    format!("{number:08x}.pack")
}
