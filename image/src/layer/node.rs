//! Map nodes as stored: leaves, branches and the root.
//!
//! A node is a header and a body; its bytes lie in the data blocks of records, packed one behind
//! the other. References name the first byte and the length, so that a leaf with few entries
//! costs few bytes. Nodes are never changed in place: a checkpoint writes new ones.

use super::layout::{Damage, FIRST_SEGMENT_BLOCK, damage};
use crate::bytes::{checksum, get_u16, get_u32, get_u64, put};
use sapwood_blockdev::units::BLOCK_SIZE;

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
pub(super) const RUN_BYTES: usize = 8;

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

    /// The entry `n` blocks further in a run that begins with this one.
    pub(super) fn plus(self, n: u32) -> Self {
        Self(self.0 + if self.0 >= FIRST_SEGMENT_BLOCK { n } else { 0 })
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
    /// References to branches and to usage nodes.
    Root = 4,
    /// What is in use of 256 segments.
    Usage = 5,
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

/// The stored form of the root: a word that says how many of the references are to branches,
/// those, and the references to usage nodes.
pub(super) fn encode_root(branches: &[NodeRef], usage: &[NodeRef]) -> Vec<u8> {
    let mut words = vec![NodeRef(branches.len() as u64)];
    words.extend_from_slice(branches);
    words.extend_from_slice(usage);
    encode_refs(NodeKind::Root, 0, &words)
}

/// The stored form of a branch.
pub(super) fn encode_branch(index: u32, refs: &[NodeRef; BRANCH_LEAVES]) -> Vec<u8> {
    encode_refs(NodeKind::Branch, index, refs)
}

fn encode_refs(kind: NodeKind, index: u32, refs: &[NodeRef]) -> Vec<u8> {
    let mut b = vec![0; NODE_HEADER];
    b.extend(refs.iter().flat_map(|r| r.0.to_le_bytes()));
    finish(kind, index, refs.len(), b)
}

/// A node's kind and the bytes of one of the things that it counts.
fn kind(b: &[u8]) -> Result<(NodeKind, usize), Damage> {
    if b.len() < NODE_HEADER || get_u16(b, 0) != MAGIC {
        return Err(damage("node.magic", 0, "there is no map node here"));
    }
    Ok(match get_u16(b, N_KIND) {
        1 => (NodeKind::LeafRuns, RUN_BYTES),
        2 => (NodeKind::LeafDense, 4),
        3 => (NodeKind::Branch, 8),
        4 => (NodeKind::Root, 8),
        5 => (NodeKind::Usage, USAGE_BYTES),
        other => return Err(damage("node.kind", N_KIND, other)),
    })
}

/// The kind and padded length that a node claims to have.
fn length(b: &[u8]) -> Option<(NodeKind, usize)> {
    let (kind, unit) = kind(b).ok()?;
    let body = (get_u32(b, N_COUNT) as usize).checked_mul(unit)?;
    Some((kind, body.checked_add(NODE_HEADER)?.next_multiple_of(NODE_ALIGNMENT)))
}

/// Checks a node's frame; returns its kind and body. `b` may be padded.
fn open(b: &[u8], index: u32) -> Result<(NodeKind, usize, &[u8]), Damage> {
    let (kind, unit) = kind(b)?;
    let count = get_u32(b, N_COUNT) as usize;
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

/// Reads the references of a branch. Stored nodes must lie where `holds` says that a segment holds
/// so many bytes from an offset.
pub(super) fn decode_branch(
    b: &[u8],
    index: u32,
    holds: impl Fn(u64, usize) -> bool,
) -> Result<[NodeRef; BRANCH_LEAVES], Damage> {
    let (kind, count, body) = open(b, index)?;
    if kind != NodeKind::Branch || count != BRANCH_LEAVES {
        return Err(damage("node.kind", N_KIND, format!("{kind:?} where a branch belongs")));
    }
    let mut refs = [NodeRef::ABSENT; BRANCH_LEAVES];
    for (i, reference) in refs.iter_mut().enumerate() {
        *reference = decode_ref(body, i, &holds)?;
    }
    Ok(refs)
}

/// Reads the root: the references to branches, and those to usage nodes.
pub(super) fn decode_root(
    b: &[u8],
    holds: impl Fn(u64, usize) -> bool,
) -> Result<(Vec<NodeRef>, Vec<NodeRef>), Damage> {
    let (kind, count, body) = open(b, 0)?;
    if kind != NodeKind::Root || count == 0 {
        return Err(damage("node.kind", N_KIND, format!("{kind:?} where the root belongs")));
    }
    let branches = get_u64(body, 0);
    let Some(branches) = usize::try_from(branches).ok().filter(|&n| n < count) else {
        return Err(damage("root.branches", NODE_HEADER, branches));
    };
    let refs: Vec<NodeRef> = (1..count).map(|i| decode_ref(body, i, &holds)).collect::<Result<_, _>>()?;
    Ok((refs[..branches].to_vec(), refs[branches..].to_vec()))
}

fn decode_ref(body: &[u8], i: usize, holds: &impl Fn(u64, usize) -> bool) -> Result<NodeRef, Damage> {
    let reference = NodeRef(get_u64(body, i * 8));
    match reference.stored() {
        Some((offset, len))
            if !offset.is_multiple_of(NODE_ALIGNMENT as u64) || len < NODE_HEADER || !holds(offset, len) =>
        {
            Err(damage("node.reference", NODE_HEADER + i * 8, format!("{:#x}", reference.0)))
        }
        _ => Ok(reference),
    }
}

/// Segments of a usage node.
pub(super) const USAGE_SEGMENTS: usize = 256;
const USAGE_BYTES: usize = 16;
/// Bytes of a usage node.
pub(super) const USAGE_NODE_BYTES: usize = NODE_HEADER + USAGE_SEGMENTS * USAGE_BYTES;

/// What is in use of a segment, as of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Mapped blocks.
    pub(super) live_blocks: u32,
    /// Bytes of leaves that the map refers to.
    pub(super) leaf_bytes: u32,
    /// The newest record in it, or an earlier one.
    pub(super) written: u64,
}

/// The usage of 256 segments.
pub(super) type UsageTable = [Usage; USAGE_SEGMENTS];

/// The stored form of usage node `index`.
pub(super) fn encode_usage(index: u32, table: &UsageTable) -> Vec<u8> {
    let mut b = vec![0; NODE_HEADER];
    for usage in table {
        b.extend(usage.live_blocks.to_le_bytes());
        b.extend(usage.leaf_bytes.to_le_bytes());
        b.extend(usage.written.to_le_bytes());
    }
    finish(NodeKind::Usage, index, USAGE_SEGMENTS, b)
}

/// Reads usage node `index` of segments that have `segment_bytes` bytes.
pub(super) fn decode_usage(b: &[u8], index: u32, segment_bytes: u64) -> Result<UsageTable, Damage> {
    let (kind, count, body) = open(b, index)?;
    if kind != NodeKind::Usage || count != USAGE_SEGMENTS {
        return Err(damage("node.kind", N_KIND, format!("{kind:?} where a usage node belongs")));
    }
    let mut table = [Usage::default(); USAGE_SEGMENTS];
    for (i, usage) in table.iter_mut().enumerate() {
        let at = i * USAGE_BYTES;
        let (live_blocks, leaf_bytes) = (get_u32(body, at), get_u32(body, at + 4));
        if u64::from(live_blocks) * BLOCK_SIZE + u64::from(leaf_bytes) > segment_bytes {
            let detail = format!("entry {i}: {live_blocks} blocks and {leaf_bytes} bytes of leaves");
            return Err(damage("usage.live", NODE_HEADER + at, detail));
        }
        *usage = Usage { live_blocks, leaf_bytes, written: get_u64(body, at + 8) };
    }
    Ok(table)
}

/// The nodes that lie in blocks in which nodes were packed: where each begins, its kind, its index
/// and its padded length. Bytes that are no node are passed over.
pub(super) fn packed_nodes(b: &[u8]) -> Vec<(usize, NodeKind, u32, usize)> {
    let mut nodes = Vec::new();
    let mut at = 0;
    while at + NODE_HEADER <= b.len() {
        match length(&b[at..]) {
            Some((kind, len)) if at + len <= b.len() => {
                let index = get_u32(b, at + N_INDEX);
                if open(&b[at..at + len], index).is_ok() {
                    nodes.push((at, kind, index, len));
                    at += len;
                    continue;
                }
                at = (at + 1).next_multiple_of(BLOCK_SIZE as usize);
            }
            _ => at = (at + 1).next_multiple_of(BLOCK_SIZE as usize),
        }
    }
    nodes
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
    fn packed_nodes_are_found() {
        let usage = |live_blocks| [Usage { live_blocks, leaf_bytes: 8, written: 5 }; USAGE_SEGMENTS];
        let mut b = encode_leaf(3, &leaf(|i| if i < 9 { 16 + 2 * i as u32 } else { 0 }));
        b.resize(b.len().next_multiple_of(NODE_ALIGNMENT), 0);
        let second = b.len();
        b.extend(encode_usage(7, &usage(1)));
        let end = b.len();
        b.resize(end.next_multiple_of(4096), 0);
        let third = b.len();
        b.extend(encode_usage(8, &usage(2)));
        let found: Vec<_> =
            packed_nodes(&b).into_iter().map(|(at, kind, index, _)| (at, kind, index)).collect();
        let expected =
            [(0, NodeKind::LeafRuns, 3), (second, NodeKind::Usage, 7), (third, NodeKind::Usage, 8)];
        assert_eq!(found, expected);
        assert_eq!(decode_usage(&b[second..end], 7, 1 << 16).unwrap(), usage(1));
        assert_eq!(decode_usage(&b[second..end], 7, 4096).unwrap_err().field, "usage.live");
    }

    #[test]
    fn references_stay_in_the_file() {
        let refs = [NodeRef::ABSENT, NodeRef::ZERO, NodeRef::new(65536, 24)];
        let b = encode_root(&refs[..2], &refs[2..]);
        let decode = |end| decode_root(&b, |offset, len| offset + len as u64 <= end);
        assert_eq!(decode(65560).unwrap(), (refs[..2].to_vec(), refs[2..].to_vec()));
        assert_eq!(decode(65559).unwrap_err().field, "node.reference");
    }
}
