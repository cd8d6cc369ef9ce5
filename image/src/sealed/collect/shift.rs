//! Moving what is live out of packs that are mostly dead.
//!
//! Every block and node that is moved has the hash that its pack lists, or its pack stays. New packs are complete, synced and
//! named, and the directory is synced, when the move ends.

use std::path::PathBuf;
use std::sync::Arc;

use super::finder::{Finder, Locate};
use super::mark::Marks;
use super::records::Records;
use crate::error::ImageError;
use crate::sealed::codec::Coder;
use crate::sealed::entries::Entry;
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::node::{Child, Node};
use crate::sealed::pack::Pack;
use crate::sealed::place::Place;
use crate::sealed::record::{FRAME_BLOCKS_MAX, NewRecord, Record, decode_record};
use crate::sealed::writer::{PACK_BYTES, PackWriter, Written};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Where new packs go.
pub struct Target<S> {
    /// Makes their files.
    pub storage: S,
    /// The directory that they are in.
    pub directory: PathBuf,
    /// Chooses a number for a pack: one that was never used.
    pub next_number: Box<dyn FnMut() -> Result<u32, ImageError>>,
    /// How blocks are compressed whose frame was live in part. Other frames stay as they are.
    pub level: i32,
    /// Blocks in such a frame.
    pub frame_blocks: usize,
    /// Bytes of records after which a pack is full.
    pub pack_bytes: u64,
}

impl<S> Target<S> {
    /// Packs of the usual size in a directory.
    pub fn new(
        storage: S,
        directory: PathBuf,
        next_number: impl FnMut() -> Result<u32, ImageError> + 'static,
        level: i32,
        frame_blocks: usize,
    ) -> Self {
        assert!((1..=FRAME_BLOCKS_MAX).contains(&frame_blocks), "blocks of a frame");
        let next_number = Box::new(next_number);
        Self { storage, directory, next_number, level, frame_blocks, pack_bytes: PACK_BYTES }
    }
}

/// What was moved where: 16 bytes for each block and node.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// By the old place's key; in rising order.
    blocks: Vec<(u64, Place)>,
    nodes: Vec<(u64, Place)>,
}

impl Moves {
    /// Where what was at a place is now, if it was moved.
    fn get(&self, kind: PackKind, place: Place) -> Option<Place> {
        let moves = match kind {
            PackKind::Data => &self.blocks,
            PackKind::Nodes => &self.nodes,
        };
        let found = moves.binary_search_by_key(&place.key(), |(old, _)| *old).ok()?;
        Some(moves[found].1)
    }

    /// The top of a tree with the place where it is now: for the catalog.
    pub fn refreshed(&self, top: Child) -> Child {
        Child { hash: top.hash, place: self.get(PackKind::Nodes, top.place).unwrap_or(top.place) }
    }
}

/// How much was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Blocks.
    pub blocks: u64,
    /// Nodes.
    pub nodes: u64,
    /// Frames copied as they were.
    pub frames_copied: u64,
    /// Frames made of blocks whose frames were live in part.
    pub frames_made: u64,
    /// Bytes read.
    pub bytes_read: u64,
}

/// Moves the live content of one pack after the other.
pub(super) struct Mover<'a, E: Engine, L, S> {
    finder: &'a mut Finder<E, L>,
    marks: &'a Marks,
    target: &'a mut Target<S>,
    coder: Coder,
    writer: Option<PackWriter<E>>,
    /// Blocks for the next frame, and what they are.
    gathered: Vec<u8>,
    gathered_entries: Vec<Entry>,
    written: Vec<Written>,
    moves: Moves,
    moved: Moved,
}

impl<'a, E: Engine, L: Locate<E>, S: Storage<File = E::File>> Mover<'a, E, L, S> {
    pub(super) fn new(
        finder: &'a mut Finder<E, L>,
        marks: &'a Marks,
        target: &'a mut Target<S>,
    ) -> Result<Self, ImageError> {
        let coder = Coder::new(target.level)
            .map_err(|error| ImageError::io(&target.directory, "make tables to compress for", error))?;
        Ok(Self {
            finder,
            marks,
            target,
            coder,
            writer: None,
            gathered: Vec::new(),
            gathered_entries: Vec::new(),
            written: Vec::new(),
            moves: Moves::default(),
            moved: Moved::default(),
        })
    }

    /// Moves what is live in a pack. The inner error is about the pack itself, which then has to stay.
    pub(super) async fn pack(&mut self, pack: &Pack<E::File>) -> Result<Result<(), ImageError>, ImageError> {
        let (blocks, nodes) = (self.moves.blocks.len(), self.moves.nodes.len());
        self.finder.pace.spend(&self.finder.io, u64::from(pack.pages()) * BLOCK_SIZE).await;
        let result = match pack.entries_in(&self.finder.io, 0..u32::MAX).await {
            Ok(entries) if pack.kind() == PackKind::Data => self.frames(pack, &entries).await,
            Ok(entries) => self.nodes(pack, &entries).await,
            Err(error) => Err(error),
        };
        self.moves.blocks[blocks..].sort_unstable();
        match result {
            Err(error) if error.path == pack.path() => {
                self.gathered.clear();
                self.gathered_entries.clear();
                self.moves.blocks.truncate(blocks);
                self.moves.nodes.truncate(nodes);
                self.note_damage(pack, &error).await;
                Ok(Err(error))
            }
            result => result.map(Ok),
        }
    }

    /// Takes down what is damaged in a pack, all of it: from now on it counts for as long as there is no other copy.
    async fn note_damage(&mut self, pack: &Pack<E::File>, error: &ImageError) {
        let (pace, number) = (Arc::clone(&self.finder.pace), pack.number());
        self.finder.bad.add_error(number, error);
        let Ok(entries) = pack.entries_in(&self.finder.io, 0..u32::MAX).await else {
            return self.finder.bad.add_pack(number);
        };
        let mut records = Records::new(&self.finder.io, pack, &pace);
        for record in entries.chunk_by(|a, b| a.place.offset() == b.place.offset()) {
            let (place, at) = (record[0].place, record[0].place.offset());
            let holds = |hashes: &[Hash]| {
                record.iter().all(|entry| hashes.get(entry.place.index()) == Some(&entry.hash))
            };
            let is_good =
                match records.at(at, place.read_len()).await.map(|b| decode_record(&pack.id(), at, b)) {
                    Ok(Ok((Record::Frame(frame), _))) => holds(&frame.hashes().collect::<Vec<_>>()),
                    Ok(Ok((Record::Node(node), _))) => holds(&[node.hash()]),
                    _ => false,
                };
            if !is_good {
                self.finder.bad.add_record(number, at);
            }
        }
    }

    async fn frames(&mut self, pack: &Pack<E::File>, entries: &[Entry]) -> Result<(), ImageError> {
        let pace = Arc::clone(&self.finder.pace);
        let mut records = Records::new(&self.finder.io, pack, &pace);
        let mut first = 0;
        for record in entries.chunk_by(|a, b| a.place.offset() == b.place.offset()) {
            let numbers = first..first + record.len() as u32;
            first = numbers.end;
            let live: Vec<Entry> = numbers
                .zip(record)
                .filter(|(number, _)| self.marks.is_live(pack.number(), *number))
                .map(|(_, entry)| *entry)
                .collect();
            if live.is_empty() {
                continue;
            }
            let (place, read) = (record[0].place, records.bytes_read);
            let bytes = records.at(place.offset(), place.read_len()).await?;
            let damaged = |why: &str| pack.damaged("record", place.offset(), &why);
            let (decoded, len) = decode_record(&pack.id(), place.offset(), bytes).map_err(damaged)?;
            let Record::Frame(frame) = decoded else { return Err(damaged("it is a node and no frame")) };
            for entry in &live {
                let block = frame.block(entry.place.index());
                if block.is_none_or(|block| Hash::of_block(block) != entry.hash) {
                    return Err(damaged("a block has another hash than the pack's list says"));
                }
            }
            if live.len() == frame.count() {
                self.push_blocks(pack.kind(), NewRecord::copied(&bytes[..len]), &live).await?;
                self.moved.frames_copied += 1;
            } else {
                for entry in &live {
                    self.gather(entry, frame.block(entry.place.index()).expect("it was verified")).await?;
                }
            }
            self.moved.bytes_read += records.bytes_read - read;
        }
        self.end_frame().await
    }

    /// Adds a block to the frame that is being made.
    async fn gather(&mut self, entry: &Entry, block: &[u8]) -> Result<(), ImageError> {
        self.gathered.extend(block);
        self.gathered_entries.push(*entry);
        if self.gathered.len() == self.target.frame_blocks * BLOCK_BYTES {
            self.end_frame().await?;
        }
        Ok(())
    }

    async fn end_frame(&mut self) -> Result<(), ImageError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let record = NewRecord::frame(&mut self.coder, &self.gathered);
        self.gathered.clear();
        let entries = std::mem::take(&mut self.gathered_entries);
        self.moved.frames_made += 1;
        self.push_blocks(PackKind::Data, record, &entries).await
    }

    async fn push_blocks(
        &mut self,
        kind: PackKind,
        record: NewRecord,
        entries: &[Entry],
    ) -> Result<(), ImageError> {
        let hashes: Vec<Hash> = entries.iter().map(|entry| entry.hash).collect();
        let place = self.push(kind, record, &hashes).await?;
        let moves = entries.iter().enumerate().map(|(i, entry)| (entry.place.key(), place.with_index(i)));
        self.moves.blocks.extend(moves);
        self.moved.blocks += entries.len() as u64;
        Ok(())
    }

    async fn nodes(&mut self, pack: &Pack<E::File>, entries: &[Entry]) -> Result<(), ImageError> {
        let pace = Arc::clone(&self.finder.pace);
        let mut records = Records::new(&self.finder.io, pack, &pace);
        for (number, entry) in (0..).zip(entries) {
            if !self.marks.is_live(pack.number(), number) {
                continue;
            }
            let (offset, read) = (entry.place.offset(), records.bytes_read);
            let bytes = records.at(offset, entry.place.read_len()).await?;
            let damaged = |why: &str| pack.damaged("record", offset, &why);
            let (decoded, _) = decode_record(&pack.id(), offset, bytes).map_err(damaged)?;
            self.moved.bytes_read += records.bytes_read - read;
            let Record::Node(mut node) = decoded else { return Err(damaged("it is a frame and no node")) };
            if node.hash() != entry.hash {
                return Err(damaged("it has another hash than the pack's list says"));
            }
            self.refresh(&mut node).await;
            let place = self.push(pack.kind(), NewRecord::node(&node), &[entry.hash]).await?;
            self.moves.nodes.push((entry.place.key(), place));
            self.moved.nodes += 1;
        }
        Ok(())
    }

    /// Gives a node's children the places where they are now. A child that is moved later keeps the old one: it is found by its hash.
    async fn refresh(&mut self, node: &mut Node) {
        let kind = if node.level == 1 { PackKind::Data } else { PackKind::Nodes };
        for child in node.children.iter_mut().filter(|child| !child.hash.is_zero()) {
            if child.place.is_none() || !self.finder.knows(child.place.pack()) {
                let found = self.finder.find(child, kind).await;
                child.place = found.map_or(Place::NONE, |spot| spot.place);
            }
            child.place = self.moves.get(kind, child.place).unwrap_or(child.place);
        }
    }

    /// Appends a record to the pack that is being made.
    async fn push(
        &mut self,
        kind: PackKind,
        record: NewRecord,
        hashes: &[Hash],
    ) -> Result<Place, ImageError> {
        let is_full = self.writer.as_ref().is_some_and(|writer| writer.is_full_at(self.target.pack_bytes));
        if is_full || self.writer.as_ref().is_some_and(|writer| writer.kind() != kind) {
            self.end_pack().await?;
        }
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let number = (self.target.next_number)()?;
                let (storage, directory) = (&self.target.storage, &self.target.directory);
                let made = PackWriter::create(storage, &self.finder.io, directory, number, kind)?;
                self.writer.insert(made)
            }
        };
        let before = writer.bytes();
        let place = writer.push(record, hashes);
        self.finder.pace.spend(&self.finder.io, writer.bytes() - before).await;
        writer.write_out().await?;
        Ok(place)
    }

    async fn end_pack(&mut self) -> Result<(), ImageError> {
        if let Some(writer) = self.writer.take() {
            self.written.push(writer.finish().await?);
        }
        Ok(())
    }

    /// Ends the last pack, and makes the names of all durable.
    pub(super) async fn finish(mut self) -> Result<(Vec<Written>, Moves, Moved), ImageError> {
        self.end_pack().await?;
        if !self.written.is_empty() {
            let path = self.target.directory.clone();
            let sync = self.finder.io.run(Op::SyncDirectory { path }).await;
            sync.result.map_err(|errno| ImageError::errno(&self.target.directory, "sync", errno))?;
        }
        Ok((self.written, self.moves, self.moved))
    }

    /// Gives up: new packs are removed, finished or not.
    pub(super) async fn abandon(self) {
        if let Some(writer) = self.writer {
            writer.abandon().await;
        }
        for written in self.written {
            // What cannot be removed is found as garbage later.
            let _ = self.finder.io.run(Op::Unlink { path: written.path }).await;
        }
    }

    /// The finder that it works with.
    pub(super) fn finder(&mut self) -> &mut Finder<E, L> {
        self.finder
    }
}
