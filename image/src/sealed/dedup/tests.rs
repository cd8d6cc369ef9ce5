//! The index as a whole, on made packs.

use super::*;
use crate::sealed::hash::Hash;
use crate::sealed::place::Place;

const BUDGET: usize = 64 << 10;
/// Blocks of a pack, each in a record of its own.
const PACK_BLOCKS: usize = 3 * CONTAINER_ENTRIES_MAX;

fn hash(i: usize) -> Hash {
    Hash(blake3::hash(&i.to_le_bytes()).into())
}

/// The blocks of pack `number`: those from `first` on.
fn pack(number: u32, first: usize) -> Vec<Entry> {
    let entry =
        |i: usize| Entry { hash: hash(first + i), place: Place::new(number, 4096 + 32 * i as u64, 32, 0) };
    (0..PACK_BLOCKS).map(entry).collect()
}

fn page(i: usize) -> u32 {
    (i / PAGE_ENTRIES_MAX) as u32
}

fn old(index: &mut DedupIndex, pack: &[Entry]) {
    pack.iter().enumerate().for_each(|(i, entry)| index.insert_old(entry, page(i)));
}

/// Reads what is wanted until nothing is, and counts that.
fn look_up(index: &mut DedupIndex, lookup: &mut Lookup, packs: &[Vec<Entry>]) -> usize {
    let mut reads = 0;
    loop {
        let wanted = index.wanted(lookup);
        if wanted.is_empty() {
            return reads;
        }
        for container in wanted {
            let pack = &packs[container.pack as usize - 1];
            let first = (container.pages().start as usize * PAGE_ENTRIES_MAX).min(pack.len());
            let end = (first + CONTAINER_ENTRIES_MAX).min(pack.len());
            index.take(lookup, container, &pack[first..end]);
            reads += 1;
        }
    }
}

#[test]
fn the_hooks_of_a_segment_bring_its_other_blocks() {
    let packs = [pack(1, 0), pack(2, PACK_BLOCKS)];
    let mut index = DedupIndex::new(BUDGET);
    packs.iter().for_each(|pack| old(&mut index, pack));
    let mut lookup = Lookup::default();
    let segment: Vec<Hash> = packs[1].iter().take(SEGMENT_BLOCKS).map(|entry| entry.hash).collect();
    lookup.begin(&segment);
    assert!(segment.iter().all(|hash| lookup.find(hash).is_none()), "nothing was read yet");
    let reads = look_up(&mut index, &mut lookup, &packs);
    assert!((2..=3).contains(&reads), "{reads}");
    for entry in &packs[1][..SEGMENT_BLOCKS] {
        assert_eq!(lookup.find(&entry.hash), Some(entry.place));
    }
    assert!(lookup.find(&packs[0][0].hash).is_none(), "it is not in the segment");
    // The last blocks of it were near the end of a container, or its hooks name the next one.
    let rest: Vec<Hash> = packs[1][SEGMENT_BLOCKS..].iter().map(|entry| entry.hash).collect();
    lookup.begin(&rest);
    look_up(&mut index, &mut lookup, &packs);
    assert!(packs[1][SEGMENT_BLOCKS..].iter().all(|entry| lookup.find(&entry.hash) == Some(entry.place)));
}

#[test]
fn a_container_goes_on_in_the_next_one() {
    let packs = [pack(1, 0)];
    let mut index = DedupIndex::new(BUDGET);
    let mut lookup = Lookup::default();
    let first = Container::of_page(1, 0);
    let edge = CONTAINER_ENTRIES_MAX - 1;
    lookup.begin(&[packs[0][edge].hash, packs[0][edge + 1].hash]);
    assert!(index.wanted(&mut lookup).is_empty(), "no hook is known");
    index.take(&mut lookup, first, &packs[0][..CONTAINER_ENTRIES_MAX]);
    assert_eq!(index.wanted(&mut lookup), [Container { pack: 1, number: 1 }]);
    assert!(index.wanted(&mut lookup).is_empty(), "it was given out");
}

#[test]
fn what_was_read_or_stored_last_is_known_without_hooks() {
    let packs = [pack(1, 0), pack(2, PACK_BLOCKS)];
    let mut index = DedupIndex::new(BUDGET);
    packs[0][..CONTAINER_ENTRIES_MAX].iter().for_each(|entry| index.insert(entry, 0));
    let mut lookup = Lookup::default();
    for entry in &packs[0][..CONTAINER_ENTRIES_MAX] {
        lookup.begin(&[entry.hash]);
        assert_eq!(index.wanted(&mut lookup), [Container { pack: 1, number: 0 }]);
    }
    let mut lookup = Lookup::default();
    lookup.begin(&[packs[1][7].hash]);
    index.take(&mut lookup, Container::of_page(2, 0), &packs[1][..CONTAINER_ENTRIES_MAX]);
    lookup.begin(&[packs[1][8].hash, packs[1][PACK_BLOCKS - 1].hash]);
    assert_eq!(index.wanted(&mut lookup), [Container { pack: 2, number: 0 }]);
}

#[test]
fn what_is_named_wrongly_is_not_found() {
    let packs = [pack(1, 0), pack(2, PACK_BLOCKS)];
    let mut index = DedupIndex::new(BUDGET);
    old(&mut index, &packs[0]);
    let mut lookup = Lookup::default();
    let segment: Vec<Hash> = packs[0].iter().map(|entry| entry.hash).collect();
    lookup.begin(&segment);
    for container in index.wanted(&mut lookup) {
        index.take(&mut lookup, container, &packs[1][..CONTAINER_ENTRIES_MAX]);
    }
    assert!(segment.iter().all(|hash| lookup.find(hash).is_none()));
}

#[test]
fn no_segment_makes_more_reads_than_the_limit() {
    let mut index = DedupIndex::new(1 << 20);
    let hashes: Vec<Hash> = (0..100_000).map(hash).collect();
    for (i, hash) in hashes.iter().enumerate() {
        let number = 1 + i as u32 / 1000;
        let entry = Entry { hash: *hash, place: Place::new(number, 4096, 32, 0) };
        index.insert_old(&entry, i as u32 % 1000 * CONTAINER_PAGES);
    }
    let mut lookup = Lookup::default();
    lookup.begin(&hashes);
    assert_eq!(index.wanted(&mut lookup).len(), WANTED_MAX);
    assert!(index.wanted(&mut lookup).is_empty());
    lookup.begin(&hashes);
    assert_eq!(index.wanted(&mut lookup).len(), WANTED_MAX, "the next segment");
}

#[test]
fn withdrawn_packs_are_not_wanted() {
    let packs = [pack(1, 0), pack(2, PACK_BLOCKS)];
    let mut index = DedupIndex::new(BUDGET);
    for pack in &packs {
        pack.iter().enumerate().for_each(|(i, entry)| index.insert(entry, page(i)));
    }
    index.withdraw(&BTreeSet::from([1]));
    let mut lookup = Lookup::default();
    let all: Vec<Hash> = packs.iter().flatten().map(|entry| entry.hash).collect();
    lookup.begin(&all);
    let wanted = index.wanted(&mut lookup);
    assert!(!wanted.is_empty() && wanted.iter().all(|container| container.pack == 2), "{wanted:?}");
    index.withdraw(&BTreeSet::from([2]));
    lookup.begin(&all);
    assert!(index.wanted(&mut lookup).is_empty());
    // A pack that gets the place of a withdrawn one is not taken for it.
    old(&mut index, &pack(3, 2 * PACK_BLOCKS));
    lookup.begin(&all);
    assert!(index.wanted(&mut lookup).is_empty());
}

#[test]
fn any_budget_is_kept() {
    let packs = [pack(1, 0), pack(2, PACK_BLOCKS)];
    for budget in (0..200).chain([1000, 4000, 5000, 12_345, 100_000]) {
        let mut index = DedupIndex::new(budget);
        for pack in &packs {
            pack.iter().enumerate().for_each(|(i, entry)| index.insert(entry, page(i)));
        }
        let mut lookup = Lookup::default();
        lookup.begin(&packs[0].iter().map(|entry| entry.hash).collect::<Vec<_>>());
        look_up(&mut index, &mut lookup, &packs);
        assert!(index.bytes() <= budget);
        index.set_budget(budget * 2);
        index.set_budget(budget / 2);
        assert!(index.bytes() <= budget / 2);
    }
    assert_eq!(DedupIndex::budget_for(1 << 40, 0), 64 << 20);
    assert_eq!(DedupIndex::budget_for(0, 7), 7);
}
