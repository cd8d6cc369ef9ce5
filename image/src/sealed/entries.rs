//! What a pack holds: hashes and places, in pages of 4 KiB that can be read one by one.
//!
//! A page is a checksum, a count, and groups: the place of a record, and the hashes of consecutive blocks of it. So
//! neighbours in a page were stored one after the other, as files on a disk lie: who finds one looks for the next there.

use super::hash::Hash;
use super::header::PackId;
use super::place::{PACK_BYTES_MAX, Place, RECORD_ALIGNMENT};
use super::record::FRAME_BLOCKS_MAX;
use crate::bytes::{array, checksum, get_u16, get_u32, put};
use sapwood_blockdev::units::BLOCK_BYTES;

/// Entries in a page, at most.
pub const PAGE_ENTRIES_MAX: usize = (BLOCK_BYTES - P_GROUPS - G_HASHES) / Hash::BYTES;

const P_CHECKSUM: usize = 0;
const P_COUNT: usize = 4;
const P_GROUPS: usize = 8;

const G_OFFSET: usize = 0;
const G_LEN: usize = G_OFFSET + 4;
const G_FIRST: usize = G_LEN + 2;
const G_COUNT: usize = G_FIRST + 1;
const G_HASHES: usize = G_COUNT + 1;

/// A block, or a node, that a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub hash: Hash,
    /// Where it is.
    pub place: Place,
}

/// Pages being made.
#[derive(Debug, Default)]
pub(super) struct EntryPages {
    complete: Vec<u8>,
    page: Vec<u8>,
    groups: u16,
    /// Entries in all pages.
    pub(super) entries: u32,
}

impl EntryPages {
    /// Adds the blocks of a record of `len` bytes at byte `offset`: the page that they begin in, and how many are in it.
    pub(super) fn push(&mut self, pack: &PackId, offset: u64, len: usize, hashes: &[Hash]) -> (u32, usize) {
        let (mut first, mut begin) = (0, None);
        while first < hashes.len() {
            if self.page.is_empty() {
                self.page.resize(P_GROUPS, 0);
            }
            let room = (BLOCK_BYTES - self.page.len()).saturating_sub(G_HASHES) / Hash::BYTES;
            let count = room.min(hashes.len() - first);
            if count == 0 {
                self.end_page(pack);
                continue;
            }
            begin.get_or_insert(((self.complete.len() / BLOCK_BYTES) as u32, count));
            self.page.extend(((offset / RECORD_ALIGNMENT as u64) as u32).to_le_bytes());
            self.page.extend(((len.div_ceil(1024)) as u16).to_le_bytes());
            self.page.extend([first as u8, count as u8]);
            hashes[first..first + count].iter().for_each(|hash| self.page.extend(hash.0));
            self.groups += 1;
            self.entries += count as u32;
            first += count;
        }
        begin.unwrap_or_default()
    }

    fn end_page(&mut self, pack: &PackId) {
        self.page.resize(BLOCK_BYTES, 0);
        put(&mut self.page, P_COUNT, &self.groups.to_le_bytes());
        let number = (self.complete.len() / BLOCK_BYTES) as u32;
        let sum = page_sum(pack, number, &self.page);
        put(&mut self.page, P_CHECKSUM, &sum.to_le_bytes());
        self.complete.append(&mut self.page);
        self.groups = 0;
    }

    /// All pages.
    pub(super) fn finish(mut self, pack: &PackId) -> Vec<u8> {
        if !self.page.is_empty() {
            self.end_page(pack);
        }
        self.complete
    }
}

fn page_sum(pack: &PackId, number: u32, page: &[u8]) -> u32 {
    checksum(&[&pack.0, &number.to_le_bytes(), &page[P_COUNT..]])
}

/// The entries of page `number` of the pack with this id, which has the number `pack` among the packs.
pub(super) fn decode_page(
    id: &PackId,
    pack: u32,
    number: u32,
    page: &[u8],
) -> Result<Vec<Entry>, &'static str> {
    if page.len() != BLOCK_BYTES || get_u32(page, P_CHECKSUM) != page_sum(id, number, page) {
        return Err("its checksum is wrong");
    }
    let mut entries = Vec::with_capacity(PAGE_ENTRIES_MAX);
    let mut at = P_GROUPS;
    for _ in 0..get_u16(page, P_COUNT) {
        let group = page.get(at..at + G_HASHES).ok_or("its groups do not fit into it")?;
        let offset = u64::from(get_u32(group, G_OFFSET)) * RECORD_ALIGNMENT as u64;
        let len = usize::from(get_u16(group, G_LEN)) * 1024;
        let (first, count) = (usize::from(group[G_FIRST]), usize::from(group[G_COUNT]));
        let is_record = offset < PACK_BYTES_MAX && (1..=Place::LEN_MAX).contains(&len);
        if !is_record || count == 0 || first + count > FRAME_BLOCKS_MAX {
            return Err("a group names no record");
        }
        at += G_HASHES;
        let hashes = page.get(at..at + count * Hash::BYTES).ok_or("its groups do not fit into it")?;
        let place = Place::new(pack, offset, len, 0);
        entries.extend((0..count).map(|i| Entry {
            hash: Hash(array(hashes, i * Hash::BYTES)),
            place: place.with_index(first + i),
        }));
        at += count * Hash::BYTES;
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PackId = PackId([1; 16]);

    #[test]
    fn pages_hold_all_entries_in_order() {
        let (mut pages, mut told) = (EntryPages::default(), Vec::new());
        let hash =
            |record: u64, i: usize| Hash([record as u8 + 1, i as u8 + 1].repeat(16).try_into().unwrap());
        let records: Vec<(u64, usize)> =
            (0..40).map(|i| (4096 + i * 32 * 700, 1 + i as usize % 32)).collect();
        for (i, &(offset, count)) in (0..).zip(&records) {
            let hashes: Vec<Hash> = (0..count).map(|k| hash(i, k)).collect();
            let (page, in_page) = pages.push(&ID, offset, 22_000, &hashes);
            let place = |k: usize| Place::new(9, offset, 22_000, k);
            told.extend((0..count).map(|k| (place(k), page + u32::from(k >= in_page))));
        }
        let total = pages.entries as usize;
        let bytes = pages.finish(&ID);
        let mut entries = Vec::new();
        for (number, page) in (0..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let of_page = decode_page(&ID, 9, number, page).unwrap();
            assert!(of_page.len() > PAGE_ENTRIES_MAX / 2 || number as usize == bytes.len() / BLOCK_BYTES - 1);
            let here = told.iter().filter(|(_, page)| *page == number).map(|(place, _)| *place);
            assert!(of_page.iter().map(|entry| entry.place).eq(here), "they are where it was said");
            entries.extend(of_page);
        }
        assert_eq!(entries.len(), total);
        let wanted = (0..).zip(&records).flat_map(|(i, &(offset, count))| {
            (0..count).map(move |k| Entry { hash: hash(i, k), place: Place::new(9, offset, 22_000, k) })
        });
        assert!(entries.into_iter().eq(wanted));
    }

    #[test]
    fn damaged_pages_are_refused() {
        let mut pages = EntryPages::default();
        pages.push(&ID, 4096, 100, &[Hash([7; 32])]);
        let page = pages.finish(&ID);
        assert!(decode_page(&ID, 1, 0, &page).is_ok());
        assert!(decode_page(&ID, 1, 1, &page).is_err(), "another page");
        assert!(decode_page(&PackId([2; 16]), 1, 0, &page).is_err(), "another pack");
        for (at, byte) in
            [(P_COUNT, 200), (P_GROUPS + G_COUNT, 0), (P_GROUPS + G_COUNT, 200), (P_GROUPS + G_LEN, 0)]
        {
            let mut bad = page.clone();
            bad[at] = byte;
            bad[at + 1] = if at == P_COUNT || at == P_GROUPS + G_LEN { 0 } else { bad[at + 1] };
            let sum = page_sum(&ID, 0, &bad);
            put(&mut bad, P_CHECKSUM, &sum.to_le_bytes());
            assert!(decode_page(&ID, 1, 0, &bad).is_err(), "byte {at} = {byte}");
        }
    }
}
