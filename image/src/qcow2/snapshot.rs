//! The snapshot table.
//!
//! Source: docs/interop/qcow2.rst of QEMU, "Snapshots".

use super::Flaw;
use super::bytes::{be16, be32, be64};

/// Most snapshots, as in QEMU (`QCOW_MAX_SNAPSHOTS`).
pub(super) const COUNT_MAX: u32 = 65_536;
/// Largest table in bytes, as in QEMU (`QCOW_MAX_SNAPSHOTS_SIZE`).
pub(super) const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Most extra data of an entry in bytes, as in QEMU (`QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const EXTRA_BYTES_MAX: usize = 1024;
/// Bytes before the extra data.
const FIXED_BYTES: usize = 40;
/// Bytes that hold any entry.
pub(super) const ENTRY_BYTES_MAX: usize = FIXED_BYTES + EXTRA_BYTES_MAX + 2 * (u16::MAX as usize) + 8;

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
