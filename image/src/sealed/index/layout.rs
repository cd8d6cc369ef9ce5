//! The stored form of a run: `docs/format-sealed-index.md`.

use crate::bytes::{array, checksum, get_u16, get_u32, get_u64, put};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

use super::super::place::Place;

/// Entries in a page, at most.
pub(super) const PAGE_ENTRIES: usize = (BLOCK_BYTES - P_ENTRIES) / ENTRY_BYTES;
/// Fences in a page of them.
pub(super) const PAGE_FENCES: usize = (BLOCK_BYTES - P_ENTRIES) / 8;
/// Pages of entries in a run, at most: 4,278,190,080 entries.
pub(super) const PAGES_MAX: u32 = 1 << 24;

/// The first 8 bytes of a hash, and where what has it may be. Ordered by prefix, and the newest pack first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IndexEntry {
    pub(super) prefix: u64,
    pub(super) place: Place,
}

impl IndexEntry {
    /// By which entries are ordered.
    pub(super) fn key(&self) -> (u64, u64) {
        (self.prefix, !self.place.to_bits())
    }
}

/// A run's id: random, so that no page is taken for one of another run.
pub(super) type RunId = [u8; 16];

const ENTRY_BYTES: usize = 16;
const P_CHECKSUM: usize = 0;
const P_COUNT: usize = 4;
const P_RESERVED: usize = P_COUNT + 2;
const P_ENTRIES: usize = P_RESERVED + 2;

fn page_sum(run: &RunId, number: u32, page: &[u8]) -> u32 {
    checksum(&[run, &number.to_le_bytes(), &page[P_COUNT..]])
}

/// Page `number` of a run: of entries, or, numbered from where those end, of fences.
fn seal_page(run: &RunId, number: u32, count: usize, mut page: Vec<u8>) -> Vec<u8> {
    page.resize(BLOCK_BYTES, 0);
    put(&mut page, P_COUNT, &(count as u16).to_le_bytes());
    let sum = page_sum(run, number, &page);
    put(&mut page, P_CHECKSUM, &sum.to_le_bytes());
    page
}

fn check_page(run: &RunId, number: u32, page: &[u8], most: usize) -> Result<usize, &'static str> {
    if page.len() != BLOCK_BYTES || get_u32(page, P_CHECKSUM) != page_sum(run, number, page) {
        return Err("its checksum is wrong");
    }
    let count = usize::from(get_u16(page, P_COUNT));
    if count == 0 || count > most { Err("its count is impossible") } else { Ok(count) }
}

/// A page of entries, which are in order.
pub(super) fn encode_entries(run: &RunId, number: u32, entries: &[IndexEntry]) -> Vec<u8> {
    let mut page = vec![0; P_ENTRIES];
    for entry in entries {
        page.extend(entry.prefix.to_le_bytes());
        page.extend(entry.place.to_bits().to_le_bytes());
    }
    seal_page(run, number, entries.len(), page)
}

/// A page of entries that was checked.
#[derive(Debug)]
pub(super) struct EntryPage {
    bytes: Box<[u8]>,
    count: usize,
}

impl EntryPage {
    /// Checks page `number`, which must begin with the prefix `first`.
    pub(super) fn decode(run: &RunId, number: u32, page: &[u8], first: u64) -> Result<Self, &'static str> {
        let count = check_page(run, number, page, PAGE_ENTRIES)?;
        let page = Self { bytes: page.into(), count };
        if page.prefix(0) != first {
            return Err("it does not begin with the prefix that its fence says");
        }
        if !page.entries().map(|entry| entry.key()).is_sorted() {
            return Err("its entries are not in order");
        }
        Ok(page)
    }

    fn prefix(&self, index: usize) -> u64 {
        get_u64(&self.bytes, P_ENTRIES + index * ENTRY_BYTES)
    }

    fn entry(&self, index: usize) -> IndexEntry {
        let place = get_u64(&self.bytes, P_ENTRIES + index * ENTRY_BYTES + 8);
        IndexEntry { prefix: self.prefix(index), place: Place::from_bits(place) }
    }

    /// All of them, in order.
    pub(super) fn entries(&self) -> impl Iterator<Item = IndexEntry> + '_ {
        (0..self.count).map(|index| self.entry(index))
    }

    /// The places with this prefix, the newest pack first.
    pub(super) fn places(&self, prefix: u64) -> impl Iterator<Item = Place> + '_ {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.prefix(middle) < prefix {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let found = (low..self.count).map(|index| self.entry(index));
        found.take_while(move |entry| entry.prefix == prefix).map(|entry| entry.place)
    }
}

/// All fences of a run whose entries take `pages` pages, in pages of their own.
pub(super) fn encode_fences(run: &RunId, pages: u32, fences: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(fences.len().div_ceil(PAGE_FENCES) * BLOCK_BYTES);
    for (number, fences) in (pages..).zip(fences.chunks(PAGE_FENCES)) {
        let mut page = vec![0; P_ENTRIES];
        page.extend(fences.iter().flat_map(|fence| fence.to_le_bytes()));
        bytes.extend(seal_page(run, number, fences.len(), page));
    }
    bytes
}

/// The fences in page `number`.
pub(super) fn decode_fences(run: &RunId, number: u32, page: &[u8]) -> Result<Vec<u64>, &'static str> {
    let count = check_page(run, number, page, PAGE_FENCES)?;
    Ok((0..count).map(|index| get_u64(page, P_ENTRIES + index * 8)).collect())
}

/// The first block of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunHeader {
    pub(super) id: RunId,
    /// Its number, by which its file is named.
    pub(super) number: u32,
}

const MAGIC: [u8; 8] = *b"SAPWINDX";
const VERSION: u32 = 1;
const H_VERSION: usize = 8;
/// Features that a reader must know: none yet.
const H_INCOMPATIBLE: usize = H_VERSION + 8;
const H_ID: usize = H_INCOMPATIBLE + 8;
const H_NUMBER: usize = H_ID + 16;
const H_CHECKSUM: usize = BLOCK_BYTES - 4;

impl RunHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, H_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, H_ID, &self.id);
        put(&mut bytes, H_NUMBER, &self.number.to_le_bytes());
        let sum = checksum(&[&bytes[..H_CHECKSUM]]);
        put(&mut bytes, H_CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    /// From a whole block.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() != BLOCK_BYTES || bytes[..8] != MAGIC {
            return Err("it is no run of an index".to_owned());
        }
        if get_u32(bytes, H_CHECKSUM) != checksum(&[&bytes[..H_CHECKSUM]]) {
            return Err("its checksum is wrong".to_owned());
        }
        let version = get_u32(bytes, H_VERSION);
        if version != VERSION {
            return Err(format!("its version is {version}, and this program knows {VERSION}"));
        }
        match get_u64(bytes, H_INCOMPATIBLE) {
            0 => Ok(Self { id: array(bytes, H_ID), number: get_u32(bytes, H_NUMBER) }),
            bits => Err(format!("it has features that this program does not know: {bits:#x}")),
        }
    }
}

/// The last block of a run: without it the run was never finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunTrailer {
    pub(super) id: RunId,
    /// Pages of entries.
    pub(super) pages: u32,
    pub(super) entries: u64,
    /// The least and the greatest number of a pack that an entry names; both 0 without entries.
    pub(super) packs: (u32, u32),
}

const TRAILER_MAGIC: [u8; 8] = *b"SAPWIEND";
const T_ID: usize = 8;
const T_ENTRIES: usize = T_ID + 16;
const T_PAGES: usize = T_ENTRIES + 8;
const T_PACK_FIRST: usize = T_PAGES + 4;
const T_PACK_LAST: usize = T_PACK_FIRST + 4;
const T_CHECKSUM: usize = BLOCK_BYTES - 4;

impl RunTrailer {
    /// Pages of fences.
    pub(super) fn fence_pages(&self) -> u32 {
        self.pages.div_ceil(PAGE_FENCES as u32)
    }

    /// Length of the file in bytes.
    pub(super) fn file_len(&self) -> u64 {
        (u64::from(self.pages) + u64::from(self.fence_pages()) + 2) * BLOCK_SIZE
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        put(&mut bytes, 0, &TRAILER_MAGIC);
        put(&mut bytes, T_ID, &self.id);
        put(&mut bytes, T_ENTRIES, &self.entries.to_le_bytes());
        put(&mut bytes, T_PAGES, &self.pages.to_le_bytes());
        put(&mut bytes, T_PACK_FIRST, &self.packs.0.to_le_bytes());
        put(&mut bytes, T_PACK_LAST, &self.packs.1.to_le_bytes());
        let sum = checksum(&[&bytes[..T_CHECKSUM]]);
        put(&mut bytes, T_CHECKSUM, &sum.to_le_bytes());
        bytes
    }

    /// From the last block of a file of `len` bytes.
    pub(super) fn decode(bytes: &[u8], id: &RunId, len: u64) -> Result<Self, &'static str> {
        if bytes.len() != BLOCK_BYTES || bytes[..8] != TRAILER_MAGIC {
            return Err("the run was never finished, or was cut off");
        }
        if get_u32(bytes, T_CHECKSUM) != checksum(&[&bytes[..T_CHECKSUM]]) {
            return Err("its checksum is wrong");
        }
        let packs = (get_u32(bytes, T_PACK_FIRST), get_u32(bytes, T_PACK_LAST));
        let (entries, pages) = (get_u64(bytes, T_ENTRIES), get_u32(bytes, T_PAGES));
        let trailer = Self { id: array(bytes, T_ID), pages, entries, packs };
        if trailer.id != *id {
            return Err("it belongs to another run");
        }
        let fits = trailer.pages <= PAGES_MAX && entries.div_ceil(PAGE_ENTRIES as u64) == u64::from(pages);
        if !fits || trailer.file_len() != len {
            return Err("its parts do not make the file's length");
        }
        Ok(trailer)
    }
}
