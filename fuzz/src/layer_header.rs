//! Header, slots and base records. The input is what they hold, without the zeroes between: a byte
//! that says what is made right, 64 bytes of the header, 512 of each slot, 320 of each base record.

use sapwood_image::layer::doors;
use sapwood_tests::damage::format::{BLOCK, base_at, put, slot_at};
use sapwood_tests::damage::seal::{seal_bases, seal_header, seal_slots};

use crate::{MEMORY, bounded};

/// Bytes of the header that may differ from zero.
pub const HEADER: usize = 64;
/// Bytes of a slot.
pub const SLOT: usize = 512;
/// Bytes of a base record that may differ from zero.
pub const BASE: usize = 320;
/// Blocks of the file that are looked at.
const BLOCKS: usize = 5;

/// One run.
pub fn run(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let mut bytes = vec![0; BLOCKS * BLOCK];
    let (header, slots) = data.split_at(data.len().min(HEADER));
    put(&mut bytes, 0, header);
    let (slots, bases) = slots.split_at(slots.len().min(2 * SLOT));
    for (i, slot) in slots.chunks(SLOT).enumerate() {
        put(&mut bytes, slot_at(i), slot);
    }
    for (i, base) in bases.chunks(BASE).take(2).enumerate() {
        put(&mut bytes, base_at(i), base);
    }
    if flags & 1 == 0 {
        seal_header(&mut bytes);
        seal_bases(&mut bytes);
    }
    if flags & 2 == 0 {
        seal_slots(&mut bytes);
    }
    bytes.truncate(BLOCKS * BLOCK - usize::from(flags >> 2) * 8);
    bounded(MEMORY, || doors::preamble(&bytes));
}

/// The input for the start of a layer file.
pub fn seed(file: &[u8]) -> Vec<u8> {
    let mut data = vec![0];
    data.extend_from_slice(&file[..HEADER]);
    [0, 1].into_iter().for_each(|i| data.extend_from_slice(&file[slot_at(i)..slot_at(i) + SLOT]));
    [0, 1].into_iter().for_each(|i| data.extend_from_slice(&file[base_at(i)..base_at(i) + BASE]));
    data
}
