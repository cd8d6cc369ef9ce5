//! Compression of frames (Zstandard, RFC 8878).

use std::cell::RefCell;
use std::fmt;

use zstd::bulk::{Compressor, Decompressor};

/// How the payload of a record is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    None = 0,
    /// One Zstandard frame.
    Zstd = 1,
}

impl Codec {
    /// From the stored form.
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::None),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// What must at least be gained, or data is stored as it is: one part in so many.
const GAIN_PART: usize = 32;

/// Compresses: one for each thread, since its tables are large.
pub struct Coder(Option<Compressor<'static>>);

impl fmt::Debug for Coder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Coder").field(&self.0.is_some()).finish()
    }
}

impl Coder {
    /// Zstandard at a level from 1 to 19; at level 0 everything is stored as it is.
    ///
    /// # Errors
    /// When there is no memory for its tables.
    pub fn new(level: i32) -> std::io::Result<Self> {
        (level > 0).then(|| Compressor::new(level)).transpose().map(Self)
    }

    /// The compressed form, where it is worth it.
    pub(super) fn compress(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        let compressed = self.0.as_mut()?.compress(raw).ok()?;
        (compressed.len() + raw.len() / GAIN_PART <= raw.len()).then_some(compressed)
    }
}

thread_local! {
    /// Its tables are made once for each thread.
    static DECODER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Fills `to` with what `payload` holds, which must be exactly as long.
pub(super) fn decode(codec: Codec, payload: &[u8], to: &mut [u8]) -> Result<(), &'static str> {
    match codec {
        Codec::None if payload.len() == to.len() => to.copy_from_slice(payload),
        Codec::None => return Err("it is not as long as it says"),
        Codec::Zstd => {
            let decoded = DECODER.with_borrow_mut(|decoder| {
                let decoder = match decoder {
                    Some(decoder) => decoder,
                    None => decoder.insert(Decompressor::new()?),
                };
                decoder.decompress_to_buffer(payload, to)
            });
            if decoded.map_err(|_| "its zstd frame is damaged")? != to.len() {
                return Err("less comes out of its zstd frame than it says");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_compressed_comes_back_and_nothing_else() {
        let raw: Vec<u8> = (0..16384u32).map(|i| (i / 64) as u8).collect();
        let mut coder = Coder::new(3).unwrap();
        let packed = coder.compress(&raw).expect("it is regular");
        let mut back = vec![0; raw.len()];
        decode(Codec::Zstd, &packed, &mut back).unwrap();
        assert_eq!(back, raw);
        assert!(decode(Codec::Zstd, &packed, &mut back[1..]).is_err(), "longer than it says");
        assert!(decode(Codec::Zstd, &packed, &mut vec![0; raw.len() + 1]).is_err(), "shorter");
        assert!(decode(Codec::Zstd, &packed[1..], &mut back).is_err());
        assert!(decode(Codec::None, &raw[1..], &mut back).is_err());
    }

    #[test]
    fn noise_is_stored_as_it_is() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..8192)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        assert!(Coder::new(3).unwrap().compress(&noise).is_none());
        assert!(Coder::new(0).unwrap().compress(&[0; 4096]).is_none(), "level 0");
    }
}
