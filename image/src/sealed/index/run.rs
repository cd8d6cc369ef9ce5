//! One run of the index: a file that is read.

use std::path::Path;

use super::layout::{EntryPage, RunHeader, RunTrailer, decode_fences};
use crate::below::read_aligned;
use crate::error::ImageError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Pages read at a time by those who read many.
pub(super) const PAGES_AT_ONCE: u32 = 64;

/// A run that is open: its file, and its fences in memory, 8 bytes for a page of 255 entries.
#[derive(Debug)]
pub struct Run<F> {
    file: F,
    header: RunHeader,
    trailer: RunTrailer,
    /// The first prefix of each page.
    pub(super) fences: Vec<u64>,
}

impl<F: StorageFile> Run<F> {
    /// Opens run `number` of the index in a directory: its header, trailer and fences are read.
    ///
    /// # Errors
    /// The file cannot be opened or read, or is no whole run with that number.
    pub async fn open<S: Storage<File = F>, E: Engine<File = F>>(
        storage: &S,
        io: &Io<E>,
        directory: &Path,
        number: u32,
    ) -> Result<Self, ImageError> {
        let path = directory.join(run_name(number));
        let file = storage.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
        let len = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
        if len < 2 * BLOCK_SIZE || !len.is_multiple_of(BLOCK_SIZE) {
            return Err(ImageError::corrupt(&path, "run of the index", 0, "it is too short, or was cut off"));
        }
        let block = read_aligned(io, &file, 0, BLOCK_BYTES, false).await;
        let (block, _) = block.map_err(|error| ImageError::new(&path, error))?;
        let header = RunHeader::decode(&block);
        let header = header.map_err(|why| ImageError::corrupt(&path, "run header", 0, why))?;
        if header.number != number {
            let why = format!("it is run {}, and run {number} was expected", header.number);
            return Err(ImageError::corrupt(&path, "run header", 0, why));
        }
        let at = len - BLOCK_SIZE;
        let block = read_aligned(io, &file, at, BLOCK_BYTES, false).await;
        let (block, _) = block.map_err(|error| ImageError::new(&path, error))?;
        let trailer = RunTrailer::decode(&block, &header.id, len);
        let trailer = trailer.map_err(|why| ImageError::corrupt(&path, "run trailer", at, why))?;
        let mut run = Self { file, header, trailer, fences: Vec::new() };
        run.read_fences(io).await?;
        Ok(run)
    }

    async fn read_fences<E: Engine<File = F>>(&mut self, io: &Io<E>) -> Result<(), ImageError> {
        let pages = self.trailer.pages;
        let end = pages + self.trailer.fence_pages();
        for first in (pages..end).step_by(PAGES_AT_ONCE as usize) {
            let last = end.min(first + PAGES_AT_ONCE);
            let bytes = self.read(io, first, last - first).await?;
            for (number, page) in (first..last).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                let fences = decode_fences(&self.header.id, number, page);
                let fences = fences.map_err(|why| self.damaged("page of fences", number, why))?;
                self.fences.extend(fences);
            }
        }
        let is_whole = self.fences.len() == pages as usize && self.fences.is_sorted();
        if is_whole { Ok(()) } else { Err(self.damaged("page of fences", pages, "they are not in order")) }
    }

    /// Reads pages, of entries or fences.
    pub(super) async fn read<E: Engine<File = F>>(
        &self,
        io: &Io<E>,
        first: u32,
        count: u32,
    ) -> Result<Box<[u8]>, ImageError> {
        let (at, len) = (offset_of(first), count as usize * BLOCK_BYTES);
        let read = read_aligned(io, &self.file, at, len, false).await;
        let (bytes, range) = read.map_err(|error| ImageError::new(self.path(), error))?;
        Ok(bytes[range].into())
    }

    /// Checks a page of entries.
    pub(super) fn decode(&self, number: u32, page: &[u8]) -> Result<EntryPage, ImageError> {
        let decoded = EntryPage::decode(&self.header.id, number, page, self.fences[number as usize]);
        decoded.map_err(|why| self.damaged("page of entries", number, why))
    }

    /// Reads all of it, and compares it with its checksums.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub async fn verify<E: Engine<File = F>>(&self, io: &Io<E>) -> Result<(), ImageError> {
        let (mut count, mut last) = (0, None);
        for first in (0..self.pages()).step_by(PAGES_AT_ONCE as usize) {
            let pages = PAGES_AT_ONCE.min(self.pages() - first);
            let bytes = self.read(io, first, pages).await?;
            for (number, page) in (first..first + pages).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                for entry in EntryPage::entries(&self.decode(number, page)?) {
                    if last.replace(entry.key()).is_some_and(|last| last >= entry.key()) {
                        return Err(self.out_of_order());
                    }
                    count += 1;
                }
            }
        }
        let is_whole = count == self.entries();
        if is_whole {
            Ok(())
        } else {
            Err(self.damaged("page of entries", 0, "there are more or less than its trailer says"))
        }
    }

    /// The error about entries of two pages that are not in order.
    pub(super) fn out_of_order(&self) -> ImageError {
        self.damaged("page of entries", 0, "its pages are not in order")
    }

    fn damaged(&self, field: &'static str, number: u32, why: &str) -> ImageError {
        ImageError::corrupt(self.path(), field, offset_of(number), why)
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.header.number
    }

    /// Entries in it.
    pub fn entries(&self) -> u64 {
        self.trailer.entries
    }

    /// Pages of entries.
    pub(super) fn pages(&self) -> u32 {
        self.trailer.pages
    }

    /// The least and the greatest number of a pack that it names; both 0 when it has no entries.
    pub fn packs(&self) -> (u32, u32) {
        self.trailer.packs
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

/// Where a page lies in the file.
fn offset_of(number: u32) -> u64 {
    (u64::from(number) + 1) * BLOCK_SIZE
}

/// The file name of a run.
pub fn run_name(number: u32) -> String {
    format!("{number:08x}.index")
}
