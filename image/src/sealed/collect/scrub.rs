//! Reading everything, and saying what is damaged.
//!
//! A pack is read once, from its first byte to its last, in large reads. Every byte of it is looked at: those of its header,
//! trailer and pages of entries by their checksums, those of records by theirs and by the hashes of what they hold, which must be
//! those that the pages list, and what fills up the last block by being zero.

use std::fmt;
use std::path::PathBuf;

use super::finder::{Bad, Finder, Locate};
use super::records::Records;
use crate::error::{ErrorKind, ImageError};
use crate::sealed::entries::Entry;
use crate::sealed::hash::{Hash, is_zero};
use crate::sealed::header::PackKind;
use crate::sealed::pack::Pack;
use crate::sealed::place::Place;
use crate::sealed::record::{Record, decode_record};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Findings listed in full; more are counted.
const LISTED_MAX: usize = 1000;
/// Pages of entries read at a time.
const PAGES_AT_ONCE: u32 = 64;

/// A place where something is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The number of the pack.
    pub pack: u32,
    /// The file, where there is one.
    pub path: PathBuf,
    /// The byte in the file, where it is known.
    pub offset: Option<u64>,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack {} ({})", self.pack, self.path.display())?;
        match self.offset {
            Some(offset) => write!(f, " at offset {offset:#x}: {}", self.what),
            None => write!(f, ": {}", self.what),
        }
    }
}

/// What was found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Damage in the order in which it was found, the first thousand of it.
    pub damage: Vec<Damage>,
    /// All damage, what is not listed included.
    pub damage_count: u64,
    /// Packs read to their end.
    pub packs: u64,
    /// Bytes of these packs.
    pub bytes: u64,
    /// Blocks whose hash was compared.
    pub blocks: u64,
    /// Nodes whose hash was compared.
    pub nodes: u64,
}

impl Findings {
    fn add(&mut self, pack: u32, error: ImageError) {
        self.damage_count += 1;
        if self.damage.len() == LISTED_MAX {
            return;
        }
        let (offset, what) = match &error.kind {
            ErrorKind::Corrupt { field, offset, detail } => (Some(*offset), format!("{field}: {detail}")),
            kind => (None, kind.to_string()),
        };
        self.damage.push(Damage { pack, path: error.path, offset, what });
    }
}

/// Reads packs, one after the other, and then says what roots miss.
pub struct Scrub<E: Engine, L> {
    pub(super) finder: Finder<E, L>,
    findings: Findings,
}

impl<E: Engine, L: Locate<E>> Scrub<E, L> {
    /// Nothing was read yet. The finder knows the packs that there are.
    pub fn new(mut finder: Finder<E, L>) -> Self {
        finder.tolerant = true;
        Self { finder, findings: Findings::default() }
    }

    /// What was found so far.
    pub fn findings(&self) -> &Findings {
        &self.findings
    }

    /// What was found to be damaged so far, for the [`Finder`] of a collection.
    pub fn into_bad(self) -> Bad {
        self.finder.bad
    }

    /// Reads a pack. Damage is a finding and no error.
    ///
    /// # Errors
    /// When the work was stopped before it began.
    pub async fn pack(&mut self, number: u32) -> Result<(), ImageError> {
        self.finder.pace.go_on(self.finder.path())?;
        let pack = match self.finder.packs.pack(&self.finder.io, number).await {
            Ok(pack) => pack,
            Err(error) => {
                self.finder.bad.add_pack(number);
                self.findings.add(number, error);
                return Ok(());
            }
        };
        if let Err(error) = pack.verify_ends(&self.finder.io).await {
            // Who opens it the next time cannot read it.
            self.finder.bad.add_pack(number);
            self.findings.add(number, error);
        }
        let (entries, are_all) = self.entries(&pack).await;
        self.records(&pack, &entries, are_all).await;
        self.findings.packs += 1;
        self.findings.bytes += pack.bytes();
        Ok(())
    }

    /// The entries of all pages that can be read, and whether these are all.
    async fn entries(&mut self, pack: &Pack<E::File>) -> (Vec<Entry>, bool) {
        let (mut entries, mut are_all) = (Vec::new(), true);
        let io = self.finder.io.clone();
        for first in (0..pack.pages()).step_by(PAGES_AT_ONCE as usize) {
            let pages = first..pack.pages().min(first + PAGES_AT_ONCE);
            self.finder.pace.spend(&io, u64::from(pages.end - pages.start) * BLOCK_SIZE).await;
            if let Ok(some) = pack.entries_in(&io, pages.clone()).await {
                entries.extend(some);
                continue;
            }
            for page in pages {
                match pack.entries_in(&io, page..page + 1).await {
                    Ok(some) => entries.extend(some),
                    Err(error) => {
                        are_all = false;
                        self.findings.add(pack.number(), error);
                    }
                }
            }
        }
        if are_all && entries.len() != pack.entries() as usize {
            let why =
                format!("its pages list {} entries, and its trailer says {}", entries.len(), pack.entries());
            self.findings.add(pack.number(), pack.damaged("entries", pack.records_end(), &why));
            are_all = false;
        }
        (entries, are_all)
    }

    /// Reads all records of a pack and compares them with its entries.
    async fn records(&mut self, pack: &Pack<E::File>, entries: &[Entry], are_all: bool) {
        let mut records = Records::new(&self.finder.io, pack, &self.finder.pace);
        let mut listed = entries.chunk_by(|a, b| a.place.offset() == b.place.offset()).peekable();
        let (mut at, mut count) = (BLOCK_SIZE, 0);
        while count < pack.records() {
            while let Some(entries) = listed.next_if(|entries| entries[0].place.offset() < at) {
                let offset = entries[0].place.offset();
                self.bad(pack, offset, &"a record is listed there, and there is none");
            }
            let list = listed.next_if(|entries| entries[0].place.offset() == at).unwrap_or_default();
            let len = match records.at(at, Place::LEN_MAX).await {
                Ok(bytes) => self.record(pack, at, bytes, list, are_all),
                Err(error) => {
                    self.finder.bad.add_record(pack.number(), at);
                    self.findings.add(pack.number(), error);
                    None
                }
            };
            count += 1;
            let next = listed.peek().map(|entries| entries[0].place.offset());
            match len.map(|len| at + len).or(next) {
                Some(next) => at = next,
                // The last one is damaged, or nobody knows where the next one begins.
                None if count == pack.records() => return,
                None => {
                    // What a place says is there can be read nevertheless: the walk over the roots does.
                    let why = "it is not known where the next one begins: the rest of the pack was not read";
                    return self.findings.add(pack.number(), pack.damaged("record", at, &why));
                }
            }
        }
        for entries in listed {
            self.bad(pack, entries[0].place.offset(), &"a record is listed there, and there is none");
        }
        self.padding(pack, &mut records, at).await;
    }

    /// Compares one record, at the start of `bytes`, with what is listed of it: its length, if it is known.
    fn record(
        &mut self,
        pack: &Pack<E::File>,
        at: u64,
        bytes: &[u8],
        list: &[Entry],
        are_all: bool,
    ) -> Option<u64> {
        let (record, len) = match decode_record(&pack.id(), at, bytes) {
            Ok(decoded) => decoded,
            Err(why) => {
                self.bad(pack, at, &why);
                return None;
            }
        };
        let (kind, hashes): (_, Vec<Hash>) = match record {
            Record::Frame(frame) => (PackKind::Data, frame.hashes().collect()),
            Record::Node(node) => (PackKind::Nodes, vec![node.hash()]),
        };
        match kind {
            PackKind::Data => self.findings.blocks += hashes.len() as u64,
            PackKind::Nodes => self.findings.nodes += 1,
        }
        let is_listed = |entry: &Entry| {
            hashes.get(entry.place.index()) == Some(&entry.hash)
                && entry.place.read_len() == len.next_multiple_of(Place::LEN_UNIT)
        };
        if kind != pack.kind() {
            self.bad(pack, at, &"it is of another kind than its pack");
        } else if !list.iter().all(is_listed) || (are_all && list.len() != hashes.len()) {
            self.bad(pack, at, &"it does not hold what the pack's pages list");
        }
        Some(len as u64)
    }

    /// What lies between the last record and the pages.
    async fn padding(&mut self, pack: &Pack<E::File>, records: &mut Records<E>, at: u64) {
        let rest = pack.records_end().saturating_sub(at);
        if rest >= BLOCK_SIZE {
            let why = format!("{rest} bytes lie between the last record and the pages");
            return self.findings.add(pack.number(), pack.damaged("pack", at, &why));
        }
        if rest > 0 {
            match records.at(at, rest as usize).await {
                Ok(bytes) if is_zero(bytes) => {}
                Ok(_) => {
                    let why = "the bytes after the last record are not zero";
                    self.findings.add(pack.number(), pack.damaged("pack", at, &why));
                }
                Err(error) => self.findings.add(pack.number(), error),
            }
        }
    }

    /// A damaged record.
    fn bad(&mut self, pack: &Pack<E::File>, offset: u64, why: &dyn fmt::Display) {
        self.finder.bad.add_record(pack.number(), offset);
        self.findings.add(pack.number(), pack.damaged("record", offset, why));
    }
}
