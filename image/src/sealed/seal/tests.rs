//! Sealing, on a real file system.

use std::cell::Cell;
use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use super::*;
use crate::error::ErrorKind;
use crate::sealed::source::{Content, MemoryBlock, MemorySource, SourceBytes, SourceRun};
use crate::sealed::trial::{Draw, Model, Trial, block_bytes};
use crate::sealed::{ExactMap, Found, Hash, Place};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

#[test]
fn equal_contents_have_equal_roots_however_they_were_made() {
    for seed in 0..60 {
        let mut draw = Draw(seed);
        let mut trial = Trial::new();
        let mut model = Model::draw(&mut draw);
        let mut root = trial.seal(model.whole(&mut draw), None).root;
        assert_eq!(root.hash(), model.root_hash(), "seed {seed}");
        for step in 0..4 {
            let next = model.next(&mut draw);
            let sealed = trial.seal(next.changes(&model, &mut draw), Some(root));
            assert_eq!(sealed.root.hash(), next.root_hash(), "seed {seed}, step {step}");
            trial.check(&sealed.root, &next);
            let again = Trial::new().seal(next.whole(&mut draw), None);
            assert_eq!(again.root.hash(), sealed.root.hash());
            let over = trial.seal(next.whole(&mut draw), Some(sealed.root));
            assert_eq!(over.root.tree.hash, sealed.root.tree.hash);
            assert_eq!((over.stats.unique, over.stats.nodes, over.packs.len()), (0, 0, 0), "nothing is new");
            (model, root) = (next, sealed.root);
        }
    }
}

#[test]
fn threads_make_the_same() {
    let mut draw = Draw(5);
    let blocks: Vec<u64> = (0..5000).map(|i| if i % 7 == 0 { 0 } else { 1 + i % 3000 }).collect();
    let model = Model { size: 5000 * BLOCK_SIZE, blocks };
    let unique: HashSet<u64> = model.blocks.iter().copied().filter(|number| *number > 0).collect();
    let source = model.whole(&mut draw);
    let inline = Trial::new().seal(source.clone(), None);
    let mut trial = Trial::new();
    trial.workers = Workers::threads_of(2, 1).unwrap();
    let pooled = trial.seal(source, None);
    assert_eq!(pooled.root, inline.root, "places are the same, too");
    assert_eq!(pooled.stats, inline.stats);
    assert_eq!(inline.stats.unique, unique.len() as u64);
    trial.check(&pooled.root, &model);
}

#[test]
fn a_snapshot_costs_what_it_changed() {
    let mut trial = Trial::new();
    let count = 16 * 16 * 16 * 4 + 5;
    let mut model = Model { size: count * BLOCK_SIZE, blocks: (1..=count).collect() };
    let base = trial.seal(model.whole(&mut Draw(0)), None).root;
    let same = |at: &[u64], model: &Model| {
        let block = |i: u64| match at.contains(&i) {
            true => MemoryBlock::Data(block_bytes(model.blocks[i as usize])),
            false => MemoryBlock::Same,
        };
        MemorySource::new(model.size, (0..model.blocks.len() as u64).map(block).collect())
    };
    let none = trial.seal(same(&[], &model), Some(base));
    assert_eq!(none.root, base);
    assert_eq!((none.stats.nodes, none.stats.base_nodes_read, none.stats.blocks_read), (0, 0, 0));
    let rewritten = trial.seal(same(&[7, 9000], &model), Some(base));
    assert_eq!(rewritten.root, base, "the same data was written again");
    assert_eq!((rewritten.stats.duplicate, rewritten.packs.len()), (2, 0));
    model.blocks[9000] = 77_777_777;
    let changed = trial.seal(same(&[9000], &model), Some(base));
    assert_eq!(changed.root.hash(), model.root_hash());
    assert_eq!((changed.stats.unique, changed.stats.nodes), (1, 4), "one for each level");
    assert_eq!(changed.stats.base_nodes_read, 4);
    model.size += 16 * BLOCK_SIZE;
    model.blocks.resize(model.blocks.len() + 16, 0);
    let grown = trial.seal(same(&[], &model), Some(changed.root));
    assert_eq!((grown.stats.nodes, grown.stats.base_nodes_read), (0, 0), "zeroes at the end cost nothing");
    assert_eq!(grown.root.tree, changed.root.tree);
}

#[test]
fn whoever_stops_can_go_on() {
    let (mut trial, mut draw) = (Trial::new(), Draw(9));
    let base_model = Model { size: 9000 * BLOCK_SIZE, blocks: (1..=9000).collect() };
    let base = trial.seal(base_model.whole(&mut draw), None).root;
    let mut model = Model { size: 8000 * BLOCK_SIZE - 512, blocks: (1..=8000).collect() };
    (0..8000).step_by(3).for_each(|at| model.blocks[at] = 1_000_000 + at as u64);
    let (mut root, mut start, mut rounds) = (Some(base), 0, 0);
    loop {
        let mut calls = 0;
        let stop = move |_: &SealStats| {
            calls += 1;
            // One call is for what is sealed already, two for this round.
            if calls > 2 + u64::from(start > 0) { Step::Stop } else { Step::Go }
        };
        let source = model.changes(&base_model, &mut draw);
        let sealed = trial.seal_watched(source, root, start, stop).unwrap();
        let partial = match sealed.next {
            Some(next) => {
                let mut partial = model.clone();
                partial.blocks[next as usize..].copy_from_slice(&base_model.blocks[next as usize..8000]);
                partial
            }
            None => model.clone(),
        };
        assert_eq!(sealed.root.hash(), partial.root_hash(), "a whole disk at any time");
        root = Some(sealed.root);
        rounds += 1;
        assert!(rounds < 10);
        let Some(next) = sealed.next else { break };
        assert!(next > start);
        start = next;
    }
    assert_eq!(rounds, 4);
    trial.check(&root.unwrap(), &model);
}

/// A source that is told ahead what is read.
struct Announced(MemorySource, VecDeque<Vec<Range<u64>>>);

impl Source for Announced {
    const AHEAD: usize = 2;

    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        self.0.next(at).await
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        assert_eq!(self.1.pop_front().as_deref(), Some(ranges), "in the order in which it was announced");
        self.0.read(ranges).await
    }

    fn announce(&mut self, ranges: &[Range<u64>]) {
        assert!(self.1.len() <= Self::AHEAD, "no more than it asks for");
        self.1.push_back(ranges.to_vec());
    }
}

#[test]
fn what_is_announced_is_read_and_whoever_stops_loses_nothing_of_it() {
    let (mut trial, mut draw) = (Trial::new(), Draw(4));
    let model = Model { size: 9000 * BLOCK_SIZE - 512, blocks: (1..=9000).collect() };
    let (mut root, mut start) = (None, 0);
    for _ in 0..9 {
        let mut calls = 0;
        let stop = move |_: &SealStats| {
            calls += 1;
            if calls > 2 + u64::from(start > 0) { Step::Stop } else { Step::Go }
        };
        let source = Announced(model.whole(&mut draw), VecDeque::new());
        let sealed = trial.seal_watched(source, root, start, stop).unwrap();
        root = Some(sealed.root);
        let Some(next) = sealed.next else { break };
        assert_eq!(next, start + 2 * SEGMENT_BLOCKS, "two segments at a time");
        start = next;
    }
    assert_eq!(root.unwrap().hash(), model.root_hash());
    trial.check(&root.unwrap(), &model);
}

/// A source that fails when a block is read.
struct Failing(MemorySource, u64);

impl Source for Failing {
    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        self.0.next(at).await
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        if ranges.iter().any(|range| range.contains(&self.1)) {
            return Err(ImageError::invalid("source", "it fails here"));
        }
        self.0.read(ranges).await
    }
}

#[test]
fn what_fails_or_is_cancelled_leaves_nothing() {
    let mut trial = Trial::new();
    let model = Model { size: 5000 * BLOCK_SIZE, blocks: (1..=5000).collect() };
    let source = model.whole(&mut Draw(1));
    let made = Rc::new(Cell::new(0));
    let (seen, directory) = (Rc::clone(&made), trial.directory.path().to_owned());
    let cancel = move |stats: &SealStats| {
        seen.set(std::fs::read_dir(&directory).unwrap().count());
        if stats.blocks_done >= 4096 { Step::Cancel } else { Step::Go }
    };
    let error = trial.seal_watched(source.clone(), None, 0, cancel).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Cancelled));
    assert!(made.get() > 0, "something had been made");
    assert_eq!(trial.files(), 0);
    trial.known = ExactMap::default();
    let error = trial.seal_watched(Failing(source, 4500), None, 0, |_| Step::Go).unwrap_err();
    assert!(error.to_string().contains("it fails here"));
    assert_eq!(trial.files(), 0);
}

/// A disk of any size of which nothing may be asked.
struct Untouched(u64);

impl Source for Untouched {
    fn size(&self) -> u64 {
        self.0
    }

    async fn next(&mut self, _: u64) -> Result<SourceRun, ImageError> {
        panic!("it is asked what it holds");
    }

    async fn read(&mut self, _: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        panic!("it is read");
    }
}

#[test]
fn what_is_too_large_to_be_opened_is_refused_at_once() {
    let mut trial = Trial::new();
    for size in [crate::layer::SIZE_MAX + 512, 4 << 50, u64::MAX - 511, 513] {
        let error = trial.seal_watched(Untouched(size), None, 0, |_| Step::Go).unwrap_err();
        assert!(error.to_string().contains(&size.to_string()), "{error}");
    }
    assert_eq!(trial.files(), 0);
}

/// An index that says that everything is at one place.
struct Liar(Place);

impl Dedup<BlockingEngine> for Liar {
    async fn look_ahead(
        &mut self,
        _: &Io<BlockingEngine>,
        _: &Packs<BlockingEngine>,
        _: &[Hash],
    ) -> Result<(), ImageError> {
        Ok(())
    }

    fn find(&mut self, _: &Hash) -> Option<Found> {
        Some(Found::Hint(self.0))
    }

    fn insert(&mut self, _: Hash, _: Place, _: u32) {}

    fn find_node(&mut self, _: &Hash) -> Option<Found> {
        Some(Found::Hint(self.0))
    }
}

#[test]
fn a_hint_counts_when_the_block_is_there() {
    let mut trial = Trial::new();
    let first = Model { size: BLOCK_SIZE, blocks: vec![1] };
    let base = trial.seal(first.whole(&mut Draw(0)), None).root;
    let block = Liar(trial.known.place_of(&Hash::of_block(&block_bytes(1))).unwrap());
    let model = Model { size: 40 * BLOCK_SIZE, blocks: (1..=40).collect() };
    for (liar, duplicate, nodes) in [(block, 1, 4), (Liar(base.tree.place), 0, 4)] {
        let sealed = trial.seal_with(liar, model.whole(&mut Draw(0)), None, 0, |_| Step::Go).0.unwrap();
        assert_eq!(sealed.root.hash(), model.root_hash());
        assert_eq!((sealed.stats.duplicate, sealed.stats.unique), (duplicate, 40 - duplicate));
        assert_eq!(sealed.stats.nodes, nodes);
        trial.check(&sealed.root, &model);
    }
}

/// 1 GiB of blocks that are all different; some are noise, and only these are data.
struct Large {
    noise: Vec<u64>,
    is_base: bool,
}

const LARGE_BLOCKS: u64 = 1 << 18;

impl Source for Large {
    fn size(&self) -> u64 {
        LARGE_BLOCKS * BLOCK_SIZE
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        if self.is_base {
            return Ok(SourceRun { content: Content::Data, count: LARGE_BLOCKS - at });
        }
        let next = self.noise.get(self.noise.partition_point(|block| *block < at)).copied();
        Ok(match next.unwrap_or(LARGE_BLOCKS) {
            next if next == at => SourceRun { content: Content::Data, count: 1 },
            next => SourceRun { content: Content::Same, count: next - at },
        })
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        let mut bytes = Vec::new();
        for at in ranges.iter().cloned().flatten() {
            let mut block = vec![0; BLOCK_BYTES];
            let mut draw = Draw(at);
            let words = if self.is_base { 1 } else { BLOCK_BYTES / 8 };
            block
                .chunks_exact_mut(8)
                .take(words)
                .for_each(|word| word.copy_from_slice(&draw.next().to_le_bytes()));
            bytes.extend(block);
        }
        Ok(bytes.into())
    }
}

#[test]
fn bytes_added_for_a_random_changed_block() {
    let mut trial = Trial::new();
    let base = trial.seal(Large { noise: Vec::new(), is_base: true }, None);
    assert_eq!(base.stats.unique, LARGE_BLOCKS);
    let mut draw = Draw(3);
    let mut noise: Vec<u64> = (0..LARGE_BLOCKS / 100).map(|_| draw.below(LARGE_BLOCKS)).collect();
    noise.sort_unstable();
    noise.dedup();
    let changed = noise.len() as u64;
    let sealed = trial.seal(Large { noise, is_base: false }, Some(base.root));
    assert_eq!(sealed.stats.unique, changed);
    let bytes: u64 = sealed.packs.iter().map(|pack| pack.bytes).sum();
    println!("{} bytes for a changed block, {} nodes", bytes / changed, sealed.stats.nodes);
    assert!(bytes / changed <= 2 * BLOCK_SIZE, "{} bytes for each changed block", bytes / changed);
}
