//! Header and slots. The input is what they hold, without the zeroes between: a byte that says
//! what is made right, 1300 bytes of the header, 512 of each slot.

use sapwood_image::layer::doors;
use sapwood_tests::damage::format::{BLOCK, put, slot_at};
use sapwood_tests::damage::seal::{seal_header, seal_slots};

use crate::{MEMORY, bounded};

/// Bytes of the header that may differ from zero.
pub const HEADER: usize = 1300;
/// Bytes of a slot.
pub const SLOT: usize = 512;

/// One run.
pub fn run(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let mut bytes = vec![0; 3 * BLOCK];
    let (header, slots) = data.split_at(data.len().min(HEADER));
    put(&mut bytes, 0, header);
    for (i, slot) in slots.chunks(SLOT).take(2).enumerate() {
        put(&mut bytes, slot_at(i), slot);
    }
    if flags & 1 == 0 {
        seal_header(&mut bytes);
    }
    if flags & 2 == 0 {
        seal_slots(&mut bytes);
    }
    bytes.truncate(3 * BLOCK - usize::from(flags >> 2) * 8);
    bounded(MEMORY, || doors::header_and_slots(&bytes));
}

/// The input for the start of a layer file.
pub fn seed(file: &[u8]) -> Vec<u8> {
    let mut data = vec![0];
    data.extend_from_slice(&file[..HEADER]);
    [0, 1].into_iter().for_each(|i| data.extend_from_slice(&file[slot_at(i)..slot_at(i) + SLOT]));
    data
}
