//! Judges the tables of one image without changing it.
//!
//! Checked: the header, the snapshot table, and for the disk and each snapshot that every table and
//! cluster is aligned and inside its file. Reference counts are not looked at: a reader has no use
//! for them.

use std::collections::HashSet;
use std::path::Path;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use super::Mapping;
use super::bytes::be64;
use super::header::check_l1;
use super::image::{Image, read};
use crate::error::{ErrorKind, ImageError};
use crate::findings;

/// Entries of L1 tables that are looked at, in all: as many as 16 of the largest tables have. Hostile
/// snapshots could name one table again and again.
const L1_ENTRIES_MAX: u64 = 64 << 20;
/// Bytes of an L1 table read at a time.
const L1_WINDOW_BYTES: u64 = 1 << 20;

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// What is wrong: data is lost or would read wrong.
    pub errors: Vec<String>,
    /// What is odd and does no harm to a reader.
    pub warnings: Vec<String>,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters stored in the image, of the disk or of snapshots only; those shared count once.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
}

impl CheckReport {
    fn error(&mut self, text: String) {
        findings::add(&mut self.errors, text);
    }
}

/// Checks an image. Nothing that it names is opened: clusters in an external data file are taken to
/// be there.
///
/// # Errors
/// When a file cannot be read, is in use for writing, or is no image that is supported.
pub async fn check<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<CheckReport, ImageError> {
    let mut report = CheckReport::default();
    let image: Image<E> = match Image::open(storage, io, path).await {
        Ok(image) => image,
        Err(ImageError { kind: kind @ ErrorKind::Corrupt { .. }, .. }) => {
            report.error(kind.to_string());
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    if image.header.dirty {
        report.warnings.push("it was not closed properly: its reference counts may be wrong".to_owned());
    }
    if image.header.corrupt {
        report.error("a program that wrote it has marked it as corrupt".to_owned());
    }
    report.total_clusters = image.size().div_ceil(image.cluster_size());
    let snapshots = match image.snapshots(io).await {
        Ok(snapshots) => snapshots,
        Err(error) => {
            report.error(error.kind.to_string());
            Vec::new()
        }
    };
    let mut walk = Walk { io, image: &image, report, tables: HashSet::new(), l1_entries: 0 };
    walk.l1(image.header.l1_offset, image.header.l1_entries, true).await?;
    for (snapshot, at) in snapshots {
        let (offset, entries) = snapshot.l1;
        match check_l1(image.shape(), offset, entries, at, at + 8) {
            Ok(()) => walk.l1(offset, entries, false).await?,
            Err(flaw) => walk.report.error(flaw.of(path).kind.to_string()),
        }
    }
    Ok(walk.report)
}

struct Walk<'a, E: Engine> {
    io: &'a Io<E>,
    image: &'a Image<E>,
    report: CheckReport,
    /// L2 tables that were looked at: snapshots share them.
    tables: HashSet<u64>,
    l1_entries: u64,
}

impl<E: Engine> Walk<'_, E> {
    async fn l1(&mut self, offset: u64, entries: u64, active: bool) -> Result<(), ImageError> {
        self.l1_entries += entries;
        if self.l1_entries > L1_ENTRIES_MAX {
            let detail = format!("the L1 tables of its snapshots have more than {L1_ENTRIES_MAX} entries");
            return Err(ImageError::new(self.image.path(), ErrorKind::Unsupported(detail)));
        }
        let file_len = self.image.identity.size;
        if entries > 0 && offset.saturating_add(entries * 8) > file_len {
            self.report.error(format!("the L1 table at {offset:#x} lies outside of the file"));
        }
        // Tables start at multiples of 512 bytes at least, reads at pages.
        let end = (offset + entries * 8).min(file_len);
        let mut window_at = offset / 4096 * 4096;
        while window_at < end {
            let window =
                read(self.io, &self.image.file, window_at, L1_WINDOW_BYTES as usize, file_len).await?;
            let from = offset.max(window_at);
            let until = end.min(window_at + window.len() as u64);
            for at in (from..until.saturating_sub(7)).step_by(8) {
                let index = (at - offset) / 8;
                self.l1_entry(be64(&window, (at - window_at) as usize), at, index, active).await?;
            }
            window_at += L1_WINDOW_BYTES;
        }
        Ok(())
    }

    async fn l1_entry(&mut self, entry: u64, at: u64, index: u64, active: bool) -> Result<(), ImageError> {
        let shape = self.image.shape();
        let l2 = match shape.decode_l1(entry) {
            Ok(0) => return Ok(()),
            Ok(l2) => l2,
            Err(detail) => {
                self.report.error(format!("l1 entry at offset {at:#x}: {detail}"));
                return Ok(());
            }
        };
        if l2.saturating_add(shape.cluster_size()) > self.image.identity.size {
            self.report.error(format!("l1 entry at offset {at:#x}: the L2 table lies outside of the file"));
            return Ok(());
        }
        if !self.tables.insert(l2) {
            if active {
                self.report.error(format!("l1 entry at offset {at:#x}: the L2 table is in use already"));
            }
            return Ok(());
        }
        self.l2(l2, index * shape.l2_span()).await
    }

    /// Looks at the L2 table at `l2`, which describes the disk from `start`.
    async fn l2(&mut self, l2: u64, start: u64) -> Result<(), ImageError> {
        let (image, shape) = (self.image, self.image.shape());
        let (size, entry_bytes) = (shape.cluster_size(), shape.l2_entry_bytes());
        let first = l2 / 4096 * 4096;
        let window =
            read(self.io, &image.file, first, (l2 + size - first) as usize, image.identity.size).await?;
        for number in 0..size / entry_bytes {
            let at = l2 + number * entry_bytes;
            let in_window = (at - first) as usize;
            let entry = be64(&window, in_window);
            let bitmap = if shape.extended { be64(&window, in_window + 8) } else { 0 };
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let cluster = start + number * size;
            let units = (cluster..cluster + size).step_by(shape.unit() as usize);
            let mut stored = None;
            for unit in units {
                match shape.decode_l2(entry, bitmap, unit) {
                    Ok(mapping @ (Mapping::Data(_) | Mapping::Compressed { .. })) => stored = Some(mapping),
                    Ok(_) => {}
                    Err(detail) => {
                        self.report.error(format!("l2 entry at offset {at:#x}: {detail}"));
                        break;
                    }
                }
            }
            stored.into_iter().for_each(|mapping| self.stored(mapping, at));
        }
        Ok(())
    }

    fn stored(&mut self, mapping: Mapping, at: u64) {
        let (offset, end) = match mapping {
            Mapping::Compressed { offset, .. } => {
                self.report.compressed_clusters += 1;
                (offset, self.image.identity.size)
            }
            Mapping::Data(offset) if self.image.header.data_file.is_none() => (offset, self.image.data().1),
            _ => (0, u64::MAX),
        };
        self.report.allocated_clusters += 1;
        if offset >= end {
            self.report.error(format!("l2 entry at offset {at:#x}: its cluster lies outside of the file"));
        }
    }
}
