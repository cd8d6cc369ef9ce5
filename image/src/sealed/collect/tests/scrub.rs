//! Scrubbing: every damage is found, and what it means is said.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;

use super::super::*;
use super::store::{Random, TestStore, seal};
use crate::sealed::header::PackHeader;
use crate::sealed::trailer::Trailer;
use crate::sealed::*;
use sapwood_blockdev::units::BLOCK_BYTES;

/// What a scrub of everything finds.
async fn scrub(store: &TestStore) -> (Findings, Vec<Option<Lost>>, u64) {
    let mut scrub = Scrub::new(store.fresh_finder());
    for number in store.packs().unwrap() {
        scrub.pack(number).await.unwrap();
    }
    let lost = scrub.roots(&store.roots().unwrap()).await.unwrap();
    (scrub.findings().clone(), lost, scrub.finder.nodes_read())
}

fn scrubbed(store: &Rc<TestStore>) -> (Findings, Vec<Option<Lost>>, u64) {
    let of_task = Rc::clone(store);
    store.run(async move { scrub(&of_task).await })
}

/// Ranges of blocks of each root that cannot be read, by reading all of them.
fn unreadable(store: &Rc<TestStore>) -> Vec<Vec<Range<u64>>> {
    let of_task = Rc::clone(store);
    store.run(async move {
        let mut all = Vec::new();
        for root in of_task.roots().unwrap() {
            let (_, disk) = of_task.read_what_is_there(&root).await;
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for at in (0..).zip(&disk).filter(|(_, block)| block.is_none()).map(|(at, _)| at) {
                match ranges.last_mut() {
                    Some(last) if last.end == at => last.end = at + 1,
                    _ => ranges.push(at..at + 1),
                }
            }
            all.push(ranges);
        }
        all
    })
}

fn ranges(lost: Vec<Option<Lost>>) -> Vec<Vec<Range<u64>>> {
    let ranges = |lost: Lost| {
        assert!(lost.is_exact && !lost.why.is_empty());
        assert_eq!(lost.blocks, lost.ranges.iter().map(|range| range.end - range.start).sum::<u64>());
        lost.ranges
    };
    lost.into_iter().map(|lost| lost.map(ranges).unwrap_or_default()).collect()
}

fn one(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

fn path(store: &TestStore, pack: u32) -> PathBuf {
    store.path().join(pack_name(pack))
}

/// Two disks that share much, in four packs of few records.
fn small() -> Rc<TestStore> {
    let store = TestStore::new();
    let mut values: Vec<u64> = (0..40).map(|i| if i % 4 == 0 { 0 } else { i * 4 + 1 }).collect();
    values[39] = 8;
    let first = seal(&store, values.clone(), None, 1);
    values[20] = 1001;
    seal(&store, values, Some(first), 1);
    store
}

#[test]
fn a_flipped_bit_in_any_byte_is_found() {
    let store = small();
    let (findings, lost, nodes) = scrubbed(&store);
    assert_eq!((findings.damage, lost, findings.packs), (vec![], vec![None, None], 4));
    assert_eq!(
        (findings.blocks, findings.nodes, nodes),
        (31, 4 + 2, 4 + 2),
        "each is read once by each pass"
    );
    let lens = store.packs().unwrap().into_iter().map(|pack| fs::metadata(path(&store, pack)).unwrap().len());
    assert_eq!(findings.bytes, lens.sum::<u64>());
    let (mut flips, mut with_loss) = (0, 0);
    for pack in store.packs().unwrap() {
        let file = fs::OpenOptions::new().read(true).write(true).open(path(&store, pack)).unwrap();
        let whole = fs::read(path(&store, pack)).unwrap();
        for (at, byte) in (0..).zip(&whole) {
            file.write_all_at(&[byte ^ (1 << (at % 8))], at).unwrap();
            let of_task = Rc::clone(&store);
            let findings = store.run(async move {
                let mut scrub = Scrub::new(of_task.fresh_finder());
                scrub.pack(pack).await.unwrap();
                scrub.findings().clone()
            });
            assert!(findings.damage_count > 0, "byte {at} of pack {pack}");
            assert!(
                findings.damage.iter().all(|damage| damage.pack == pack && damage.path == path(&store, pack))
            );
            flips += 1;
            if at % 61 == 0 {
                let (_, lost, _) = scrubbed(&store);
                with_loss += usize::from(lost.iter().any(Option::is_some));
                assert_eq!(ranges(lost), unreadable(&store), "byte {at} of pack {pack}");
            }
            file.write_all_at(&[*byte], at).unwrap();
        }
    }
    assert!(flips > 4 * 4 * BLOCK_BYTES && with_loss > 200, "{flips} flips, {with_loss} looked at with loss");
    assert_eq!(scrubbed(&store).0.damage_count, 0);
}

#[test]
fn every_root_that_damage_touches_is_named_with_its_blocks() {
    let store = TestStore::new();
    let values: Vec<u64> = (0..800).map(|i| i * 4 + 1).collect();
    let first = seal(&store, values.clone(), None, 1);
    let mut second = values.clone();
    second[3] = 9001;
    second.copy_within(16..24, 700);
    seal(&store, second, Some(first), 1);
    seal(&store, (0..50).map(|i| i * 4 + 20_001).collect(), None, 1);
    let packs = store.packs().unwrap();
    let data = path(&store, packs[0]);
    let of_task = Rc::clone(&store);
    let place = store.run(async move {
        let pack = of_task.packs.pack(&of_task.io, packs[0]).await.unwrap();
        let entries = pack.entries_in(&of_task.io, 0..u32::MAX).await.unwrap();
        entries
            .iter()
            .find(|entry| entry.hash == Hash::of_block(&super::store::block(17 * 4 + 1)))
            .unwrap()
            .place
    });
    let mut bytes = fs::read(&data).unwrap();
    bytes[place.offset() as usize + 20] ^= 4;
    fs::write(&data, bytes).unwrap();
    let (findings, lost, _) = scrubbed(&store);
    assert_eq!(findings.damage_count, 1);
    assert_eq!(findings.damage[0].offset, Some(place.offset()));
    let text = findings.damage[0].to_string();
    assert!(text.contains("checksum") && text.contains(&data.display().to_string()), "{text}");
    let lost = ranges(lost);
    // A frame of eight blocks, which the second disk holds twice.
    assert_eq!(lost, [one(16..24), vec![16..24, 700..708], vec![]]);
    assert_eq!(lost, unreadable(&store));
}

#[test]
fn random_damage_means_what_reading_says() {
    let mut with_loss = 0;
    for seed in 0..40 {
        let store = TestStore::new();
        let mut random = Random(seed);
        let mut base = None;
        let mut values: Vec<u64> = vec![0; 300];
        for _ in 0..4 {
            for _ in 0..60 {
                values[random.below(300)] = random.below(200) as u64;
            }
            base = Some(seal(&store, values.clone(), base, random.0));
        }
        for _ in 0..1 + random.below(4) {
            let packs = store.packs().unwrap();
            let path = path(&store, packs[random.below(packs.len())]);
            let Ok(mut bytes) = fs::read(&path) else { continue };
            match random.below(10) {
                0 => fs::remove_file(&path).unwrap(),
                1 => fs::write(&path, &bytes[..bytes.len() - 1 - random.below(bytes.len())]).unwrap(),
                _ => {
                    let at = random.below(bytes.len());
                    bytes[at] ^= 1 << random.below(8);
                    fs::write(&path, bytes).unwrap();
                }
            }
        }
        let (findings, lost, _) = scrubbed(&store);
        assert!(findings.damage_count > 0, "seed {seed}");
        with_loss += usize::from(lost.iter().any(Option::is_some));
        assert_eq!(ranges(lost), unreadable(&store), "seed {seed}");
    }
    assert!(with_loss > 10, "{with_loss}");
}

/// Writes a pack again after `change` was made to its parts.
fn rewritten(store: &TestStore, pack: u32, change: impl Fn(&mut Vec<u8>, &mut Trailer)) {
    let bytes = fs::read(path(store, pack)).unwrap();
    let header = PackHeader::decode(&bytes[..BLOCK_BYTES]).unwrap();
    let end = bytes.len() - BLOCK_BYTES;
    let mut trailer = Trailer::decode(&bytes[end..], &header.id, bytes.len() as u64).unwrap();
    let mut bytes = bytes[..end].to_vec();
    change(&mut bytes, &mut trailer);
    bytes.extend(trailer.encode());
    fs::write(path(store, pack), bytes).unwrap();
}

#[test]
fn what_has_right_checksums_and_is_wrong_is_found() {
    let found = |change: &dyn Fn(&mut Vec<u8>, &mut Trailer)| {
        let store = small();
        let pack = store.packs().unwrap()[0];
        rewritten(&store, pack, change);
        let (findings, ..) = scrubbed(&store);
        findings.damage.into_iter().map(|damage| damage.what).collect::<Vec<_>>().join("; ")
    };
    let between = found(&|bytes, trailer| {
        let at = trailer.entries_at as usize;
        bytes.splice(at..at, [0; BLOCK_BYTES]);
        trailer.entries_at += BLOCK_BYTES as u64;
    });
    assert!(between.contains("lie between the last record and the pages"), "{between}");
    let fewer = found(&|_, trailer| trailer.records -= 1);
    assert!(fewer.contains("a record is listed there, and there is none"), "{fewer}");
    let more = found(&|_, trailer| trailer.records += 1);
    assert!(more.contains("record"), "{more}");
    let entries = found(&|_, trailer| trailer.entries += 1);
    assert!(entries.contains("its pages list 30 entries, and its trailer says 31"), "{entries}");
    let unlisted = found(&|bytes, trailer| {
        let pages = trailer.entries_at as usize..bytes.len();
        bytes.drain(pages);
        (trailer.pages, trailer.entries) = (0, 0);
    });
    assert!(unlisted.contains("does not hold what the pack's pages list"), "{unlisted}");
    assert_eq!(found(&|_, _| ()), "");
}

#[test]
fn a_block_that_is_not_what_its_pack_lists_is_found() {
    let store = TestStore::new();
    let of_task = Rc::clone(&store);
    store.run(async move {
        let (store, other) = (of_task, Hash([7; 32]));
        let block = super::store::block(4);
        let mut writer = store.writer(PackKind::Data);
        let record = NewRecord::frame(&mut Coder::new(1).unwrap(), &block);
        let place = writer.push(record, &[other]);
        store.publish(writer.finish().await.unwrap().number).await;
        let mut node = Node::zero(1);
        node.children[2] = Child { hash: other, place };
        let mut writer = store.writer(PackKind::Nodes);
        let tree = Child { hash: node.hash(), place: writer.push(NewRecord::node(&node), &[node.hash()]) };
        store.publish(writer.finish().await.unwrap().number).await;
        store.commit(Root { size: 16 * 4096, tree }, vec![0; 16]);
        let (findings, lost, _) = scrub(&store).await;
        assert_eq!(findings.damage_count, 1, "every checksum is right");
        assert!(findings.damage[0].what.contains("does not hold what the pack's pages list"));
        assert_eq!(ranges(lost), [one(2..3)]);
    });
}
