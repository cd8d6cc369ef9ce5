//! Power cuts in a collection of sealed content.

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_image::ImageError;
use sapwood_image::sealed::collect::{Catalog, Finder, Limits, Locate, Pace, Scrub, Shifted, Target, begin};
use sapwood_image::sealed::{
    Child, Coder, FANOUT, Hash, NewRecord, Node, PackKind, PackWriter, Packs, Place, Root, pack_name,
};
use sapwood_tests::sim::engine::SimEngine;
use sapwood_tests::sim::persist::Persistence;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::storage::SimStorage;
use sapwood_tests::sim::world::{Config, World};

const DIRECTORY: &str = "/store/packs";
const DATA: u32 = 1;
const NODES: u32 = 2;

/// Places must do.
struct NoIndex;

impl Locate<SimEngine> for NoIndex {
    async fn locate(&self, _: &Io<SimEngine>, _: &Hash) -> Result<Vec<Place>, ImageError> {
        Ok(Vec::new())
    }
}

struct TwoPacks(Root);

impl Catalog for TwoPacks {
    fn roots(&self) -> Result<Vec<Root>, ImageError> {
        Ok(vec![self.0])
    }

    fn packs(&self) -> Result<Vec<u32>, ImageError> {
        Ok(vec![DATA, NODES])
    }
}

fn process(world: &World) -> (SimStorage, Io<SimEngine>) {
    let process = world.process();
    (world.storage(process), Io::new(world.engine(process)))
}

fn packs(storage: &SimStorage) -> Arc<Packs<SimEngine>> {
    let storage = storage.clone();
    Packs::new(Path::new(DIRECTORY), move |number| {
        let path = Path::new(DIRECTORY).join(pack_name(number));
        let file = storage.open(&path, OpenOptions::READ).map_err(|error| ImageError::open(&path, error))?;
        let size = file.size().map_err(|error| ImageError::io(&path, "measure", error))?;
        Ok((file, 0..size))
    })
}

fn finder(world: &World, known: Vec<u32>) -> (Io<SimEngine>, Finder<SimEngine, NoIndex>) {
    let (storage, io) = process(world);
    let finder = Finder::new(&io, &packs(&storage), known, NoIndex, &Arc::new(Pace::default()));
    (io, finder)
}

/// The tree over these blocks, written below up.
fn tree(writer: &mut PackWriter<SimEngine>, blocks: &[Child]) -> Child {
    let (mut level, mut children) = (1, blocks.to_vec());
    while level == 1 || children.len() > 1 {
        let parents = children.chunks(FANOUT).map(|below| {
            let mut node = Node::zero(level);
            node.children[..below.len()].copy_from_slice(below);
            let hash = node.hash();
            Child { hash, place: writer.push(NewRecord::node(&node), &[hash]) }
        });
        children = parents.collect();
        level += 1;
    }
    children[0]
}

/// Two packs, of 256 blocks and of the trees over all of them and over every eighth. The root of the second.
async fn written(storage: SimStorage, io: Io<SimEngine>) -> Root {
    let create =
        |number, kind| PackWriter::create(&storage, &io, Path::new(DIRECTORY), number, kind).unwrap();
    let mut data = create(DATA, PackKind::Data);
    let (mut coder, mut rng) = (Coder::new(1).unwrap(), Rng::new(5));
    let mut blocks = Vec::new();
    for _ in 0..64 {
        let mut raw = vec![0; 4 * 4096];
        rng.fill(&mut raw);
        let hashes: Vec<Hash> = raw.chunks(4096).map(Hash::of_block).collect();
        let place = data.push(NewRecord::frame(&mut coder, &raw), &hashes);
        blocks.extend((0..).zip(hashes).map(|(i, hash)| Child { hash, place: place.with_index(i) }));
    }
    let mut nodes = create(NODES, PackKind::Nodes);
    tree(&mut nodes, &blocks);
    for (at, block) in blocks.iter_mut().enumerate() {
        *block = if at % 8 == 0 { *block } else { Child::ZERO };
    }
    let root = Root { size: 256 * 4096, tree: tree(&mut nodes, &blocks) };
    data.finish().await.unwrap();
    nodes.finish().await.unwrap();
    let sync = sapwood_blockdev::engine::Op::SyncDirectory { path: DIRECTORY.into() };
    io.run(sync).await.result.unwrap();
    root
}

/// A collection up to its commit.
async fn collect(
    mut finder: Finder<SimEngine, NoIndex>,
    storage: SimStorage,
    root: Root,
) -> Result<Shifted, ImageError> {
    let (catalog, mut last) = (TwoPacks(root), NODES);
    let next = move || {
        last += 1;
        Ok(last)
    };
    let mut target = Target::new(storage, DIRECTORY.into(), next, 1, 8);
    let survey = begin(&mut finder, &Arc::default(), &catalog, Limits::default()).await?;
    let marked = survey.withdraw().mark(&mut finder, &catalog).await?;
    marked.shift(&mut finder, &mut target).await
}

/// Whether these packs hold all of a root, whole.
#[track_caller]
fn check(world: &World, known: Vec<u32>, root: Root) {
    let (io, finder) = finder(world, known.clone());
    let (findings, lost) = block_on(&io, async move {
        let mut scrub = Scrub::new(finder);
        for number in known {
            scrub.pack(number).await.unwrap();
        }
        (scrub.findings().clone(), scrub.roots(&[root]).await.unwrap())
    });
    assert_eq!((findings.damage, lost), (vec![], vec![None]));
    assert!(findings.blocks >= 32);
}

#[test]
fn what_was_moved_is_durable_before_the_catalog_is_changed() {
    for seed in 0..24 {
        let world = World::new(Config::blocking(seed));
        let (storage, io) = process(&world);
        let root = block_on(&io.clone(), written(storage.clone(), io));
        let (io, finder) = finder(&world, vec![DATA, NODES]);
        let shifted = block_on(&io, collect(finder, storage, root)).unwrap();
        assert_eq!((shifted.moved.blocks, shifted.moved.nodes), (32, 17));
        let dropped: Vec<u32> = shifted.dropped.iter().map(|pack| pack.number).collect();
        assert_eq!(dropped, [DATA, NODES]);
        assert!(shifted.bytes_written() * 4 < shifted.bytes_dropped());
        assert_eq!(
            shifted.write_amplification_percent(),
            Some(shifted.bytes_written() * 100 / (shifted.bytes_dropped() - shifted.bytes_written()))
        );
        world.power_cut(Persistence::ALL[seed as usize % Persistence::ALL.len()]);
        let written = shifted.written.iter().map(|pack| pack.number).collect();
        check(&world, written, Root { size: root.size, tree: shifted.moves.refreshed(root.tree) });
    }
}

#[test]
fn a_cut_before_the_commit_leaves_what_there_was() {
    let mut cut = 0;
    for seed in 0..60 {
        let world = World::new(Config::blocking(seed));
        let (storage, io) = process(&world);
        let root = block_on(&io.clone(), written(storage.clone(), io));
        let (io, finder) = finder(&world, vec![DATA, NODES]);
        let (last, ended) = (world.events() + 1 + seed, Rc::new(Cell::new(false)));
        let of_task = Rc::clone(&ended);
        io.spawn(async move {
            drop(collect(finder, storage, root).await);
            of_task.set(true);
        });
        let mut none = Vec::new();
        io.poll(&mut none);
        while !ended.get() && world.events() < last {
            io.wait(None);
            io.poll(&mut none);
        }
        cut += u32::from(!ended.get());
        world.power_cut(Persistence::ALL[seed as usize % Persistence::ALL.len()]);
        io.abandon_tasks();
        check(&world, vec![DATA, NODES], root);
    }
    assert!((10..60).contains(&cut), "{cut} collections were cut");
}
