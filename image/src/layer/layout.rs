//! Where things lie in a layer file, and the header and slots at its start.
//!
//! ```text
//! block 0        header: identity and base, written once
//! block 1, 2     slots A and B: the two newest checkpoints, one sector each
//! block 3..16    zero
//! block 16..     segments of `segment_blocks` blocks each: records (see `record`)
//! ```
//!
//! All integers are little-endian. `docs/format-layer.md` is the reference.

use super::bytes::{array, checksum, get_u32, get_u64, put};
use super::record::DATA_BLOCKS_MAX;
use crate::format::Format;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset, SECTOR_SIZE};

/// First eight bytes of every layer.
pub const MAGIC: [u8; 8] = *b"SAPWOODL";
/// The only version; 0 means that the format is not frozen yet.
pub(super) const VERSION: u32 = 0;
/// The block at which segment 0 starts.
pub(super) const FIRST_SEGMENT_BLOCK: u32 = 16;
/// Bytes at the start of the file that are not segments.
pub(super) const PREAMBLE_BYTES: u64 = FIRST_SEGMENT_BLOCK as u64 * BLOCK_SIZE;
/// Largest guest-visible size in bytes: 64 TiB.
pub const SIZE_MAX: u64 = 64 << 40;
/// Bounds of the segment size in blocks: 64 KiB to 64 MiB.
pub(super) const SEGMENT_BLOCKS_MIN: u32 = 16;
pub(super) const SEGMENT_BLOCKS_MAX: u32 = 16384;
/// Default segment size in bytes.
pub const SEGMENT_SIZE_DEFAULT: u32 = 4 << 20;
/// Generations end here: they have 56 bits in a record, and this leaves room to count on.
pub(super) const GENERATION_MAX: u64 = 1 << 55;
/// Longest base path in bytes.
pub(super) const BASE_PATH_MAX: usize = 1024;

/// Largest guest-visible size in bytes for a segment size: the root of the map names every GiB in
/// 8 bytes and must fit into one record.
pub(super) fn size_max(segment_blocks: u32) -> u64 {
    let root_max = u64::from(segment_blocks - 1).min(u64::from(DATA_BLOCKS_MAX)) * BLOCK_SIZE;
    SIZE_MAX.min((root_max / 8 - 2) << 30)
}

const H_VERSION: usize = 8;
const H_INCOMPATIBLE: usize = H_VERSION + 8;
const H_RO_COMPATIBLE: usize = H_INCOMPATIBLE + 8;
const H_COMPATIBLE: usize = H_RO_COMPATIBLE + 8;
const H_LAYER_ID: usize = H_COMPATIBLE + 8;
const H_SEGMENT_BLOCKS: usize = H_LAYER_ID + 16;
const H_BASE_FORMAT: usize = H_SEGMENT_BLOCKS + 8;
const H_BASE_PATH_LEN: usize = H_BASE_FORMAT + 4;
const H_BASE_SIZE: usize = H_BASE_PATH_LEN + 4;
const H_BASE_MTIME: usize = H_BASE_SIZE + 8;
const H_BASE_LAYER_ID: usize = H_BASE_MTIME + 8;
const H_BASE_GENERATION: usize = H_BASE_LAYER_ID + 16;
const H_BASE_PATH: usize = 256;
const H_CHECKSUM: usize = BLOCK_BYTES - 4;

const BASE_NONE: u32 = 0;
const BASE_RAW: u32 = 1;
const BASE_LAYER: u32 = 2;

/// 128 random bits that name a layer.
pub type LayerId = [u8; 16];

/// What identified the base when the layer was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BaseIdentity {
    /// A raw image: its size in bytes and modification time in nanoseconds.
    Raw { size: u64, mtime_ns: u64 },
    /// A cleanly closed layer: its guest-visible size, its id and its checkpoint generation.
    Layer { size: u64, id: LayerId, generation: u64 },
}

impl BaseIdentity {
    pub(super) fn format(&self) -> Format {
        match self {
            Self::Raw { .. } => Format::Raw,
            Self::Layer { .. } => Format::Layer,
        }
    }

    /// Guest-visible size in bytes.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } | Self::Layer { size, .. } => *size,
        }
    }
}

/// A base as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseRecord {
    /// As the user gave it; a relative path starts at the layer's folder.
    pub(super) path: String,
    pub(super) identity: BaseIdentity,
}

/// The header block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) layer_id: LayerId,
    pub(super) segment_blocks: u32,
    pub(super) base: Option<BaseRecord>,
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

fn unsupported(field: &'static str, at: usize, detail: impl ToString) -> Damage {
    Damage { unsupported: true, ..damage(field, at, detail) }
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; BLOCK_BYTES];
        put(&mut b, 0, &MAGIC);
        put(&mut b, H_VERSION, &VERSION.to_le_bytes());
        put(&mut b, H_LAYER_ID, &self.layer_id);
        put(&mut b, H_SEGMENT_BLOCKS, &self.segment_blocks.to_le_bytes());
        if let Some(base) = &self.base {
            put(&mut b, H_BASE_SIZE, &base.identity.size().to_le_bytes());
            let format = match &base.identity {
                BaseIdentity::Raw { mtime_ns, .. } => {
                    put(&mut b, H_BASE_MTIME, &mtime_ns.to_le_bytes());
                    BASE_RAW
                }
                BaseIdentity::Layer { id, generation, .. } => {
                    put(&mut b, H_BASE_LAYER_ID, id);
                    put(&mut b, H_BASE_GENERATION, &generation.to_le_bytes());
                    BASE_LAYER
                }
            };
            put(&mut b, H_BASE_FORMAT, &format.to_le_bytes());
            assert!(base.path.len() <= BASE_PATH_MAX, "checked by create");
            put(&mut b, H_BASE_PATH_LEN, &(base.path.len() as u32).to_le_bytes());
            put(&mut b, H_BASE_PATH, base.path.as_bytes());
        }
        let sum = checksum(&[&b[..H_CHECKSUM]]);
        put(&mut b, H_CHECKSUM, &sum.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Result<Self, Damage> {
        if b.len() < BLOCK_BYTES || array::<8>(b, 0) != MAGIC {
            return Err(damage("header.magic", 0, "this is not a layer"));
        }
        let version = get_u32(b, H_VERSION);
        if version != VERSION {
            return Err(unsupported("header.version", H_VERSION, format!("version {version} is not known")));
        }
        let sum = checksum(&[&b[..H_CHECKSUM]]);
        if sum != get_u32(b, H_CHECKSUM) {
            return Err(damage("header.checksum", H_CHECKSUM, "it does not match"));
        }
        for (field, at) in [("incompatible", H_INCOMPATIBLE), ("read-only compatible", H_RO_COMPATIBLE)] {
            let bits = get_u64(b, at);
            if bits != 0 {
                let detail = format!("unknown {field} features {bits:#x}: a newer program made this layer");
                return Err(unsupported("header.features", at, detail));
            }
        }
        let segment_blocks = get_u32(b, H_SEGMENT_BLOCKS);
        if !segment_blocks.is_power_of_two()
            || !(SEGMENT_BLOCKS_MIN..=SEGMENT_BLOCKS_MAX).contains(&segment_blocks)
        {
            return Err(damage("header.segment_blocks", H_SEGMENT_BLOCKS, segment_blocks));
        }
        Ok(Self { layer_id: array(b, H_LAYER_ID), segment_blocks, base: Self::decode_base(b)? })
    }

    fn decode_base(b: &[u8]) -> Result<Option<BaseRecord>, Damage> {
        let size = get_u64(b, H_BASE_SIZE);
        if size > SIZE_MAX {
            return Err(damage("header.base_size", H_BASE_SIZE, size));
        }
        let identity = match get_u32(b, H_BASE_FORMAT) {
            BASE_NONE => return Ok(None),
            BASE_RAW => BaseIdentity::Raw { size, mtime_ns: get_u64(b, H_BASE_MTIME) },
            BASE_LAYER => BaseIdentity::Layer {
                size,
                id: array(b, H_BASE_LAYER_ID),
                generation: get_u64(b, H_BASE_GENERATION),
            },
            other => return Err(damage("header.base_format", H_BASE_FORMAT, other)),
        };
        let len = get_u32(b, H_BASE_PATH_LEN) as usize;
        if len == 0 || len > BASE_PATH_MAX {
            return Err(damage("header.base_path_len", H_BASE_PATH_LEN, len));
        }
        let path = String::from_utf8(b[H_BASE_PATH..H_BASE_PATH + len].to_vec())
            .map_err(|_| damage("header.base_path", H_BASE_PATH, "it is not UTF-8"))?;
        Ok(Some(BaseRecord { path, identity }))
    }
}

const SLOT_MAGIC: [u8; 8] = *b"SAPWSLOT";
const S_LAYER_ID: usize = 8;
const S_GENERATION: usize = S_LAYER_ID + 16;
const S_SEQUENCE: usize = S_GENERATION + 8;
const S_NONCE: usize = S_SEQUENCE + 8;
const S_CHAIN: usize = S_NONCE + 8;
const S_FLAGS: usize = S_CHAIN + 4;
const S_LOG_SEGMENT: usize = S_FLAGS + 4;
const S_LOG_BLOCK: usize = S_LOG_SEGMENT + 4;
const S_NEXT_SEGMENT: usize = S_LOG_BLOCK + 4;
const S_ROOT_LEN: usize = S_NEXT_SEGMENT + 4;
const S_ROOT: usize = S_ROOT_LEN + 4;
const S_SIZE: usize = S_ROOT + 8;
const S_CHECKSUM: usize = SLOT_BYTES - 4;
/// A slot fits in one sector, which the medium writes as a whole.
pub(super) const SLOT_BYTES: usize = SECTOR_SIZE as usize;
const FLAG_CLEAN: u32 = 1;

/// The slot that holds checkpoint `generation`: they alternate.
pub(super) fn slot_offset(generation: u64) -> FileOffset {
    FileOffset(BLOCK_SIZE * (1 + generation % 2))
}

/// A position in the log: between two records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogPosition {
    /// The segment being filled.
    pub(super) segment: u32,
    /// Blocks of it that are taken.
    pub(super) block: u32,
    /// The segment in which the log goes on when this one is full.
    pub(super) next_segment: u32,
    /// Sequence number of the last record before this position.
    pub(super) sequence: u64,
    /// Chain value of that record.
    pub(super) chain: u32,
    /// The nonce that the next record carries.
    pub(super) nonce: u64,
}

/// One checkpoint: the map and size as of `log.sequence`, and where the log goes on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) layer_id: LayerId,
    pub(super) generation: u64,
    pub(super) log: LogPosition,
    /// The map's root node: where its bytes start (0: the map is empty) and how many there are.
    pub(super) root: FileOffset,
    pub(super) root_len: u32,
    /// Guest-visible size in bytes.
    pub(super) size: u64,
    /// Written by a clean stop: the log is empty from here.
    pub(super) clean: bool,
}

/// What a slot's block holds.
pub(super) enum SlotState {
    /// Never written.
    Blank,
    Valid(Slot),
    Damaged(Damage),
}

impl Slot {
    /// The slot's sector, padded with zeroes to a block.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; BLOCK_BYTES];
        put(&mut b, 0, &SLOT_MAGIC);
        put(&mut b, S_LAYER_ID, &self.layer_id);
        put(&mut b, S_GENERATION, &self.generation.to_le_bytes());
        put(&mut b, S_SEQUENCE, &self.log.sequence.to_le_bytes());
        put(&mut b, S_NONCE, &self.log.nonce.to_le_bytes());
        put(&mut b, S_CHAIN, &self.log.chain.to_le_bytes());
        put(&mut b, S_FLAGS, &(if self.clean { FLAG_CLEAN } else { 0 }).to_le_bytes());
        put(&mut b, S_LOG_SEGMENT, &self.log.segment.to_le_bytes());
        put(&mut b, S_LOG_BLOCK, &self.log.block.to_le_bytes());
        put(&mut b, S_NEXT_SEGMENT, &self.log.next_segment.to_le_bytes());
        put(&mut b, S_ROOT, &self.root.0.to_le_bytes());
        put(&mut b, S_ROOT_LEN, &self.root_len.to_le_bytes());
        put(&mut b, S_SIZE, &self.size.to_le_bytes());
        let sum = checksum(&[&b[..S_CHECKSUM]]);
        put(&mut b, S_CHECKSUM, &sum.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8], header: &Header) -> SlotState {
        if b[..SLOT_BYTES].iter().all(|&byte| byte == 0) {
            return SlotState::Blank;
        }
        match Self::decode_written(b, header) {
            Ok(slot) => SlotState::Valid(slot),
            Err(damage) => SlotState::Damaged(damage),
        }
    }

    fn decode_written(b: &[u8], header: &Header) -> Result<Self, Damage> {
        if array::<8>(b, 0) != SLOT_MAGIC {
            return Err(damage("slot.magic", 0, "it is not that of a slot"));
        }
        if checksum(&[&b[..S_CHECKSUM]]) != get_u32(b, S_CHECKSUM) {
            return Err(damage("slot.checksum", S_CHECKSUM, "it does not match"));
        }
        let slot = Self {
            layer_id: array(b, S_LAYER_ID),
            generation: get_u64(b, S_GENERATION),
            log: LogPosition {
                segment: get_u32(b, S_LOG_SEGMENT),
                block: get_u32(b, S_LOG_BLOCK),
                next_segment: get_u32(b, S_NEXT_SEGMENT),
                sequence: get_u64(b, S_SEQUENCE),
                chain: get_u32(b, S_CHAIN),
                nonce: get_u64(b, S_NONCE),
            },
            root: FileOffset(get_u64(b, S_ROOT)),
            root_len: get_u32(b, S_ROOT_LEN),
            size: get_u64(b, S_SIZE),
            clean: get_u32(b, S_FLAGS) & FLAG_CLEAN != 0,
        };
        slot.check(header)?;
        Ok(slot)
    }

    fn check(&self, header: &Header) -> Result<(), Damage> {
        if self.layer_id != header.layer_id {
            return Err(damage("slot.layer_id", S_LAYER_ID, "it belongs to another layer"));
        }
        if self.size > size_max(header.segment_blocks) || !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(damage("slot.size", S_SIZE, self.size));
        }
        if self.log.block > header.segment_blocks {
            return Err(damage("slot.log_block", S_LOG_BLOCK, self.log.block));
        }
        if self.log.next_segment == self.log.segment {
            return Err(damage("slot.next_segment", S_NEXT_SEGMENT, "the log would overwrite itself"));
        }
        if self.generation == 0 || self.generation > GENERATION_MAX {
            return Err(damage("slot.generation", S_GENERATION, self.generation));
        }
        if self.log.sequence > u64::MAX / 2 {
            return Err(damage("slot.sequence", S_SEQUENCE, self.log.sequence));
        }
        Ok(())
    }
}
