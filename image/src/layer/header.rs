//! The header: what a layer is for ever. Written once, last of all when a layer is made.

use super::layout::{
    Damage, LayerId, MAGIC, SEGMENT_BLOCKS_MAX, SEGMENT_BLOCKS_MIN, VERSION, damage, unsupported,
};
use crate::bytes::{array, checksum, get_u32, get_u64, put};
use sapwood_blockdev::units::BLOCK_BYTES;

const H_VERSION: usize = 8;
const H_INCOMPATIBLE: usize = H_VERSION + 8;
const H_RO_COMPATIBLE: usize = H_INCOMPATIBLE + 8;
const H_COMPATIBLE: usize = H_RO_COMPATIBLE + 8;
const H_LAYER_ID: usize = H_COMPATIBLE + 8;
const H_SEGMENT_BLOCKS: usize = H_LAYER_ID + 16;
const H_CHECKSUM: usize = BLOCK_BYTES - 4;

/// The header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) layer_id: LayerId,
    pub(super) segment_blocks: u32,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; BLOCK_BYTES];
        put(&mut b, 0, &MAGIC);
        put(&mut b, H_VERSION, &VERSION.to_le_bytes());
        put(&mut b, H_LAYER_ID, &self.layer_id);
        put(&mut b, H_SEGMENT_BLOCKS, &self.segment_blocks.to_le_bytes());
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
        Ok(Self { layer_id: array(b, H_LAYER_ID), segment_blocks })
    }
}
