//! From hashes and places to entries of packs that are there.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::pace::Pace;
use super::table::{Fingerprints, Table};
use crate::error::{ErrorKind, ImageError};
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::node::{Child, Node};
use crate::sealed::packs::Packs;
use crate::sealed::place::Place;
use crate::sealed::record::{Record, decode_record};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Bytes of tables kept.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// What tables mostly take, for the cache's own tables.
const TABLE_BYTES_TYPICAL: u64 = 256 << 10;
/// Bytes read for a node and its neighbours, which were stored together.
const WINDOW_LEN: u64 = 64 << 10;
/// Windows kept.
const WINDOWS_MAX: usize = 64;
/// Damaged records that are remembered one by one.
const BAD_RECORDS_MAX: usize = 1 << 20;

/// Where content may be when a place says nothing or no longer holds: the exact index.
pub trait Locate<E: Engine> {
    /// Places that may hold content with this hash, in any order. All that are known belong there: a collection goes by them.
    ///
    /// # Errors
    /// When the index cannot be read. A hash that is nowhere is no error.
    fn locate(&self, io: &Io<E>, hash: &Hash) -> impl Future<Output = Result<Vec<Place>, ImageError>>;
}

/// An entry of a pack: a block or a node as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) place: Place,
    pub(super) number: u32,
    /// Entries in its pack.
    pub(super) entries: u32,
    /// Its share of the stored bytes.
    pub(super) bytes: u32,
    /// Bytes of all records of its pack.
    pub(super) pack_bytes: u64,
}

impl Spot {
    pub(super) fn pack(&self) -> u32 {
        self.place.pack()
    }
}

/// What was found to be damaged: content there is looked for elsewhere. A scrub's findings, for a collection.
#[derive(Clone, Debug, Default)]
pub struct Bad {
    packs: BTreeSet<u32>,
    /// Places of records.
    records: BTreeSet<(u32, u64)>,
}

impl Bad {
    pub(super) fn add_pack(&mut self, pack: u32) {
        self.packs.insert(pack);
    }

    pub(super) fn add_record(&mut self, pack: u32, offset: u64) {
        if self.records.len() < BAD_RECORDS_MAX {
            self.records.insert((pack, offset));
        } else {
            self.packs.insert(pack);
        }
    }

    /// What an error about a pack says of it: the record at an offset, or anything in it.
    pub(super) fn add_error(&mut self, pack: u32, error: &ImageError) {
        match &error.kind {
            ErrorKind::Corrupt { field: "record", offset, .. } => self.add_record(pack, *offset),
            _ => self.add_pack(pack),
        }
    }

    fn holds(&self, place: Place) -> bool {
        self.packs.contains(&place.pack()) || self.records.contains(&(place.pack(), place.offset()))
    }

    /// Whether something in a pack is damaged.
    pub(super) fn touches(&self, pack: u32) -> bool {
        let records = self.records.range((pack, 0)..=(pack, u64::MAX)).next();
        self.packs.contains(&pack) || records.is_some()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.records.is_empty()
    }
}

/// Weighs tables by their bytes.
#[derive(Clone)]
struct ByBytes;

impl Weighter<u32, Arc<Table>> for ByBytes {
    fn weight(&self, _: &u32, table: &Arc<Table>) -> u64 {
        table.bytes() as u64
    }
}

/// Finds content in packs, and reads nodes. What it keeps of packs is bounded: tables of 64 MiB together, nodes of 4 MiB.
pub struct Finder<E: Engine, L> {
    pub(super) io: Io<E>,
    pub(super) packs: Arc<Packs<E>>,
    locate: L,
    pub(super) pace: Arc<Pace>,
    /// The packs that there are.
    known: BTreeSet<u32>,
    keys: Fingerprints,
    tables: Cache<u32, Arc<Table>, ByBytes>,
    /// The table that was asked last.
    recent: Option<(u32, Arc<Table>)>,
    windows: Cache<(u32, u64), Arc<AlignedBuf>>,
    pub(super) bad: Bad,
    /// Packs without a table, with numbers for what was found there.
    unlisted: HashMap<u32, HashMap<u64, u32>>,
    /// Whether packs that cannot be read are passed over, and what is damaged counts as lost.
    pub(super) tolerant: bool,
    nodes_read: u64,
}

impl<E: Engine, L: Locate<E>> Finder<E, L> {
    /// Finds content in these packs, and in no others.
    pub fn new(
        io: &Io<E>,
        packs: &Arc<Packs<E>>,
        known: impl IntoIterator<Item = u32>,
        locate: L,
        pace: &Arc<Pace>,
    ) -> Self {
        let mut options = OptionsBuilder::new();
        options.weight_capacity(TABLE_BYTES_MAX);
        options.estimated_items_capacity((TABLE_BYTES_MAX / TABLE_BYTES_TYPICAL) as usize);
        let options = options.build().expect("capacity and weight are stated");
        let (hasher, cycle) = (DefaultHashBuilder::default(), DefaultLifecycle::default());
        Self {
            io: io.clone(),
            packs: Arc::clone(packs),
            locate,
            pace: Arc::clone(pace),
            known: known.into_iter().collect(),
            keys: Fingerprints::default(),
            tables: Cache::with_options(options, ByBytes, hasher, cycle),
            recent: None,
            windows: Cache::new(WINDOWS_MAX),
            bad: Bad::default(),
            unlisted: HashMap::new(),
            tolerant: false,
            nodes_read: 0,
        }
    }

    /// Knows what is damaged, from a [scrub](super::Scrub::into_bad): a collection goes by other copies of it, where there are any,
    /// and does not try to move it.
    #[must_use]
    pub fn with_bad(mut self, bad: Bad) -> Self {
        self.bad = bad;
        self
    }

    /// What is known to be damaged: what was said, and what collections have found since.
    pub fn bad(&self) -> &Bad {
        &self.bad
    }

    /// Replaces the packs that there are.
    pub fn know(&mut self, known: impl IntoIterator<Item = u32>) {
        self.known = known.into_iter().collect();
    }

    /// The packs that there are.
    pub fn known(&self) -> impl Iterator<Item = u32> {
        self.known.iter().copied()
    }

    /// Whether a pack is one of them.
    pub(super) fn knows(&self, pack: u32) -> bool {
        self.known.contains(&pack)
    }

    /// Nodes that were read so far.
    pub fn nodes_read(&self) -> u64 {
        self.nodes_read
    }

    /// What is stored of a child, which is not zero: where its place says, or else where the index does; of several the
    /// lowest place, so that the answer is the same every time. What is damaged counts where there is no other copy.
    pub(super) async fn find(&mut self, child: &Child, kind: PackKind) -> Result<Spot, ImageError> {
        let mut damaged = None;
        if !child.place.is_none()
            && let Some(spot) = self.at(child.place, &child.hash, kind).await?
        {
            if !self.bad.holds(spot.place) {
                return Ok(spot);
            }
            damaged = Some(spot);
        }
        let mut places = self.locate.locate(&self.io, &child.hash).await?;
        places.sort_unstable();
        for place in places {
            if let Some(spot) = self.at(place, &child.hash, kind).await? {
                if !self.bad.holds(spot.place) {
                    return Ok(spot);
                }
                damaged.get_or_insert(spot);
            }
        }
        damaged.ok_or_else(|| self.packs.missing(&child.hash))
    }

    /// The entry at a place, if it is that content.
    async fn at(&mut self, place: Place, hash: &Hash, kind: PackKind) -> Result<Option<Spot>, ImageError> {
        if !self.known.contains(&place.pack()) || (self.tolerant && self.bad.holds(place)) {
            return Ok(None);
        }
        if self.unlisted.contains_key(&place.pack()) {
            return Ok(self.read_at(place, hash, kind).await);
        }
        let table = match self.table(place.pack()).await {
            Ok(table) => table,
            Err(_) if self.tolerant => {
                self.unlisted.insert(place.pack(), HashMap::new());
                return Ok(self.read_at(place, hash, kind).await);
            }
            // It is known: maybe there is another copy.
            Err(_) if self.bad.packs.contains(&place.pack()) => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = table.find(place, hash, &self.keys).filter(|_| table.kind == kind);
        let (entries, pack_bytes) = (table.entries(), table.record_bytes());
        Ok(found.map(|found| Spot { place, number: found.number, entries, bytes: found.bytes, pack_bytes }))
    }

    /// The same, by reading what is there: for packs that have no table, because both their pages and a record are damaged.
    async fn read_at(&mut self, place: Place, hash: &Hash, kind: PackKind) -> Option<Spot> {
        let pack = match self.packs.pack(&self.io, place.pack()).await {
            Ok(pack) => pack,
            Err(_) => {
                self.bad.add_pack(place.pack());
                return None;
            }
        };
        let found = match kind {
            PackKind::Data => {
                let frame = pack.frame(&self.io, place).await.ok()?;
                Hash::of_block(frame.block(place.index())?)
            }
            PackKind::Nodes => pack.node(&self.io, place).await.ok()?.hash(),
        };
        if found != *hash || pack.kind() != kind {
            return None;
        }
        let numbers = self.unlisted.entry(place.pack()).or_default();
        let next = numbers.len() as u32;
        let number = *numbers.entry(place.key()).or_insert(next);
        let entries = pack.entries();
        (number < entries).then_some(Spot { place, number, entries, bytes: 0, pack_bytes: 0 })
    }

    async fn table(&mut self, number: u32) -> Result<Arc<Table>, ImageError> {
        if let Some((recent, table)) = &self.recent
            && *recent == number
        {
            return Ok(Arc::clone(table));
        }
        let table = match self.tables.get(&number) {
            Some(table) => Arc::clone(table),
            None => {
                let pack = self.packs.pack(&self.io, number).await?;
                let table = Arc::new(Table::load(&self.io, &pack, &self.pace, &self.keys).await?);
                self.tables.insert(number, Arc::clone(&table));
                table
            }
        };
        self.recent = Some((number, Arc::clone(&table)));
        Ok(table)
    }

    /// The node at a spot, which must have this hash and be of this level.
    pub(super) async fn node(&mut self, spot: &Spot, hash: &Hash, level: u32) -> Result<Node, ImageError> {
        let pack = self.packs.pack(&self.io, spot.pack()).await?;
        let offset = spot.place.offset();
        let start = offset / WINDOW_LEN * WINDOW_LEN;
        let key = (spot.pack(), start);
        let window = match self.windows.get(&key) {
            Some(window) => Arc::clone(window),
            None => {
                // One block more: a node is shorter, so all that begin in the window are in it.
                let end = (start + WINDOW_LEN + BLOCK_SIZE).min(pack.records_end());
                self.pace.spend(&self.io, end - start).await;
                let window = Arc::new(pack.read_blocks(&self.io, start..end).await?);
                self.windows.insert(key, Arc::clone(&window));
                window
            }
        };
        self.nodes_read += 1;
        let bytes = window.get((offset - start) as usize..).unwrap_or_default();
        let damaged = |why: &str| pack.damaged("record", offset, &format!("{why} (node {hash})"));
        let (record, _) = decode_record(&pack.id(), offset, bytes).map_err(damaged)?;
        match record {
            Record::Node(node) if node.hash() != *hash => Err(damaged("its hash is another one")),
            Record::Node(node) if node.level != level => {
                Err(damaged("it is on another level than it should be"))
            }
            Record::Node(node) => Ok(*node),
            Record::Frame(_) => Err(damaged("it is a frame")),
        }
    }

    /// For messages.
    pub(super) fn path(&self) -> &Path {
        self.packs.path()
    }
}
