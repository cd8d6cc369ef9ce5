//! The last block of a pack: without it a pack was never finished.

use super::header::PackId;
use super::place::PACK_BYTES_MAX;
use crate::bytes::{array, checksum, get_u32, get_u64, put};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// The trailer of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) id: PackId,
    /// Where the pages of entries begin: after the last record, at a multiple of 4096.
    pub(super) entries_at: u64,
    /// How many there are.
    pub(super) pages: u32,
    /// Blocks or nodes in the pack.
    pub(super) entries: u32,
    pub(super) records: u32,
}

const MAGIC: [u8; 8] = *b"SAPWPEND";
const T_ID: usize = 8;
const T_ENTRIES_AT: usize = T_ID + 16;
const T_PAGES: usize = T_ENTRIES_AT + 8;
const T_ENTRIES: usize = T_PAGES + 4;
const T_RECORDS: usize = T_ENTRIES + 4;
const T_CHECKSUM: usize = BLOCK_BYTES - 4;

impl Trailer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, T_ID, &self.id.0);
        put(&mut bytes, T_ENTRIES_AT, &self.entries_at.to_le_bytes());
        put(&mut bytes, T_PAGES, &self.pages.to_le_bytes());
        put(&mut bytes, T_ENTRIES, &self.entries.to_le_bytes());
        put(&mut bytes, T_RECORDS, &self.records.to_le_bytes());
        let sum = checksum(&[&bytes[..T_CHECKSUM]]);
        put(&mut bytes, T_CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    /// From the last block of a pack of `len` bytes.
    pub(super) fn decode(bytes: &[u8], id: &PackId, len: u64) -> Result<Self, &'static str> {
        if bytes.len() != BLOCK_BYTES || bytes[..8] != MAGIC {
            return Err("the pack was never finished, or was cut off");
        }
        if get_u32(bytes, T_CHECKSUM) != checksum(&[&bytes[..T_CHECKSUM]]) {
            return Err("its checksum is wrong");
        }
        let trailer = Self {
            id: PackId(array(bytes, T_ID)),
            entries_at: get_u64(bytes, T_ENTRIES_AT),
            pages: get_u32(bytes, T_PAGES),
            entries: get_u32(bytes, T_ENTRIES),
            records: get_u32(bytes, T_RECORDS),
        };
        if trailer.id != *id {
            return Err("it belongs to another pack");
        }
        let pages = u64::from(trailer.pages) * BLOCK_SIZE;
        let is_whole = trailer.entries_at >= BLOCK_SIZE
            && trailer.entries_at <= PACK_BYTES_MAX
            && trailer.entries_at.is_multiple_of(BLOCK_SIZE)
            && trailer.entries_at + pages + BLOCK_SIZE == len;
        if is_whole { Ok(trailer) } else { Err("its parts do not make the file's length") }
    }
}
