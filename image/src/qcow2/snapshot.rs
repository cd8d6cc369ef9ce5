//! The snapshot table: its entries, and reading an image as it was.
//!
//! Source: docs/interop/qcow2.rst of QEMU, "Snapshots".

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

use super::Flaw;
use super::bytes::{be16, be32, be64};
use super::header::check_l1;
use super::image::{Image, PAGE, read};
use crate::error::ImageError;

/// Most snapshots, as in QEMU (`QCOW_MAX_SNAPSHOTS`).
const COUNT_MAX: u32 = 65_536;
/// Largest table in bytes, as in QEMU (`QCOW_MAX_SNAPSHOTS_SIZE`).
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Most extra data of an entry in bytes, as in QEMU (`QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const EXTRA_BYTES_MAX: usize = 1024;
/// Bytes before the extra data.
const FIXED_BYTES: usize = 40;
/// Bytes that hold any entry.
const ENTRY_BYTES_MAX: usize = FIXED_BYTES + EXTRA_BYTES_MAX + 2 * (u16::MAX as usize) + 8;

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made: seconds and nanoseconds since the epoch.
    pub date: (u32, u32),
    /// Time that the guest had run, in nanoseconds.
    pub vm_clock_ns: u64,
    /// Bytes of saved machine state.
    pub vm_state_bytes: u64,
    /// Size of the disk in bytes then, as far as the image says.
    pub disk_size: Option<u64>,
    /// Where its L1 table is, and how many entries it has.
    pub(super) l1: (u64, u64),
}

/// Reads one entry at the start of `bytes`, and its length; `None` when more bytes are needed.
/// `at` is where the bytes are in the file.
///
/// # Errors
/// Extra data of absurd size.
pub(crate) fn parse(bytes: &[u8], at: u64) -> Result<Option<(Snapshot, usize)>, Flaw> {
    if bytes.len() < FIXED_BYTES {
        return Ok(None);
    }
    let (id_bytes, name_bytes) = (usize::from(be16(bytes, 12)), usize::from(be16(bytes, 14)));
    let extra_bytes = be32(bytes, 36) as usize;
    if extra_bytes > EXTRA_BYTES_MAX {
        let detail = format!("{extra_bytes} bytes, and {EXTRA_BYTES_MAX} is the most");
        return Err(Flaw::corrupt("snapshot.extra_data_size", at + 36, detail));
    }
    let id_at = FIXED_BYTES + extra_bytes;
    let name_at = id_at + id_bytes;
    let end = name_at + name_bytes;
    if bytes.len() < end {
        return Ok(None);
    }
    let extra = |from: usize| (extra_bytes >= from + 8).then(|| be64(bytes, FIXED_BYTES + from));
    let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&bytes[range]).into_owned();
    let snapshot = Snapshot {
        id: text(id_at..name_at),
        name: text(name_at..end),
        date: (be32(bytes, 16), be32(bytes, 20)),
        vm_clock_ns: be64(bytes, 24),
        vm_state_bytes: extra(0).unwrap_or_else(|| u64::from(be32(bytes, 32))),
        disk_size: extra(8),
        l1: (be64(bytes, 0), u64::from(be32(bytes, 8))),
    };
    Ok(Some((snapshot, end.next_multiple_of(8))))
}

impl<E: Engine> Image<E> {
    /// Switches from the disk to a snapshot, by id or else by name.
    pub(crate) async fn use_snapshot(&mut self, io: &Io<E>, wanted: &str) -> Result<(), ImageError> {
        let all = self.snapshots(io).await?;
        let by_id = all.iter().position(|(snapshot, _)| snapshot.id == wanted);
        let found = by_id.or_else(|| all.iter().position(|(snapshot, _)| snapshot.name == wanted));
        let Some((snapshot, at)) = found.map(|index| &all[index]) else {
            let detail = format!("has no snapshot '{wanted}': sapwood info lists those it has");
            return Err(ImageError::invalid(self.path(), detail));
        };
        let (l1_offset, l1_entries) = snapshot.l1;
        let shape = self.shape();
        check_l1(shape, l1_offset, l1_entries, *at, at + 8).map_err(|flaw| flaw.of(self.path()))?;
        let size = snapshot.disk_size.unwrap_or(self.size) / 512 * 512;
        if size.div_ceil(shape.l2_span()) > l1_entries && snapshot.disk_size.is_some() {
            let detail = format!("the L1 table is too small for a disk of {size} bytes");
            return Err(ImageError::corrupt(self.path(), "snapshot.l1_size", at + 8, detail));
        }
        (self.l1_offset, self.l1_entries, self.size) = (l1_offset, l1_entries, size);
        Ok(())
    }

    /// The snapshots, each with the offset of its entry.
    pub(super) async fn snapshots(&self, io: &Io<E>) -> Result<Vec<(Snapshot, u64)>, ImageError> {
        let corrupt = |at, detail: &str| ImageError::corrupt(self.path(), "snapshot table", at, detail);
        let (start, count) = (self.header.snapshots_offset, self.header.snapshot_count);
        if count > COUNT_MAX {
            return Err(corrupt(60, &format!("{count} snapshots, and {COUNT_MAX} is the most")));
        }
        if count > 0 && (start >= self.identity.size || !start.is_multiple_of(self.cluster_size())) {
            return Err(corrupt(64, &format!("{start:#x} is not where it can be")));
        }
        let mut found = Vec::new();
        let (mut window, mut window_at, mut at) = (AlignedBuf::zeroed(0), start, start);
        for _ in 0..count {
            let parsed = loop {
                let rest = window.get((at - window_at) as usize..).unwrap_or_default();
                match parse(rest, at).map_err(|flaw| flaw.of(self.path()))? {
                    Some(parsed) => break parsed,
                    None if window_at + window.len() as u64 >= self.identity.size
                        || rest.len() >= ENTRY_BYTES_MAX =>
                    {
                        return Err(corrupt(at, "the file ends inside it"));
                    }
                    None => {}
                }
                window_at = at / PAGE * PAGE;
                window = read(io, &self.file, window_at, 2 * ENTRY_BYTES_MAX, self.identity.size).await?;
            };
            found.push((parsed.0, at));
            at += parsed.1 as u64;
            if at - start > TABLE_BYTES_MAX {
                return Err(corrupt(start, "it is larger than 64 MiB"));
            }
        }
        Ok(found)
    }
}
