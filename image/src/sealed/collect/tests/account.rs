//! Accounts against a count from first principles.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::super::*;
use super::store::{Random, TestStore, seal};
use crate::sealed::*;

/// Stored things that a root reaches, with the bytes that are counted for them; blocks and nodes.
type Reached = [HashMap<Place, u64>; 2];

/// Bytes of every entry of every pack, by its records' lengths and counts.
async fn entry_bytes(store: &TestStore) -> HashMap<Place, u64> {
    let mut bytes = HashMap::new();
    let listed = store.listed.borrow().clone();
    for number in listed {
        let pack = store.packs.pack(&store.io, number).await.unwrap();
        let entries = pack.entries_in(&store.io, 0..u32::MAX).await.unwrap();
        let records: Vec<&[Entry]> = entries.chunk_by(|a, b| a.place.offset() == b.place.offset()).collect();
        for (i, record) in records.iter().enumerate() {
            let place = record[0].place;
            let end = match records.get(i + 1) {
                Some(next) => next[0].place.offset(),
                None => pack.records_end().min(place.offset() + place.read_len() as u64),
            };
            let (len, count) = (end - place.offset(), record.len() as u64);
            for (k, entry) in (0..).zip(*record) {
                bytes.insert(entry.place, len * (k + 1) / count - len * k / count);
            }
        }
    }
    bytes
}

/// Everything that a root reaches, without skipping anything.
async fn reached(store: &TestStore, root: &Root, bytes: &HashMap<Place, u64>) -> Reached {
    let mut found = Reached::default();
    let (children, _) = store.read(root).await.unwrap();
    for ((level, _), child) in children {
        if !child.hash.is_zero() {
            found[usize::from(level > 0)].insert(child.place, bytes[&child.place]);
        }
    }
    found
}

fn amount<'a>(places: impl Iterator<Item = (usize, u64)> + 'a) -> Amount {
    places.fold(Amount::default(), |mut amount, (kind, bytes)| {
        if kind == 0 {
            amount.blocks += 1;
            amount.block_bytes += bytes;
        } else {
            amount.nodes += 1;
            amount.node_bytes += bytes;
        }
        amount
    })
}

/// The same as the accounts, by sets of places.
fn counted(all: &[Reached]) -> Accounts {
    let others = |me: usize, kind: usize, place: &Place| {
        all.iter().enumerate().any(|(other, reached)| other != me && reached[kind].contains_key(place))
    };
    let part = |me: usize, is_shared: bool| {
        let kinds =
            (0..2).flat_map(|kind| all[me][kind].iter().map(move |(place, bytes)| (kind, place, *bytes)));
        amount(
            kinds
                .filter(|(kind, place, _)| others(me, *kind, place) == is_shared)
                .map(|(kind, _, bytes)| (kind, bytes)),
        )
    };
    let roots = (0..all.len())
        .map(|me| RootAccount { exclusive: part(me, false), shared: Some(part(me, true)) })
        .collect();
    let mut seen = HashSet::new();
    let places =
        all.iter().flat_map(|reached| (0..2).flat_map(|kind| reached[kind].iter().map(move |p| (kind, p))));
    let total = amount(
        places.filter(|(_, (place, _))| seen.insert(**place)).map(|(kind, (_, bytes))| (kind, *bytes)),
    );
    Accounts { roots, total }
}

/// Disks that share much, hold the same blocks in several places, and are equal to others.
fn disks(store: &Rc<TestStore>, random: &mut Random) {
    let mut made: Vec<(u64, Vec<u64>)> = Vec::new();
    for _ in 0..2 + random.below(5) {
        let (base, mut values) = match random.below(4) {
            0 => (None, vec![0; 1 + random.below(700)]),
            _ if made.is_empty() => (None, vec![0; 300]),
            _ => {
                let (base, values) = &made[random.below(made.len())];
                (Some(*base), values.clone())
            }
        };
        let changes = [0, 1, 5, 200][random.below(4)];
        for _ in 0..changes {
            let (at, value) = (random.below(values.len()), random.below(300) as u64);
            values[at] = value;
        }
        if random.percent(30) && values.len() >= 64 {
            values.copy_within(0..32, 32);
        }
        made.push((seal(store, values.clone(), base, random.0), values));
    }
}

#[test]
fn accounts_are_what_sets_of_places_say() {
    for seed in 0..60 {
        let store = TestStore::new();
        let mut random = Random(seed);
        disks(&store, &mut random);
        let of_task = Rc::clone(&store);
        let (found, wanted) = store.run(async move {
            let store = of_task;
            let roots = store.roots().unwrap();
            let bytes = entry_bytes(&store).await;
            let mut all = Vec::new();
            for root in &roots {
                all.push(reached(&store, root, &bytes).await);
            }
            let mut finder = store.finder();
            let brief = account(&mut finder, &roots, Detail::Exclusive).await.unwrap();
            let found = account(&mut finder, &roots, Detail::Shared).await.unwrap();
            assert_eq!(brief.total, found.total);
            for (brief, found) in brief.roots.iter().zip(&found.roots) {
                assert_eq!((brief.exclusive, brief.shared), (found.exclusive, None));
            }
            (found, counted(&all))
        });
        assert_eq!(found, wanted, "seed {seed}");
    }
}

#[test]
fn what_two_roots_share_is_not_walked_for_each() {
    let store = TestStore::new();
    let values: Vec<u64> = (1..=1024).collect();
    let first = seal(&store, values.clone(), None, 1);
    for _ in 0..20 {
        seal(&store, values.clone(), Some(first), 1);
    }
    let of_task = Rc::clone(&store);
    let (accounts, brief, all) = store.run(async move {
        let (store, mut finder) = (Rc::clone(&of_task), of_task.finder());
        let accounts = account(&mut finder, &store.roots().unwrap(), Detail::Exclusive).await.unwrap();
        let brief = finder.nodes_read();
        account(&mut finder, &store.roots().unwrap(), Detail::Shared).await.unwrap();
        (accounts, brief, finder.nodes_read() - brief)
    });
    let nodes = 64 + 4 + 1;
    assert_eq!((accounts.total.blocks, accounts.total.nodes), (1024, nodes));
    assert_eq!(accounts.total.logical_bytes(), 4 << 20);
    assert!(accounts.total.stored_bytes() < 4 << 20, "some of it was compressed");
    assert!(accounts.roots.iter().all(|root| root.exclusive == Amount::default()), "they are equal");
    assert_eq!(brief, 2 * nodes, "once as new, once as shared, and not once more");
    assert_eq!(all, 3 * nodes, "equal roots are counted once");
}
