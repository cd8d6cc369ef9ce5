//! Damage by name: each function does one thing to an image, and makes right again whatever
//! checksum would otherwise hide it. Where a field is the damage, its checksums hold.

use super::format::{
    BLOCK, base, base_at, bases, header, node, put, put_u32, put_u64, record, slot, slot_at, slots, u32_at,
    u64_at,
};
use super::seal::{Seal, seal_bases, seal_header, seal_node, seal_record, seal_slots};
use super::walk::{NodeAt, RecordAt, log, nodes, records};

/// An image.
pub type Image = Vec<u8>;

/// The slot with the newest checkpoint.
///
/// # Panics
/// If there is none.
pub fn newest(b: &[u8]) -> usize {
    slots(b)[0]
}

/// The first node of a kind below the newest slot.
///
/// # Panics
/// If there is none.
pub fn first_node(b: &[u8], kinds: &[u16]) -> NodeAt {
    *nodes(b, newest(b)).iter().find(|n| kinds.contains(&n.kind)).expect("such a node")
}

/// The record that holds a byte of the file.
///
/// # Panics
/// If there is none.
pub fn record_of(b: &[u8], at: usize) -> RecordAt {
    let holds = |r: &&RecordAt| (r.at..r.at + (1 + r.data_blocks) * BLOCK).contains(&at);
    *records(b).iter().find(holds).expect("a record")
}

/// Changes a field of a node and makes the checksums right.
pub fn change_node(b: &mut Image, found: &NodeAt, change: impl FnOnce(&mut [u8])) {
    change(&mut b[found.at..found.at + found.len]);
    seal_node(b, found.at, found.len);
    let record = record_of(b, found.at);
    seal_record(b, &record);
}

/// Changes a field of the newest slot and makes its checksum right.
pub fn change_slot(b: &mut Image, change: impl FnOnce(&mut [u8])) {
    let at = newest(b);
    change(&mut b[at..at + 512]);
    seal_slots(b);
}

/// Changes a record after the newest slot and makes everything after it follow.
pub fn change_log(b: &mut Image, number: usize, change: impl FnOnce(&mut [u8])) {
    let found = log(b, newest(b))[number];
    change(&mut b[found.at..found.at + BLOCK]);
    Seal::ALL.apply(b);
}

/// Not a layer's first bytes.
pub fn header_magic(b: &mut Image) {
    b[header::MAGIC] ^= 1;
}

/// The header's checksum is wrong.
pub fn header_checksum(b: &mut Image) {
    b[header::CHECKSUM] ^= 1;
}

/// A version of the future.
pub fn header_version(b: &mut Image) {
    put_u32(b, header::VERSION, 77);
    seal_header(b);
}

/// A feature that must be understood.
pub fn incompatible_feature(b: &mut Image) {
    put_u64(b, header::INCOMPATIBLE, 1 << 40);
    seal_header(b);
}

/// A feature that must be understood to write.
pub fn ro_compatible_feature(b: &mut Image) {
    put_u64(b, header::RO_COMPATIBLE, 2);
    seal_header(b);
}

/// Segments of 17 blocks.
pub fn segment_size(b: &mut Image) {
    put_u32(b, header::SEGMENT_BLOCKS, 17);
    seal_header(b);
}

/// The base record that the newest slot names.
pub fn base_of(b: &[u8]) -> usize {
    base_at(u64_at(b, newest(b) + slot::BASE) as usize % 2)
}

/// Changes a field of the base record in force and makes its checksum right.
pub fn change_base(b: &mut Image, change: impl FnOnce(&mut [u8])) {
    let at = base_of(b);
    change(&mut b[at..at + BLOCK]);
    seal_bases(b);
}

/// The checksum of the base record is wrong.
pub fn base_checksum(b: &mut Image) {
    let at = base_of(b);
    b[at + base::CHECKSUM] ^= 1;
}

/// The base record is gone.
pub fn no_base_record(b: &mut Image) {
    let at = base_of(b);
    b[at..at + BLOCK].fill(0);
}

/// The base record is an earlier or later one.
pub fn base_sequence(b: &mut Image) {
    change_base(b, |base| {
        let sequence = u64_at(base, base::SEQUENCE);
        put_u64(base, base::SEQUENCE, sequence + 2);
    });
}

/// A flag of the future.
pub fn base_flags(b: &mut Image) {
    change_base(b, |base| put_u32(base, base::FLAGS, 1 << 20));
}

/// A base that is a raw file of this name and size.
pub fn raw_base(b: &mut Image, path: &str, size: u64) {
    change_base(b, |base| {
        put_u32(base, base::FORMAT, 1);
        put_u32(base, base::PATH_LEN, path.len() as u32);
        put_u64(base, base::SIZE, size);
        put(base, base::PATH, path.as_bytes());
    });
}

/// A base that is a layer of this name, which is `identity` and whose disk has this size.
pub fn layer_base(b: &mut Image, path: &str, identity: &Image, size: u64) {
    raw_base(b, path, size);
    change_base(b, |base| {
        put_u32(base, base::FORMAT, 2);
        put(base, base::BASE_ID, &identity[header::LAYER_ID..header::LAYER_ID + 16]);
        let generation = u64_at(identity, newest(identity) + slot::GENERATION);
        put_u64(base, base::GENERATION, generation);
    });
}

/// No base.
pub fn no_base(b: &mut Image) {
    change_base(b, |base| put_u32(base, base::FORMAT, 0));
}

/// Another identity.
pub fn rename_layer(b: &mut Image, id: [u8; 16]) {
    put(b, header::LAYER_ID, &id);
    for at in slots(b) {
        put(b, at + slot::LAYER_ID, &id);
    }
    for at in bases(b) {
        put(b, at + base::LAYER_ID, &id);
    }
    Seal::ALL.apply(b);
}

/// A base path longer than the record has room for.
pub fn base_path_length(b: &mut Image) {
    raw_base(b, "base", 512);
    change_base(b, |base| put_u32(base, base::PATH_LEN, 4000));
}

/// The checksum of the newest slot is wrong.
pub fn newest_slot(b: &mut Image) {
    let at = newest(b);
    b[at + slot::CHECKSUM] ^= 1;
}

/// The checksum of the other slot is wrong.
pub fn older_slot(b: &mut Image) {
    let at = slots(b)[1];
    b[at + slot::CHECKSUM] ^= 1;
}

/// Both slots are damaged.
pub fn both_slots(b: &mut Image) {
    newest_slot(b);
    older_slot(b);
}

/// Both slots are gone.
pub fn no_slots(b: &mut Image) {
    [0, 1].map(slot_at).into_iter().for_each(|at| b[at..at + BLOCK].fill(0));
}

/// The root lies behind the end of the file.
pub fn root_outside(b: &mut Image) {
    let end = b.len() as u64;
    change_slot(b, |slot| put_u64(slot, slot::ROOT, end));
}

/// The root's length is not that of the node.
pub fn root_length(b: &mut Image) {
    change_slot(b, |slot| {
        let len = u32_at(slot, slot::ROOT_LEN);
        put_u32(slot, slot::ROOT_LEN, len - 8);
    });
}

/// A node's checksum is wrong, though the record's is right.
pub fn node_checksum(b: &mut Image) {
    let leaf = first_node(b, &[node::LEAF_RUNS, node::LEAF_DENSE]);
    b[leaf.at + node::CHECKSUM] ^= 1;
    let record = record_of(b, leaf.at);
    seal_record(b, &record);
}

/// A leaf names a block behind the end of the file.
pub fn leaf_place_outside(b: &mut Image) {
    let (leaf, place) = (first_node(b, &[node::LEAF_RUNS]), (b.len() / BLOCK) as u32);
    change_node(b, &leaf, |n| put_u32(n, node::BODY + 4, place));
}

/// A leaf names a block in the header.
pub fn leaf_place_header(b: &mut Image) {
    let leaf = first_node(b, &[node::LEAF_RUNS]);
    change_node(b, &leaf, |n| put_u32(n, node::BODY + 4, 2));
}

/// A leaf names the first block that the log will write next.
pub fn leaf_place_future(b: &mut Image) {
    let at = newest(b);
    let (segment, block) = (u32_at(b, at + slot::LOG_SEGMENT), u32_at(b, at + slot::LOG_BLOCK));
    let leaf = first_node(b, &[node::LEAF_RUNS]);
    change_node(b, &leaf, |n| put_u32(n, node::BODY + 4, 16 + 16 * segment + block));
}

/// A leaf's run goes on behind the leaf's end.
pub fn leaf_run_long(b: &mut Image) {
    let leaf = first_node(b, &[node::LEAF_RUNS]);
    change_node(b, &leaf, |n| put(n, node::BODY + 2, &600u16.to_le_bytes()));
}

/// Every entry of a leaf's run is one segment's first block and those behind it.
pub fn shared_places(b: &mut Image) {
    for leaf in nodes(b, newest(b)).iter().filter(|n| n.kind == node::LEAF_RUNS) {
        let runs = (leaf.len - node::BODY) / 8;
        change_node(b, leaf, |n| {
            for run in 0..runs {
                put_u32(n, node::BODY + run * 8 + 4, 17);
            }
        });
    }
}

/// A branch says that it is another one.
pub fn branch_index(b: &mut Image) {
    let branch = first_node(b, &[node::BRANCH]);
    change_node(b, &branch, |n| put_u32(n, node::INDEX, 9));
}

/// A branch where a leaf belongs.
pub fn branch_as_leaf(b: &mut Image) {
    let branch = first_node(b, &[node::BRANCH]);
    let reference = u64_at(b, branch.reference);
    let slot = (0..512).find(|i| u64_at(b, branch.at + node::BODY + i * 8) > 1).expect("a leaf");
    change_node(b, &branch, |n| put_u64(n, node::BODY + slot * 8, reference));
}

/// A reference to a node before the segments.
pub fn reference_to_header(b: &mut Image) {
    let root = first_node(b, &[node::ROOT]);
    change_node(b, &root, |n| put_u64(n, node::ROOT_REFS, 4096 << 16 | 514));
}

/// A reference longer than the node.
pub fn reference_length(b: &mut Image) {
    let branch = first_node(b, &[node::BRANCH]);
    let slot = (0..512).find(|i| u64_at(b, branch.at + node::BODY + i * 8) > 1).expect("a leaf");
    change_node(b, &branch, |n| {
        let at = node::BODY + slot * 8;
        let longer = u64_at(n, at) + 1;
        put_u64(n, at, longer);
    });
}

/// The generation of both slots is near the end of the numbers.
pub fn huge_generation(b: &mut Image) {
    for at in slots(b) {
        let generation = u64_at(b, at + slot::GENERATION);
        put_u64(b, at + slot::GENERATION, generation % 2 + (1 << 56) - 2);
    }
    seal_slots(b);
}

/// The newest sequence number is near the end of the numbers.
pub fn huge_sequence(b: &mut Image) {
    change_slot(b, |slot| put_u64(slot, slot::SEQUENCE, u64::MAX - 3));
    Seal::ALL.apply(b);
}

/// A disk so large that the map's root does not fit into a segment.
pub fn huge_size(b: &mut Image) {
    change_slot(b, |slot| put_u64(slot, slot::SIZE, 64 << 40));
}

/// The log goes on where it is.
pub fn log_in_a_loop(b: &mut Image) {
    change_slot(b, |slot| {
        let segment = u32_at(slot, slot::LOG_SEGMENT);
        put_u32(slot, slot::NEXT_SEGMENT, segment);
    });
}

/// The log goes on in a segment that holds data.
pub fn log_over_data(b: &mut Image) {
    change_slot(b, |slot| put_u32(slot, slot::NEXT_SEGMENT, 0));
}

/// The log lies far behind the end of the file.
pub fn log_outside(b: &mut Image) {
    change_slot(b, |slot| put_u32(slot, slot::LOG_SEGMENT, 1 << 20));
}

/// Puts a run into the first record of the log, in place of its data.
pub fn log_run(b: &mut Image, kind: u64, start: u64, operand: u64) {
    change_log(b, 0, |index| {
        put_u32(index, record::RUN_COUNT, 1);
        put_u32(index, record::DATA_BLOCKS, 0);
        put_u64(index, record::RUNS, kind << 56 | start);
        put_u64(index, record::RUNS + 8, operand);
    });
}

/// A record says that the log goes on elsewhere than all others of its segment say.
pub fn log_turns(b: &mut Image, number: usize) {
    change_log(b, number, |index| put_u32(index, record::NEXT_SEGMENT, 60));
}

/// A void record that says something.
pub fn void_with_runs(b: &mut Image) {
    log_run(b, record::ZERO, 0, 1 << 20);
    change_log(b, 0, |index| put_u32(index, record::KIND, 1));
}
