//! What the sectors of a disk hold in a test: every write is recognisable.
//!
//! A written sector repeats its value and its own number, so that a torn, misplaced or foreign
//! sector is noticed whatever it was mixed from.

use std::collections::HashMap;

use super::medium::SECTOR;

/// [`SECTOR`] as a memory length.
pub const SECTOR_BYTES: usize = SECTOR as usize;

/// What a sector holds. Values of different writes differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u64);

/// A sector of zeroes.
pub const ZERO: Value = Value(0);

/// Values of this bit belong to a base image.
const BASE: u64 = 1 << 40;

/// Gives out values and recognises them.
#[derive(Debug, Default)]
pub struct Contents {
    last: u64,
    foreign: HashMap<Box<[u8]>, Value>,
    foreign_bytes: HashMap<Value, Box<[u8]>>,
}

impl Value {
    /// The value that a base image holds in a sector: zero in every seventh.
    pub fn base(sector: u64) -> Self {
        if sector.is_multiple_of(7) { ZERO } else { Self(BASE | sector) }
    }
}

/// Fills one sector with what a value looks like there.
fn fill(value: Value, sector: u64, bytes: &mut [u8]) {
    if value == ZERO {
        return bytes.fill(0);
    }
    for pair in bytes.chunks_exact_mut(16) {
        pair[..8].copy_from_slice(&value.0.to_le_bytes());
        pair[8..].copy_from_slice(&(!sector).to_le_bytes());
    }
}

/// The value and the place that a sector claims.
fn claim(bytes: &[u8]) -> (Value, u64) {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    (Value(word(0)), !word(8))
}

/// The bytes of a base image of so many sectors.
pub fn base_image(sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; (sectors * SECTOR) as usize];
    for (sector, chunk) in (0..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
        fill(Value::base(sector), sector, chunk);
    }
    bytes
}

impl Contents {
    /// A value that was never used.
    pub fn fresh(&mut self) -> Value {
        self.last += 1;
        Value(self.last)
    }

    /// The value that stands for bytes of somebody else's making.
    pub fn foreign(&mut self, sector: u64, bytes: &[u8]) -> Value {
        if let Ok(known) = self.recognise(sector, bytes) {
            return known;
        }
        let value = self.fresh();
        self.foreign.insert(bytes.into(), value);
        self.foreign_bytes.insert(value, bytes.into());
        value
    }

    /// Whether a sector holds what a guest or a base put there or elsewhere, other than zeroes.
    pub fn is_guests(&self, bytes: &[u8]) -> bool {
        let (value, place) = claim(bytes);
        let mut whole = [0; SECTOR_BYTES];
        fill(value, place, &mut whole);
        (value != ZERO && whole == bytes) || self.foreign.contains_key(bytes)
    }

    /// The bytes of consecutive sectors.
    pub fn bytes(&self, first: u64, values: &[Value]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * SECTOR_BYTES];
        for ((sector, value), chunk) in (first..).zip(values).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            match self.foreign_bytes.get(value) {
                Some(known) => chunk.copy_from_slice(known),
                None => fill(*value, sector, chunk),
            }
        }
        bytes
    }

    /// The value of a sector's bytes.
    ///
    /// # Errors
    /// What is known about bytes that no write put there.
    pub fn recognise(&self, sector: u64, bytes: &[u8]) -> Result<Value, String> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(ZERO);
        }
        let (value, place) = claim(bytes);
        let mut whole = [0; SECTOR_BYTES];
        fill(value, place, &mut whole);
        if whole == bytes && place == sector {
            return Ok(value);
        }
        if let Some(value) = self.foreign.get(bytes) {
            return Ok(*value);
        }
        Err(if whole == bytes {
            format!("the value {} of sector {place}", value.0)
        } else {
            format!("bytes that nobody wrote, beginning {:02x?}", &bytes[..32])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_its_own_and_nothing_else() {
        let mut contents = Contents::default();
        let value = contents.fresh();
        let bytes = contents.bytes(5, &[value, ZERO]);
        assert_eq!(contents.recognise(5, &bytes[..512]), Ok(value));
        assert_eq!(contents.recognise(6, &bytes[512..]), Ok(ZERO));
        assert!(contents.recognise(6, &bytes[..512]).is_err(), "misplaced");
        let torn: Vec<u8> = [&bytes[..256], &bytes[512..768]].concat();
        assert!(contents.recognise(5, &torn).is_err());
        let foreign = contents.foreign(9, &torn);
        assert_eq!(contents.recognise(3, &torn), Ok(foreign));
        assert_eq!(contents.bytes(9, &[foreign]), torn);
    }
}
