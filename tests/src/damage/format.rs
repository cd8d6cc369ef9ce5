//! Where the fields of a layer file are, in bytes, and access to them that never panics: images
//! are hostile here, too.

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Block at which segment 0 starts.
pub const FIRST_SEGMENT: usize = 16;

/// The header block.
pub mod header {
    #![allow(missing_docs)]
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const INCOMPATIBLE: usize = 16;
    pub const RO_COMPATIBLE: usize = 24;
    pub const LAYER_ID: usize = 40;
    pub const SEGMENT_BLOCKS: usize = 56;
    pub const END: usize = 60;
    pub const CHECKSUM: usize = 4092;
}

/// A base record: block 3 or 4.
pub mod base {
    #![allow(missing_docs)]
    pub const MAGIC: &[u8; 8] = b"SAPWBASE";
    pub const LAYER_ID: usize = 8;
    pub const SEQUENCE: usize = 24;
    pub const FLAGS: usize = 32;
    pub const FORMAT: usize = 36;
    pub const PATH_LEN: usize = 40;
    pub const SIZE: usize = 48;
    pub const MTIME: usize = 56;
    pub const BASE_ID: usize = 64;
    pub const GENERATION: usize = 80;
    pub const PATH: usize = 256;
    pub const CHECKSUM: usize = 4092;
}

/// A slot: the first sector of block 1 or 2.
pub mod slot {
    #![allow(missing_docs)]
    pub const MAGIC: &[u8; 8] = b"SAPWSLOT";
    pub const LAYER_ID: usize = 8;
    pub const GENERATION: usize = 24;
    pub const SEQUENCE: usize = 32;
    pub const NONCE: usize = 40;
    pub const CHAIN: usize = 48;
    pub const FLAGS: usize = 52;
    pub const LOG_SEGMENT: usize = 56;
    pub const LOG_BLOCK: usize = 60;
    pub const NEXT_SEGMENT: usize = 64;
    pub const ROOT_LEN: usize = 68;
    pub const ROOT: usize = 72;
    pub const SIZE: usize = 80;
    pub const BASE: usize = 88;
    pub const LANES: usize = 96;
    pub const LANE_1: usize = 100;
    pub const CHECKSUM: usize = 508;
}

/// A record's index block.
pub mod record {
    #![allow(missing_docs)]
    pub const MAGIC: &[u8; 8] = b"SAPWRECD";
    pub const LAYER_ID: usize = 8;
    pub const NONCE: usize = 24;
    pub const SEQUENCE: usize = 32;
    pub const PREVIOUS: usize = 40;
    pub const STANDS_FOR: usize = 44;
    pub const KIND: usize = 48;
    pub const DATA_BLOCKS: usize = 52;
    pub const NEXT_SEGMENT: usize = 56;
    pub const RUN_COUNT: usize = 60;
    pub const RUNS: usize = 64;
    pub const CHECKSUM: usize = 4092;
    pub const RUN_BYTES: usize = 16;
    /// Kinds of runs.
    pub const DATA: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const ABSENT: u64 = 3;
    pub const NODES: u64 = 4;
    pub const SIZE: u64 = 5;
    pub const CHECKPOINT_END: u64 = 6;
}

/// A map node.
pub mod node {
    #![allow(missing_docs)]
    pub const MAGIC: u16 = 0x4e53;
    pub const KIND: usize = 2;
    pub const INDEX: usize = 4;
    pub const COUNT: usize = 8;
    pub const CHECKSUM: usize = 12;
    pub const BODY: usize = 16;
    pub const LEAF_RUNS: u16 = 1;
    pub const LEAF_DENSE: u16 = 2;
    pub const BRANCH: u16 = 3;
    pub const ROOT: u16 = 4;
    pub const USAGE: u16 = 5;
    /// Where the references of a root begin, in its body.
    pub const ROOT_REFS: usize = BODY + 8;
}

/// Bytes `at..at + N`; those outside are zeroes.
pub fn bytes<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    let inside = b.get(at..).unwrap_or_default();
    let n = inside.len().min(N);
    out[..n].copy_from_slice(&inside[..n]);
    out
}

/// The `u16` at `at`.
pub fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(b, at))
}

/// The `u32` at `at`.
pub fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(b, at))
}

/// The `u64` at `at`.
pub fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(b, at))
}

/// Writes `value` at `at`, unless it lies outside.
pub fn put(b: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = at.checked_add(value.len()).and_then(|end| b.get_mut(at..end)) {
        target.copy_from_slice(value);
    }
}

/// Writes a `u32`.
pub fn put_u32(b: &mut [u8], at: usize, value: u32) {
    put(b, at, &value.to_le_bytes());
}

/// Writes a `u64`.
pub fn put_u64(b: &mut [u8], at: usize, value: u64) {
    put(b, at, &value.to_le_bytes());
}

/// Byte of the slot in block 1 (`parity` 0) or 2.
pub fn slot_at(parity: usize) -> usize {
    (1 + parity) * BLOCK
}

/// Byte of the base record in block 3 (`parity` 0) or 4.
pub fn base_at(parity: usize) -> usize {
    (3 + parity) * BLOCK
}

/// The base records that are there.
pub fn bases(b: &[u8]) -> Vec<usize> {
    let mut bases: Vec<usize> = [0, 1].map(base_at).into();
    bases.retain(|&at| bytes::<8>(b, at) == *base::MAGIC);
    bases
}

/// The slots that are there, the one with the newest checkpoint first.
pub fn slots(b: &[u8]) -> Vec<usize> {
    let mut slots: Vec<usize> = [0, 1].map(slot_at).into();
    slots.retain(|&at| bytes::<8>(b, at) == *slot::MAGIC);
    slots.sort_by_key(|&at| std::cmp::Reverse(u64_at(b, at + slot::GENERATION)));
    slots
}

/// Blocks in a segment; 0 when the header makes no sense.
pub fn segment_blocks(b: &[u8]) -> usize {
    let blocks = u32_at(b, header::SEGMENT_BLOCKS) as usize;
    if blocks.is_power_of_two() && (16..=16384).contains(&blocks) { blocks } else { 0 }
}

/// Byte of a block of a segment, if a file can have it.
pub fn segment_at(b: &[u8], segment: u32, block: usize) -> usize {
    (FIRST_SEGMENT + segment as usize * segment_blocks(b) + block) * BLOCK
}
