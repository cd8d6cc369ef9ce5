//! Where things lie in a layer file, and what its structures share.
//!
//! ```text
//! block 0        header: identity, written once (see `header`)
//! block 1, 2     slots A and B: the two newest checkpoints, one sector each (see `slot`)
//! block 3, 4     base records: what lies below, one for the slots and one for the next change
//! block 5..16    zero
//! block 16..     segments of `segment_blocks` blocks each: records (see `record`)
//! ```
//!
//! All integers are little-endian. `docs/format-layer.md` is the reference.

use super::record::DATA_BLOCKS_MAX;
use sapwood_blockdev::units::BLOCK_SIZE;

/// First eight bytes of every layer.
pub const MAGIC: [u8; 8] = *b"SAPWOODL";
/// The only version; 0 means that the format is not frozen yet.
pub(super) const VERSION: u32 = 0;
/// The block at which segment 0 starts.
pub(super) const FIRST_SEGMENT_BLOCK: u32 = 16;
/// Bytes at the start of the file that are not segments.
pub(super) const PREAMBLE_BYTES: u64 = FIRST_SEGMENT_BLOCK as u64 * BLOCK_SIZE;
/// Bytes at the start of the file that hold anything: header, slots, base records.
pub(super) const HEAD_BYTES: u64 = 5 * BLOCK_SIZE;
/// Largest guest-visible size in bytes: 64 TiB.
pub const SIZE_MAX: u64 = 64 << 40;
/// Bounds of the segment size in blocks: 64 KiB to 64 MiB.
pub(super) const SEGMENT_BLOCKS_MIN: u32 = 16;
pub(super) const SEGMENT_BLOCKS_MAX: u32 = 16384;
/// Default segment size in bytes.
pub const SEGMENT_SIZE_DEFAULT: u32 = 4 << 20;
/// Generations end here: they have 56 bits in a record, and this leaves room to count on.
pub(super) const GENERATION_MAX: u64 = 1 << 55;
/// 128 random bits that name a layer.
pub type LayerId = [u8; 16];

/// Largest guest-visible size in bytes for a segment size: the root of the map names every GiB in
/// 8 bytes and must fit into one record.
pub(super) fn size_max(segment_blocks: u32) -> u64 {
    let root_max = u64::from(segment_blocks - 1).min(u64::from(DATA_BLOCKS_MAX)) * BLOCK_SIZE;
    SIZE_MAX.min((root_max / 8 - 2) << 30)
}

/// A field that does not make sense, with its offset in the structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    pub(super) field: &'static str,
    pub(super) at: usize,
    pub(super) detail: String,
    /// Not damage, but something a newer version may have written.
    pub(super) unsupported: bool,
}

pub(super) fn damage(field: &'static str, at: usize, detail: impl ToString) -> Damage {
    Damage { field, at, detail: detail.to_string(), unsupported: false }
}

pub(super) fn unsupported(field: &'static str, at: usize, detail: impl ToString) -> Damage {
    Damage { unsupported: true, ..damage(field, at, detail) }
}
