//! The first block of an archive: what disk it holds.

use crate::bytes::{array, checksum, get_u16, get_u32, get_u64, put};
use crate::sealed::cursor::SEALED_BYTES_MAX;
use crate::sealed::hash::Hash;
use sapwood_blockdev::units::{BLOCK_BYTES, SECTOR_SIZE};

/// The longest name of an archive's disk, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest description, in bytes.
pub const DESCRIPTION_BYTES_MAX: usize = 2048;

/// What an archive says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveInfo {
    /// What the disk is known by.
    pub root: Hash,
    /// Size of the disk in bytes.
    pub size: u64,
    /// For an increment: what the disk is known by that it builds on. What is as there is not in the archive.
    pub base: Option<Hash>,
    /// The disk's name where it came from; may be empty.
    pub name: String,
    /// May be empty.
    pub description: String,
}

pub(super) const MAGIC: [u8; 8] = *b"SAPWARCH";
const VERSION: u32 = 1;
const A_VERSION: usize = 8;
const A_INCOMPATIBLE: usize = A_VERSION + 8;
const A_ID: usize = A_INCOMPATIBLE + 8;
const A_SIZE: usize = A_ID + 16;
const A_ROOT: usize = A_SIZE + 8;
const A_BASE: usize = A_ROOT + Hash::BYTES;
const A_NAME_LEN: usize = A_BASE + Hash::BYTES;
const A_DESCRIPTION_LEN: usize = A_NAME_LEN + 2;
const A_NAME: usize = A_DESCRIPTION_LEN + 2;
const A_DESCRIPTION: usize = A_NAME + NAME_BYTES_MAX + 1;
const A_CHECKSUM: usize = BLOCK_BYTES - 4;
const _: () = assert!(A_DESCRIPTION + DESCRIPTION_BYTES_MAX <= A_CHECKSUM);

/// The feature bit that is kept for encryption.
const FEATURE_ENCRYPTED: u64 = 1;

/// The id of an archive: random, so that its parts know each other.
pub(super) type ArchiveId = [u8; 16];

/// The block; name and description have been found short enough.
pub(super) fn encode(info: &ArchiveInfo, id: &ArchiveId) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, A_VERSION, &VERSION.to_le_bytes());
    put(&mut bytes, A_ID, id);
    put(&mut bytes, A_SIZE, &info.size.to_le_bytes());
    put(&mut bytes, A_ROOT, &info.root.0);
    put(&mut bytes, A_BASE, &info.base.unwrap_or(Hash::ZERO).0);
    put(&mut bytes, A_NAME_LEN, &(info.name.len() as u16).to_le_bytes());
    put(&mut bytes, A_DESCRIPTION_LEN, &(info.description.len() as u16).to_le_bytes());
    put(&mut bytes, A_NAME, info.name.as_bytes());
    put(&mut bytes, A_DESCRIPTION, info.description.as_bytes());
    seal_block(&mut bytes);
    bytes
}

/// From the first block.
pub(super) fn decode(bytes: &[u8]) -> Result<(ArchiveInfo, ArchiveId), String> {
    let refuse = |why: &str| Err(why.to_owned());
    if bytes.len() != BLOCK_BYTES || bytes[..8] != MAGIC {
        return refuse("it is no archive");
    }
    if !is_sealed_block(bytes) {
        return refuse("its checksum is wrong");
    }
    let version = get_u32(bytes, A_VERSION);
    if version != VERSION {
        return Err(format!("its version is {version}, and this program knows {VERSION}"));
    }
    match get_u64(bytes, A_INCOMPATIBLE) {
        0 => {}
        FEATURE_ENCRYPTED => return refuse("it is encrypted, which this program cannot read"),
        bits => return Err(format!("it has features that this program does not know: {bits:#x}")),
    }
    let size = get_u64(bytes, A_SIZE);
    if !size.is_multiple_of(SECTOR_SIZE) || size > SEALED_BYTES_MAX {
        return Err(format!("a disk cannot have {size} bytes"));
    }
    let text = |len_at: usize, at: usize, max: usize| {
        let len = usize::from(get_u16(bytes, len_at));
        let bytes = bytes[at..at + max].get(..len).ok_or("a text in it is too long")?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "a text in it is no UTF-8")
    };
    let base = Hash(array(bytes, A_BASE));
    let info = ArchiveInfo {
        root: Hash(array(bytes, A_ROOT)),
        size,
        base: (!base.is_zero()).then_some(base),
        name: text(A_NAME_LEN, A_NAME, NAME_BYTES_MAX)?,
        description: text(A_DESCRIPTION_LEN, A_DESCRIPTION, DESCRIPTION_BYTES_MAX)?,
    };
    Ok((info, array(bytes, A_ID)))
}

/// Completes a block with its checksum, in its last four bytes.
pub(super) fn seal_block(bytes: &mut [u8]) {
    let sum = checksum(&[&bytes[..A_CHECKSUM]]);
    put(bytes, A_CHECKSUM, &sum.to_le_bytes());
}

/// Whether the checksum of a block is right.
pub(super) fn is_sealed_block(bytes: &[u8]) -> bool {
    get_u32(bytes, A_CHECKSUM) == checksum(&[&bytes[..A_CHECKSUM]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> ArchiveInfo {
        ArchiveInfo {
            root: Hash([1; 32]),
            size: 1 << 30,
            base: Some(Hash([2; 32])),
            name: "web é".to_owned(),
            description: "d".repeat(DESCRIPTION_BYTES_MAX),
        }
    }

    #[test]
    fn a_header_comes_back() {
        for base in [None, info().base] {
            let info = ArchiveInfo { base, ..info() };
            assert_eq!(decode(&encode(&info, &[7; 16])), Ok((info, [7; 16])));
        }
    }

    #[test]
    fn a_header_that_makes_no_sense_is_refused() {
        let bytes = encode(&info(), &[7; 16]);
        let changed = |at: usize, value: &[u8]| {
            let mut bytes = bytes.clone();
            put(&mut bytes, at, value);
            seal_block(&mut bytes);
            decode(&bytes).map(drop)
        };
        assert_eq!(changed(A_CHECKSUM, &[0; 4]), Ok(()), "the checksum is made last");
        for (at, value, why) in [
            (0, &[0][..], "no archive"),
            (A_VERSION, &[9], "version is 9"),
            (A_INCOMPATIBLE, &[1], "encrypted"),
            (A_INCOMPATIBLE, &[4], "0x4"),
            (A_SIZE, &[1], "cannot have"),
            (A_SIZE, &[0xff; 8], "cannot have"),
            (A_NAME_LEN, &[0, 1], "too long"),
            (A_DESCRIPTION_LEN, &[1, 8], "too long"),
            (A_NAME, &[0xff], "UTF-8"),
        ] {
            let error = changed(at, value).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let mut flipped = bytes.clone();
        flipped[4000] ^= 1;
        assert!(decode(&flipped).unwrap_err().contains("checksum"));
    }
}
