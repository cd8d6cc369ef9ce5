//! Sealing on the simulated engine: power cuts at any point, and writes that fail.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::engine::Op;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};
use sapwood_image::ImageError;
use sapwood_image::sealed::{
    ExactMap, Hash, MemoryBlock, MemorySource, PackKind, Packs, Root, SealStats, Sealed, Sealing, Step,
    Workers, Written, pack_name, seal,
};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::storage::SimStorage;
use sapwood_tests::sim::world::{Config, Waiting, World};

const FOLDER: &str = "/packs";
const BLOCKS: u64 = 2600;
/// Small, so that there are many.
const PACK_BYTES: u64 = 1 << 20;
const NUMBERS_MAX: u32 = 200;

fn world(seed: u64) -> World {
    World::new(Config { waiting: Waiting::IsNoted, ..Config::blocking(seed) })
}

/// One process, and its only thread.
struct Process {
    world: World,
    storage: SimStorage,
    io: Io<SimEngine>,
    packs: Arc<Packs<SimEngine>>,
}

impl Process {
    fn new(world: &World) -> Self {
        let process = world.process();
        let storage = world.storage(process);
        let files = storage.clone();
        let packs = Packs::new(Path::new(FOLDER), move |number| {
            let path = Path::new(FOLDER).join(pack_name(number));
            let file = files.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
            let size = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
            Ok((file, 0..size))
        });
        Self { world: world.clone(), storage, io: Io::new(world.engine(process)), packs }
    }

    /// Runs to the end, or until so many operations have taken effect: then there is no result.
    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static, cut: u64) -> Option<T> {
        let slot = Rc::new(Cell::new(None));
        let result = Rc::clone(&slot);
        self.io.spawn(async move { result.set(Some(future.await)) });
        let mut finished = Vec::new();
        loop {
            self.io.poll(&mut finished);
            if let Some(value) = slot.take() {
                return Some(value);
            }
            if self.world.events() >= cut {
                self.io.abandon_tasks();
                return None;
            }
            assert!(self.world.step(), "nothing is in flight");
        }
    }

    /// Seals, up to some block, and publishes: packs count when their folder has been synced.
    fn seal(
        &self,
        source: MemorySource,
        known: ExactMap,
        first: u32,
        base: Option<(Root, u64)>,
        stop_at: u64,
        cut: u64,
    ) -> Option<Result<Sealed, ImageError>> {
        let (storage, io, packs) = (self.storage.clone(), self.io.clone(), Arc::clone(&self.packs));
        let (mut source, mut dedup, mut number) = (source, known, first);
        let sealing = async move {
            let workers = Workers::inline(0).unwrap();
            let sealing = Sealing {
                storage: &storage,
                io: &io,
                directory: Path::new(FOLDER),
                packs: &packs,
                dedup: &mut dedup,
                workers: &workers,
                base: base.map(|(root, _)| root),
                frame_blocks: 16,
                pack_bytes: PACK_BYTES,
                start: base.map_or(0, |(_, start)| start),
            };
            let numbers = || {
                number += 1;
                Ok(number)
            };
            let mut watch =
                |stats: &SealStats| if stats.blocks_done >= stop_at { Step::Stop } else { Step::Go };
            let sealed = seal(sealing, &mut source, numbers, &mut watch).await?;
            let sync = Op::SyncDirectory { path: FOLDER.into() };
            io.run(sync).await.result.map_err(|e| ImageError::errno(FOLDER, "sync", e))?;
            Ok(sealed)
        };
        self.run(sealing, cut)
    }

    /// What the packs with these numbers hold, every block and node of which is verified.
    fn verify(&self, numbers: Vec<u32>) -> ExactMap {
        let (io, packs) = (self.io.clone(), Arc::clone(&self.packs));
        let verified = async move {
            let mut known = ExactMap::default();
            for number in numbers {
                let pack = packs.pack(&io, number).await.unwrap();
                for entry in pack.entries_in(&io, 0..u32::MAX).await.unwrap() {
                    let held = match pack.kind() {
                        PackKind::Data => {
                            let frame = pack.frame(&io, entry.place).await.unwrap();
                            Hash::of_block(frame.block(entry.place.index()).unwrap())
                        }
                        PackKind::Nodes => pack.node(&io, entry.place).await.unwrap().hash(),
                    };
                    assert_eq!(held, entry.hash, "pack {number}");
                }
                known.add_pack(&io, &packs, number).await.unwrap();
            }
            known
        };
        self.run(verified, u64::MAX).unwrap()
    }
}

/// Noise, some of it twice, and zeroes.
fn source(seed: u64) -> MemorySource {
    let mut rng = Rng::new(seed);
    let block = |at: u64| match at % 10 {
        3 => MemoryBlock::Zero,
        number => {
            let mut bytes = vec![0; BLOCK_BYTES];
            Rng::new(if number == 5 { 5 } else { at + 100 }).fill(&mut bytes);
            MemoryBlock::Data(bytes)
        }
    };
    let size = BLOCKS * BLOCK_SIZE - 512 * rng.below(8);
    MemorySource::new(size, (0..BLOCKS).map(block).collect())
}

/// Packs that can be seen.
fn present(world: &World) -> Vec<u32> {
    let is_there = |number: &u32| world.contents(&Path::new(FOLDER).join(pack_name(*number))).is_some();
    (1..=NUMBERS_MAX).filter(is_there).collect()
}

fn numbers(packs: &[Written]) -> Vec<u32> {
    packs.iter().map(|pack| pack.number).collect()
}

fn sorted(mut numbers: Vec<u32>) -> Vec<u32> {
    numbers.sort_unstable();
    numbers
}

#[test]
fn packs_are_whole_after_a_power_cut_at_any_point() {
    let (mut cut_short, mut unpublished, mut hashes) = (0, 0, Vec::new());
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let world = world(seed);
        let first = Process::new(&world);
        let half = first.seal(source(1), ExactMap::default(), 0, None, 1024, u64::MAX).unwrap().unwrap();
        let next = half.next.expect("it was stopped");
        let published = numbers(&half.packs);
        assert!(published.len() > 2, "several packs");
        let last = *published.iter().max().unwrap();
        let known = first.verify(published.clone());
        let cut = world.events() + rng.below(26);
        let rest = first.seal(source(1), known, last, Some((half.root, next)), u64::MAX, cut);
        cut_short += u32::from(rest.is_none());
        drop(first);
        world.power_cut(rng.pick(&Persistence::ALL));

        let second = Process::new(&world);
        let seen = present(&world);
        assert!(
            published.iter().all(|number| seen.contains(number)),
            "seed {seed}: what was published is there"
        );
        unpublished += u32::from(rest.is_none() && seen.len() > published.len());
        // Whatever has the name of a pack is one, published or not; and the half disk is there.
        let known = second.verify(seen.clone());
        let last = seen.iter().max().unwrap() + 50;
        let again = second.seal(source(1), known, last, Some((half.root, next)), u64::MAX, u64::MAX);
        let again = again.unwrap().unwrap();
        assert!(again.packs.iter().all(|pack| pack.number > last));
        hashes.push((again.root.hash(), half.root.hash()));
        if let Some(Ok(rest)) = rest {
            assert_eq!(rest.root.hash(), again.root.hash());
            assert!(numbers(&rest.packs).iter().all(|number| seen.contains(number)), "it was published");
            assert!(again.packs.is_empty(), "and is found again");
        }
    }
    assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]), "one disk, one root");
    assert!(cut_short > 20 && cut_short < 40, "{cut_short} of 40 were cut short");
    assert!(unpublished > 3, "{unpublished} left packs that nobody knows of");
}

#[test]
fn a_failed_write_or_sync_leaves_no_packs() {
    let mut failed = 0;
    for seed in 0..20 {
        let world = world(seed);
        let faults = match seed % 2 {
            0 => Faults { write_error: 400, ..Faults::default() },
            _ => Faults { sync_error: 2000, ..Faults::default() },
        };
        world.set_faults(faults);
        let process = Process::new(&world);
        let sealed = process.seal(source(seed), ExactMap::default(), 0, None, u64::MAX, u64::MAX).unwrap();
        match sealed {
            Ok(sealed) => assert_eq!(present(&world), sorted(numbers(&sealed.packs))),
            Err(_) => {
                failed += 1;
                assert!(present(&world).is_empty(), "seed {seed}");
                let unfinished = |number: &u32| {
                    world.contents(&Path::new(FOLDER).join(pack_name(*number)).with_extension("pack.tmp"))
                };
                assert!((1..=NUMBERS_MAX).all(|number| unfinished(&number).is_none()), "seed {seed}");
            }
        }
    }
    assert!(failed > 5 && failed < 20, "{failed} of 20 failed");
}
