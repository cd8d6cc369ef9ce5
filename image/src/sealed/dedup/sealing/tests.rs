//! Seals that share an index, on a real file system.

use super::*;
use crate::sealed::collect::Pins;
use crate::sealed::trial::{Draw, Model, Trial};
use crate::sealed::*;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::block_on;
use sapwood_blockdev::units::BLOCK_SIZE;

const BUDGET: usize = 1 << 20;

/// A disk of these blocks.
fn model(blocks: impl IntoIterator<Item = u64>) -> Model {
    let blocks: Vec<u64> = blocks.into_iter().collect();
    Model { size: blocks.len() as u64 * BLOCK_SIZE, blocks }
}

struct Store {
    trial: Trial,
    shared: Arc<SharedDedup>,
    pins: Arc<Pins>,
    /// The number of the last pack.
    last: u32,
}

impl Store {
    fn new() -> Self {
        Self { trial: Trial::new(), shared: SharedDedup::new(BUDGET), pins: Arc::default(), last: 0 }
    }

    /// Seals a disk; nothing is published.
    fn seal(&mut self, model: &Model) -> (Sealed, BoundedDedup) {
        let pin = Arc::new(self.pins.pin(&[]));
        // More than it will make.
        (self.last + 1..self.last + 100).for_each(|pack| pin.begin_pack(pack));
        let dedup = BoundedDedup::new(&self.shared, &pin);
        let (sealed, dedup) = self.trial.seal_with(dedup, model.whole(&mut Draw(1)), None, 0, |_| Step::Go);
        let sealed = sealed.unwrap();
        self.last += sealed.packs.len() as u32;
        assert_eq!(sealed.root.hash(), model.root_hash());
        self.trial.check(&sealed.root, model);
        (sealed, dedup)
    }

    fn publish(&self, sealed: &Sealed, dedup: &mut BoundedDedup) {
        self.pins.published(sealed.packs.iter().map(|pack| pack.number));
        dedup.publish();
    }

    fn remove(&self, sealed: &Sealed) {
        sealed.packs.iter().for_each(|pack| std::fs::remove_file(&pack.path).unwrap());
        let numbers: Vec<u32> = sealed.packs.iter().map(|pack| pack.number).collect();
        self.trial.packs.withdraw(&numbers);
    }
}

#[test]
fn seals_side_by_side_do_not_refer_to_what_is_not_published() {
    let mut store = Store::new();
    let disk = model(1..=5000);
    let (first, dedup) = store.seal(&disk);
    let (second, mut of_second) = store.seal(&disk);
    assert_eq!((first.stats.unique, second.stats.unique), (5000, 5000), "neither knows of the other");
    // The first one fails after all.
    drop(dedup);
    store.remove(&first);
    store.trial.check(&second.root, &disk);
    let (third, _) = store.seal(&disk);
    assert_eq!(third.stats.unique, 5000, "nothing is published yet");
    store.publish(&second, &mut of_second);
    let (fourth, of_fourth) = store.seal(&disk);
    assert!(fourth.stats.unique < 250, "{:?}", fourth.stats);
    assert!(of_fourth.containers_read() > 0);
    assert_eq!(fourth.stats.unique + fourth.stats.duplicate, 5000);
}

#[test]
fn what_a_seal_has_stored_itself_it_finds_again() {
    let parts = (0..12).map(|part| part * 1000 + 1..=(part + 1) * 1000);
    let again = parts.clone().rev();
    let disk = model(parts.chain(again).flatten());
    for (pack_bytes, packs) in [(PACK_BYTES, 2..3), (40_000, 8..99)] {
        let mut store = Store::new();
        store.trial.pack_bytes = pack_bytes;
        let (sealed, dedup) = store.seal(&disk);
        assert!(sealed.stats.unique < 12_100, "{:?}", sealed.stats);
        assert!(packs.contains(&sealed.packs.len()), "{}", sealed.packs.len());
        assert_eq!(dedup.containers_read() > 0, packs.end > 3, "what is not finished is in memory");
        assert!(dedup.bytes() < OWN_BUDGET + OPEN_PAGES_MAX * 127 * 64);
    }
}

#[test]
fn a_subtree_that_a_disk_repeats_is_stored_once() {
    let mut store = Store::new();
    let disk = model((0..40).flat_map(|_| 1..=4096));
    let (sealed, _) = store.seal(&disk);
    assert!(sealed.stats.unique < 4200, "{:?}", sealed.stats);
    // Some blocks have two places.
    assert!(sealed.stats.nodes < 256 + 16 + 1 + 40, "{:?}", sealed.stats);
}

#[test]
fn packs_that_are_withdrawn_or_gone_are_not_referred_to() {
    let mut store = Store::new();
    let disk = model(1..=3000);
    let (first, mut dedup) = store.seal(&disk);
    store.publish(&first, &mut dedup);
    drop(dedup);
    let numbers: Vec<u32> = first.packs.iter().map(|pack| pack.number).collect();
    let mut collecting = store.pins.collect().unwrap();
    assert!(collecting.withdraw(&numbers).is_empty());
    let (second, mut dedup) = store.seal(&disk);
    assert_eq!(second.stats.unique, 3000, "they are withdrawn");
    collecting.finish([]);
    store.remove(&first);
    // The index knows them still.
    let (third, _) = store.seal(&disk);
    assert_eq!(third.stats.unique, 3000, "they are gone");
    store.publish(&second, &mut dedup);
    store.shared.withdraw(&numbers.into_iter().collect());
    assert!(store.seal(&disk).0.stats.unique < 250);
}

#[test]
fn a_store_that_is_opened_learns_what_its_packs_hold() {
    let mut store = Store::new();
    let disk = model(1..=9000);
    let (first, mut dedup) = store.seal(&disk);
    store.publish(&first, &mut dedup);
    store.shared = SharedDedup::new(BUDGET);
    assert_eq!(store.seal(&disk).0.stats.unique, 9000, "nothing is known");
    let (io, packs, shared) =
        (store.trial.io.clone(), Arc::clone(&store.trial.packs), Arc::clone(&store.shared));
    let numbers: Vec<u32> = first.packs.iter().map(|pack| pack.number).collect();
    block_on(&store.trial.io, async move {
        for number in numbers {
            shared.learn_pack(&io, &packs, number).await.unwrap();
        }
        assert!(shared.learn_pack::<BlockingEngine>(&io, &packs, 9999).await.is_err());
    });
    assert!(store.seal(&disk).0.stats.unique < 450);
}

#[test]
fn the_overlay_grows_with_its_hooks_up_to_the_shared_budget() {
    let mut own = Own::new(16 << 20);
    let mut most = 0;
    for i in 0..2_000_000u64 {
        // Only what can be a hook.
        let mut hash = Hash([1; 32]);
        hash.0[..8].copy_from_slice(&i.to_le_bytes());
        hash.0[24..28].copy_from_slice(&64u32.to_le_bytes());
        hash.0[28..].copy_from_slice(&(i as u32).wrapping_mul(0x85EB_CA6B).to_le_bytes());
        let (pack, at) = (1 + (i / 50_000) as u32, (i % 50_000) as u32);
        let place = Place::new(pack, 4096 + u64::from(at) * 32, 32, 0);
        own.insert(&Entry { hash, place }, at / 127, || 8 << 20);
        if i == 50_000 {
            assert_eq!(own.index.budget, OWN_BUDGET, "it is not taken before it is needed");
        }
        most = most.max(own.index.bytes());
    }
    assert!(own.pages.len() <= OPEN_PAGES_MAX);
    assert!(most > 7 << 20 && most <= 8 << 20, "{most}");
}
