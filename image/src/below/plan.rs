//! Finding the bytes of a range, through a whole chain, in memory alone.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::FileOffset;

use super::cache::{PAGE_BYTES, Page};
use super::{Below, Link};
use crate::error::ImageError;
use crate::qcow2::{Mapping, image};

/// A stretch of a disk whose bytes are in one place.
#[derive(Debug)]
pub struct Piece<F> {
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// Where they are.
    pub source: Source<F>,
}

/// Where bytes are.
#[derive(Debug)]
pub enum Source<F> {
    /// Nowhere: they are zeroes.
    Zero,
    /// In a file, as they are, from this offset; what lies past its end reads as zeroes.
    File {
        /// The file.
        file: F,
        /// Where in it.
        offset: FileOffset,
    },
    /// In a compressed cluster.
    Compressed(Compressed),
}

/// A part of a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The number of the image in the chain.
    pub(super) link: usize,
    /// Where in the image's file the compressed bytes start.
    pub(super) offset: u64,
    /// How many bytes they are at most.
    pub(super) len: u32,
    /// Bytes of the cluster before the part.
    pub(super) skip: usize,
}

/// Why planning stopped.
#[derive(Debug)]
pub enum Stop {
    /// A page of a table is not in memory: [`Below::load`] it and go on at `at`.
    Miss {
        /// The first byte that is not planned yet.
        at: u64,
        /// The number of the image in the chain.
        link: usize,
        /// The number of the page in its file.
        page: u64,
    },
    /// The tables of an image are damaged.
    Damage(ImageError),
}

/// Pages that were just loaded: they count even when the cache has no room for them.
#[derive(Default)]
pub struct Held {
    at: u64,
    pages: Vec<((usize, u64), Page)>,
}

/// Where in a chain bytes are: the number of the image that answers, and the place in it.
pub(super) struct Found {
    pub(super) link: usize,
    pub(super) mapping: Mapping,
    pub(super) len: u64,
}

impl<E: Engine> Below<E> {
    /// Appends to `pieces` where the bytes of `range` are, which must lie inside the disk, in order and
    /// without gaps. When it stops, the pieces up to there have been appended.
    ///
    /// # Errors
    /// Something is not in memory, or damaged.
    pub fn plan(&self, range: Range<u64>, held: &Held, pieces: &mut Vec<Piece<E::File>>) -> Result<(), Stop> {
        let mut at = range.start;
        while at < range.end {
            let found = self.find(at, range.end, held)?;
            let next = at..at + found.len;
            at = next.end;
            let source = self.source(&next, &found);
            push(pieces, Piece { range: next, source });
        }
        Ok(())
    }

    /// Where the byte `at` is, through the chain, and for how many bytes that goes on.
    pub(super) fn find(&self, at: u64, end: u64, held: &Held) -> Result<Found, Stop> {
        let mut len = end - at;
        for (number, link) in self.links.iter().enumerate() {
            // What an image lacks at its end reads as zeroes above, whatever lies below it.
            if at >= link.size() {
                return Ok(Found { link: number.saturating_sub(1), mapping: Mapping::Unallocated, len });
            }
            len = len.min(link.size() - at);
            let image = match link {
                Link::Raw { .. } => return Ok(Found { link: number, mapping: Mapping::Data(at), len }),
                Link::Qcow2(image) => image,
            };
            let page = |page| held.page((number, page)).or_else(|| self.tables.get(&(number, page)));
            let (mapping, known) = image.find(at, at + len, page).map_err(|stop| match stop {
                image::Stop::Miss(page) => Stop::Miss { at, link: number, page },
                image::Stop::Flaw(flaw) => Stop::Damage(flaw.of(image.path())),
            })?;
            len = known;
            if mapping != Mapping::Unallocated {
                return Ok(Found { link: number, mapping, len });
            }
        }
        Ok(Found { link: self.links.len() - 1, mapping: Mapping::Unallocated, len })
    }

    fn source(&self, range: &Range<u64>, found: &Found) -> Source<E::File> {
        let offset = match found.mapping {
            Mapping::Unallocated | Mapping::Zero => return Source::Zero,
            Mapping::Data(offset) => offset,
            Mapping::Compressed { offset, len } => {
                let skip = self.cluster_size(found.link).map_or(0, |size| range.start % size) as usize;
                return Source::Compressed(Compressed { link: found.link, offset, len, skip });
            }
        };
        match self.data_of(found.link) {
            Some((file, len)) if offset < len => {
                Source::File { file: file.clone(), offset: FileOffset(offset) }
            }
            // As QEMU does. Nothing that is not in the file needs to be read.
            _ => Source::Zero,
        }
    }

    /// The file in which an image of the chain has its data, and the file's length.
    pub(super) fn data_of(&self, link: usize) -> Option<(&E::File, u64)> {
        self.links.get(link).map(|link| match link {
            Link::Raw { file, identity, .. } => (file, identity.size),
            Link::Qcow2(image) => image.data(),
        })
    }

    fn cluster_size(&self, link: usize) -> Option<u64> {
        match self.links.get(link) {
            Some(Link::Qcow2(image)) => Some(image.cluster_size()),
            _ => None,
        }
    }

    /// Brings what planning stopped for into memory, and into `held` until planning has come further.
    ///
    /// # Errors
    /// The file cannot be read; or it was not a page that was missing, but damage, which is logged.
    pub async fn load(&self, io: &Io<E>, stop: Stop, held: &mut Held) -> Result<(), DeviceError> {
        let (at, number, page) = match stop {
            Stop::Miss { at, link, page } => (at, link, page),
            Stop::Damage(error) => return Err(self.complain(&error)),
        };
        let Some(Link::Qcow2(image)) = self.links.get(number) else { return Err(DeviceError::Corrupt) };
        let file = image.file.clone();
        let key = (number, page);
        let brought = self.tables.get_or_insert_async(&key, async {
            let buf = AlignedBuf::zeroed(PAGE_BYTES);
            let offset = FileOffset(page * PAGE_BYTES as u64);
            let memory = io.run(Op::read(file, offset, buf)).await.zero_filled()?;
            Ok::<_, DeviceError>(Arc::new(memory.into_buf()))
        });
        let brought = brought.await?;
        if at != held.at {
            held.pages.clear();
        }
        held.at = at;
        held.pages.push((key, brought));
        Ok(())
    }

    /// Logs damage, the first time.
    pub(super) fn complain(&self, error: &ImageError) -> DeviceError {
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::error!("{error}; what else is found damaged while this disk is open is not logged");
        }
        DeviceError::Corrupt
    }
}

impl Held {
    fn page(&self, key: (usize, u64)) -> Option<Page> {
        self.pages.iter().find(|(held, _)| *held == key).map(|(_, page)| Arc::clone(page))
    }
}

/// Appends a piece, joined to the one before where the file goes on.
fn push<F: StorageFile>(pieces: &mut Vec<Piece<F>>, next: Piece<F>) {
    if let Some(last) = pieces.last_mut() {
        let len = last.range.end - last.range.start;
        let joins = match (&last.source, &next.source) {
            (Source::Zero, Source::Zero) => true,
            (Source::File { file: a, offset: at }, Source::File { file: b, offset }) => {
                at.plus(len) == *offset && a.path() == b.path()
            }
            _ => false,
        };
        if joins && last.range.end == next.range.start {
            last.range.end = next.range.end;
            return;
        }
    }
    pieces.push(next);
}
