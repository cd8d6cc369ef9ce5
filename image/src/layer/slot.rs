//! Slots: the two newest checkpoints.
//!
//! A slot is one sector, which the medium writes as a whole, and the only thing that commits: a
//! checkpoint, and with it a change of the base.

use super::base_record::BASE_SEQUENCE_MAX;
use super::header::Header;
use super::layout::{Damage, GENERATION_MAX, LayerId, damage, size_max};
use super::position::{LANES, Lane, LogPosition};
use super::traffic::Traffic;
use crate::bytes::{array, checksum, get_u32, get_u64, put};
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
/// Which of the lanes after the main one are open: one bit each. Then the segment, block and next segment of each.
const S_LANES: usize = S_BASE + 8;
const S_LANE: usize = S_LANES + 4;
const LANE_BYTES: usize = 12;
const S_TRAFFIC: usize = S_LANE + (LANES - 1) * LANE_BYTES;
const S_CHECKSUM: usize = SLOT_BYTES - 4;
/// A slot fits in one sector, which the medium writes as a whole.
pub(super) const SLOT_BYTES: usize = SECTOR_SIZE as usize;
const FLAG_CLEAN: u32 = 1;

/// The slot that holds checkpoint `generation`: they alternate.
pub(super) fn slot_offset(generation: u64) -> FileOffset {
    FileOffset(BLOCK_SIZE * (1 + generation % 2))
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
    /// What was written up to `log`.
    pub(super) traffic: Traffic,
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
        let mut open = 0u32;
        for (number, lane) in self.log.lanes() {
            open |= 1 << number;
            put_lane(&mut b, lane_offset(number), lane);
        }
        put(&mut b, S_LANES, &(open & !1).to_le_bytes());
        put(&mut b, S_ROOT, &self.root.0.to_le_bytes());
        put(&mut b, S_ROOT_LEN, &self.root_len.to_le_bytes());
        put(&mut b, S_SIZE, &self.size.to_le_bytes());
        put(&mut b, S_BASE, &self.base.to_le_bytes());
        let Traffic { guest, moved, nodes, index } = self.traffic;
        for (i, blocks) in [guest, moved, nodes, index].into_iter().enumerate() {
            put(&mut b, S_TRAFFIC + 8 * i, &blocks.to_le_bytes());
        }
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
            log: decode_position(b, header)?,
            root: FileOffset(get_u64(b, S_ROOT)),
            root_len: get_u32(b, S_ROOT_LEN),
            size: get_u64(b, S_SIZE),
            base: get_u64(b, S_BASE),
            clean: get_u32(b, S_FLAGS) & FLAG_CLEAN != 0,
            traffic: decode_traffic(b),
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

/// Where the fields of a lane are.
fn lane_offset(number: usize) -> usize {
    match number {
        0 => S_LOG_SEGMENT,
        number => S_LANE + (number - 1) * LANE_BYTES,
    }
}

fn put_lane(b: &mut [u8], at: usize, lane: Lane) {
    put(b, at, &lane.segment.to_le_bytes());
    put(b, at + 4, &lane.block.to_le_bytes());
    put(b, at + 8, &lane.next_segment.to_le_bytes());
}

fn get_lane(b: &[u8], at: usize, header: &Header) -> Result<Lane, Damage> {
    let lane = Lane { segment: get_u32(b, at), block: get_u32(b, at + 4), next_segment: get_u32(b, at + 8) };
    if lane.block > header.segment_blocks {
        return Err(damage("slot.log_block", at + 4, lane.block));
    }
    if lane.next_segment == lane.segment {
        return Err(damage("slot.next_segment", at + 8, "the log would overwrite itself"));
    }
    Ok(lane)
}

fn decode_position(b: &[u8], header: &Header) -> Result<LogPosition, Damage> {
    let main = get_lane(b, lane_offset(0), header)?;
    let mut log = LogPosition::new(main, get_u64(b, S_SEQUENCE), get_u32(b, S_CHAIN), get_u64(b, S_NONCE));
    let open = get_u32(b, S_LANES);
    if open & 1 != 0 || open >> LANES != 0 {
        return Err(damage("slot.lanes", S_LANES, open));
    }
    for number in (1..LANES).filter(|number| open >> number & 1 == 1) {
        let at = lane_offset(number);
        let lane = get_lane(b, at, header)?;
        if !log.can_open(number, lane) {
            return Err(damage("slot.lane", at, "another lane has its segments"));
        }
        log.open(number, lane);
    }
    Ok(log)
}

/// The statistics: whatever they say, only they and the choice of lanes are wrong.
fn decode_traffic(b: &[u8]) -> Traffic {
    let [guest, moved, nodes, index] = [0, 1, 2, 3].map(|i| get_u64(b, S_TRAFFIC + 8 * i) & (u64::MAX >> 8));
    Traffic { guest, moved, nodes, index }
}
