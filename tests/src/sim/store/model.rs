//! What a store must hold: a model in memory, simple enough to be seen to be right.

use std::collections::{BTreeMap, BTreeSet};

/// Blocks of every disk.
pub const BLOCKS: usize = 24;

/// What a block may read as: one mark, or several when a write of it was cut off. 0 is zeroes.
pub type Marks = BTreeSet<u32>;

/// What a disk holds, block by block.
pub type Content = Vec<Marks>;

/// A disk of zeroes.
pub fn zeroes() -> Content {
    vec![[0].into(); BLOCKS]
}

/// Whatever either of two disks holds.
pub fn either(a: &Content, b: &Content) -> Content {
    a.iter().zip(b).map(|(a, b)| a | b).collect()
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// What its disk holds.
    pub content: Content,
    /// Of blocks that were written, and not synced, when the process was killed: what a power cut may bring
    /// back.
    pub unsynced: BTreeMap<usize, Marks>,
    /// Whether it holds writes that are in no snapshot, if that is known.
    pub is_dirty: Option<bool>,
    /// The snapshots below it, by number, from the bottom up.
    pub line: Vec<u64>,
    /// Whether it is protected.
    pub protected: bool,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What its disk holds.
    pub content: Content,
    /// Its number: no other ever has the same.
    pub number: u64,
    /// The snapshots below it.
    pub line: Vec<u64>,
    /// Whether it is protected.
    pub protected: bool,
}

impl Snapshot {
    /// The line of what lies over it.
    pub fn line_over(&self) -> Vec<u64> {
        self.line.iter().copied().chain([self.number]).collect()
    }
}

/// A file that holds a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// What its disk holds.
    pub content: Content,
    /// The snapshot that it is an increment over.
    pub base: Option<Snapshot>,
    /// Whether it was reported, or seen after a power cut.
    pub is_durable: bool,
}

/// A store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// By name.
    pub volumes: BTreeMap<String, Volume>,
    /// By volume and name.
    pub snapshots: BTreeMap<(String, String), Snapshot>,
    /// Snapshots that were deleted: the store may still have them.
    pub deleted: Vec<Snapshot>,
    /// Archives by number.
    pub archives: BTreeMap<u64, Archive>,
    next: u64,
}

impl Model {
    /// A number that no snapshot had yet.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The topmost snapshot of a line that is still there.
    pub fn topmost(&self, line: &[u64]) -> Option<(String, String)> {
        line.iter().rev().find_map(|number| {
            let found = self.snapshots.iter().find(|(_, snapshot)| snapshot.number == *number);
            found.map(|(name, _)| name.clone())
        })
    }

    /// Everything that is there with its place in the tree, without contents.
    pub fn summary(&self) -> BTreeSet<String> {
        let parent = |line: &[u64]| self.topmost(line).map(|(volume, name)| format!("{volume}@{name}"));
        let volumes =
            self.volumes.iter().map(|(name, row)| line(name, parent(&row.line), row.protected, true));
        let snapshots = self.snapshots.iter().map(|((volume, name), row)| {
            line(&format!("{volume}@{name}"), parent(&row.line), row.protected, false)
        });
        volumes.chain(snapshots).chain(self.archives.keys().map(|number| archive_name(*number))).collect()
    }

    /// A sync failed: what was not synced of volumes may be lost.
    pub fn sync_failed(&mut self) {
        for volume in self.volumes.values_mut() {
            for (block, marks) in std::mem::take(&mut volume.unsynced) {
                volume.content[block].extend(marks);
            }
        }
    }

    /// The power failed: the same, and names of archives.
    pub fn power_cut(mut self) -> Vec<Self> {
        self.sync_failed();
        let is_durable = |archive: &Archive| archive.is_durable;
        let Some(number) = self.archives.iter().find(|(_, archive)| !is_durable(archive)).map(|(n, _)| *n)
        else {
            return vec![self];
        };
        let mut without = self.clone();
        without.archives.remove(&number);
        self.archives.get_mut(&number).expect("it is there").is_durable = true;
        [self, without].into_iter().flat_map(Self::power_cut).collect()
    }
}

/// The name of an archive.
pub fn archive_name(number: u64) -> String {
    format!("{number}.archive")
}

/// One line of a summary.
pub fn line(name: &str, parent: Option<String>, protected: bool, is_head: bool) -> String {
    let parent = parent.unwrap_or_else(|| "nothing".to_owned());
    format!("{name} over {parent}, protected: {protected}, head: {is_head}")
}
