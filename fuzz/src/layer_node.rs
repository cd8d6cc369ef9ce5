//! A map node. The input is a byte that says whether its checksum is made right, its index, the
//! number of blocks of the file, and its bytes.

use sapwood_image::layer::doors;
use sapwood_tests::damage::format::{node, u16_at, u32_at};
use sapwood_tests::damage::seal::seal_node;

use crate::{MEMORY, bounded};

/// Bytes before the node.
const NODE: usize = 9;

/// One run.
pub fn run(data: &[u8]) {
    let Some(bytes) = data.get(NODE..) else { return };
    let mut bytes = bytes.to_vec();
    if data[0] & 1 == 0 {
        let unit = if u16_at(&bytes, node::KIND) == node::LEAF_DENSE { 4 } else { 8 };
        let body = (u32_at(&bytes, node::COUNT) as usize).saturating_mul(unit);
        let len = node::BODY.saturating_add(body).min(bytes.len());
        seal_node(&mut bytes, 0, len);
    }
    bounded(MEMORY, || doors::node(&bytes, u32_at(data, 1), u32_at(data, 5)));
}

/// The input for a node of a file.
pub fn seed(file: &[u8], at: usize, len: usize) -> Vec<u8> {
    let bytes = &file[at..at + len];
    let blocks = (file.len() / 4096) as u32;
    let mut data = vec![0];
    data.extend(u32_at(bytes, node::INDEX).to_le_bytes());
    data.extend(blocks.to_le_bytes());
    data.extend(bytes);
    data
}
