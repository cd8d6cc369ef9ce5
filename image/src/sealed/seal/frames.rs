//! Blocks that are stored: gathered into frames, compressed elsewhere, and placed in order.

use std::collections::{HashMap, VecDeque};

use super::SealStats;
use crate::error::ImageError;
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::known::Dedup;
use crate::sealed::node::Child;
use crate::sealed::output::{Put, RecordSink};
use crate::sealed::place::Place;
use crate::sealed::record::NewRecord;
use crate::sealed::workers::{Ticket, Workers};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_BYTES;

/// A block that is known, or that will have a place when its frame has one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Slot {
    Known(Child),
    Stored { hash: Hash, frame: u64, index: usize },
}

/// Frames from the one that is filled to those that have places.
pub(super) struct Frames {
    frame_blocks: usize,
    /// The number of the frame that is filled, and what is in it.
    filling: u64,
    bytes: Vec<u8>,
    hashes: Vec<Hash>,
    /// Those that are being compressed, up to it.
    flying: VecDeque<(Vec<Hash>, Ticket<NewRecord>)>,
    /// Places of the frames before these, from this number on.
    places: VecDeque<Place>,
    places_from: u64,
    /// Blocks in frames without a place.
    pending: HashMap<Hash, (u64, usize)>,
}

impl Frames {
    pub(super) fn new(frame_blocks: usize) -> Self {
        Self {
            frame_blocks,
            filling: 0,
            bytes: Vec::new(),
            hashes: Vec::new(),
            flying: VecDeque::new(),
            places: VecDeque::new(),
            places_from: 0,
            pending: HashMap::new(),
        }
    }

    /// Frames being compressed.
    pub(super) fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Whether the next frame can be placed without waiting.
    pub(super) fn is_next_ready(&self) -> bool {
        self.flying.front().is_some_and(|(_, ticket)| ticket.is_ready())
    }

    /// Frames that have places: those with lower numbers.
    pub(super) fn placed(&self) -> u64 {
        self.places_from + self.places.len() as u64
    }

    /// A block that is stored and has no place yet.
    pub(super) fn find(&self, hash: &Hash) -> Option<Slot> {
        self.pending.get(hash).map(|&(frame, index)| Slot::Stored { hash: *hash, frame, index })
    }

    /// Stores a block.
    pub(super) fn add(&mut self, hash: Hash, block: &[u8], workers: &Workers) -> Slot {
        let slot = (self.filling, self.hashes.len());
        if slot.1 == 0 {
            self.bytes.reserve_exact(self.frame_blocks * BLOCK_BYTES);
        }
        self.bytes.extend_from_slice(block);
        self.hashes.push(hash);
        self.pending.insert(hash, slot);
        if self.hashes.len() == self.frame_blocks {
            self.close(workers);
        }
        Slot::Stored { hash, frame: slot.0, index: slot.1 }
    }

    /// Has the frame that is filled compressed, full or not.
    pub(super) fn close(&mut self, workers: &Workers) {
        if self.hashes.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut self.bytes);
        let ticket = workers.run(move |coder| NewRecord::frame(coder, &bytes));
        self.flying.push_back((std::mem::take(&mut self.hashes), ticket));
        self.filling += 1;
    }

    /// Waits for the next frame, and appends it to a pack.
    pub(super) async fn place_next<E: Engine>(
        &mut self,
        output: &mut impl RecordSink,
        dedup: &mut impl Dedup<E>,
        stats: &mut SealStats,
    ) -> Result<(), ImageError> {
        let Some((hashes, ticket)) = self.flying.pop_front() else { return Ok(()) };
        let record = ticket.wait().await;
        stats.stored_bytes += record.len() as u64;
        let Put { place, pages } = output.push(PackKind::Data, record, &hashes).await?;
        for (index, (hash, page)) in hashes.iter().zip(pages).enumerate() {
            self.pending.remove(hash);
            dedup.insert(*hash, place.with_index(index), page);
        }
        self.places.push_back(place);
        Ok(())
    }

    /// What a block became, whose frame has a place.
    pub(super) fn resolve(&self, slot: Slot) -> Child {
        match slot {
            Slot::Known(child) => child,
            Slot::Stored { hash, frame, index } => {
                let place = self.places[(frame - self.places_from) as usize];
                Child { hash, place: place.with_index(index) }
            }
        }
    }

    /// Forgets the places of frames before this one.
    pub(super) fn forget_before(&mut self, frame: u64) {
        while self.places_from < frame && self.places.pop_front().is_some() {
            self.places_from += 1;
        }
    }
}
