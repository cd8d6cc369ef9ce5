//! One image: an open file, its header, and where the bytes of its disk are.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

use super::bytes::be64;
use super::header::{self, FIXED_BYTES, Header};
use super::table::{Mapping, Shape};
use super::{Compression, Flaw};
use crate::below::cache::{PAGE_BYTES, Page};
use crate::below::{BackingSpec, OpenBelow, open_shared};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;

pub(super) const PAGE: u64 = PAGE_BYTES as u64;

/// An open image. What it says nothing about is in its backing file, which is not part of this.
pub(crate) struct Image<E: Engine> {
    pub(crate) file: E::File,
    pub(crate) identity: FileIdentity,
    /// The external data file.
    data: Option<(E::File, FileIdentity)>,
    pub(super) header: Header,
    /// The L1 table in use: of the disk, or of a snapshot.
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    /// Size of the disk in bytes, now or when the snapshot was made.
    pub(super) size: u64,
}

/// Why a look-up did not succeed.
#[derive(Debug)]
pub(crate) enum Stop {
    /// This page of the file is needed.
    Miss(u64),
    /// The tables are damaged.
    Flaw(Flaw),
}

impl<E: Engine> Image<E> {
    /// Opens the image alone, sharing its file with other readers.
    pub(crate) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
    ) -> Result<Self, ImageError> {
        let (file, identity) = open_shared(storage, path)?;
        let start = read(io, &file, 0, PAGE_BYTES, identity.size).await?;
        let fixed = &start[..start.len().min(FIXED_BYTES)];
        let cluster_bits = header::cluster_bits(fixed).map_err(|flaw| flaw.of(path))?;
        let first_cluster = read(io, &file, 0, 1 << cluster_bits, identity.size).await?;
        let header = Header::parse(&first_cluster).map_err(|flaw| flaw.of(path))?;
        if header.corrupt {
            log::warn!(
                "{}: marked as corrupt: what is read may be wrong (qemu-img check tells more)",
                path.display()
            );
        }
        let (l1_offset, l1_entries, size) = (header.l1_offset, header.l1_entries, header.size);
        Ok(Self { file, identity, data: None, header, l1_offset, l1_entries, size })
    }

    /// Opens the external data file, if the image has one.
    pub(crate) fn open_data<S: Storage<File = E::File>>(
        &mut self,
        storage: &S,
        allowed: bool,
    ) -> Result<(), ImageError> {
        let Some(name) = &self.header.data_file else { return Ok(()) };
        let path = self.resolve(name, "data file", allowed)?;
        self.data = Some(open_shared(storage, &path)?);
        Ok(())
    }

    /// What the image says lies below it, if anything.
    pub(crate) fn backing(&self, options: &OpenBelow) -> Result<Option<BackingSpec>, ImageError> {
        let Some(name) = &self.header.backing_name else { return Ok(None) };
        let path = self.resolve(name, "backing file", options.allow_backing)?;
        let stated = self.header.backing_format.as_deref();
        let format = match (stated, options.backing_format) {
            (None, Some(format)) => format,
            (None, None) => {
                return Err(self.unsupported(format!(
                    "does not say which format its backing file {} has, and that is never guessed: pass \
                     --backing-format raw (or qcow2), or write it into the image with qemu-img rebase -u -F",
                    path.display()
                )));
            }
            (Some(stated), _) => match stated.parse() {
                Ok(format @ (Format::Raw | Format::Qcow2)) => format,
                _ => {
                    return Err(self.unsupported(format!(
                        "its backing file {} has the format '{}': only raw and qcow2 can lie below qcow2",
                        path.display(),
                        stated.escape_debug()
                    )));
                }
            },
        };
        Ok(Some(BackingSpec { path, format }))
    }

    /// The path of another file that the image names.
    fn resolve(&self, name: &[u8], what: &str, allowed: bool) -> Result<PathBuf, ImageError> {
        let shown = String::from_utf8_lossy(name);
        let shown = shown.escape_debug();
        // As QEMU tells a protocol (`path_has_protocol`): a colon before any slash.
        if name.iter().find(|byte| matches!(byte, b':' | b'/')) == Some(&b':') {
            return Err(
                self.unsupported(format!("its {what} is '{shown}': only paths of files are followed"))
            );
        }
        if !allowed {
            return Err(self.unsupported(format!(
                "names the {what} '{shown}', which is not read without leave, because an image from elsewhere \
                 may name any file of this machine: pass --allow-backing if you trust the image"
            )));
        }
        Ok(self.beside(name))
    }

    /// A path as the image stores it, seen from here.
    pub(super) fn beside(&self, name: &[u8]) -> PathBuf {
        self.path().parent().unwrap_or(Path::new("")).join(OsStr::from_bytes(name))
    }

    fn unsupported(&self, detail: String) -> ImageError {
        ImageError::new(self.path(), ErrorKind::Unsupported(detail))
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.shape().cluster_size()
    }

    pub(crate) fn compression(&self) -> Compression {
        self.header.compression
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.header.shape
    }

    /// The file that holds clusters which are not compressed, and its length.
    pub(crate) fn data(&self) -> (&E::File, u64) {
        self.data.as_ref().map_or((&self.file, self.identity.size), |(file, identity)| (file, identity.size))
    }

    /// The external data file, if there is one, and what makes it recognisable.
    pub(crate) fn external_data(&self) -> Option<&(E::File, FileIdentity)> {
        self.data.as_ref()
    }

    /// Where the byte `at` of the disk is, and for how many bytes that goes on, at most to `end`.
    /// `page` looks for pages of the image's file in memory.
    pub(crate) fn find(
        &self,
        at: u64,
        end: u64,
        page: impl Fn(u64) -> Option<Page>,
    ) -> Result<(Mapping, u64), Stop> {
        let span = self.shape().l2_span();
        let index = at / span;
        if index >= self.l1_entries {
            return Ok((Mapping::Unallocated, end - at));
        }
        let l1 = self.l1_offset + index * 8;
        let l1_page = self.page(l1, 8, "l1 table", &page)?;
        let decode = |at: u64| {
            let flaw = |detail| Stop::Flaw(Flaw::corrupt("l1 entry", at, detail));
            self.shape().decode_l1(be64(&l1_page, (at % PAGE) as usize)).map_err(flaw)
        };
        let l2 = decode(l1)?;
        if l2 == 0 {
            // No further than this page says.
            let known = (self.l1_entries - index).min((self.page_end(l1) - l1) / 8);
            let absent = (1..known).take_while(|i| decode(l1 + i * 8).is_ok_and(|l2| l2 == 0)).count() as u64;
            let until = (index + 1 + absent).saturating_mul(span);
            return Ok((Mapping::Unallocated, until.min(end) - at));
        }
        self.find_in(l2, at, end, page)
    }

    /// The same, within the L2 table at `l2`.
    fn find_in(
        &self,
        l2: u64,
        at: u64,
        end: u64,
        page: impl Fn(u64) -> Option<Page>,
    ) -> Result<(Mapping, u64), Stop> {
        let shape = self.shape();
        let (span, unit, entry_bytes) = (shape.l2_span(), shape.unit(), shape.l2_entry_bytes());
        let entry_of = |at: u64| l2 + at % span / shape.cluster_size() * entry_bytes;
        let l2_page = self.page(entry_of(at), entry_bytes, "l2 table", &page)?;
        let decode = |unit_at: u64| {
            let entry = entry_of(unit_at);
            let in_page = (entry % PAGE) as usize;
            let bitmap = if shape.extended { be64(&l2_page, in_page + 8) } else { 0 };
            let flaw = |detail| Stop::Flaw(Flaw::corrupt("l2 entry", entry, detail));
            shape.decode_l2(be64(&l2_page, in_page), bitmap, unit_at).map_err(flaw)
        };
        let start = at / unit * unit;
        let first = decode(start)?;
        let span_end = (at / span + 1) * span;
        let (table_end, page_end) = (end.min(span_end), self.page_end(entry_of(at)));
        if let Mapping::Compressed { .. } = first {
            let until = (at / shape.cluster_size() + 1) * shape.cluster_size();
            return Ok((first, until.min(end) - at));
        }
        let mut until = start + unit;
        while until < table_end
            && entry_of(until) + entry_bytes <= page_end
            && decode(until).is_ok_and(|next| next == first.advanced(until - start))
        {
            until += unit;
        }
        Ok((first.advanced(at - start), until.min(end) - at))
    }

    /// Where the page that holds the byte at `offset` ends, or the file.
    fn page_end(&self, offset: u64) -> u64 {
        ((offset / PAGE + 1) * PAGE).min(self.identity.size)
    }

    /// The page that holds `len` bytes of a table at `offset`.
    fn page(
        &self,
        offset: u64,
        len: u64,
        table: &'static str,
        page: &impl Fn(u64) -> Option<Page>,
    ) -> Result<Page, Stop> {
        // QEMU reads zeroes there, and so an empty table. That hides that the file was cut off.
        if offset.saturating_add(len) > self.identity.size {
            return Err(Stop::Flaw(Flaw::corrupt(table, offset, "it lies outside of the file")));
        }
        page(offset / PAGE).ok_or(Stop::Miss(offset / PAGE))
    }
}

/// Reads up to `len` bytes of a file of `file_len`; `offset` is a multiple of [`PAGE`].
pub(super) async fn read<E: Engine>(
    io: &Io<E>,
    file: &E::File,
    offset: u64,
    len: usize,
    file_len: u64,
) -> Result<AlignedBuf, ImageError> {
    let wanted = (file_len.saturating_sub(offset)).min(len as u64) as usize;
    let buf = AlignedBuf::zeroed(wanted.next_multiple_of(PAGE_BYTES));
    let outcome = io.run(Op::read(file.clone(), FileOffset(offset), buf)).await;
    let memory = outcome.zero_filled().map_err(|errno| ImageError::errno(file.path(), "read", errno))?;
    Ok(match memory.into_buf() {
        buf if buf.len() == wanted => buf,
        buf => AlignedBuf::from_slice(&buf[..wanted]),
    })
}
