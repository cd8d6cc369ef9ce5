//! Joining: what was hashed, in the order of the disk again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::frames::{Frames, Slot};
use super::gather::{Gathered, Gatherer};
use super::{FRAMES_MAX, JOINED_MAX, SealStats, Step, Watch};
use crate::error::{ErrorKind, ImageError};
use crate::sealed::cursor::Cursor;
use crate::sealed::hash::Hash;
use crate::sealed::header::PackKind;
use crate::sealed::known::{Dedup, Found};
use crate::sealed::node::{Child, Node};
use crate::sealed::output::{Put, RecordSink};
use crate::sealed::packs::{Packs, Root};
use crate::sealed::place::Place;
use crate::sealed::record::NewRecord;
use crate::sealed::source::{Content, Source, SourceBytes, SourceRun};
use crate::sealed::tree::{NodeSink, TreeBuilder};
use crate::sealed::workers::{Ticket, Workers};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_BYTES;

/// A stretch whose blocks are all known, or will be.
struct Joined {
    runs: Vec<SourceRun>,
    /// Its data blocks.
    slots: Vec<Slot>,
    /// Frames that must have places first: those with lower numbers.
    needs: u64,
    /// The first frame that it may refer to.
    oldest: u64,
}

/// A stretch that is being hashed.
struct Hashing {
    start: u64,
    runs: Vec<SourceRun>,
    ticket: Ticket<(SourceBytes, Vec<Hash>)>,
}

/// What a line works with.
pub(in crate::sealed) struct Means<'a, E: Engine, O, D> {
    pub(in crate::sealed) io: &'a Io<E>,
    pub(in crate::sealed) packs: &'a Arc<Packs<E>>,
    pub(in crate::sealed) dedup: &'a mut D,
    pub(in crate::sealed) workers: &'a Workers,
    pub(in crate::sealed) output: &'a mut O,
    pub(in crate::sealed) base: Option<Cursor<E>>,
    pub(in crate::sealed) frame_blocks: usize,
}

/// The way from read segments to a tree.
pub(in crate::sealed) struct Line<'a, E: Engine, O, D> {
    io: &'a Io<E>,
    packs: &'a Arc<Packs<E>>,
    dedup: &'a mut D,
    workers: &'a Workers,
    output: &'a mut O,
    tree: TreeBuilder<E>,
    has_base: bool,
    frames: Frames,
    joined: VecDeque<Joined>,
    stats: SealStats,
}

impl<'a, E, O, D> Line<'a, E, O, D>
where
    E: Engine,
    O: RecordSink,
    D: Dedup<E>,
{
    /// A line for a disk of `size` bytes.
    pub(in crate::sealed) fn new(means: Means<'a, E, O, D>, size: u64) -> Self {
        let Means { io, packs, dedup, workers, output, base, frame_blocks } = means;
        Self {
            io,
            packs,
            dedup,
            workers,
            output,
            has_base: base.is_some(),
            tree: TreeBuilder::new(size, base),
            frames: Frames::new(frame_blocks),
            joined: VecDeque::new(),
            stats: SealStats { blocks_total: size.div_ceil(BLOCK_BYTES as u64), ..SealStats::default() },
        }
    }

    /// Seals what is gathered.
    pub(in crate::sealed) async fn run(
        mut self,
        gatherer: &mut Gatherer<'_, E, impl Source>,
        watch: &mut impl Watch,
    ) -> Result<(Root, SealStats), ImageError> {
        let ahead = (2 * self.workers.threads()).max(1);
        let mut hashing = VecDeque::new();
        loop {
            while hashing.len() < ahead && !gatherer.is_done() {
                match watch.between(&self.stats).await {
                    Step::Go => {}
                    Step::Stop => gatherer.stop(),
                    Step::Cancel => return Err(ImageError::new(self.packs.path(), ErrorKind::Cancelled)),
                }
                let gathered = gatherer.next().await?;
                self.stats.blocks_done += gathered.blocks();
                hashing.push_back(self.hash(gathered));
            }
            let Some(next) = hashing.pop_front() else { break };
            gatherer.take_back(self.join(next).await?);
            self.settle(FRAMES_MAX, JOINED_MAX).await?;
        }
        self.frames.close(self.workers);
        self.settle(0, 0).await?;
        let Self { tree, mut stats, output, dedup, packs, io, .. } = self;
        let (root, reads) = tree.finish(&mut Nodes { output, dedup, packs, io, stats: &mut stats }).await?;
        stats.base_nodes_read = reads;
        gatherer.check(&root)?;
        Ok((root, stats))
    }

    fn hash(&self, gathered: Gathered) -> Hashing {
        let Gathered { start, runs, bytes } = gathered;
        let ticket = self.workers.run(move |_| {
            let hashes = bytes.chunks_exact(BLOCK_BYTES).map(Hash::of_block).collect();
            (bytes, hashes)
        });
        Hashing { start, runs, ticket }
    }

    /// Looks for blocks that were hashed, and has stored what is new: their bytes, which are not needed any more.
    async fn join(&mut self, hashing: Hashing) -> Result<SourceBytes, ImageError> {
        let Hashing { start, runs, ticket } = hashing;
        let (bytes, hashes) = ticket.wait().await;
        self.dedup.look_ahead(self.io, self.packs, &hashes).await?;
        let oldest = self.frames.placed();
        let mut slots = Vec::with_capacity(hashes.len());
        let mut data = hashes.iter().zip(bytes.chunks_exact(BLOCK_BYTES));
        let mut at = start;
        for run in &runs {
            if run.content == Content::Data {
                for (block, (hash, bytes)) in (at..at + run.count).zip(&mut data) {
                    slots.push(self.slot(block, hash, bytes).await?);
                }
            }
            at += run.count;
        }
        self.stats.blocks_read += slots.len() as u64;
        let needs = slots.iter().map(|slot| match slot {
            Slot::Known(_) => 0,
            Slot::Stored { frame, .. } => frame + 1,
        });
        let needs = needs.max().unwrap_or(0);
        self.joined.push_back(Joined { runs, slots, needs, oldest });
        Ok(bytes)
    }

    /// What becomes of a block.
    async fn slot(&mut self, block: u64, hash: &Hash, bytes: &[u8]) -> Result<Slot, ImageError> {
        if hash.is_zero() {
            self.stats.zero += 1;
            return Ok(Slot::Known(Child::ZERO));
        }
        let found = self.find(block, hash).await?;
        match &found {
            Some(_) => self.stats.duplicate += 1,
            None => self.stats.unique += 1,
        }
        Ok(found.unwrap_or_else(|| self.frames.add(*hash, bytes, self.workers)))
    }

    async fn find(&mut self, block: u64, hash: &Hash) -> Result<Option<Slot>, ImageError> {
        if self.has_base {
            let child = self.tree.base_block(block).await?;
            if child.hash == *hash {
                return Ok(Some(Slot::Known(child)));
            }
        }
        if let Some(slot) = self.frames.find(hash) {
            return Ok(Some(slot));
        }
        let known = |place| Slot::Known(Child { hash: *hash, place });
        match self.dedup.find(hash) {
            None => Ok(None),
            Some(Found::Sure(place)) => Ok(Some(known(place))),
            // What cannot be read is stored again.
            Some(Found::Hint(place)) => {
                Ok(holds_block(self.packs, self.io, place, hash).await.then(|| known(place)))
            }
        }
    }

    /// Places frames, and lets segments enter the tree: those that can, and until no more than so many are left.
    async fn settle(&mut self, frames_max: usize, joined_max: usize) -> Result<(), ImageError> {
        loop {
            self.grow().await?;
            let is_crowded = self.joined.len() > joined_max;
            if self.frames.flying() == 0 && is_crowded {
                // They wait for the frame that is filled.
                self.frames.close(self.workers);
            }
            if self.frames.flying() <= frames_max && !self.frames.is_next_ready() && !is_crowded {
                return Ok(());
            }
            self.frames.place_next(self.output, self.dedup, &mut self.stats).await?;
        }
    }

    /// Lets the segments enter the tree that have all places.
    async fn grow(&mut self) -> Result<(), ImageError> {
        let Self { tree, frames, joined, output, dedup, packs, io, stats, .. } = self;
        let mut sink = Nodes { output: &mut **output, dedup: &mut **dedup, packs, io, stats };
        while joined.front().is_some_and(|next| next.needs <= frames.placed()) {
            let Some(next) = joined.pop_front() else { break };
            let mut slots = next.slots.into_iter();
            for run in next.runs {
                match run.content {
                    Content::Same => tree.same(run.count),
                    Content::Zero => tree.zero(run.count, &mut sink).await?,
                    Content::Data => {
                        for slot in slots.by_ref().take(run.count as usize) {
                            tree.block(frames.resolve(slot), &mut sink).await?;
                        }
                    }
                }
            }
        }
        frames.forget_before(joined.front().map_or(frames.placed(), |next| next.oldest));
        Ok(())
    }
}

/// Where nodes go.
struct Nodes<'a, E: Engine, O, D> {
    output: &'a mut O,
    dedup: &'a mut D,
    packs: &'a Arc<Packs<E>>,
    io: &'a Io<E>,
    stats: &'a mut SealStats,
}

impl<E, O, D> NodeSink for Nodes<'_, E, O, D>
where
    E: Engine,
    O: RecordSink,
    D: Dedup<E>,
{
    async fn put(&mut self, node: &Node, hash: Hash) -> Result<Place, ImageError> {
        let known = match self.dedup.find_node(&hash) {
            Some(Found::Sure(place)) => Some(place),
            Some(Found::Hint(place)) => holds_node(self.packs, self.io, place, &hash).await.then_some(place),
            None => None,
        };
        if let Some(place) = known {
            return Ok(place);
        }
        let record = NewRecord::node(node);
        self.stats.nodes += 1;
        self.stats.node_bytes += record.len() as u64;
        let Put { place, .. } = self.output.push(PackKind::Nodes, record, &[hash]).await?;
        self.dedup.insert_node(hash, place);
        Ok(place)
    }
}

/// Whether a block is at that very place: elsewhere, or in memory, does not count.
async fn holds_block<E: Engine>(packs: &Packs<E>, io: &Io<E>, place: Place, hash: &Hash) -> bool {
    let Ok(pack) = packs.pack(io, place.pack()).await else { return false };
    let Ok(frame) = pack.frame(io, place).await else { return false };
    frame.block(place.index()).is_some_and(|block| Hash::of_block(block) == *hash)
}

/// Whether a node is at that very place.
async fn holds_node<E: Engine>(packs: &Packs<E>, io: &Io<E>, place: Place, hash: &Hash) -> bool {
    let Ok(pack) = packs.pack(io, place.pack()).await else { return false };
    pack.node(io, place).await.is_ok_and(|node| node.hash() == *hash)
}
