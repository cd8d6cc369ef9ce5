//! Which number the block or node at a place has among the entries of its pack.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::pace::Pace;
use super::records::Records;
use crate::error::{ErrorKind, ImageError};
use crate::sealed::entries::Entry;
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::pack::Pack;
use crate::sealed::place::{Place, RECORD_ALIGNMENT};
use crate::sealed::record::{Record, decode_record};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::BLOCK_SIZE;

/// The entries of a pack in short: 8 bytes for each, and 8 for each record.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) kind: PackKind,
    /// Where its records begin, in units of their alignment, rising; and where they end (the last one's length is known
    /// as places state it, rounded up).
    offsets: Vec<u32>,
    /// The number of each record's first entry; and how many entries there are.
    firsts: Vec<u32>,
    /// Of each entry's hash.
    fingerprints: Vec<u64>,
}

/// What a table says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbered {
    pub(super) number: u32,
    /// Its share of the stored bytes of its record. The shares of a record's entries are, together, its length.
    pub(super) bytes: u32,
}

/// Short forms of hashes. They are keyed, so that nobody can make two contents that have the same.
#[derive(Debug, Default)]
pub(super) struct Fingerprints(RandomState);

impl Fingerprints {
    fn of(&self, hash: &Hash) -> u64 {
        self.0.hash_one(hash)
    }
}

impl Table {
    /// The table of a pack, from its pages of entries; where these are damaged, from its records.
    pub(super) async fn load<E: Engine>(
        io: &Io<E>,
        pack: &Pack<E::File>,
        pace: &Arc<Pace>,
        keys: &Fingerprints,
    ) -> Result<Self, ImageError> {
        pace.spend(io, u64::from(pack.pages()) * BLOCK_SIZE).await;
        let mut table = Self { kind: pack.kind(), offsets: vec![], firsts: vec![], fingerprints: vec![] };
        let listed = pack.entries_in(io, 0..u32::MAX).await;
        let failed = match listed.and_then(|entries| table.fill(pack, &entries, keys).map(|()| entries.len()))
        {
            Ok(len) if len == pack.entries() as usize => return Ok(table),
            Ok(len) => {
                let why = format!("there are {len}, and the trailer says {}", pack.entries());
                pack.damaged("entries", pack.records_end(), &why)
            }
            Err(error) => error,
        };
        if !matches!(failed.kind, ErrorKind::Corrupt { .. }) {
            return Err(failed);
        }
        table.scan(io, pack, pace, keys).await.map_err(|_| failed)?;
        Ok(table)
    }

    /// From the list of entries.
    fn fill<F: StorageFile>(
        &mut self,
        pack: &Pack<F>,
        entries: &[Entry],
        keys: &Fingerprints,
    ) -> Result<(), ImageError> {
        let (mut least, mut last) = (BLOCK_SIZE, BLOCK_SIZE);
        for record in entries.chunk_by(|a, b| a.place.offset() == b.place.offset()) {
            let place = record[0].place;
            let is_whole = record.iter().enumerate().all(|(i, entry)| entry.place.index() == i);
            if place.offset() < least || place.offset() >= pack.records_end() || !is_whole {
                return Err(pack.damaged("entries", place.offset(), &"they are not those of its records"));
            }
            self.push(place.offset(), record.iter().map(|entry| keys.of(&entry.hash)));
            least = place.offset() + RECORD_ALIGNMENT as u64;
            last = place.offset() + place.read_len() as u64;
        }
        self.end(last.min(pack.records_end()));
        Ok(())
    }

    /// From the records themselves.
    async fn scan<E: Engine>(
        &mut self,
        io: &Io<E>,
        pack: &Pack<E::File>,
        pace: &Arc<Pace>,
        keys: &Fingerprints,
    ) -> Result<(), ImageError> {
        (self.offsets, self.firsts, self.fingerprints) = (vec![], vec![], vec![]);
        let (mut records, mut at) = (Records::new(io, pack, pace), BLOCK_SIZE);
        for _ in 0..pack.records() {
            let bytes = records.at(at, Place::LEN_MAX).await?;
            let (record, len) =
                decode_record(&pack.id(), at, bytes).map_err(|why| pack.damaged("record", at, &why))?;
            match record {
                Record::Frame(frame) => self.push(at, frame.hashes().map(|hash| keys.of(&hash))),
                Record::Node(node) => self.push(at, [keys.of(&node.hash())].into_iter()),
            }
            at += len as u64;
        }
        self.end(at);
        Ok(())
    }

    fn push(&mut self, offset: u64, fingerprints: impl Iterator<Item = u64>) {
        self.offsets.push((offset / RECORD_ALIGNMENT as u64) as u32);
        self.firsts.push(self.fingerprints.len() as u32);
        self.fingerprints.extend(fingerprints);
    }

    fn end(&mut self, offset: u64) {
        self.offsets.push((offset / RECORD_ALIGNMENT as u64) as u32);
        self.firsts.push(self.fingerprints.len() as u32);
    }

    /// How many entries there are.
    pub(super) fn entries(&self) -> u32 {
        self.fingerprints.len() as u32
    }

    /// Bytes of all records.
    pub(super) fn record_bytes(&self) -> u64 {
        let ends = self.offsets.first().zip(self.offsets.last());
        ends.map_or(0, |(first, end)| u64::from(end - first) * RECORD_ALIGNMENT as u64)
    }

    /// The entry at a place, if it has this hash.
    pub(super) fn find(&self, place: Place, hash: &Hash, keys: &Fingerprints) -> Option<Numbered> {
        let offset = (place.offset() / RECORD_ALIGNMENT as u64) as u32;
        let records = self.offsets.len() - 1;
        let record = self.offsets[..records].binary_search(&offset).ok()?;
        let (first, end) = (self.firsts[record], self.firsts[record + 1]);
        let number = first.checked_add(place.index() as u32).filter(|number| *number < end)?;
        if self.fingerprints[number as usize] != keys.of(hash) {
            return None;
        }
        let len = u64::from(self.offsets[record + 1] - offset) * RECORD_ALIGNMENT as u64;
        Some(Numbered { number, bytes: share(len, place.index() as u64, u64::from(end - first)) })
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.offsets.len() * 8 + self.fingerprints.len() * 8
    }
}

/// The part of `len` bytes that is counted for one of `count` blocks.
fn share(len: u64, index: u64, count: u64) -> u32 {
    (len * (index + 1) / count - len * index / count) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_make_the_whole() {
        for (len, count) in [(32, 1), (1000, 7), (131_104, 32), (64, 31)] {
            let shares: Vec<u64> = (0..count).map(|i| u64::from(share(len, i, count))).collect();
            assert_eq!(shares.iter().sum::<u64>(), len);
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }
    }
}
