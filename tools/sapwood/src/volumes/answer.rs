//! What operations answer, for the command line and for other programs: `docs/daemon-api.json` describes it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::sealed::SealStats;
use sapwood_store::Id;
use sapwood_store::rows::{NodeState, Notes, Space};
use serde::{Deserialize, Serialize};

/// Nothing to say.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Done {}

/// A volume or snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// `volume` or `volume@snapshot`.
    pub name: String,
    /// Its id.
    pub id: Id,
    /// What holds it.
    pub state: State,
    /// The snapshot that it lies over, by name.
    pub parent: Option<String>,
    /// Size of its disk in bytes.
    pub virtual_size: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Not to be deleted.
    pub protected: bool,
    /// Free text.
    pub description: String,
    /// Keys and values.
    pub labels: BTreeMap<String, String>,
    /// Bytes that nothing else needs, as far as that was found out.
    pub exclusive_bytes: Option<u64>,
    /// Bytes that others need, too.
    pub shared_bytes: Option<u64>,
    /// When that was found, in milliseconds since 1970.
    pub space_ms: Option<u64>,
    /// Of a volume: how many snapshots it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<u64>,
    /// Where it is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached: Option<Serving>,
    /// Why it could not be attached again when the daemon began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach_failed: Option<String>,
}

/// What an entry is, and what holds its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A volume, which its guest writes.
    Volume,
    /// A snapshot that holds nothing beyond what its parent does.
    Bare,
    /// A snapshot whose contents are a layer that nobody writes any more.
    Frozen,
    /// A snapshot in packs.
    Sealed,
}

impl State {
    /// That of a snapshot.
    pub fn of(state: &NodeState) -> Self {
        match state {
            NodeState::Bare => Self::Bare,
            NodeState::Frozen { .. } => Self::Frozen,
            _ => Self::Sealed,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Bare => "bare",
            Self::Frozen => "frozen",
            Self::Sealed => "sealed",
        }
    }
}

impl Entry {
    /// An entry without what only some have.
    pub fn new(id: Id, name: String, state: State, notes: Notes, space: Option<Space>) -> Self {
        Self {
            name,
            id,
            state,
            parent: None,
            virtual_size: 0,
            created_ms: 0,
            protected: notes.protected,
            description: notes.description,
            labels: notes.labels,
            exclusive_bytes: space.map(|space| space.exclusive),
            shared_bytes: space.map(|space| space.shared),
            space_ms: space.map(|space| space.found_ms),
            snapshots: None,
            attached: None,
            attach_failed: None,
        }
    }
}

/// How something is served.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Serving {
    /// Where a virtual machine connects.
    pub socket: PathBuf,
    /// Virtqueues.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// A virtual machine is connected.
    pub frontend_connected: bool,
    /// Requests that were taken since it was attached.
    pub requests: u64,
}

/// Several of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Entries {
    /// Volumes by name, snapshots by time.
    pub entries: Vec<Entry>,
}

/// The trees of a store.
#[derive(Debug, Serialize, Deserialize)]
pub struct Forest {
    /// All snapshots that have a name, and all volumes, each after what it lies over; by time where
    /// several lie over the same.
    pub entries: Vec<Entry>,
    /// Deleted snapshots that are kept because others need them.
    pub nameless: u64,
}

/// What was made.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Made {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: Id,
    /// Size of its disk in bytes.
    pub virtual_size: u64,
}

/// What was made, several at once.
#[derive(Debug, Serialize, Deserialize)]
pub struct MadeAll {
    /// In the order asked for.
    pub made: Vec<Made>,
}

/// Where a volume went on from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Switched {
    /// The snapshot.
    pub to: String,
}

/// A change of size.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Resized {
    /// In bytes, before.
    pub old_size: u64,
    /// In bytes, now.
    pub size: u64,
}

/// A store.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stat {
    /// Its directory.
    pub path: PathBuf,
    /// Its id.
    pub id: Id,
    /// How many volumes it has.
    pub volumes: u64,
    /// Snapshots that hold nothing beyond what their parents do.
    pub bare: u64,
    /// Snapshots whose contents are a layer, and are yet to be sealed.
    pub frozen: u64,
    /// Snapshots that are sealed.
    pub sealed: u64,
    /// Of all these, those that were deleted and are kept because others need them.
    pub nameless: u64,
    /// How many volumes and snapshots are attached.
    pub attached: u64,
    /// Bytes that its files take: layers,
    pub layer_bytes: u64,
    /// packs,
    pub pack_bytes: u64,
    /// the index,
    pub index_bytes: u64,
    /// and the catalog.
    pub catalog_bytes: u64,
    /// Bytes of packs that are needed, as far as collections have counted.
    pub live_bytes: u64,
    /// Bytes of the blocks in packs before they were compressed.
    pub block_bytes: u64,
    /// Bytes of blocks for each byte of packs.
    pub compression: Option<f64>,
    /// Bytes that sealed snapshots hold, by the last account,
    pub referenced_bytes: Option<u64>,
    /// of these each different block once,
    pub unique_bytes: Option<u64>,
    /// and what that takes in packs.
    pub stored_bytes: Option<u64>,
    /// Bytes that snapshots hold for each byte of different blocks, by the last account.
    pub deduplication: Option<f64>,
    /// When that was, in milliseconds since 1970.
    pub account_ms: Option<u64>,
    /// Most bytes that it may take.
    pub quota: Option<u64>,
    /// Bytes of the file system that are left to others.
    pub reserve: Option<u64>,
    /// Shares of the space in percent at which is warned.
    pub watermarks: Vec<u8>,
    /// Bytes that it may still take.
    pub left_bytes: Option<u64>,
    /// What it takes, in percent of that and of what is left.
    pub full_percent: Option<u8>,
    /// The highest watermark that is reached.
    pub watermark: Option<u8>,
}

/// Something that happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Event {
    /// Its number, from 1.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// What kind of thing.
    pub kind: String,
    /// What a person should read.
    pub message: String,
}

/// What happened lately.
#[derive(Debug, Serialize, Deserialize)]
pub struct Events {
    /// The newest last.
    pub events: Vec<Event>,
}

/// What sealing counted.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// Bytes of disk that were read.
    pub read_bytes: u64,
    /// Of these, zeroes.
    pub zero_bytes: u64,
    /// Of these, what was stored already.
    pub duplicate_bytes: u64,
    /// Of these, what was stored,
    pub unique_bytes: u64,
    /// and what it takes compressed.
    pub stored_bytes: u64,
    /// What the nodes of the tree take.
    pub node_bytes: u64,
}

impl Counts {
    /// Adds those of another one.
    pub fn add(&mut self, more: &Self) {
        self.read_bytes += more.read_bytes;
        self.zero_bytes += more.zero_bytes;
        self.duplicate_bytes += more.duplicate_bytes;
        self.unique_bytes += more.unique_bytes;
        self.stored_bytes += more.stored_bytes;
        self.node_bytes += more.node_bytes;
    }
}

impl From<&SealStats> for Counts {
    fn from(stats: &SealStats) -> Self {
        Self {
            read_bytes: stats.blocks_read * BLOCK_SIZE,
            zero_bytes: stats.zero * BLOCK_SIZE,
            duplicate_bytes: stats.duplicate * BLOCK_SIZE,
            unique_bytes: stats.unique * BLOCK_SIZE,
            stored_bytes: stats.stored_bytes,
            node_bytes: stats.node_bytes,
        }
    }
}

/// What was imported.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Imported {
    /// The snapshot, `volume@snapshot`.
    pub name: String,
    /// The volume's id.
    pub volume: Id,
    /// The snapshot's id.
    pub snapshot: Id,
    /// Size of its disk in bytes.
    pub virtual_size: u64,
    /// By what the disk is known, here and anywhere.
    pub hash: String,
    /// Bytes of packs that were written.
    pub pack_bytes: u64,
    /// Counts.
    pub sealed: Counts,
}

/// A snapshot that was sealed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SealedOne {
    /// `volume@snapshot`; null: one that was deleted and is needed by others.
    pub name: Option<String>,
    /// All of it, not a part.
    pub whole: bool,
    /// Counts.
    pub sealed: Counts,
}

/// What was sealed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sealed {
    /// In the order in which it was done.
    pub snapshots: Vec<SealedOne>,
}

/// What a collection has done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Collected {
    /// Packs that are gone, those that were rewritten included.
    pub packs_dropped: u64,
    /// Packs of which something was needed, and was moved.
    pub packs_rewritten: u64,
    /// Bytes of the files that are gone.
    pub bytes_freed: u64,
    /// Bytes of new packs.
    pub bytes_written: u64,
    /// Packs that work in progress holds: they are left to the next collection.
    pub packs_held: u64,
    /// Packs that had to stay because something in them that is needed is damaged, and what.
    pub packs_kept: Vec<String>,
    /// It was told to stop, and left a part of the work to the next one.
    pub stopped: bool,
}

/// A range of bytes of a disk.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Range {
    /// The first of them.
    pub start: u64,
    /// How many.
    pub length: u64,
}

impl From<&std::ops::Range<u64>> for Range {
    fn from(range: &std::ops::Range<u64>) -> Self {
        Self { start: range.start, length: range.end - range.start }
    }
}

/// A snapshot or a volume of which something cannot be read.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Touched {
    /// `volume` or `volume@snapshot`; of a deleted snapshot its id.
    pub name: String,
    /// Bytes of its disk that cannot be read.
    pub ranges: Vec<Range>,
    /// How many more ranges there are.
    pub ranges_left_out: u64,
    /// Nothing else lies in the ranges.
    pub exact: bool,
    /// The snapshot that holds what is damaged, if that is not its own.
    pub through: Option<String>,
    /// What is wrong.
    pub why: String,
}

/// What a scrub has found.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Scrub {
    /// Everything is as it was written.
    pub sound: bool,
    /// Bytes of packs that were read.
    pub bytes: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Layers that were read.
    pub layers: u64,
    /// Layers of volumes that are attached: they were not read.
    pub in_use: Vec<PathBuf>,
    /// What is damaged: in packs the first thousand of it, in layers, in the index.
    pub damage: Vec<String>,
    /// The index was damaged, and was made again from the packs.
    pub index_mended: bool,
    /// What that touches.
    pub touched: Vec<Touched>,
}

/// What an account has found of everything; what it has found of each is in the lists.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Accounted {
    /// Snapshots, deleted ones that others need included.
    pub snapshots: u64,
    /// Volumes.
    pub volumes: u64,
    /// Bytes of the blocks that sealed snapshots hold, each counted once for each snapshot that holds it.
    pub referenced_bytes: Option<u64>,
    /// Bytes of these blocks, each counted once.
    pub unique_bytes: u64,
    /// Bytes that they take in packs, with the trees over them.
    pub stored_bytes: u64,
}

/// What a backup holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackedUp {
    /// The directory of the copy.
    pub path: PathBuf,
    /// Files that were copied; the catalog is not one of them.
    pub files: u64,
    /// Bytes of these that were copied.
    pub bytes: u64,
    /// Volumes that may have been written since their newest snapshot: in the copy they are what that is.
    pub without_heads: Vec<String>,
}

/// What was exported.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Exported {
    /// The snapshot, `volume@snapshot`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// By what the disk is known, here and anywhere.
    pub hash: String,
    /// Of an increment: by what the disk is known that it needs.
    pub base: Option<String>,
    /// Counts.
    pub sealed: Counts,
}

/// In what two snapshots differ.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Diff {
    /// Size of the older disk in bytes; that of the other one, where there is none.
    pub from_size: u64,
    /// Size of the newer disk in bytes.
    pub to_size: u64,
    /// Bytes in which they differ.
    pub bytes: u64,
    /// Where, in order and apart.
    pub extents: Vec<Range>,
}

/// What a check has found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Checked {
    /// What is not as it should be.
    pub problems: Vec<Problem>,
    /// The highest watermark that is reached.
    pub watermark: Option<u8>,
}

/// Something that is not as it should be.
#[derive(Debug, Serialize, Deserialize)]
pub struct Problem {
    /// Something is missing or wrong; else it is a leftover of a crash, which does no harm.
    pub damage: bool,
    /// A volume or snapshot by name, a file, a row.
    pub subject: String,
    /// What is wrong.
    pub text: String,
}
