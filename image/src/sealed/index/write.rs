//! Making runs: of entries, and of other runs.
//!
//! A run is written as a pack is: under a name of its own, synced, and then given its name, which is durable when the directory
//! has been synced.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::entries::Entry;
use super::super::place::Place;
use super::layout::{
    EntryPage, IndexEntry, PAGE_ENTRIES, PAGES_MAX, RunHeader, RunTrailer, encode_entries, encode_fences,
};
use super::run::{PAGES_AT_ONCE, Run, run_name};
use crate::error::ImageError;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_blockdev::units::{BLOCK_BYTES, FileOffset};

/// Entries that [`write_run`] takes, at most: while it sorts them it needs 16 bytes for each, 64 MiB.
pub const RUN_ENTRIES_MAX: usize = 4 << 20;
/// Runs that are merged at a time, at most. Each takes 0.5 MiB meanwhile.
pub const MERGED_MAX: usize = 64;

/// Bytes written at a time.
const CHUNK_LEN: usize = 1 << 20;

/// A run that is whole, and durable but for its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenRun {
    /// Its number.
    pub number: u32,
    /// Entries in it.
    pub entries: u64,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// The file.
    pub path: PathBuf,
}

/// A run that is being made. Beside what it has not written it keeps 8 bytes for each page.
struct RunWriter<E: Engine> {
    io: Io<E>,
    file: E::File,
    header: RunHeader,
    path: PathBuf,
    unfinished: PathBuf,
    /// What has not been written, from byte `written` on.
    tail: Vec<u8>,
    written: u64,
    page: Vec<IndexEntry>,
    fences: Vec<u64>,
    entries: u64,
    packs: (u32, u32),
    last: Option<(u64, u64)>,
}

impl<E: Engine> RunWriter<E> {
    fn create<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        directory: &Path,
        number: u32,
    ) -> Result<Self, ImageError> {
        let path = directory.join(run_name(number));
        let unfinished = path.with_extension("index.tmp");
        let mut id = [0; 16];
        storage.random(&mut id).map_err(|e| ImageError::io(&path, "choose an id for", e))?;
        let file =
            storage.open(&unfinished, OpenOptions::CREATE).map_err(|e| ImageError::open(&unfinished, e))?;
        let header = RunHeader { id, number };
        Ok(Self {
            io: io.clone(),
            file,
            header,
            path,
            unfinished,
            tail: header.encode(),
            written: 0,
            page: Vec::with_capacity(PAGE_ENTRIES),
            fences: Vec::new(),
            entries: 0,
            packs: (0, 0),
            last: None,
        })
    }

    /// Adds the next entry in order; one that is there already adds nothing.
    async fn push(&mut self, entry: IndexEntry) -> Result<(), ImageError> {
        let key = entry.key();
        assert!(self.last.is_none_or(|last| last <= key), "entries come in order");
        if self.last.replace(key) == Some(key) {
            return Ok(());
        }
        let pack = entry.place.pack();
        self.packs = match self.packs {
            (0, _) => (pack, pack),
            (first, last) => (first.min(pack), last.max(pack)),
        };
        self.page.push(entry);
        self.entries += 1;
        if self.page.len() == PAGE_ENTRIES { self.end_page().await } else { Ok(()) }
    }

    async fn end_page(&mut self) -> Result<(), ImageError> {
        let Some(first) = self.page.first() else { return Ok(()) };
        let number = self.fences.len() as u32;
        if number == PAGES_MAX {
            return Err(ImageError::invalid(&self.path, "a run of the index has at most 16,777,216 pages"));
        }
        self.fences.push(first.prefix);
        self.tail.extend(encode_entries(&self.header.id, number, &self.page));
        self.page.clear();
        if self.tail.len() >= CHUNK_LEN { self.write_tail().await } else { Ok(()) }
    }

    async fn write_tail(&mut self) -> Result<(), ImageError> {
        let buf = AlignedBuf::from_slice(&self.tail);
        let write = Op::write(self.file.clone(), FileOffset(self.written), buf);
        self.written += self.tail.len() as u64;
        self.tail.clear();
        self.io.run(write).await.result.map_err(|e| ImageError::errno(&self.unfinished, "write", e))?;
        Ok(())
    }

    async fn finish(&mut self) -> Result<WrittenRun, ImageError> {
        self.end_page().await?;
        let pages = self.fences.len() as u32;
        let RunHeader { id, number } = self.header;
        self.tail.extend(encode_fences(&id, pages, &self.fences));
        let trailer = RunTrailer { id, pages, entries: self.entries, packs: self.packs };
        self.tail.extend(trailer.encode());
        self.write_tail().await?;
        let sync = Op::Sync { file: self.file.clone() };
        self.io.run(sync).await.result.map_err(|e| ImageError::errno(&self.unfinished, "sync", e))?;
        let rename = Op::Rename { from: self.unfinished.clone(), to: self.path.clone() };
        self.io.run(rename).await.result.map_err(|e| ImageError::errno(&self.unfinished, "rename", e))?;
        Ok(WrittenRun { number, entries: self.entries, bytes: self.written, path: self.path.clone() })
    }

    /// Completes the run when everything went well, or else removes the unfinished file.
    async fn end(mut self, filled: Result<(), ImageError>) -> Result<WrittenRun, ImageError> {
        let finished = match filled {
            Ok(()) => self.finish().await,
            Err(error) => Err(error),
        };
        if finished.is_err() {
            // What cannot be removed is found as garbage later.
            let _ = self.io.run(Op::Unlink { path: self.unfinished }).await;
        }
        finished
    }
}

/// Writes run `number` of the index in a directory, of entries in any order, not more than [`RUN_ENTRIES_MAX`].
///
/// # Errors
/// Too many entries, an existing file, what the storage says; then there is no such run.
pub async fn write_run<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    directory: &Path,
    number: u32,
    entries: impl IntoIterator<Item = Entry>,
) -> Result<WrittenRun, ImageError> {
    let entries = entries.into_iter().take(RUN_ENTRIES_MAX + 1);
    let entries = entries.filter(|entry| !entry.place.is_none());
    let mut sorted: Vec<IndexEntry> =
        entries.map(|Entry { hash, place }| IndexEntry { prefix: hash.prefix(), place }).collect();
    if sorted.len() > RUN_ENTRIES_MAX {
        let detail = format_args!("a run is made of at most {RUN_ENTRIES_MAX} entries");
        return Err(ImageError::invalid(directory.join(run_name(number)), detail));
    }
    sorted.sort_unstable_by_key(IndexEntry::key);
    let mut writer = RunWriter::create(storage, io, directory, number)?;
    let filled = async {
        for entry in sorted {
            writer.push(entry).await?;
        }
        Ok(())
    };
    let filled = filled.await;
    writer.end(filled).await
}

/// A run that is read from its start to its end.
struct Cursor<F> {
    run: Arc<Run<F>>,
    /// The next page to be read.
    page: u32,
    /// What was read, the next one last.
    entries: Vec<IndexEntry>,
}

impl<F: sapwood_blockdev::storage::StorageFile> Cursor<F> {
    async fn next<E: Engine<File = F>>(&mut self, io: &Io<E>) -> Result<Option<IndexEntry>, ImageError> {
        if self.entries.is_empty() && self.page < self.run.pages() {
            let count = PAGES_AT_ONCE.min(self.run.pages() - self.page);
            let bytes = self.run.read(io, self.page, count).await?;
            for (number, page) in (self.page..self.page + count).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                self.entries.extend(EntryPage::entries(&self.run.decode(number, page)?));
            }
            self.entries.reverse();
            self.page += count;
        }
        Ok(self.entries.pop())
    }
}

/// Writes run `number` of what `runs` hold, not more than [`MERGED_MAX`], without the entries of packs that `lives` does not
/// know any more.
///
/// # Errors
/// Too many runs, one that is damaged, an existing file, what the storage says; then there is no such run.
pub async fn merge<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    directory: &Path,
    number: u32,
    runs: &[Arc<Run<E::File>>],
    lives: impl Fn(u32) -> bool,
) -> Result<WrittenRun, ImageError> {
    if runs.len() > MERGED_MAX {
        let detail = format_args!("not more than {MERGED_MAX} runs are merged at a time");
        return Err(ImageError::invalid(directory, detail));
    }
    let mut writer = RunWriter::create(storage, io, directory, number)?;
    let filled = merge_into(&mut writer, runs, lives).await;
    writer.end(filled).await
}

async fn merge_into<E: Engine>(
    writer: &mut RunWriter<E>,
    runs: &[Arc<Run<E::File>>],
    lives: impl Fn(u32) -> bool,
) -> Result<(), ImageError> {
    let io = writer.io.clone();
    let mut cursors: Vec<Cursor<E::File>> =
        runs.iter().map(|run| Cursor { run: Arc::clone(run), page: 0, entries: Vec::new() }).collect();
    let mut heads = BinaryHeap::new();
    for (from, cursor) in cursors.iter_mut().enumerate() {
        heads.extend(cursor.next(&io).await?.map(|entry| Reverse((entry.key(), from))));
    }
    while let Some(Reverse((key, from))) = heads.pop() {
        let entry = IndexEntry { prefix: key.0, place: Place::from_bits(!key.1) };
        if !entry.place.is_none() && lives(entry.place.pack()) {
            writer.push(entry).await?;
        }
        // Within a page that was checked; between pages nobody has.
        match cursors[from].next(&io).await? {
            Some(next) if next.key() < key => return Err(cursors[from].run.out_of_order()),
            next => heads.extend(next.map(|entry| Reverse((entry.key(), from)))),
        }
    }
    Ok(())
}
