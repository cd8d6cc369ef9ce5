//! Makes checksums right again, so that damage gets past them: what a hostile author of a layer
//! would do.

use super::format::{
    BLOCK, base, bases, bytes, header, node, put, put_u32, put_u64, record, slot, slot_at, slots, u32_at,
    u64_at,
};
use super::walk::{Position, RecordAt, nodes, records};

/// What to make right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// The checksums of the header and the base records.
    pub header: bool,
    /// The slots' checksums.
    pub slots: bool,
    /// The checksums of map nodes.
    pub nodes: bool,
    /// The checksums of records, and those of their data blocks.
    pub records: bool,
    /// What ties the log's records together: id, nonce, sequence number, chain.
    pub chain: bool,
}

impl Seal {
    /// Everything.
    pub const ALL: Self = Self { header: true, slots: true, nodes: true, records: true, chain: true };
    /// Checksums only: a valid image stays as it is.
    pub const CHECKSUMS: Self = Self { chain: false, ..Self::ALL };

    /// Applies itself to an image.
    pub fn apply(self, b: &mut [u8]) {
        if self.header {
            seal_header(b);
            seal_bases(b);
        }
        if self.nodes {
            for at in slots(b) {
                seal_nodes(b, at);
            }
        }
        if self.records {
            for found in records(b) {
                seal_record(b, &found);
            }
        }
        if self.chain {
            for at in slots(b).into_iter().rev() {
                seal_log(b, at);
            }
        }
        if self.slots {
            seal_slots(b);
        }
    }
}

/// The checksum that the format uses for its own structures.
pub fn checksum(bytes: &[u8]) -> u32 {
    masked(crc32fast::hash(bytes))
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn seal_range(b: &mut [u8], start: usize, len: usize) {
    if let Some(covered) = b.get(start..start + len) {
        let sum = checksum(covered);
        put_u32(b, start + len, sum);
    }
}

/// The header's checksum.
pub fn seal_header(b: &mut [u8]) {
    seal_range(b, 0, header::CHECKSUM);
}

/// The checksums of the base records.
pub fn seal_bases(b: &mut [u8]) {
    for at in bases(b) {
        seal_range(b, at, base::CHECKSUM);
    }
}

/// The checksums of both slots.
pub fn seal_slots(b: &mut [u8]) {
    for at in [0, 1].map(slot_at) {
        if bytes::<8>(b, at) == *slot::MAGIC {
            seal_range(b, at, slot::CHECKSUM);
        }
    }
}

/// The checksums of the map nodes below a slot.
pub fn seal_nodes(b: &mut [u8], slot_at: usize) {
    for found in nodes(b, slot_at) {
        seal_node(b, found.at, found.len);
    }
}

/// The checksum of the node in `at..at + len`.
pub fn seal_node(b: &mut [u8], at: usize, len: usize) {
    let (Some(frame), Some(body)) = (b.get(at..at + node::CHECKSUM), b.get(at + node::BODY..at + len)) else {
        return;
    };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(frame);
    hasher.update(body);
    put_u32(b, at + node::CHECKSUM, masked(hasher.finalize()));
}

/// The checksums of a record and of its data blocks.
pub fn seal_record(b: &mut [u8], found: &RecordAt) {
    let is_void = u32_at(b, found.at + record::KIND) != 0;
    let runs = u32_at(b, found.at + record::RUN_COUNT) as usize;
    let sums = record::RUNS.saturating_add(runs.saturating_mul(record::RUN_BYTES));
    for i in 0..if is_void { 0 } else { found.data_blocks } {
        let block: [u8; BLOCK] = bytes(b, found.at + (1 + i) * BLOCK);
        let at = sums.saturating_add(i * 4);
        if at + 4 <= record::CHECKSUM {
            put_u32(b, found.at + at, crc32fast::hash(&block));
        }
    }
    seal_range(b, found.at, record::CHECKSUM);
}

/// Ties the records after a slot together: each becomes the successor of the one before.
pub fn seal_log(b: &mut [u8], slot_at: usize) {
    let layer_id: [u8; 16] = bytes(b, header::LAYER_ID);
    let mut position = Position::of_slot(b, slot_at);
    let mut sequence = u64_at(b, slot_at + slot::SEQUENCE);
    let mut chain = u32_at(b, slot_at + slot::CHAIN);
    let mut nonce = u64_at(b, slot_at + slot::NONCE);
    for _ in 0..b.len() / BLOCK {
        let Some(next) = position.candidates(b).next() else { return };
        sequence = sequence.wrapping_add(1);
        put(b, next.at + record::LAYER_ID, &layer_id);
        put_u64(b, next.at + record::NONCE, nonce);
        put_u64(b, next.at + record::SEQUENCE, sequence);
        put_u32(b, next.at + record::PREVIOUS, chain);
        seal_record(b, &next);
        let is_void = u32_at(b, next.at + record::KIND) == 1;
        chain = u32_at(b, next.at + if is_void { record::STANDS_FOR } else { record::CHECKSUM });
        nonce = new_nonce(b, &next).unwrap_or(nonce);
        position = Position::after(b, &next);
    }
}

/// The nonce that a record puts in force.
fn new_nonce(b: &[u8], found: &RecordAt) -> Option<u64> {
    let runs = (u32_at(b, found.at + record::RUN_COUNT) as usize).min(BLOCK / record::RUN_BYTES);
    let run = |i| found.at + record::RUNS + i * record::RUN_BYTES;
    let last = (0..runs).rev().find(|&i| u64_at(b, run(i)) >> 56 == record::CHECKPOINT_END)?;
    Some(u64_at(b, run(last) + 8))
}
