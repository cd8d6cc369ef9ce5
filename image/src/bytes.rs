//! Little-endian integers at named offsets, and the checksum of stored structures.

/// Reads the `u16` at `at`.
pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

/// Reads the `u32` at `at`.
pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

/// Reads the `u64` at `at`.
pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// Reads `N` bytes at `at`.
///
/// # Panics
/// If they lie outside: callers check lengths that come from a file first.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

/// Writes `value` at `at`.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The checksum stored in a header, slot, node or index block: the CRC-32 of `parts` in order,
/// masked. A block that ends in its own plain CRC-32 has, as a whole, one and the same CRC-32 as any
/// other such block. A guest may well store layers on its disk: by its checksum in the log, a block
/// of theirs could not be told from an old index block of ours that a lost write left in its place.
pub(crate) fn checksum(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().rotate_right(MASK_ROTATION).wrapping_add(MASK_SUMMAND)
}

/// How a stored checksum is masked.
const MASK_ROTATION: u32 = 15;
const MASK_SUMMAND: u32 = 0xa282_ead8;
