//! Map nodes as stored: leaves, branches and the root.
//!
//! A node is a header and a body; its bytes lie in the data blocks of records, packed one behind
//! the other. References name the first byte and the length, so that a leaf with few entries
//! costs few bytes. Nodes are never changed in place: a checkpoint writes new ones.

use super::bytes::{checksum, get_u16, get_u32, get_u64, put};
use super::layout::{Damage, FIRST_SEGMENT_BLOCK, damage};

/// Guest blocks of a leaf (2 MiB), and leaves of a branch (1 GiB).
pub(super) const LEAF_ENTRIES: usize = 512;
pub(super) const BRANCH_LEAVES: usize = 512;

const MAGIC: u16 = 0x4e53;
const N_KIND: usize = 2;
const N_INDEX: usize = 4;
const N_COUNT: usize = 8;
const N_CHECKSUM: usize = 12;
pub(super) const NODE_HEADER: usize = 16;
/// Nodes start at multiples of this many bytes.
pub(super) const NODE_ALIGNMENT: usize = 8;
const RUN_BYTES: usize = 8;

/// What the map says of one guest block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u32);

impl Entry {
    /// Ask below.
    pub(super) const ABSENT: Self = Self(0);
    /// Reads as zeroes.
    pub(super) const ZERO: Self = Self(1);

    /// The block of the file that holds the contents, if there is one.
    pub(super) fn place(self) -> Option<u32> {
        (self.0 >= FIRST_SEGMENT_BLOCK).then_some(self.0)
    }
}

/// Where a stored node is: absent, all zero, or the first byte's offset in the file (48 bits)
/// and an eighth of the padded length (16 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeRef(pub(super) u64);

impl NodeRef {
    /// Every block below is absent.
    pub(super) const ABSENT: Self = Self(0);
    /// Every block below is zero.
    #[cfg(test)]
    const ZERO: Self = Self(1);

    pub(super) fn new(offset: u64, len: usize) -> Self {
        let units = len.div_ceil(NODE_ALIGNMENT) as u64;
        assert!(offset < 1 << 48 && units < 1 << 16, "a node reference");
        Self(offset << 16 | units)
    }

    /// Offset in the file and padded length, when there is a stored node.
    pub(super) fn stored(self) -> Option<(u64, usize)> {
        (self.0 > 1).then_some((self.0 >> 16, (self.0 & 0xffff) as usize * NODE_ALIGNMENT))
    }

    /// The entry that all blocks below share, when no node is stored.
    pub(super) fn uniform(self) -> Option<Entry> {
        (self.0 <= 1).then_some(Entry(self.0 as u32))
    }
}

/// The kinds of nodes, by their stored number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum NodeKind {
    /// Runs of (first entry, length, value).
    LeafRuns = 1,
    /// All 512 values.
    LeafDense = 2,
    /// 512 references to leaves.
    Branch = 3,
    /// References to branches, as many as the count says.
    Root = 4,
}

fn finish(kind: NodeKind, index: u32, count: usize, mut b: Vec<u8>) -> Vec<u8> {
    put(&mut b, 0, &MAGIC.to_le_bytes());
    put(&mut b, N_KIND, &(kind as u16).to_le_bytes());
    put(&mut b, N_INDEX, &index.to_le_bytes());
    put(&mut b, N_COUNT, &(count as u32).to_le_bytes());
    let sum = node_checksum(&b);
    put(&mut b, N_CHECKSUM, &sum.to_le_bytes());
    b
}

fn node_checksum(b: &[u8]) -> u32 {
    checksum(&[&b[..N_CHECKSUM], &b[NODE_HEADER..]])
}

/// The stored form of leaf `index`: runs where they are shorter than the dense table.
pub(super) fn encode_leaf(index: u32, entries: &[Entry; LEAF_ENTRIES]) -> Vec<u8> {
    let dense_bytes = LEAF_ENTRIES * 4;
    let mut b = vec![0; NODE_HEADER];
    let mut count = 0;
    let mut at = 0;
    while at < LEAF_ENTRIES {
        let len = run_length(&entries[at..]);
        if entries[at] != Entry::ABSENT {
            b.extend((at as u16).to_le_bytes());
            b.extend((len as u16).to_le_bytes());
            b.extend(entries[at].0.to_le_bytes());
            count += 1;
        }
        at += len;
        if b.len() > NODE_HEADER + dense_bytes {
            return encode_dense(index, entries);
        }
    }
    finish(NodeKind::LeafRuns, index, count, b)
}

fn encode_dense(index: u32, entries: &[Entry; LEAF_ENTRIES]) -> Vec<u8> {
    let mut b = vec![0; NODE_HEADER];
    b.extend(entries.iter().flat_map(|entry| entry.0.to_le_bytes()));
    finish(NodeKind::LeafDense, index, LEAF_ENTRIES, b)
}

/// How many entries from the first follow it: the same uniform value, or rising places.
pub(super) fn run_length(entries: &[Entry]) -> usize {
    let first = entries[0];
    let step = u32::from(first.place().is_some());
    let follows = |(i, entry): &(usize, &Entry)| entry.0 == first.0.wrapping_add(*i as u32 * step);
    entries.iter().enumerate().take_while(follows).count()
}

/// The stored form of a branch or of the root.
pub(super) fn encode_refs(kind: NodeKind, index: u32, refs: &[NodeRef]) -> Vec<u8> {
    let mut b = vec![0; NODE_HEADER];
    b.extend(refs.iter().flat_map(|r| r.0.to_le_bytes()));
    finish(kind, index, refs.len(), b)
}

/// Checks a node's frame; returns its kind and body. `b` may be padded.
fn open(b: &[u8], index: u32) -> Result<(NodeKind, usize, &[u8]), Damage> {
    if b.len() < NODE_HEADER || get_u16(b, 0) != MAGIC {
        return Err(damage("node.magic", 0, "there is no map node here"));
    }
    let count = get_u32(b, N_COUNT) as usize;
    let (kind, unit) = match get_u16(b, N_KIND) {
        1 => (NodeKind::LeafRuns, RUN_BYTES),
        2 => (NodeKind::LeafDense, 4),
        3 => (NodeKind::Branch, 8),
        4 => (NodeKind::Root, 8),
        other => return Err(damage("node.kind", N_KIND, other)),
    };
    let end = count.checked_mul(unit).and_then(|body| body.checked_add(NODE_HEADER));
    // A reference that is longer than its node would be accounted for with space that is another's.
    let fills = |end: &usize| b.len() >= *end && b.len() - *end < NODE_ALIGNMENT;
    let Some(node) = end.filter(fills).map(|end| &b[..end]) else {
        return Err(damage("node.count", N_COUNT, format!("{count} in {} bytes", b.len())));
    };
    if node_checksum(node) != get_u32(node, N_CHECKSUM) {
        return Err(damage("node.checksum", N_CHECKSUM, "it does not match"));
    }
    if get_u32(b, N_INDEX) != index {
        return Err(damage("node.index", N_INDEX, format!("{} instead of {index}", get_u32(b, N_INDEX))));
    }
    Ok((kind, count, &node[NODE_HEADER..]))
}

/// Reads leaf `index`. Places must lie below `place_end`.
pub(super) fn decode_leaf(b: &[u8], index: u32, place_end: u32) -> Result<[Entry; LEAF_ENTRIES], Damage> {
    let mut entries = [Entry::ABSENT; LEAF_ENTRIES];
    let (kind, count, body) = open(b, index)?;
    match kind {
        NodeKind::LeafRuns => {
            for i in 0..count {
                let at = i * RUN_BYTES;
                let (start, len) = (usize::from(get_u16(body, at)), usize::from(get_u16(body, at + 2)));
                let value = Entry(get_u32(body, at + 4));
                let bad = || damage("leaf.run", NODE_HEADER + at, format!("{len} from {start}"));
                let slots = entries.get_mut(start..start + len).ok_or_else(bad)?;
                let step = u32::from(value.place().is_some());
                for (slot, n) in slots.iter_mut().zip(0u32..) {
                    *slot = Entry(value.0.checked_add(n * step).ok_or_else(bad)?);
                }
            }
        }
        NodeKind::LeafDense if count == LEAF_ENTRIES => {
            for (i, slot) in entries.iter_mut().enumerate() {
                *slot = Entry(get_u32(body, i * 4));
            }
        }
        other => return Err(damage("node.kind", N_KIND, format!("{other:?} where a leaf belongs"))),
    }
    match entries.iter().position(|e| e.0 > 1 && e.place().is_none_or(|place| place >= place_end)) {
        Some(i) => Err(damage("leaf.place", NODE_HEADER, format!("entry {i} is {:#x}", entries[i].0))),
        None => Ok(entries),
    }
}

/// Reads the references of a branch or root. Stored nodes must lie where `holds` says that a
/// segment holds so many bytes from an offset.
pub(super) fn decode_refs(
    b: &[u8],
    expected: NodeKind,
    index: u32,
    holds: impl Fn(u64, usize) -> bool,
) -> Result<Vec<NodeRef>, Damage> {
    let (kind, count, body) = open(b, index)?;
    if kind != expected || (kind == NodeKind::Branch && count != BRANCH_LEAVES) {
        return Err(damage("node.kind", N_KIND, format!("{kind:?} where a {expected:?} belongs")));
    }
    (0..count)
        .map(|i| {
            let reference = NodeRef(get_u64(body, i * 8));
            match reference.stored() {
                Some((offset, len))
                    if !offset.is_multiple_of(NODE_ALIGNMENT as u64)
                        || len < NODE_HEADER
                        || !holds(offset, len) =>
                {
                    Err(damage("node.reference", NODE_HEADER + i * 8, format!("{:#x}", reference.0)))
                }
                _ => Ok(reference),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(f: impl Fn(usize) -> u32) -> [Entry; LEAF_ENTRIES] {
        std::array::from_fn(|i| Entry(f(i)))
    }

    #[test]
    fn leaves_survive_both_encodings() {
        let scattered = leaf(|i| if i % 2 == 0 { 100 + (i as u32 * 7919) % 5000 } else { 0 });
        let sparse = leaf(|i| match i {
            3..=10 => 50 + i as u32,
            400.. => 1,
            _ => 0,
        });
        assert_eq!(encode_leaf(9, &sparse).len(), NODE_HEADER + 2 * RUN_BYTES);
        for entries in [scattered, sparse, leaf(|i| 16 + i as u32), leaf(|i| 9999 - i as u32)] {
            let mut b = encode_leaf(9, &entries);
            b.resize(b.len().next_multiple_of(8), 0);
            assert!(b.len() <= NODE_HEADER + 2048);
            assert_eq!(decode_leaf(&b, 9, 1 << 20).unwrap(), entries);
            assert_eq!(decode_leaf(&b, 8, 1 << 20).unwrap_err().field, "node.index");
        }
    }

    #[test]
    fn a_place_outside_the_file_is_damage() {
        let b = encode_leaf(0, &leaf(|i| 16 + i as u32));
        assert_eq!(decode_leaf(&b, 0, 17).unwrap_err().field, "leaf.place");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let b = encode_leaf(0, &leaf(|i| if i < 9 { 16 + 2 * i as u32 } else { 0 }));
        for bit in 0..b.len() * 8 {
            let mut bad = b.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_leaf(&bad, 0, 1 << 20).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn references_stay_in_the_file() {
        let refs = [NodeRef::ABSENT, NodeRef::ZERO, NodeRef::new(65536, 24)];
        let b = encode_refs(NodeKind::Root, 0, &refs);
        let decode = |end| decode_refs(&b, NodeKind::Root, 0, |offset, len| offset + len as u64 <= end);
        assert_eq!(decode(65560).unwrap(), refs);
        assert_eq!(decode(65559).unwrap_err().field, "node.reference");
    }
}
