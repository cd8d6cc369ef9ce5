//! Doors for the fuzzers: the parsers of stored bytes, which are private, behind functions of
//! bytes. Only with the cargo feature `fuzzing`, which nothing but the fuzz crate enables.
//!
//! Each panics when what was decoded does not survive being encoded and decoded again.

use super::base_record::{BaseRecord, base_offset};
use super::header::Header;
use super::node::{
    decode_branch, decode_leaf, decode_root, decode_usage, encode_branch, encode_leaf, encode_root,
    encode_usage, packed_nodes,
};
use super::record::Index;
use super::slot::{Slot, SlotState, slot_offset};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// The first blocks of a layer: header, slots and the base records that they name. Says whether
/// there is a header.
pub fn preamble(bytes: &[u8]) -> bool {
    let Ok(header) = Header::decode(bytes) else { return false };
    assert_eq!(Header::decode(&header.encode()).as_ref(), Ok(&header));
    for parity in [0, 1] {
        let at = slot_offset(parity).0 as usize;
        let Some(block) = bytes.get(at..at + BLOCK_SIZE as usize) else { continue };
        if let SlotState::Valid(slot) = Slot::decode(block, &header) {
            let SlotState::Valid(again) = Slot::decode(&slot.encode(), &header) else {
                panic!("{slot:?} was refused")
            };
            assert_eq!(slot, again);
            let at = base_offset(slot.base).0 as usize;
            let Some(block) = bytes.get(at..at + BLOCK_SIZE as usize) else { continue };
            if let Ok(record) = BaseRecord::decode(block, &header, slot.base) {
                let again = BaseRecord::decode(&record.encode(), &header, slot.base);
                assert_eq!(again.as_ref(), Ok(&record));
            }
        }
    }
    true
}

/// The index block of a record. Says whether it is one.
pub fn record(bytes: &[u8]) -> bool {
    let Ok((index, chain)) = Index::decode(bytes) else { return false };
    let mut block = vec![0; BLOCK_BYTES];
    index.encode(&mut block);
    let (again, chain_again) = Index::decode(&block).expect("what was decoded can be encoded");
    assert_eq!(index, again);
    // Reserved bytes are not kept, so that the checksum of a record may change.
    assert!(index.stands_for.is_none() || chain == chain_again);
    true
}

/// A map node of any kind, as leaf, branch, root or usage node `index` of a file with this many blocks. Says
/// whether it is one.
pub fn node(bytes: &[u8], index: u32, blocks: u32) -> bool {
    if let Ok(table) = decode_leaf(bytes, index, blocks) {
        let mut encoded = encode_leaf(index, &table);
        encoded.resize(encoded.len().next_multiple_of(8), 0);
        assert_eq!(decode_leaf(&encoded, index, blocks).as_ref(), Ok(&table));
        return true;
    }
    let holds = |offset: u64, len: usize| {
        offset.checked_add(len as u64).is_some_and(|end| end <= u64::from(blocks) * BLOCK_SIZE)
    };
    if let Ok(refs) = decode_branch(bytes, index, holds) {
        let encoded = encode_branch(index, &refs);
        assert_eq!(decode_branch(&encoded, index, holds).as_ref(), Ok(&refs));
        return true;
    }
    if let Ok(refs) = decode_root(bytes, holds) {
        let encoded = encode_root(&refs.0, &refs.1);
        assert_eq!(decode_root(&encoded, holds).as_ref(), Ok(&refs));
        return true;
    }
    let segment_bytes = u64::from(blocks) * BLOCK_SIZE;
    if let Ok(table) = decode_usage(bytes, index, segment_bytes) {
        let encoded = encode_usage(index, &table);
        assert_eq!(decode_usage(&encoded, index, segment_bytes).as_ref(), Ok(&table));
        return true;
    }
    packed_nodes(bytes);
    false
}
