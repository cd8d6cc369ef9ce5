//! The toy's log: what its records say, and the map they add up to.

use super::{BLOCK, Flaw, Toy};
use crate::sim::medium::SECTOR;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Base,
    Zero,
    At(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Session,
    Write,
    Zero,
    Resize,
}

/// What a header block says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) kind: Kind,
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) data_sum: u32,
    pub(super) previous: u32,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        let words = [
            u64::from_le_bytes(*b"TOYLOG01"),
            self.sequence,
            self.kind as u64,
            self.first,
            self.count,
            u64::from(self.data_sum),
            u64::from(self.previous),
        ];
        for (at, word) in words.into_iter().enumerate() {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        let sum = crc(&bytes[..56]);
        bytes[56..60].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, u32)> {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
        let sum = word(7) as u32;
        if word(0) != u64::from_le_bytes(*b"TOYLOG01") || sum != crc(&bytes[..56]) {
            return None;
        }
        let kind = [Kind::Session, Kind::Write, Kind::Zero, Kind::Resize][word(2) as usize % 4];
        let (data_sum, previous) = (word(5) as u32, word(6) as u32);
        Some((Self { sequence: word(1), kind, first: word(3), count: word(4), data_sum, previous }, sum))
    }

    pub(super) fn data_blocks(&self) -> u64 {
        if self.kind == Kind::Write { (self.count * SECTOR).div_ceil(BLOCK) } else { 0 }
    }
}

pub(super) fn crc(bytes: &[u8]) -> u32 {
    // Masked: a block that ends in its own plain CRC-32 would have the same one as any other such
    // block, and guests store copies of this log's headers.
    crc32fast::hash(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

pub(super) struct Log {
    pub(super) map: Vec<Place>,
    pub(super) sectors: u64,
    pub(super) end: u64,
    pub(super) sequence: u64,
    pub(super) previous: u32,
    pub(super) writing: bool,
    pub(super) latched: bool,
    pub(super) write_cache: bool,
    pub(super) served: u64,
}

impl Log {
    pub(super) fn apply(&mut self, toy: Toy, header: &Header, at: u64) {
        let range = header.first as usize..(header.first + header.count) as usize;
        match header.kind {
            Kind::Session => {}
            Kind::Write => {
                for (n, place) in self.map[range].iter_mut().enumerate() {
                    *place = Place::At(at + BLOCK + n as u64 * SECTOR);
                }
            }
            Kind::Zero => self.map[range].fill(Place::Zero),
            Kind::Resize => {
                if toy.flaw != Some(Flaw::ShrinkKeeps) {
                    self.map[header.count as usize..].fill(Place::Zero);
                }
                self.sectors = header.count;
            }
        }
    }
}
