//! Slots: the two newest checkpoints.
//!
//! A slot is one sector, which the medium writes as a whole, and the only thing that commits: a
//! checkpoint, and with it a change of the base.

use super::base_record::BASE_SEQUENCE_MAX;
use super::bytes::{array, checksum, get_u32, get_u64, put};
use super::header::Header;
use super::layout::{Damage, GENERATION_MAX, LayerId, damage, size_max};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset, SECTOR_SIZE};

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
const S_BASE: usize = S_SIZE + 8;
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
    /// Sequence number of the base record that the map belongs to.
    pub(super) base: u64,
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
        put(&mut b, S_BASE, &self.base.to_le_bytes());
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
            base: get_u64(b, S_BASE),
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
        if self.base == 0 || self.base > BASE_SEQUENCE_MAX {
            return Err(damage("slot.base", S_BASE, self.base));
        }
        Ok(())
    }
}
