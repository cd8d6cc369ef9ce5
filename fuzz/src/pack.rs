//! Layer files as small inputs: only the stretches that differ from zero, with checksums left out,
//! to be made right when the file is unpacked. A fuzzer that changes a byte changes a field.
//!
//! ```text
//! byte 0       which checksums stay as they are (see `seal`)
//! byte 1       what is done with the layer (see `layer_open`)
//! byte 2..4    blocks in the file
//! byte 4..6    bytes cut off its end
//! then         stretches: block (2 bytes), start in the block (2), length (2), bytes
//! ```

use sapwood_tests::damage::format::{BLOCK, put, u16_at};
use sapwood_tests::damage::seal::Seal;

/// Bytes before the stretches.
const HEAD: usize = 6;
/// Bytes before the contents of a stretch.
const STRETCH: usize = 6;
/// Zeroes that end a stretch.
const GAP: usize = 12;
/// Most blocks in a file: 6 MiB.
const BLOCKS_MAX: usize = 1536;

/// The flag for which records keep the checksums that they have.
pub const RECORDS_AS_THEY_ARE: u8 = 8;

fn seal(flags: u8) -> Seal {
    Seal {
        header: flags & 1 == 0,
        slots: flags & 2 == 0,
        nodes: flags & 4 == 0,
        records: flags & RECORDS_AS_THEY_ARE == 0,
        chain: flags & 16 != 0,
    }
}

/// The file of an input.
pub fn unpack(data: &[u8]) -> Option<Vec<u8>> {
    let mut rest = data.get(HEAD..)?;
    let blocks = usize::from(u16_at(data, 2)).min(BLOCKS_MAX);
    let mut file = vec![0; blocks * BLOCK];
    while rest.len() >= STRETCH {
        let at = usize::from(u16_at(rest, 0)) * BLOCK + usize::from(u16_at(rest, 2)) % BLOCK;
        let len = usize::from(u16_at(rest, 4)).min(BLOCK).min(rest.len() - STRETCH);
        put(&mut file, at, &rest[STRETCH..STRETCH + len]);
        rest = &rest[STRETCH + len..];
    }
    seal(data[0]).apply(&mut file);
    file.truncate(file.len().saturating_sub(usize::from(u16_at(data, 4))));
    Some(file)
}

/// The input for a file; `bare` is the file without its checksums.
pub fn pack(len: usize, bare: &[u8]) -> Vec<u8> {
    let blocks = len.div_ceil(BLOCK);
    let mut data = vec![0, 0];
    data.extend((blocks as u16).to_le_bytes());
    data.extend(((blocks * BLOCK - len) as u16).to_le_bytes());
    for (number, block) in bare.chunks(BLOCK).enumerate() {
        let mut at = 0;
        while let Some(start) = block[at..].iter().position(|&byte| byte != 0).map(|skip| at + skip) {
            let zeroes = block[start..].windows(GAP).position(|gap| gap.iter().all(|&byte| byte == 0));
            let end = zeroes.map_or(block.len(), |len| start + len);
            [number, start, end - start].iter().for_each(|&n| data.extend((n as u16).to_le_bytes()));
            data.extend(&block[start..end]);
            at = end;
        }
    }
    data
}
