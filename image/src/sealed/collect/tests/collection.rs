//! Collections with nothing beside them.

use std::rc::Rc;

use super::super::*;
use super::store::{Random, TestFinder, TestStore, seal};
use crate::error::ErrorKind;
use crate::sealed::*;

#[test]
fn a_subtree_that_is_marked_is_not_walked_again() {
    let store = TestStore::new();
    let mut values: Vec<u64> = (1..=1024).collect();
    let first = seal(&store, values.clone(), None, 1);
    values[700] = 5000;
    seal(&store, values.clone(), Some(first), 1);
    // The same content twice in one disk, too.
    values.copy_within(0..256, 256);
    seal(&store, values, Some(first), 1);
    let of_task = Rc::clone(&store);
    let (read, marks) = store.run(async move {
        let mut finder = of_task.finder();
        let mut read = Vec::new();
        let mut marks = Marks::default();
        for root in of_task.roots().unwrap() {
            marks.add(&mut finder, &root).await.unwrap();
            read.push(finder.nodes_read());
        }
        (read, marks)
    });
    assert_eq!(read, [64 + 4 + 1, 64 + 4 + 1 + 3, 64 + 4 + 1 + 3 + 1]);
    let live: u32 = store.packs().unwrap().iter().map(|pack| marks.live(*pack).entries).sum();
    assert_eq!(live, 1024 + 1 + 64 + 4 + 1 + 3 + 1);
    assert!(marks.bytes() < 1024, "about a bit for each entry");
}

#[test]
fn a_collection_keeps_what_is_live_and_frees_the_rest() {
    let store = TestStore::new();
    let all: Vec<u64> = (1..=800).collect();
    let whole = seal(&store, all.clone(), None, 1);
    // Every frame is live in part, but for those of the second half: they are dead.
    let part: Vec<u64> =
        all.iter().map(|value| if value % 4 == 1 && *value < 400 { *value } else { 0 }).collect();
    let partly = seal(&store, part, Some(whole), 1);
    let other = seal(&store, (2000..2100).collect(), None, 1);
    let before = store.packs().unwrap();
    store.roots.borrow_mut().remove(&whole);
    let of_task = Rc::clone(&store);
    let (moved, dropped) = store.run(async move { of_task.collect().await.unwrap() });
    assert_eq!((moved.blocks, moved.frames_copied), (100, 0));
    assert_eq!(moved.frames_made, 13, "of 8 blocks each");
    assert!(
        dropped.len() == 2 && dropped.iter().all(|pack| before.contains(pack)),
        "data and nodes of the first"
    );
    let of_task = Rc::clone(&store);
    store.run(async move { of_task.check().await.unwrap() });
    let names = std::fs::read_dir(store.path()).unwrap().count();
    assert_eq!(names, store.packs().unwrap().len(), "files of packs that are listed, and no others");
    // What is moved is where the nodes say, without the index.
    let root = store.roots.borrow()[&partly].0;
    assert!(store.packs().unwrap().contains(&root.tree.place.pack()));
    store.roots.borrow_mut().retain(|id, _| *id == other);
    let of_task = Rc::clone(&store);
    let (moved, dropped) = store.run(async move { of_task.collect().await.unwrap() });
    assert_eq!((moved.blocks, moved.nodes), (0, 0), "the rest is dead or whole");
    assert!(!dropped.is_empty());
    store.roots.borrow_mut().clear();
    let of_task = Rc::clone(&store);
    store.run(async move { of_task.collect().await.unwrap() });
    assert_eq!(store.packs().unwrap(), [0; 0]);
    assert_eq!(std::fs::read_dir(store.path()).unwrap().count(), 0);
}

#[test]
fn frames_that_are_wholly_live_are_copied_as_they_are() {
    let store = TestStore::new();
    let all: Vec<u64> = (1..=320).collect();
    let whole = seal(&store, all.clone(), None, 1);
    // Three in ten frames of eight blocks are live, all of each.
    let part: Vec<u64> = all.iter().map(|value| if (value - 1) / 8 % 10 < 3 { *value } else { 0 }).collect();
    seal(&store, part, Some(whole), 1);
    store.roots.borrow_mut().remove(&whole);
    let of_task = Rc::clone(&store);
    let (moved, _) = store.run(async move { of_task.collect().await.unwrap() });
    assert_eq!((moved.blocks, moved.frames_copied, moved.frames_made), (96, 12, 0));
    let of_task = Rc::clone(&store);
    store.run(async move { of_task.check().await.unwrap() });
}

#[test]
fn nodes_that_are_moved_say_where_their_children_are() {
    let store = TestStore::new();
    let all: Vec<u64> = (1..=1600).collect();
    let whole = seal(&store, all.clone(), None, 1);
    let part: Vec<u64> = all.iter().map(|value| if *value <= 320 { *value } else { 0 }).collect();
    let kept = seal(&store, part, Some(whole), 1);
    store.roots.borrow_mut().remove(&whole);
    let of_task = Rc::clone(&store);
    store.run(async move { of_task.collect().await.unwrap() });
    let of_task = Rc::clone(&store);
    let stale = store.run(async move {
        let root = of_task.roots.borrow()[&kept].0;
        let (children, _) = of_task.read(&root).await.unwrap();
        let listed = of_task.listed.borrow();
        let stale = children.into_iter();
        let stale = stale.filter(|(_, child)| !child.hash.is_zero() && !listed.contains(&child.place.pack()));
        let mut levels: Vec<u32> = stale.map(|((level, _), _)| level).collect();
        levels.sort_unstable();
        levels
    });
    // The two nodes of the second disk that were its own stayed where they were, and have children that were moved. Of
    // the twenty nodes of level 1 that were moved, none has a stale place.
    assert_eq!(stale, [1, 1, 1, 1, 2]);
}

#[test]
fn a_collection_never_goes_on_past_a_node_that_it_cannot_read() {
    let store = TestStore::new();
    let first = seal(&store, (1..=600).collect(), None, 1);
    seal(&store, (1000..1600).collect(), None, 1);
    let packs = store.packs().unwrap();
    store.roots.borrow_mut().remove(&first);
    let nodes = store.path().join(pack_name(packs[3]));
    let mut bytes = std::fs::read(&nodes).unwrap();
    bytes[4096 + 60] ^= 1;
    std::fs::write(&nodes, bytes).unwrap();
    let of_task = Rc::clone(&store);
    let error = store.run(async move { of_task.collect().await.map(|_| ()) }).unwrap_err();
    assert_eq!(error.path, nodes);
    assert!(error.to_string().contains("(node "), "{error}");
    assert_eq!(store.packs().unwrap(), packs, "nothing was dropped");
    let pin = store.pins.pin(&[]);
    assert!(packs.iter().all(|pack| pin.hold(*pack)), "nothing is withdrawn");
}

/// Flips a bit in the first record of a pack.
fn damage(store: &TestStore, pack: u32) {
    let path = store.path().join(pack_name(pack));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 60] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

/// A collection: packs that were kept, and those that were dropped.
async fn collect_with(store: &TestStore, finder: &mut TestFinder) -> (Vec<(u32, String)>, Vec<u32>) {
    let survey = begin(finder, &store.pins, store, Limits::default()).await.unwrap();
    let marked = survey.withdraw().mark(finder, store).await.unwrap();
    let shifted = marked.shift(finder, &mut store.target()).await.unwrap();
    let kept = shifted.kept.iter().map(|(pack, error)| (*pack, error.to_string())).collect();
    let dropped = shifted.dropped.iter().map(|pack| pack.number).collect();
    store.finish(shifted).await;
    (kept, dropped)
}

#[test]
fn a_pack_with_damage_in_what_is_live_stays() {
    let store = TestStore::new();
    let all: Vec<u64> = (1..=400).collect();
    let whole = seal(&store, all.clone(), None, 1);
    let part = all.iter().map(|value| if *value <= 40 { *value } else { 0 }).collect();
    seal(&store, part, Some(whole), 1);
    store.roots.borrow_mut().remove(&whole);
    let packs = store.packs().unwrap();
    damage(&store, packs[0]);
    let of_task = Rc::clone(&store);
    store.run(async move {
        let mut finder = of_task.finder();
        let (kept, dropped) = collect_with(&of_task, &mut finder).await;
        assert_eq!((kept.len(), dropped), (1, vec![]), "what is dead could be needed");
        assert!(kept[0].0 == packs[0] && kept[0].1.contains("offset 0x1000"), "{kept:?}");
        assert_eq!(of_task.packs().unwrap(), packs);
        assert_eq!(std::fs::read_dir(of_task.path()).unwrap().count(), packs.len(), "nothing else is there");
        let pin = of_task.pins.pin(&[]);
        assert!(packs.iter().all(|pack| pin.hold(*pack)), "nothing is withdrawn");
        drop(pin);
        // Now it is known, and that there is no other copy.
        let (kept, dropped) = collect_with(&of_task, &mut finder).await;
        assert_eq!((kept, dropped), (vec![], vec![packs[1]]));
    });
}

/// Two copies of a disk, of which one is dead and whole. Of the other one a part is live, and damaged.
fn damaged_with_a_dead_copy() -> Rc<TestStore> {
    let store = TestStore::new();
    let all: Vec<u64> = (1..=400).collect();
    let dead = seal(&store, all.clone(), None, 1);
    let index = store.index.0.take();
    let whole = seal(&store, all.clone(), None, 1);
    for (hash, places) in index {
        store.index.0.borrow_mut().entry(hash).or_default().extend(places);
    }
    let part = all.iter().map(|value| if *value <= 40 { *value } else { 0 }).collect();
    seal(&store, part, Some(whole), 1);
    store.roots.borrow_mut().remove(&dead);
    store.roots.borrow_mut().remove(&whole);
    damage(&store, store.packs().unwrap()[2]);
    store
}

#[test]
fn a_good_copy_is_not_dropped_while_the_other_one_is_damaged() {
    let store = damaged_with_a_dead_copy();
    let of_task = Rc::clone(&store);
    store.run(async move {
        let packs = of_task.packs().unwrap();
        let mut finder = of_task.finder();
        let (kept, dropped) = collect_with(&of_task, &mut finder).await;
        assert_eq!((kept.len(), kept[0].0, dropped), (1, packs[2], vec![]));
        of_task.check().await.unwrap();
        let (kept, dropped) = collect_with(&of_task, &mut finder).await;
        assert_eq!((kept, dropped), (vec![], vec![packs[1], packs[0], packs[3]]), "its blocks were moved");
        of_task.check().await.unwrap();
    });
}

#[test]
fn a_collection_goes_by_what_a_scrub_has_found() {
    let store = damaged_with_a_dead_copy();
    let of_task = Rc::clone(&store);
    store.run(async move {
        let packs = of_task.packs().unwrap();
        let mut scrub = Scrub::new(of_task.finder());
        for pack in &packs {
            scrub.pack(*pack).await.unwrap();
        }
        let roots = scrub.roots(&of_task.roots().unwrap()).await.unwrap();
        assert_eq!(roots, [None], "there is another copy");
        let mut finder = of_task.finder().with_bad(scrub.into_bad());
        let (kept, dropped) = collect_with(&of_task, &mut finder).await;
        assert_eq!((kept, dropped), (vec![], vec![packs[1], packs[0], packs[3]]));
        of_task.check().await.unwrap();
    });
}

#[test]
fn what_is_moved_has_the_hash_that_its_pack_lists() {
    let store = TestStore::new();
    let of_task = Rc::clone(&store);
    store.run(async move {
        let store = of_task;
        let mut writer = store.writer(PackKind::Data);
        let mut coder = Coder::new(1).unwrap();
        // Two frames: of the first nothing is live, of the second a block that is not what is listed.
        let dead: Vec<Vec<u8>> = (1..=8).map(|i| super::store::block(i * 4)).collect();
        let hashes: Vec<Hash> = dead.iter().map(|block| Hash::of_block(block)).collect();
        writer.push(NewRecord::frame(&mut coder, &dead.concat()), &hashes);
        let other = Hash([9; 32]);
        let place = writer.push(NewRecord::frame(&mut coder, &super::store::block(5)), &[other]);
        let data = writer.number();
        store.publish(writer.finish().await.unwrap().number).await;
        let mut node = Node::zero(1);
        node.children[0] = Child { hash: other, place };
        let mut writer = store.writer(PackKind::Nodes);
        let tree = Child { hash: node.hash(), place: writer.push(NewRecord::node(&node), &[node.hash()]) };
        store.publish(writer.finish().await.unwrap().number).await;
        store.commit(Root { size: 4096, tree }, vec![5]);
        let (moved, dropped) = store.collect().await.unwrap();
        assert_eq!((moved, dropped), (Moved::default(), vec![]));
        assert!(store.listed.borrow().contains(&data));
    });
}

#[test]
fn a_collection_that_is_stopped_keeps_what_it_has_done() {
    let store = TestStore::new();
    let mut random = Random(3);
    let mut kept = Vec::new();
    for disk in 0..4 {
        let all: Vec<u64> = (disk * 1000 + 1..disk * 1000 + 200).collect();
        let whole = seal(&store, all.clone(), None, random.0);
        let few = all.iter().map(|value| if random.percent(10) { *value } else { 0 }).collect();
        kept.push(seal(&store, few, Some(whole), 1));
        store.roots.borrow_mut().remove(&whole);
    }
    let of_task = Rc::clone(&store);
    let (dropped, stopped) = store.run(async move {
        let (store, mut finder) = (Rc::clone(&of_task), of_task.finder());
        let survey = begin(&mut finder, &store.pins, &*store, Limits::default()).await.unwrap();
        let marked = survey.withdraw().mark(&mut finder, &*store).await.unwrap();
        assert!(marked.sparse().len() >= 4);
        let mut target = store.target();
        let (mut next, pace) = (target.next_number, std::sync::Arc::clone(&store.pace));
        // Stopped within the first pack that is moved.
        target.next_number = Box::new(move || {
            pace.stop();
            next()
        });
        let shifted = marked.shift(&mut finder, &mut target).await.unwrap();
        let dead = shifted.dropped.len();
        store.finish(shifted).await;
        let error = begin(&mut finder, &store.pins, &*store, Limits::default()).await.map(|_| ());
        (dead, error.unwrap_err().kind)
    });
    assert!(matches!(stopped, ErrorKind::Cancelled), "{stopped}");
    assert_eq!(dropped, 1 + 4, "the one that was begun, and nodes of the first disks that were dead");
    let of_task = Rc::clone(&store);
    store.run(async move { of_task.check().await.unwrap() });
}

#[test]
fn what_is_moved_at_once_is_bounded() {
    let store = TestStore::new();
    for disk in 0..4u64 {
        let all: Vec<u64> = (disk * 1000 + 1..disk * 1000 + 200).collect();
        let whole = seal(&store, all.clone(), None, 1);
        let few = all.iter().map(|value| if value % 10 == 0 { *value } else { 0 }).collect();
        seal(&store, few, Some(whole), 1);
        store.roots.borrow_mut().remove(&whole);
    }
    let of_task = Rc::clone(&store);
    let chosen = store.run(async move {
        let mut finder = of_task.finder();
        let mut chosen = Vec::new();
        for moved_max in [0, 25, 45] {
            let limits = Limits { moved_max, ..Limits::default() };
            let survey = begin(&mut finder, &of_task.pins, &*of_task, limits).await.unwrap();
            let live: u32 = survey.candidates().iter().map(|pack| survey.live(*pack).entries).sum();
            chosen.push((survey.candidates().len(), live));
        }
        chosen
    });
    let dead = chosen[0].0;
    assert_eq!(chosen[0].1, 0);
    assert_eq!(chosen[1..].iter().map(|chosen| chosen.0 - dead).collect::<Vec<_>>(), [1, 2]);
    assert!(chosen[1].1 <= 25 && chosen[2].1 <= 45);
}
