//! The end of an archive: where its packs are, and the top of the tree.

use std::ops::Range;

use super::header::{ArchiveId, is_sealed_block, seal_block};
use crate::bytes::{array, get_u32, get_u64, put};
use crate::sealed::hash::Hash;
use crate::sealed::node::Child;
use crate::sealed::place::{PACK_BYTES_MAX, Place};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Packs in an archive, at most: 16 TiB of them, if they are full.
pub(super) const SECTIONS_MAX: u32 = 1 << 18;
const _: () = assert!(SECTIONS_MAX <= Place::PACK_MAX);

/// The longest pack in an archive, in bytes: its records, and the pages of entries after them.
const SECTION_BYTES_MAX: u64 = 2 * PACK_BYTES_MAX;

const D_ID: usize = 0;
const D_NUMBER: usize = D_ID + 16;
const D_SECTIONS: usize = D_NUMBER + 8;
const SECTION_BYTES: usize = 16;
const PAGE_SECTIONS: usize = (BLOCK_BYTES - D_SECTIONS - 4) / SECTION_BYTES;

/// The pages of the directory: a section is where a pack lies in the archive.
pub(super) fn encode_pages(id: &ArchiveId, sections: &[Range<u64>]) -> Vec<u8> {
    let mut pages = Vec::new();
    for (number, part) in (0u64..).zip(sections.chunks(PAGE_SECTIONS)) {
        let mut page = vec![0; BLOCK_BYTES];
        put(&mut page, D_ID, id);
        put(&mut page, D_NUMBER, &number.to_le_bytes());
        for (i, section) in part.iter().enumerate() {
            let at = D_SECTIONS + i * SECTION_BYTES;
            put(&mut page, at, &section.start.to_le_bytes());
            put(&mut page, at + 8, &(section.end - section.start).to_le_bytes());
        }
        seal_block(&mut page);
        pages.extend(page);
    }
    pages
}

/// From the pages, which end where the trailer begins, at byte `end` of the archive.
pub(super) fn decode_pages(
    id: &ArchiveId,
    bytes: &[u8],
    count: u32,
    end: u64,
) -> Result<Vec<Range<u64>>, &'static str> {
    let mut sections = Vec::new();
    for (number, page) in (0u64..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        if !is_sealed_block(page) {
            return Err("its checksum is wrong");
        }
        if page[D_ID..D_NUMBER] != *id || get_u64(page, D_NUMBER) != number {
            return Err("it belongs elsewhere");
        }
        for i in 0..PAGE_SECTIONS.min(count as usize - sections.len()) {
            let at = D_SECTIONS + i * SECTION_BYTES;
            let (start, len) = (get_u64(page, at), get_u64(page, at + 8));
            let fits = start >= BLOCK_SIZE && len <= SECTION_BYTES_MAX && start <= end && len <= end - start;
            if !fits || len == 0 || !(start | len).is_multiple_of(BLOCK_SIZE) {
                return Err("a pack does not lie in the archive");
            }
            sections.push(start..start + len);
        }
    }
    if sections.len() == count as usize { Ok(sections) } else { Err("it has fewer packs than it says") }
}

/// The trailer of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ArchiveTrailer {
    pub(super) id: ArchiveId,
    /// The top of the tree.
    pub(super) tree: Child,
    /// Where the directory begins; it ends at the trailer.
    pub(super) directory_at: u64,
    pub(super) sections: u32,
}

pub(super) const TRAILER_MAGIC: [u8; 8] = *b"SAPWAEND";
const T_ID: usize = 8;
const T_TREE: usize = T_ID + 16;
const T_PLACE: usize = T_TREE + Hash::BYTES;
const T_DIRECTORY_AT: usize = T_PLACE + 8;
const T_SECTIONS: usize = T_DIRECTORY_AT + 8;

impl ArchiveTrailer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        put(&mut bytes, 0, &TRAILER_MAGIC);
        put(&mut bytes, T_ID, &self.id);
        put(&mut bytes, T_TREE, &self.tree.hash.0);
        put(&mut bytes, T_PLACE, &self.tree.place.to_bits().to_le_bytes());
        put(&mut bytes, T_DIRECTORY_AT, &self.directory_at.to_le_bytes());
        put(&mut bytes, T_SECTIONS, &self.sections.to_le_bytes());
        seal_block(&mut bytes);
        bytes
    }

    /// From the last block, at byte `at` of the archive with this id.
    pub(super) fn decode(bytes: &[u8], id: &ArchiveId, at: u64) -> Result<Self, &'static str> {
        if bytes.len() != BLOCK_BYTES || bytes[..8] != TRAILER_MAGIC {
            return Err("the archive was never finished, or was cut off");
        }
        if !is_sealed_block(bytes) {
            return Err("its checksum is wrong");
        }
        let trailer = Self {
            id: array(bytes, T_ID),
            tree: Child {
                hash: Hash(array(bytes, T_TREE)),
                place: Place::from_bits(get_u64(bytes, T_PLACE)),
            },
            directory_at: get_u64(bytes, T_DIRECTORY_AT),
            sections: get_u32(bytes, T_SECTIONS),
        };
        if trailer.id != *id {
            return Err("it belongs to another archive");
        }
        let pages = u64::from(trailer.sections).div_ceil(PAGE_SECTIONS as u64);
        let is_whole = trailer.directory_at >= BLOCK_SIZE
            && trailer.sections <= SECTIONS_MAX
            && trailer.directory_at.checked_add(pages * BLOCK_SIZE) == Some(at);
        if is_whole { Ok(trailer) } else { Err("its directory does not lie before it") }
    }
}
