//! The first block of a pack.

use super::place::Place;
use crate::bytes::{array, checksum, get_u32, get_u64, put};
use sapwood_blockdev::units::BLOCK_BYTES;

/// A pack's id: random, so that no record is taken for one of another pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackId(pub [u8; 16]);

/// What a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PackKind {
    /// Frames.
    Data = 1,
    /// Nodes: apart, so that whoever walks over trees reads them alone.
    Nodes = 2,
}

impl PackKind {
    /// From the stored form.
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::Nodes),
            _ => None,
        }
    }
}

/// The header of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PackHeader {
    pub(super) id: PackId,
    pub(super) kind: PackKind,
    /// Its number, by which places name it.
    pub(super) number: u32,
}

const MAGIC: [u8; 8] = *b"SAPWPACK";
const VERSION: u32 = 1;
const H_VERSION: usize = 8;
/// Features that a reader must know.
const H_INCOMPATIBLE: usize = H_VERSION + 8;
const H_ID: usize = H_INCOMPATIBLE + 8;
const H_NUMBER: usize = H_ID + 16;
const H_KIND: usize = H_NUMBER + 4;
const H_CHECKSUM: usize = BLOCK_BYTES - 4;

/// The feature bit that is kept for encryption.
const FEATURE_ENCRYPTED: u64 = 1;

impl PackHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, H_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, H_ID, &self.id.0);
        put(&mut bytes, H_NUMBER, &self.number.to_le_bytes());
        bytes[H_KIND] = self.kind as u8;
        let sum = checksum(&[&bytes[..H_CHECKSUM]]);
        put(&mut bytes, H_CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    /// From a whole block.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let refuse = |why: &str| Err(why.to_owned());
        if bytes.len() != BLOCK_BYTES || bytes[..8] != MAGIC {
            return refuse("it is no pack");
        }
        if get_u32(bytes, H_CHECKSUM) != checksum(&[&bytes[..H_CHECKSUM]]) {
            return refuse("its checksum is wrong");
        }
        let version = get_u32(bytes, H_VERSION);
        if version != VERSION {
            return Err(format!("its version is {version}, and this program knows {VERSION}"));
        }
        match get_u64(bytes, H_INCOMPATIBLE) {
            0 => {}
            FEATURE_ENCRYPTED => return refuse("it is encrypted, which this program cannot read"),
            bits => return Err(format!("it has features that this program does not know: {bits:#x}")),
        }
        let number = get_u32(bytes, H_NUMBER);
        let kind = PackKind::from_byte(bytes[H_KIND]).ok_or("its kind is unknown")?;
        if number == 0 || number > Place::PACK_MAX {
            return refuse("it has an impossible number");
        }
        Ok(Self { id: PackId(array(bytes, H_ID)), kind, number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_a_damaged_one_does_not() {
        let header = PackHeader { id: PackId([5; 16]), kind: PackKind::Nodes, number: 77 };
        let bytes = header.encode();
        assert_eq!(PackHeader::decode(&bytes), Ok(header));
        for at in [0, 8, 16, 24, 40, 44, 100, 4095] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(PackHeader::decode(&bad).is_err(), "byte {at}");
        }
        let encrypted = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes[H_INCOMPATIBLE] = 1;
            let sum = checksum(&[&bytes[..H_CHECKSUM]]);
            put(&mut bytes, H_CHECKSUM, &sum.to_le_bytes());
            PackHeader::decode(&bytes)
        };
        assert!(encrypted(&bytes).unwrap_err().contains("encrypted"));
    }
}
