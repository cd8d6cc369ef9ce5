//! How many of the duplicates that are there the dedup index finds, with its memory scaled to the data: 64 MiB for 1 TiB of
//! unique blocks.
//!
//! A store is only modelled: packs are lists of hashes. Whatever the index says is compared with them.

#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, HashSet};

use sapwood_image::sealed::{
    Container, DedupIndex, Entry, Hash, Lookup, PAGE_ENTRIES_MAX, Place, SEGMENT_BLOCKS as SEGMENT,
};
use sapwood_tests::corpus;

/// Of the exact duplicates, so many in a hundred must be found.
const FOUND_PERCENT: u64 = 95;
/// Containers that are read for each segment, on average.
const READS_MAX: u64 = 8;
/// Blocks of a pack of 64 MiB, compressed.
const PACK_BLOCKS: usize = 45_000;
const FRAME_BLOCKS: usize = 16;
/// A page of entries has fewer than it could, since it names records too.
const PAGE_ENTRIES: usize = PAGE_ENTRIES_MAX - PAGE_ENTRIES_MAX / FRAME_BLOCKS / 4;
/// Segments of one image before the next one has its turn: 64 MiB.
const TURN: usize = 16;
const SEGMENT_BLOCKS: usize = SEGMENT as usize;

/// Packs as lists.
#[derive(Default)]
struct Packs(Vec<Vec<Entry>>);

impl Packs {
    /// Stores a block: its entry, and the page of entries that has it.
    fn store(&mut self, hash: Hash) -> (Entry, u32) {
        if self.0.last().is_none_or(|pack| pack.len() == PACK_BLOCKS) {
            self.0.push(Vec::new());
        }
        let number = self.0.len() as u32;
        let pack = self.0.last_mut().unwrap();
        let (frame, index) = (pack.len() / FRAME_BLOCKS, pack.len() % FRAME_BLOCKS);
        let place = Place::new(number, 4096 + frame as u64 * 32, 32, index);
        pack.push(Entry { hash, place });
        (pack[pack.len() - 1], ((pack.len() - 1) / PAGE_ENTRIES) as u32)
    }

    fn read(&self, container: Container) -> &[Entry] {
        let pack = &self.0[container.pack as usize - 1];
        let pages = container.pages();
        let at = |page: u32| (page as usize * PAGE_ENTRIES).min(pack.len());
        &pack[at(pages.start)..at(pages.end)]
    }

    fn hash_at(&self, place: Place) -> Hash {
        let frame = (place.offset() - 4096) as usize / 32;
        self.0[place.pack() as usize - 1][frame * FRAME_BLOCKS + place.index()].hash
    }
}

/// What happened to the blocks of some segments.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    /// Segments that are not zero.
    segments: u64,
    nonzero: u64,
    /// Blocks that came before.
    duplicates: u64,
    found: u64,
    /// Containers that were read.
    reads: u64,
}

impl Count {
    #[track_caller]
    fn assert_good(&self, what: &str) {
        let percent = 100.0 * self.found as f64 / self.duplicates as f64;
        let reads = self.reads as f64 / self.segments as f64;
        println!("{what}: {percent:.2} % found, {reads:.2} reads for each segment, {self:?}");
        assert!(self.duplicates > self.nonzero / 8, "{what}: there is something to find: {self:?}");
        assert!(self.found * 100 >= self.duplicates * FOUND_PERCENT, "{what}: {self:?}");
        assert!(self.reads <= self.segments * READS_MAX, "{what}: {self:?}");
    }
}

/// A store into which images are sealed.
struct Store {
    index: DedupIndex,
    packs: Packs,
    seen: HashSet<Hash>,
}

impl Store {
    fn new(budget: usize) -> Self {
        Self { index: DedupIndex::new(budget), packs: Packs::default(), seen: HashSet::new() }
    }

    fn seal(&mut self, lookup: &mut Lookup, segment: &[Hash], count: &mut Count) {
        lookup.begin(segment);
        loop {
            let wanted = self.index.wanted(lookup);
            if wanted.is_empty() {
                break;
            }
            count.reads += wanted.len() as u64;
            wanted.into_iter().for_each(|one| self.index.take(lookup, one, self.packs.read(one)));
        }
        let (mut of_segment, mut new) = (HashSet::new(), Vec::new());
        count.segments += u64::from(segment.iter().any(|hash| !hash.is_zero()));
        for hash in segment.iter().filter(|hash| !hash.is_zero()) {
            count.nonzero += 1;
            count.duplicates += u64::from(!self.seen.insert(*hash));
            match lookup.find(hash) {
                Some(place) => {
                    assert_eq!(self.packs.hash_at(place), *hash, "a place that is found is right");
                    count.found += 1;
                }
                // Who seals a segment sees itself what comes twice in it.
                None if !of_segment.insert(*hash) => count.found += 1,
                None => new.push(*hash),
            }
        }
        for hash in new {
            let (entry, page) = self.packs.store(hash);
            self.index.insert(&entry, page);
        }
    }

    /// Seals segments of several images in this order.
    fn seal_all(&mut self, order: impl Iterator<Item = (usize, Vec<Hash>)>) -> Count {
        let (mut lookups, mut count) = (HashMap::<usize, Lookup>::new(), Count::default());
        for (image, segment) in order {
            self.seal(lookups.entry(image).or_default(), &segment, &mut count);
        }
        count
    }
}

/// The segments of images, in turns of `turn` segments.
fn in_turns(images: &[Vec<Hash>], turn: usize) -> impl Iterator<Item = (usize, Vec<Hash>)> {
    let longest = images.iter().map(Vec::len).max().unwrap_or_default();
    let blocks = turn * SEGMENT_BLOCKS;
    (0..longest.div_ceil(blocks)).flat_map(move |round| {
        images.iter().enumerate().flat_map(move |(i, image)| {
            let begin = (round * blocks).min(image.len());
            let end = (begin + blocks).min(image.len());
            image[begin..end].chunks(SEGMENT_BLOCKS).map(move |segment| (i, segment.to_vec()))
        })
    })
}

/// The budget for images of which nothing is there twice in the store.
fn scaled_budget(images: &[Vec<Hash>]) -> usize {
    let unique: HashSet<&Hash> = images.iter().flatten().filter(|hash| !hash.is_zero()).collect();
    DedupIndex::budget_for(unique.len() as u64 * 4096, 0)
}

/// One after the other, and in turns.
fn assert_images(images: &[Vec<Hash>], later: &[Vec<Hash>]) {
    let budget = scaled_budget(images);
    println!("budget {budget} bytes");
    let mut store = Store::new(budget);
    store.seal_all(in_turns(images, usize::MAX / SEGMENT_BLOCKS / 2)).assert_good("one after the other");
    store.seal_all(in_turns(later, TURN)).assert_good("a later state of one of them");
    Store::new(budget).seal_all(in_turns(images, TURN)).assert_good("in turns");
    let without = Store::new(0).seal_all(in_turns(images, TURN));
    assert!(without.found * 10 < without.duplicates, "without memory it is not found: {without:?}");
}

/// A generator of numbers (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn hash(&mut self) -> Hash {
        let mut hash = [0; 32];
        hash.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&self.next().to_le_bytes()));
        Hash(hash)
    }
}

const PACKAGES: u64 = 600;

/// The blocks of a package's files: most files have one or two, few have hundreds.
fn package(number: u64, version: u64) -> Vec<Vec<Hash>> {
    let mut numbers = Numbers(number << 8);
    let files = 4 + numbers.below(40);
    let file = |i: u64| -> Vec<Hash> {
        let largest = 1 << numbers.below(9);
        let size = 1 + numbers.below(largest);
        // An upgrade changes some files and keeps others.
        let changed = if (number + i).is_multiple_of(3) { version } else { 0 };
        let mut contents = Numbers(number << 40 | i << 20 | changed << 8 | 1);
        (0..size).map(|_| contents.hash()).collect()
    };
    (0..files).map(file).collect()
}

/// An image of two thirds of the packages in an order of its own, with blocks between their files that no other image has.
fn image(seed: u64, version: impl Fn(u64) -> u64) -> Vec<Hash> {
    let mut numbers = Numbers(seed);
    let mut packages: Vec<u64> = (0..PACKAGES).filter(|_| numbers.below(3) > 0).collect();
    for i in (1..packages.len()).rev() {
        let other = numbers.below(i as u64 + 1) as usize;
        packages.swap(i, other);
    }
    let mut image = Vec::new();
    for number in packages {
        let mut files = package(number, version(number));
        // One package in eight lies in another order of its files.
        if numbers.below(8) == 0 {
            files.reverse();
        }
        for file in files {
            image.extend(file);
            if numbers.below(12) == 0 {
                image.push(numbers.hash());
            }
        }
        image.extend((0..numbers.below(40)).map(|_| Hash::ZERO));
    }
    image
}

#[test]
fn packages_in_many_orders() {
    let images: Vec<Vec<Hash>> = (1..=5).map(|seed| image(seed, |_| 0)).collect();
    let later = image(1, |package| u64::from(package.is_multiple_of(5)));
    assert_images(&images, &[later]);
}

#[test]
#[ignore = "reads the corpus: cargo xtask test --only corpus"]
fn corpus_of_debian_images() {
    let corpus = corpus::locate().unwrap();
    let read = |name: &str| corpus::hashes(&corpus::image(&corpus, name)).unwrap();
    let images: Vec<Vec<Hash>> = corpus::IMAGES.iter().map(|name| read(name)).collect();
    assert_images(&images, &[read(corpus::AGED)]);
}
