//! Finds the records and map nodes of an image, whatever its checksums say.

use super::format::{
    BLOCK, FIRST_SEGMENT, bytes, node, record, segment_at, segment_blocks, slot, u16_at, u32_at, u64_at,
};

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordAt {
    /// Byte of its index block.
    pub at: usize,
    /// Segment that it is in.
    pub segment: u32,
    /// Block of the segment at which it starts.
    pub block: usize,
    /// Data blocks after the index block.
    pub data_blocks: usize,
}

/// A map node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAt {
    /// Its first byte.
    pub at: usize,
    /// Its length, without padding.
    pub len: usize,
    /// `format::node::LEAF_RUNS` and so on.
    pub kind: u16,
    /// Where the reference to it is: a slot's or a node's field.
    pub reference: usize,
}

/// The record at a place of the log, if there is one.
pub fn record_at(b: &[u8], segment: u32, block: usize) -> Option<RecordAt> {
    let at = segment_at(b, segment, block);
    let data_blocks = u32_at(b, at + record::DATA_BLOCKS) as usize;
    let fits = block + 1 + data_blocks <= segment_blocks(b);
    (bytes::<8>(b, at) == *record::MAGIC && fits).then_some(RecordAt { at, segment, block, data_blocks })
}

/// The records of every segment, each segment from its start to the first block that is none.
pub fn records(b: &[u8]) -> Vec<RecordAt> {
    let (blocks, mut found) = (segment_blocks(b), Vec::new());
    if blocks == 0 {
        return found;
    }
    let count = (b.len() / BLOCK).saturating_sub(FIRST_SEGMENT).div_ceil(blocks);
    for segment in 0..count as u32 {
        let mut block = 0;
        while let Some(record) = record_at(b, segment, block) {
            found.push(record);
            block += 1 + record.data_blocks;
        }
    }
    found
}

/// Where the log goes on after a slot or record.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The segment being filled.
    pub segment: u32,
    /// Blocks of it that are taken.
    pub block: usize,
    /// The segment after it.
    pub next_segment: u32,
}

impl Position {
    /// The one that a slot names.
    pub fn of_slot(b: &[u8], at: usize) -> Self {
        Self {
            segment: u32_at(b, at + slot::LOG_SEGMENT),
            block: u32_at(b, at + slot::LOG_BLOCK) as usize,
            next_segment: u32_at(b, at + slot::NEXT_SEGMENT),
        }
    }

    /// The one after a record.
    pub fn after(b: &[u8], record: &RecordAt) -> Self {
        Self {
            segment: record.segment,
            block: record.block + 1 + record.data_blocks,
            next_segment: u32_at(b, record.at + record::NEXT_SEGMENT),
        }
    }

    /// The records that may be the next one.
    pub fn candidates(self, b: &[u8]) -> impl Iterator<Item = RecordAt> + use<'_> {
        [(self.segment, self.block), (self.next_segment, 0)]
            .into_iter()
            .filter_map(|(segment, block)| record_at(b, segment, block))
    }
}

/// The log after a slot, by sequence numbers.
pub fn log(b: &[u8], slot_at: usize) -> Vec<RecordAt> {
    let mut position = Position::of_slot(b, slot_at);
    let mut sequence = u64_at(b, slot_at + slot::SEQUENCE);
    let mut found = Vec::new();
    loop {
        sequence = sequence.wrapping_add(1);
        let follows = |r: &RecordAt| u64_at(b, r.at + record::SEQUENCE) == sequence;
        let Some(next) = position.candidates(b).find(follows) else { return found };
        position = Position::after(b, &next);
        found.push(next);
        if found.len() > b.len() / BLOCK {
            return found;
        }
    }
}

/// The map nodes below a slot, children after their parents.
pub fn nodes(b: &[u8], slot_at: usize) -> Vec<NodeAt> {
    let mut found = Vec::new();
    let root = u64_at(b, slot_at + slot::ROOT) as usize;
    if u32_at(b, slot_at + slot::ROOT_LEN) > 0 {
        found.extend(node_at(b, root, slot_at + slot::ROOT));
    }
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        next += 1;
        if !matches!(parent.kind, node::BRANCH | node::ROOT) || found.len() > b.len() / 8 {
            continue;
        }
        for reference in (parent.at + node::BODY..parent.at + parent.len).step_by(8) {
            let child = node_at(b, (u64_at(b, reference) >> 16) as usize, reference);
            // Kinds go down only, so that this ends: usage nodes have nothing below them.
            let is_below =
                |c: &NodeAt| c.kind < parent.kind || (c.kind == node::USAGE && parent.kind == node::ROOT);
            found.extend(child.filter(is_below));
        }
    }
    found
}

fn node_at(b: &[u8], at: usize, reference: usize) -> Option<NodeAt> {
    if at >= b.len() {
        return None;
    }
    let kind = u16_at(b, at + node::KIND);
    let unit = match kind {
        node::LEAF_DENSE => 4,
        node::LEAF_RUNS | node::BRANCH | node::ROOT => 8,
        node::USAGE => 16,
        _ => return None,
    };
    let len = node::BODY + (u32_at(b, at + node::COUNT) as usize).checked_mul(unit)?;
    let inside = u16_at(b, at) == node::MAGIC && at.checked_add(len)? <= b.len();
    inside.then_some(NodeAt { at, len, kind, reference })
}
