//! A store for tests: packs in a directory, a catalog and an exact index in memory, and seals that go step by step.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::super::*;
use crate::error::ImageError;
use crate::sealed::node::blocks_below;
use crate::sealed::*;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_BYTES;

pub(super) type TestPacks = Packs<BlockingEngine>;

/// Pseudo-random numbers.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) % n as u64) as usize
    }

    pub(super) fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// The block that stands for a number; 0 is zeroes. One in four is noise.
pub(super) fn block(value: u64) -> Vec<u8> {
    if value == 0 {
        return vec![0; BLOCK_BYTES];
    }
    let mut noise = Random(value);
    let words = (0..BLOCK_BYTES / 8).map(|i| match value % 4 {
        0 => noise.below(usize::MAX) as u64,
        _ => (value << 20) | (i as u64 / 3),
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// The exact index: everything in the packs of the catalog.
#[derive(Clone, Default)]
pub(super) struct Index(pub(super) Rc<RefCell<HashMap<Hash, Vec<Place>>>>);

impl Locate<BlockingEngine> for Index {
    async fn locate(&self, _: &Io<BlockingEngine>, hash: &Hash) -> Result<Vec<Place>, ImageError> {
        Ok(self.0.borrow().get(hash).cloned().unwrap_or_default())
    }
}

pub(super) type TestFinder = Finder<BlockingEngine, Index>;

/// See the module's documentation.
pub(super) struct TestStore {
    directory: tempfile::TempDir,
    pub(super) io: Io<BlockingEngine>,
    pub(super) packs: Arc<TestPacks>,
    pub(super) index: Index,
    pub(super) pins: Arc<Pins>,
    pub(super) pace: Arc<Pace>,
    last_number: Rc<Cell<u32>>,
    /// The catalog's packs.
    pub(super) listed: RefCell<BTreeSet<u32>>,
    /// The catalog's roots, by a number of their own, with what their disks hold.
    pub(super) roots: RefCell<BTreeMap<u64, (Root, Vec<u64>)>>,
    next_root: Cell<u64>,
    /// A catalog that answers with roots as of long ago, where a test wants to break the rules.
    pub(super) old_roots: RefCell<Option<Vec<Root>>>,
}

impl Catalog for TestStore {
    fn roots(&self) -> Result<Vec<Root>, ImageError> {
        if let Some(roots) = &*self.old_roots.borrow() {
            return Ok(roots.clone());
        }
        Ok(self.roots.borrow().values().map(|(root, _)| *root).collect())
    }

    fn packs(&self) -> Result<Vec<u32>, ImageError> {
        Ok(self.listed.borrow().iter().copied().collect())
    }
}

impl TestStore {
    pub(super) fn new() -> Rc<Self> {
        let memory = Path::new("/dev/shm");
        let directory =
            if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let io = Io::new(BlockingEngine::new().unwrap());
        let packs = open_packs(directory.path());
        Rc::new(Self {
            directory,
            io,
            packs,
            index: Index::default(),
            pins: Arc::default(),
            pace: Arc::default(),
            last_number: Rc::default(),
            listed: RefCell::default(),
            roots: RefCell::default(),
            next_root: Cell::default(),
            old_roots: RefCell::default(),
        })
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    pub(super) fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        block_on(&self.io, future)
    }

    pub(super) fn finder(&self) -> TestFinder {
        self.finder_in(&self.packs)
    }

    /// One over packs that are opened afresh.
    pub(super) fn fresh_finder(&self) -> TestFinder {
        self.finder_in(&open_packs(self.directory.path()))
    }

    fn finder_in(&self, packs: &Arc<TestPacks>) -> TestFinder {
        let known = self.listed.borrow().clone();
        Finder::new(&self.io, packs, known, self.index.clone(), &self.pace)
    }

    /// New packs of few bytes, so that there are many.
    pub(super) fn target(&self) -> Target<HostStorage> {
        let last = Rc::clone(&self.last_number);
        let next = move || {
            last.set(last.get() + 1);
            Ok(last.get())
        };
        Target { pack_bytes: 60_000, ..Target::new(HostStorage, self.path(), next, 1, 8) }
    }

    pub(super) fn writer(&self, kind: PackKind) -> PackWriter<BlockingEngine> {
        let number = (self.target().next_number)().unwrap();
        PackWriter::create(&HostStorage, &self.io, self.directory.path(), number, kind).unwrap()
    }

    /// Lists a pack in the catalog and the index.
    pub(super) async fn publish(&self, number: u32) {
        let pack = self.packs.pack(&self.io, number).await.unwrap();
        for entry in pack.entries_in(&self.io, 0..u32::MAX).await.unwrap() {
            self.index.0.borrow_mut().entry(entry.hash).or_default().push(entry.place);
        }
        self.listed.borrow_mut().insert(number);
        self.pins.published([number]);
    }

    pub(super) fn commit(&self, root: Root, values: Vec<u64>) -> u64 {
        self.next_root.set(self.next_root.get() + 1);
        self.roots.borrow_mut().insert(self.next_root.get(), (root, values));
        self.next_root.get()
    }

    /// The end of a collection: the catalog's commit, and the unlinking.
    pub(super) async fn finish(&self, shifted: Shifted) {
        for pack in &shifted.written {
            self.publish(pack.number).await;
        }
        let dropped: BTreeSet<u32> = shifted.dropped.iter().map(|pack| pack.number).collect();
        self.listed.borrow_mut().retain(|pack| !dropped.contains(pack));
        self.index.0.borrow_mut().retain(|_, places| {
            places.retain(|place| !dropped.contains(&place.pack()));
            !places.is_empty()
        });
        for (root, _) in self.roots.borrow_mut().values_mut() {
            root.tree = shifted.moves.refreshed(root.tree);
        }
        let paths: Vec<PathBuf> = shifted.dropped.iter().filter_map(|pack| pack.path.clone()).collect();
        shifted.committed();
        paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }

    /// A whole collection with nothing beside it.
    pub(super) async fn collect(&self) -> Result<(Moved, Vec<u32>), ImageError> {
        let mut finder = self.finder();
        let withdrawn = begin(&mut finder, &self.pins, self, Limits::default()).await?.withdraw();
        let marked = withdrawn.mark(&mut finder, self).await?;
        let shifted = marked.shift(&mut finder, &mut self.target()).await?;
        let (moved, dropped) = (shifted.moved, shifted.dropped.iter().map(|pack| pack.number).collect());
        self.finish(shifted).await;
        Ok((moved, dropped))
    }

    /// Where content is: where its place says, or else where the index does.
    async fn node(&self, packs: &TestPacks, child: &Child) -> Option<Node> {
        for place in self.places(child) {
            let Ok(pack) = packs.pack(&self.io, place.pack()).await else { continue };
            match pack.node(&self.io, place).await {
                Ok(node) if node.hash() == child.hash => return Some(node),
                _ => {}
            }
        }
        None
    }

    fn places(&self, child: &Child) -> Vec<Place> {
        let listed = self.index.0.borrow().get(&child.hash).cloned().unwrap_or_default();
        [child.place].into_iter().chain(listed).filter(|place| !place.is_none()).collect()
    }

    async fn block(&self, packs: &TestPacks, child: &Child) -> Option<Vec<u8>> {
        for place in self.places(child) {
            let Ok(pack) = packs.pack(&self.io, place.pack()).await else { continue };
            let Ok(frame) = pack.frame(&self.io, place).await else { continue };
            match frame.block(place.index()) {
                Some(block) if Hash::of_block(block) == child.hash => return Some(block.to_vec()),
                _ => {}
            }
        }
        None
    }

    /// Reads the children of every node of a tree, by level and position; and what its disk holds.
    pub(super) async fn read(&self, root: &Root) -> Option<(HashMap<(u32, u64), Child>, Vec<Vec<u8>>)> {
        let (children, disk) = self.read_what_is_there(root).await;
        Some((children, disk.into_iter().collect::<Option<_>>()?))
    }

    /// The same, without what cannot be read.
    pub(super) async fn read_what_is_there(
        &self,
        root: &Root,
    ) -> (HashMap<(u32, u64), Child>, Vec<Option<Vec<u8>>>) {
        // Opened afresh: a file that was unlinked must not help.
        let packs = open_packs(self.directory.path());
        let blocks = root.size.div_ceil(4096);
        let height = height_of(blocks);
        let mut children = HashMap::from([((height, 0), root.tree)]);
        let mut disk = vec![Some(block(0)); blocks as usize];
        for level in (1..=height).rev() {
            for at in 0..blocks.div_ceil(blocks_below(level)) {
                let Some(child) = children.get(&(level, at)).filter(|child| !child.hash.is_zero()) else {
                    continue;
                };
                let Some(node) = self.node(&packs, child).await else {
                    let (first, end) = (at * blocks_below(level), (at + 1) * blocks_below(level));
                    disk[first as usize..end.min(blocks) as usize].fill(None);
                    continue;
                };
                let below = (at * FANOUT as u64..).zip(node.children);
                children.extend(below.map(|(i, child)| ((level - 1, i), child)));
            }
        }
        for at in 0..blocks {
            if let Some(child) = children.get(&(0, at)).filter(|child| !child.hash.is_zero()) {
                disk[at as usize] = self.block(&packs, child).await;
            }
        }
        (children, disk)
    }

    /// Whether every root of the catalog reads as it should.
    pub(super) async fn check(&self) -> Result<(), String> {
        let roots = self.roots.borrow().clone();
        for (id, (root, values)) in roots {
            let (_, disk) = self.read(&root).await.ok_or_else(|| format!("root {id} has lost content"))?;
            if !values.iter().zip(&disk).all(|(value, found)| block(*value) == *found) {
                return Err(format!("root {id} reads as something else"));
            }
        }
        Ok(())
    }
}

pub(super) fn open_packs(directory: &Path) -> Arc<TestPacks> {
    let of_packs = directory.to_owned();
    Packs::new(directory, move |number| {
        let path = of_packs.join(pack_name(number));
        let open = |error| ImageError::open(&path, error);
        let file = HostStorage.open(&path, OpenOptions::READ).map_err(open)?;
        let size = file.size().map_err(open)?;
        Ok((file, 0..size))
    })
}

/// How a seal may break the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Breach {
    /// It does not pin the root that it builds upon.
    pub(super) pins_no_base: bool,
    /// It refers to what it found though it could not hold the pack.
    pub(super) holds_nothing: bool,
}

/// A seal, step by step.
pub(super) struct Seal {
    pub(super) pin: Pin,
    breach: Breach,
    values: Vec<u64>,
    /// What the base's tree holds, by level and position.
    base: HashMap<(u32, u64), Child>,
    leaves: Vec<Child>,
    /// The first block that it has stored of each content.
    first: HashMap<Hash, usize>,
    frame: Vec<u64>,
    frame_at: Vec<usize>,
    writer: Option<PackWriter<BlockingEngine>>,
}

impl Seal {
    /// Begins to seal a disk that holds these blocks, over a base or nothing; none when the base has lost content.
    pub(super) async fn begin(
        store: &TestStore,
        values: Vec<u64>,
        base: Option<Root>,
        breach: Breach,
    ) -> Option<Self> {
        let pinned: Vec<Root> = base.into_iter().filter(|_| !breach.pins_no_base).collect();
        let pin = store.pins.pin(&pinned);
        let base = match base {
            Some(base) => store.read(&base).await?.0,
            None => HashMap::new(),
        };
        let (leaves, frame, frame_at) = (Vec::new(), Vec::new(), Vec::new());
        Some(Self { pin, breach, values, base, leaves, first: HashMap::new(), frame, frame_at, writer: None })
    }

    /// A place for content that needs none of its own.
    fn known(&self, store: &TestStore, key: (u32, u64), hash: Hash, random: &mut Random) -> Option<Child> {
        if hash.is_zero() {
            return Some(Child::ZERO);
        }
        if let Some(child) = self.base.get(&key).filter(|child| child.hash == hash) {
            return Some(*child);
        }
        let found = store.index.0.borrow().get(&hash).cloned().unwrap_or_default();
        let mut free = found.into_iter().filter(|place| {
            let is_held = self.pin.hold(place.pack());
            is_held || self.breach.holds_nothing
        });
        let place = free.next().filter(|_| !random.percent(5))?;
        Some(Child { hash, place })
    }

    /// Goes on by some blocks; whether all are done.
    pub(super) async fn step(&mut self, store: &TestStore, count: usize, random: &mut Random) -> bool {
        for _ in 0..count.min(self.values.len() - self.leaves.len()) {
            let at = self.leaves.len();
            let value = self.values[at];
            let hash = Hash::of_block(&block(value));
            let known = self.known(store, (0, at as u64), hash, random);
            // Most of what it holds twice itself is stored once: its place is known when its frame is.
            let is_again = known.is_none() && self.first.contains_key(&hash) && !random.percent(20);
            if known.is_none() && !is_again {
                self.first.entry(hash).or_insert(at);
                self.frame.push(value);
                self.frame_at.push(at);
            }
            self.leaves.push(known.unwrap_or(Child { hash, place: Place::NONE }));
            if self.frame.len() == 8 {
                self.end_frame(store);
            }
        }
        self.leaves.len() == self.values.len()
    }

    fn end_frame(&mut self, store: &TestStore) {
        if self.frame.is_empty() {
            return;
        }
        let blocks: Vec<Vec<u8>> = self.frame.drain(..).map(block).collect();
        let hashes: Vec<Hash> = blocks.iter().map(|block| Hash::of_block(block)).collect();
        let writer = self.writer.get_or_insert_with(|| store.writer(PackKind::Data));
        let record = NewRecord::frame(&mut Coder::new(1).unwrap(), &blocks.concat());
        let place = writer.push(record, &hashes);
        for (i, at) in self.frame_at.drain(..).enumerate() {
            self.leaves[at].place = place.with_index(i);
        }
    }

    /// Writes what is left, and the nodes; publishes the packs: the root.
    pub(super) async fn publish(&mut self, store: &TestStore, random: &mut Random) -> Root {
        self.end_frame(store);
        for at in 0..self.leaves.len() {
            let leaf = self.leaves[at];
            if !leaf.hash.is_zero() && leaf.place.is_none() {
                self.leaves[at] = self.leaves[self.first[&leaf.hash]];
            }
        }
        let mut nodes = store.writer(PackKind::Nodes);
        let height = height_of(self.leaves.len() as u64);
        let mut children = self.leaves.clone();
        for level in 1..=height {
            let mut parents: Vec<Child> = Vec::new();
            for (at, below) in (0..).zip(children.chunks(FANOUT)) {
                let mut node = Node::zero(level);
                node.children[..below.len()].copy_from_slice(below);
                let hash = node.hash();
                let known = self.known(store, (level, at), hash, random);
                let known = known.or_else(|| parents.iter().find(|child| child.hash == hash).copied());
                parents.push(
                    known.unwrap_or_else(|| Child {
                        hash,
                        place: nodes.push(NewRecord::node(&node), &[hash]),
                    }),
                );
            }
            children = parents;
        }
        let nodes = if nodes.bytes() > 0 { Some(nodes) } else { None };
        for writer in self.writer.take().into_iter().chain(nodes) {
            self.pin.begin_pack(writer.number());
            let written = writer.finish().await.unwrap();
            store.publish(written.number).await;
        }
        Root { size: self.leaves.len() as u64 * 4096, tree: children[0] }
    }
}

/// Seals a disk at once: its number in the catalog.
pub(super) fn seal(store: &Rc<TestStore>, values: Vec<u64>, base: Option<u64>, random: u64) -> u64 {
    let of_task = Rc::clone(store);
    store.run(async move {
        let mut random = Random(random);
        let base = base.map(|base| of_task.roots.borrow()[&base].0);
        let mut seal = Seal::begin(&of_task, values.clone(), base, Breach::default()).await.unwrap();
        seal.step(&of_task, usize::MAX, &mut random).await;
        let root = seal.publish(&of_task, &mut random).await;
        of_task.commit(root, values)
    })
}
