//! What packs hold and what trees refer to, read as `docs/format-sealed.md` has it, and with no code of collections: to count by.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use sapwood_image::sealed::{Child, Hash, Place, Root, height_of, pack_name};
use sapwood_store::catalog::Look;

use super::rig::{BLOCK, Done, Rig};

/// Records begin at multiples of this; their heads have so many bytes; the lengths of a pack's last are rounded up to this.
const ALIGNMENT: u64 = 32;
const HEAD: u64 = 16;
const LAST_UNIT: u64 = 1024;

/// The number of a pack, and where a record begins in it.
type RecordAt = (u32, u64);
/// A block or node as it is stored: a record, and which block of it.
pub(super) type Spot = (RecordAt, usize);

/// A record.
struct Record {
    /// Blocks in it.
    count: u64,
    /// Bytes that count for it: of a pack's last one they are rounded up.
    len: u64,
    payload: Vec<u8>,
}

/// All that is in the packs that the catalog names.
#[derive(Default)]
pub(super) struct Stored {
    records: BTreeMap<RecordAt, Record>,
    /// Where everything is, by hash; nodes apart from blocks.
    spots: BTreeMap<(bool, Hash), BTreeSet<Spot>>,
}

/// What a root refers to, each once: where it is stored, with its hash.
#[derive(Default)]
pub(super) struct Reached {
    pub(super) blocks: BTreeMap<Spot, Hash>,
    pub(super) nodes: BTreeMap<Spot, Hash>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}

fn hash(bytes: &[u8], at: usize) -> Hash {
    Hash(bytes[at..at + Hash::BYTES].try_into().expect("so many bytes"))
}

impl Stored {
    fn add_pack(&mut self, pack: u32, bytes: &[u8]) {
        let is_nodes = bytes[44] == 2;
        let trailer = &bytes[bytes.len() - BLOCK..];
        let entries_at = number::<8>(trailer, 24);
        let pages = bytes[entries_at as usize..].chunks(BLOCK).take(number::<4>(trailer, 32) as usize);
        for page in pages {
            let mut at = 8;
            for _ in 0..number::<2>(page, 4) {
                let record = (pack, number::<4>(page, at) * ALIGNMENT);
                let (first, count) = (usize::from(page[at + 6]), usize::from(page[at + 7]));
                at += 8;
                for index in first..first + count {
                    let spots = self.spots.entry((is_nodes, hash(page, at))).or_default();
                    spots.insert((record, index));
                    at += Hash::BYTES;
                }
            }
        }
        let mut at = BLOCK as u64;
        for left in (0..number::<4>(trailer, 40)).rev() {
            let head = &bytes[at as usize..];
            let payload = head[HEAD as usize..][..number::<4>(head, 4) as usize].to_vec();
            let len = (HEAD + payload.len() as u64).next_multiple_of(ALIGNMENT);
            let counted = if left == 0 { len.next_multiple_of(LAST_UNIT).min(entries_at - at) } else { len };
            self.records.insert((pack, at), Record { count: u64::from(head[2]), len: counted, payload });
            at += len;
        }
    }

    /// Whether anything is stored more than once.
    pub(super) fn has_copies(&self) -> bool {
        self.spots.values().any(|spots| spots.len() > 1)
    }

    /// Where a child is: where its place says, if it is there, else at the first place at which it is.
    fn find(&self, child: &Child, is_node: bool) -> Spot {
        let spots = self.spots.get(&(is_node, child.hash)).expect("what is referred to is stored");
        let said = ((child.place.pack(), child.place.offset()), child.place.index());
        *spots.get(&said).unwrap_or_else(|| spots.first().expect("it is somewhere"))
    }

    /// Everything that a root refers to.
    pub(super) fn reached(&self, root: &Root) -> Reached {
        let mut reached = Reached::default();
        self.walk(&root.tree, height_of(root.size.div_ceil(BLOCK as u64)), &mut reached);
        reached
    }

    fn walk(&self, child: &Child, level: u32, reached: &mut Reached) {
        if child.hash.is_zero() {
            return;
        }
        let spot = self.find(child, level > 0);
        if level == 0 {
            reached.blocks.insert(spot, child.hash);
            return;
        }
        reached.nodes.insert(spot, child.hash);
        let node = &self.records[&spot.0].payload;
        assert_eq!(u32::from(node[0]), level);
        let count = number::<2>(node, 2).count_ones() as usize;
        assert_eq!(node.len(), 4 + count * (Hash::BYTES + 8));
        for n in 0..count {
            let place = Place::from_bits(number::<8>(node, 4 + count * Hash::BYTES + n * 8));
            self.walk(&Child { hash: hash(node, 4 + n * Hash::BYTES), place }, level - 1, reached);
        }
    }

    /// What these may take: of a record that is there as a whole its length, else for each of its blocks its part of that, rounded down
    /// or up.
    pub(super) fn bytes(&self, spots: &BTreeSet<Spot>) -> RangeInclusive<u64> {
        let (mut least, mut most) = (0, 0);
        for same in spots.iter().collect::<Vec<_>>().chunk_by(|a, b| a.0 == b.0) {
            let (Record { count, len, .. }, found) = (&self.records[&same[0].0], same.len() as u64);
            let is_whole = found == *count;
            least += if is_whole { *len } else { found * (len / count) };
            most += if is_whole { *len } else { found * len.div_ceil(*count) };
        }
        least..=most
    }
}

impl Rig {
    /// What is in the packs.
    pub(super) fn stored(&self) -> Done<Stored> {
        let store = self.store();
        let mut stored = Stored::default();
        for (number, _) in store.catalog().view()?.packs()? {
            let path = store.directory().packs().join(pack_name(number));
            stored.add_pack(number, &self.world.contents(&path).expect("the catalog names what is there"));
        }
        Ok(stored)
    }
}
