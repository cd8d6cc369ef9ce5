//! Records: what a pack is made of.
//!
//! A record is a head of 16 bytes, a payload, and zeroes up to a multiple of 32. Its checksum covers the id of the
//! pack and the record's offset, too, so that what belongs elsewhere is not taken for it.

use super::codec::{Codec, Coder, decode};
use super::hash::Hash;
use super::header::PackId;
use super::node::{NODE_BYTES_MAX, Node};
use super::place::{Place, RECORD_ALIGNMENT};
use crate::bytes::{checksum, get_u32, put};
use sapwood_blockdev::units::BLOCK_BYTES;

/// Blocks in a frame, at most.
pub const FRAME_BLOCKS_MAX: usize = 32;

const R_KIND: usize = 0;
const R_CODEC: usize = R_KIND + 1;
const R_COUNT: usize = R_CODEC + 1;
const R_RESERVED: usize = R_COUNT + 1;
const R_STORED_LEN: usize = R_RESERVED + 1;
const R_RAW_LEN: usize = R_STORED_LEN + 4;
const R_CHECKSUM: usize = R_RAW_LEN + 4;
const R_PAYLOAD: usize = R_CHECKSUM + 4;
const _: () = assert!(R_PAYLOAD + FRAME_BLOCKS_MAX * BLOCK_BYTES + RECORD_ALIGNMENT <= Place::LEN_MAX);

/// Bytes of the longest record of a node.
pub(super) const NODE_RECORD_MAX: usize = (R_PAYLOAD + NODE_BYTES_MAX).next_multiple_of(RECORD_ALIGNMENT);

const KIND_FRAME: u8 = 1;
const KIND_NODE: u8 = 2;

/// A record that has no place yet.
#[derive(Debug)]
pub struct NewRecord {
    bytes: Vec<u8>,
    /// Blocks, or nodes, in it.
    pub(super) count: usize,
}

impl NewRecord {
    /// A frame: compressed blocks.
    ///
    /// # Panics
    /// When `raw` is not one to 32 whole blocks.
    pub fn frame(coder: &mut Coder, raw: &[u8]) -> Self {
        let count = raw.len() / BLOCK_BYTES;
        assert!(raw.len().is_multiple_of(BLOCK_BYTES) && (1..=FRAME_BLOCKS_MAX).contains(&count), "a frame");
        match coder.compress(raw) {
            Some(packed) => Self::new(KIND_FRAME, Codec::Zstd, count, &packed, raw.len()),
            None => Self::new(KIND_FRAME, Codec::None, count, raw, raw.len()),
        }
    }

    /// A node.
    pub fn node(node: &Node) -> Self {
        let payload = node.encode();
        Self::new(KIND_NODE, Codec::None, 1, &payload, payload.len())
    }

    fn new(kind: u8, codec: Codec, count: usize, payload: &[u8], raw_len: usize) -> Self {
        let mut bytes = vec![0; (R_PAYLOAD + payload.len()).next_multiple_of(RECORD_ALIGNMENT)];
        bytes[R_KIND] = kind;
        bytes[R_CODEC] = codec as u8;
        bytes[R_COUNT] = count as u8;
        put(&mut bytes, R_STORED_LEN, &(payload.len() as u32).to_le_bytes());
        put(&mut bytes, R_RAW_LEN, &(raw_len as u32).to_le_bytes());
        put(&mut bytes, R_PAYLOAD, payload);
        Self { bytes, count }
    }

    /// Its length in a pack.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes for byte `offset` of a pack.
    pub(super) fn place(mut self, pack: &PackId, offset: u64) -> Vec<u8> {
        let stored = get_u32(&self.bytes, R_STORED_LEN) as usize;
        let sum = sum(pack, offset, &self.bytes, stored);
        put(&mut self.bytes, R_CHECKSUM, &sum.to_le_bytes());
        self.bytes
    }
}

fn sum(pack: &PackId, offset: u64, bytes: &[u8], stored: usize) -> u32 {
    let payload = &bytes[R_PAYLOAD..R_PAYLOAD + stored];
    checksum(&[&pack.0, &offset.to_le_bytes(), &bytes[..R_CHECKSUM], payload])
}

/// The blocks of a frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame(Box<[u8]>);

impl Frame {
    /// A block of it.
    pub fn block(&self, index: usize) -> Option<&[u8]> {
        self.0.get(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len() / BLOCK_BYTES
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.0.len()
    }

    /// The hashes of its blocks.
    pub fn hashes(&self) -> impl Iterator<Item = Hash> {
        self.0.chunks_exact(BLOCK_BYTES).map(Hash::of_block)
    }
}

/// What a record holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    Frame(Frame),
    Node(Box<Node>),
}

/// The record at byte `offset` of a pack, at the start of `bytes`, which may go on after it; and its length with padding.
pub(super) fn decode_record(
    pack: &PackId,
    offset: u64,
    bytes: &[u8],
) -> Result<(Record, usize), &'static str> {
    if bytes.len() < R_PAYLOAD {
        return Err("it does not fit into the pack");
    }
    let (stored, raw_len) = (get_u32(bytes, R_STORED_LEN) as usize, get_u32(bytes, R_RAW_LEN) as usize);
    if stored > bytes.len() - R_PAYLOAD {
        return Err("it is longer than its place says");
    }
    if get_u32(bytes, R_CHECKSUM) != sum(pack, offset, bytes, stored) {
        return Err("its checksum is wrong");
    }
    let padded = (R_PAYLOAD + stored).next_multiple_of(RECORD_ALIGNMENT);
    let padding = bytes.get(R_PAYLOAD + stored..padded).ok_or("it is longer than its place says")?;
    if padding.iter().any(|byte| *byte != 0) {
        return Err("the bytes after it are not zero");
    }
    let codec = Codec::from_byte(bytes[R_CODEC]).ok_or("its codec is unknown")?;
    let count = usize::from(bytes[R_COUNT]);
    let payload = &bytes[R_PAYLOAD..R_PAYLOAD + stored];
    let record = match bytes[R_KIND] {
        KIND_FRAME => {
            if !(1..=FRAME_BLOCKS_MAX).contains(&count) || raw_len != count * BLOCK_BYTES {
                return Err("it does not hold whole blocks");
            }
            let mut raw = vec![0; raw_len].into_boxed_slice();
            decode(codec, payload, &mut raw)?;
            Record::Frame(Frame(raw))
        }
        KIND_NODE => {
            if count != 1 || raw_len > NODE_BYTES_MAX || codec != Codec::None {
                return Err("it is no node");
            }
            Record::Node(Box::new(Node::decode(payload)?))
        }
        _ => return Err("its kind is unknown"),
    };
    Ok((record, padded))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACK: PackId = PackId([3; 16]);

    fn frame() -> (Vec<u8>, Vec<u8>) {
        let raw: Vec<u8> = (0..2 * BLOCK_BYTES).map(|i| (i / 100) as u8).collect();
        let record = NewRecord::frame(&mut Coder::new(1).unwrap(), &raw);
        (record.place(&PACK, 4096), raw)
    }

    #[test]
    fn a_frame_comes_back() {
        let (bytes, raw) = frame();
        assert!(bytes.len() < raw.len() / 4 && bytes.len().is_multiple_of(RECORD_ALIGNMENT));
        let longer = [&bytes[..], &[9; 100]].concat();
        let (record, len) = decode_record(&PACK, 4096, &longer).unwrap();
        assert_eq!(len, bytes.len());
        let Record::Frame(frame) = record else { panic!("a frame") };
        assert_eq!(frame.block(1), Some(&raw[BLOCK_BYTES..]));
        assert_eq!((frame.block(2), frame.count()), (None, 2));
    }

    #[test]
    fn a_record_belongs_where_it_was_put() {
        let (bytes, _) = frame();
        assert!(decode_record(&PACK, 8192, &bytes).is_err(), "another offset");
        assert!(decode_record(&PackId([4; 16]), 4096, &bytes).is_err(), "another pack");
        assert!(decode_record(&PACK, 4096, &bytes[..20]).is_err(), "cut off");
    }

    #[test]
    fn a_flipped_bit_is_found_wherever_it_matters() {
        let (bytes, _) = frame();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_record(&PACK, 4096, &bad).is_err(), "bit {bit}");
        }
    }
}
