//! Reading a pack.

use std::ops::Range;
use std::path::Path;

use super::entries::{Entry, decode_page};
use super::hash::Hash;
use super::header::{PackHeader, PackId, PackKind};
use super::node::Node;
use super::place::Place;
use super::record::{Frame, Record, decode_record};
use super::trailer::Trailer;
use crate::below::read_aligned;
use crate::error::ImageError;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Pages of entries read at a time.
const PAGES_AT_ONCE: u32 = 64;

/// A whole pack: a file, or a part of one.
#[derive(Clone, Debug)]
pub struct Pack<F> {
    file: F,
    /// Where it begins in the file.
    start: u64,
    header: PackHeader,
    trailer: Trailer,
}

impl<F: StorageFile> Pack<F> {
    /// Opens the pack in these bytes of a file, which must have this number. Its header and its trailer are read.
    ///
    /// # Errors
    /// The file cannot be read, or there is no whole pack with that number.
    pub async fn open<E: Engine<File = F>>(
        io: &Io<E>,
        file: F,
        range: Range<u64>,
        number: u32,
    ) -> Result<Self, ImageError> {
        let path = file.path().to_owned();
        let corrupt = |field, at, why: &dyn std::fmt::Display| ImageError::corrupt(&path, field, at, why);
        let len = range.end.saturating_sub(range.start);
        if len < 2 * BLOCK_SIZE || !(range.start | len).is_multiple_of(BLOCK_SIZE) {
            return Err(corrupt("pack", range.start, &"it is too short, or was cut off"));
        }
        let block = read(io, &file, range.start..range.start + BLOCK_SIZE).await?;
        let header = PackHeader::decode(&block).map_err(|why| corrupt("pack header", range.start, &why))?;
        if header.number != number {
            let why = format!("it is pack {}, and pack {number} was expected", header.number);
            return Err(corrupt("pack header", range.start, &why));
        }
        let at = range.end - BLOCK_SIZE;
        let block = read(io, &file, at..range.end).await?;
        let trailer =
            Trailer::decode(&block, &header.id, len).map_err(|why| corrupt("pack trailer", at, &why))?;
        Ok(Self { file, start: range.start, header, trailer })
    }

    /// Its id.
    pub fn id(&self) -> PackId {
        self.header.id
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.header.number
    }

    /// What it holds.
    pub fn kind(&self) -> PackKind {
        self.header.kind
    }

    /// The file that it is in.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Blocks or nodes in it.
    pub fn entries(&self) -> u32 {
        self.trailer.entries
    }

    /// Records in it.
    pub fn records(&self) -> u32 {
        self.trailer.records
    }

    /// Pages of entries.
    pub fn pages(&self) -> u32 {
        self.trailer.pages
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.records_end() + (u64::from(self.trailer.pages) + 1) * BLOCK_SIZE
    }

    /// Where its records end, padding included, and its pages of entries begin.
    pub(super) fn records_end(&self) -> u64 {
        self.trailer.entries_at
    }

    /// Whole blocks of it.
    pub(super) async fn read_blocks<E: Engine<File = F>>(
        &self,
        io: &Io<E>,
        range: Range<u64>,
    ) -> Result<AlignedBuf, ImageError> {
        read(io, &self.file, self.start + range.start..self.start + range.end).await
    }

    /// Reads its header and its trailer once more: they must be what they were when it was opened.
    pub(super) async fn verify_ends<E: Engine<File = F>>(&self, io: &Io<E>) -> Result<(), ImageError> {
        let at = self.bytes() - BLOCK_SIZE;
        let header = self.read_blocks(io, 0..BLOCK_SIZE).await?;
        if header[..] != self.header.encode()[..] {
            return Err(self.damaged("pack header", 0, &"it is not what it was when the pack was opened"));
        }
        let trailer = self.read_blocks(io, at..at + BLOCK_SIZE).await?;
        if trailer[..] != self.trailer.encode()[..] {
            return Err(self.damaged("pack trailer", at, &"it is not what it was when the pack was opened"));
        }
        Ok(())
    }

    /// The frame at a place.
    ///
    /// # Errors
    /// The file cannot be read, or what is there is damaged or no frame.
    pub async fn frame<E: Engine<File = F>>(&self, io: &Io<E>, place: Place) -> Result<Frame, ImageError> {
        match self.record(io, place).await? {
            Record::Frame(frame) => Ok(frame),
            Record::Node(_) => Err(self.damaged("record", place.offset(), &"it is a node and no frame")),
        }
    }

    /// The node at a place.
    ///
    /// # Errors
    /// The file cannot be read, or what is there is damaged or no node.
    pub async fn node<E: Engine<File = F>>(&self, io: &Io<E>, place: Place) -> Result<Node, ImageError> {
        match self.record(io, place).await? {
            Record::Node(node) => Ok(*node),
            Record::Frame(_) => Err(self.damaged("record", place.offset(), &"it is a frame and no node")),
        }
    }

    async fn record<E: Engine<File = F>>(&self, io: &Io<E>, place: Place) -> Result<Record, ImageError> {
        let (offset, end) = (place.offset(), self.trailer.entries_at);
        if offset < BLOCK_SIZE || offset >= end {
            return Err(self.damaged("record", offset, &"there are no records"));
        }
        let len = (place.read_len() as u64).min(end - offset) as usize;
        let (bytes, range) = read_aligned(io, &self.file, self.start + offset, len, false)
            .await
            .map_err(|error| ImageError::new(self.path(), error))?;
        let decoded = decode_record(&self.header.id, offset, &bytes[range]);
        decoded.map(|(record, _)| record).map_err(|why| self.damaged("record", offset, &why))
    }

    /// Bytes before the end of the records, as they are stored; not checked.
    pub(super) async fn stored<E: Engine<File = F>>(
        &self,
        io: &Io<E>,
        bytes: Range<u64>,
    ) -> Result<Box<[u8]>, ImageError> {
        let end = bytes.end.min(self.records_end());
        let len = end.saturating_sub(bytes.start) as usize;
        let (read, range) = read_aligned(io, &self.file, self.start + bytes.start, len, false)
            .await
            .map_err(|error| ImageError::new(self.path(), error))?;
        Ok(read[range].into())
    }

    /// The error about a record that holds something else than what its place was said to be of.
    pub(super) fn holds_other(&self, place: Place, hash: &Hash) -> ImageError {
        self.damaged("record", place.offset(), &format_args!("it does not hold {hash}"))
    }

    /// The entries of some of its pages, in the order in which they were stored.
    ///
    /// # Errors
    /// The file cannot be read, or a page is damaged.
    pub async fn entries_in<E: Engine<File = F>>(
        &self,
        io: &Io<E>,
        pages: Range<u32>,
    ) -> Result<Vec<Entry>, ImageError> {
        let mut entries = Vec::new();
        self.each_page(io, pages, |_, page| entries.extend(page)).await?;
        Ok(entries)
    }

    /// The same, page by page, with the number of each.
    pub(super) async fn each_page<E: Engine<File = F>>(
        &self,
        io: &Io<E>,
        pages: Range<u32>,
        mut take: impl FnMut(u32, Vec<Entry>),
    ) -> Result<(), ImageError> {
        let pages = pages.start..pages.end.min(self.trailer.pages);
        for first in pages.clone().step_by(PAGES_AT_ONCE as usize) {
            let end = pages.end.min(first + PAGES_AT_ONCE);
            let at = |page: u32| self.trailer.entries_at + u64::from(page) * BLOCK_SIZE;
            let bytes = read(io, &self.file, self.start + at(first)..self.start + at(end)).await?;
            for (number, page) in (first..end).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                let decoded = decode_page(&self.header.id, self.header.number, number, page);
                take(number, decoded.map_err(|why| self.damaged("page of entries", at(number), &why))?);
            }
        }
        Ok(())
    }

    /// An error about a byte of the pack.
    pub(super) fn damaged(
        &self,
        field: &'static str,
        offset: u64,
        why: &dyn std::fmt::Display,
    ) -> ImageError {
        ImageError::corrupt(self.path(), field, self.start + offset, why)
    }
}

/// Reads whole blocks.
async fn read<E: Engine>(io: &Io<E>, file: &E::File, range: Range<u64>) -> Result<AlignedBuf, ImageError> {
    let len = (range.end - range.start) as usize;
    let read = read_aligned(io, file, range.start, len, false).await;
    read.map(|(bytes, _)| bytes).map_err(|error| ImageError::new(file.path(), error))
}
