//! The index block of a record. The input is a byte that says whether its checksum is made right,
//! and the block without the zeroes at its end.

use sapwood_image::layer::doors;
use sapwood_tests::damage::format::{BLOCK, put, put_u32, record};
use sapwood_tests::damage::seal::checksum;

use crate::{MEMORY, bounded};

/// One run.
pub fn run(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let mut block = vec![0; BLOCK];
    put(&mut block, 0, &data[..data.len().min(BLOCK)]);
    if flags & 1 == 0 {
        let sum = checksum(&block[..record::CHECKSUM]);
        put_u32(&mut block, record::CHECKSUM, sum);
    }
    bounded(MEMORY, || doors::record(&block));
}

/// The input for an index block.
pub fn seed(block: &[u8]) -> Vec<u8> {
    let used = block[..record::CHECKSUM].iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    [&[0], &block[..used]].concat()
}
