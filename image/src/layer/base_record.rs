//! Base records: what lies below a layer.
//!
//! Record *n* lies in block 3 + *n* mod 2, and counts when the newest slot names it. So a base is
//! changed by writing the block that no slot names, a sync, and a checkpoint.

use super::bytes::{array, checksum, get_u32, get_u64, put};
use super::header::Header;
use super::layout::{Damage, LayerId, SIZE_MAX, damage, unsupported};
use crate::format::Format;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};

/// Longest base path in bytes.
pub(super) const BASE_PATH_MAX: usize = 2048;
/// The numbers of base records begin with 1 and end here.
pub(super) const BASE_SEQUENCE_MAX: u64 = 1 << 55;

const BASE_MAGIC: [u8; 8] = *b"SAPWBASE";
const B_LAYER_ID: usize = 8;
const B_SEQUENCE: usize = B_LAYER_ID + 16;
const B_FLAGS: usize = B_SEQUENCE + 8;
const B_FORMAT: usize = B_FLAGS + 4;
const B_PATH_LEN: usize = B_FORMAT + 4;
const B_SIZE: usize = B_PATH_LEN + 8;
const B_MTIME: usize = B_SIZE + 8;
const B_BASE_ID: usize = B_MTIME + 8;
const B_GENERATION: usize = B_BASE_ID + 16;
const B_PATH: usize = 256;
const B_CHECKSUM: usize = BLOCK_BYTES - 4;

const FLAG_COMMITTING: u32 = 1;

const FORMAT_NONE: u32 = 0;
const FORMAT_RAW: u32 = 1;
const FORMAT_LAYER: u32 = 2;

/// What identified a base when it was recorded.
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

/// A base as a layer names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseRef {
    /// As the user gave it; a relative path starts at the layer's folder.
    pub(super) path: String,
    pub(super) identity: BaseIdentity,
}

/// A base record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseRecord {
    pub(super) layer_id: LayerId,
    /// Its number, from 1.
    pub(super) sequence: u64,
    /// The layer is being merged into its base, which therefore may be anything between what it was
    /// and what it is to become; together with the layer it still is the same disk.
    pub(super) committing: bool,
    pub(super) base: Option<BaseRef>,
}

/// Where base record `sequence` lies: they alternate.
pub(super) fn base_offset(sequence: u64) -> FileOffset {
    FileOffset(BLOCK_SIZE * (3 + sequence % 2))
}

impl BaseRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; BLOCK_BYTES];
        put(&mut b, 0, &BASE_MAGIC);
        put(&mut b, B_LAYER_ID, &self.layer_id);
        put(&mut b, B_SEQUENCE, &self.sequence.to_le_bytes());
        put(&mut b, B_FLAGS, &(if self.committing { FLAG_COMMITTING } else { 0 }).to_le_bytes());
        if let Some(base) = &self.base {
            put(&mut b, B_SIZE, &base.identity.size().to_le_bytes());
            let format = match &base.identity {
                BaseIdentity::Raw { mtime_ns, .. } => {
                    put(&mut b, B_MTIME, &mtime_ns.to_le_bytes());
                    FORMAT_RAW
                }
                BaseIdentity::Layer { id, generation, .. } => {
                    put(&mut b, B_BASE_ID, id);
                    put(&mut b, B_GENERATION, &generation.to_le_bytes());
                    FORMAT_LAYER
                }
            };
            put(&mut b, B_FORMAT, &format.to_le_bytes());
            assert!(base.path.len() <= BASE_PATH_MAX, "checked where a base is named");
            put(&mut b, B_PATH_LEN, &(base.path.len() as u32).to_le_bytes());
            put(&mut b, B_PATH, base.path.as_bytes());
        }
        let sum = checksum(&[&b[..B_CHECKSUM]]);
        put(&mut b, B_CHECKSUM, &sum.to_le_bytes());
        b
    }

    /// Decodes the block in which record `sequence` of a layer lies.
    pub(super) fn decode(b: &[u8], header: &Header, sequence: u64) -> Result<Self, Damage> {
        if array::<8>(b, 0) != BASE_MAGIC {
            return Err(damage("base.magic", 0, "it is not that of a base record"));
        }
        if checksum(&[&b[..B_CHECKSUM]]) != get_u32(b, B_CHECKSUM) {
            return Err(damage("base.checksum", B_CHECKSUM, "it does not match"));
        }
        let layer_id = array(b, B_LAYER_ID);
        if layer_id != header.layer_id {
            return Err(damage("base.layer_id", B_LAYER_ID, "it belongs to another layer"));
        }
        let found = get_u64(b, B_SEQUENCE);
        if found != sequence {
            let detail = format!("the newest checkpoint belongs to base record {sequence}, this is {found}");
            return Err(damage("base.sequence", B_SEQUENCE, detail));
        }
        let flags = get_u32(b, B_FLAGS);
        if flags & !FLAG_COMMITTING != 0 {
            let detail = format!("unknown flags {flags:#x} of the base: a newer program wrote them");
            return Err(unsupported("base.flags", B_FLAGS, detail));
        }
        let committing = flags & FLAG_COMMITTING != 0;
        let base = Self::decode_base(b)?;
        if committing && base.is_none() {
            return Err(damage("base.flags", B_FLAGS, "a commit into nothing is under way"));
        }
        Ok(Self { layer_id, sequence, committing, base })
    }

    fn decode_base(b: &[u8]) -> Result<Option<BaseRef>, Damage> {
        let size = get_u64(b, B_SIZE);
        if size > SIZE_MAX {
            return Err(damage("base.size", B_SIZE, size));
        }
        let identity = match get_u32(b, B_FORMAT) {
            FORMAT_NONE => return Ok(None),
            FORMAT_RAW => BaseIdentity::Raw { size, mtime_ns: get_u64(b, B_MTIME) },
            FORMAT_LAYER => {
                BaseIdentity::Layer { size, id: array(b, B_BASE_ID), generation: get_u64(b, B_GENERATION) }
            }
            other => {
                let detail = format!("unknown format {other} of the base: a newer program recorded it");
                return Err(unsupported("base.format", B_FORMAT, detail));
            }
        };
        let len = get_u32(b, B_PATH_LEN) as usize;
        if len == 0 || len > BASE_PATH_MAX {
            return Err(damage("base.path_len", B_PATH_LEN, len));
        }
        let path = String::from_utf8(b[B_PATH..B_PATH + len].to_vec())
            .map_err(|_| damage("base.path", B_PATH, "it is not UTF-8"))?;
        Ok(Some(BaseRef { path, identity }))
    }
}
