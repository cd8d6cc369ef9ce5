//! Lays what was written scattered in the order of the disk again, so that sequential reads are long reads.
//!
//! The leaves of the map are gone over in their order. The blocks of a fragmented one are read, wherever they
//! are, and appended again in one go, by the cleaner's rule: only where the map still names the place that was
//! read, and no writer is there. So it may run beside guests, and be ended at any moment. What is appended gets
//! new checksums, so a block is moved only when all that was in its segment was compared with the old ones.
//!
//! Segments that lose a little with each leaf would be free at the very end only. When the file has grown by its
//! allowance, the emptiest ones are cleaned; what comes soon is put apart from what comes later, so that whole
//! segments die next.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use super::OpenLayer;
use super::age;
use super::clean::{Live, whole_blocks};
use super::core::Core;
use super::device::Layer;
use super::driver::Driver;
use super::map::{BRANCH_BLOCKS, LEAF_BLOCKS, by_branch, leaves_of};
use super::tuning::Tuning;
use super::waiter::Result;
use crate::error::ImageError;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// A leaf is fragmented when its runs have fewer blocks than this on average.
const RUN_BLOCKS: usize = 64;
/// Reads in flight at once.
const READS: usize = 128;
/// The file may grow by this part of the live data,
const GROWTH_PART: u64 = 8;
/// and by so many segments.
const GROWTH_SEGMENTS: u64 = 32;
/// Blocks whose turn comes within this part of what is left come soon.
const SOON_PART: u64 = 4;
/// At the end, dead blocks may be this part of the live ones,
const DEAD_PART: u64 = 10;
/// and so many segments.
const DEAD_SEGMENTS: u64 = 4;

/// What laying a layer in order did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of data that were moved, those out of the way included.
    pub moved: u64,
    /// Stretches of consecutive blocks of the file in which the disk lay, and lies now.
    pub runs_before: u64,
    /// See `runs_before`.
    pub runs_after: u64,
    /// Bytes that were left where they are because something in their segment is damaged.
    pub damaged: u64,
    /// Bytes of the file in use before, and now.
    pub used_before: u64,
    /// See `used_before`.
    pub used_after: u64,
}

/// Lays the layer at `path`, which nobody else uses, in order: see [`Layer::compact`].
///
/// # Errors
/// When it cannot be opened, or what the storage says.
pub async fn compact<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    tuning: Tuning,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<Compacted, ImageError> {
    let layer = Layer::open(storage, io, path, &OpenLayer { read_only: false, tuning }).await?;
    let compacted = layer.compact(io, progress).await;
    let closed = layer.close(io).await;
    let compacted = compacted?;
    closed.map(|()| Compacted { used_after: layer.info().used_bytes, ..compacted })
}

impl<E: Engine> Layer<E> {
    /// Lays what is scattered in the order of the disk. Guests may use the layer meanwhile; it must not be
    /// closed before this has ended. The file grows by an eighth of the live data and 48 segments at most. Interrupted,
    /// what was done is kept. `progress` is called with the bytes of disk done and their number.
    ///
    /// # Errors
    /// A layer that was opened read-only, a full host, or what the storage says.
    pub async fn compact(
        self: &Arc<Self>,
        io: &Io<E>,
        progress: impl FnMut(u64, u64),
    ) -> std::result::Result<Compacted, ImageError> {
        if self.is_read_only() {
            return Err(ImageError::new(self.path(), DeviceError::ReadOnly));
        }
        self.on_driver(io, async |driver| Pass::new(driver).run(progress).await).await
    }
}

/// One going over of a layer.
struct Pass<'a, E: Engine> {
    driver: &'a Driver<E>,
    done: Compacted,
    /// Bytes that segments may take before some have to be emptied.
    limit: u64,
    /// Bytes that may be written between checkpoints while that is done, and before looking for some again.
    step: u64,
    /// What had been written when that may be done again, in blocks.
    again_at: u64,
    scratch: AlignedBuf,
}

impl<'a, E: Engine> Pass<'a, E> {
    fn new(driver: &'a Driver<E>) -> Self {
        let core = driver.layer.core();
        let live = core.segments.live_blocks() * BLOCK_SIZE;
        let growth = live / GROWTH_PART + GROWTH_SEGMENTS * core.segments.bytes();
        let limit = core.segments.occupied_bytes().max(live) + growth / 2;
        drop(core);
        let scratch = AlignedBuf::zeroed(0);
        Self { driver, done: Compacted::default(), limit, step: growth / 8, again_at: 0, scratch }
    }

    async fn run(mut self, mut progress: impl FnMut(u64, u64)) -> Result<Compacted> {
        let layer = &self.driver.layer;
        let size = layer.core().size;
        let moved = layer.core().log.traffic.moved;
        let used_before = layer.info().used_bytes;
        for branch in by_branch(0..size.div_ceil(BLOCK_SIZE)) {
            let is_empty = layer.core().map.uniform_branch((branch.start / BRANCH_BLOCKS) as u32).is_some();
            for leaf in leaves_of(&branch).filter(|_| !is_empty) {
                self.prepare(leaf, size.div_ceil(BLOCK_SIZE)).await?;
                self.order(leaf).await?;
                progress((u64::from(leaf + 1) * LEAF_BLOCKS * BLOCK_SIZE).min(size), size);
            }
            progress((branch.end * BLOCK_SIZE).min(size), size);
        }
        self.finish().await?;
        if self.done.damaged > 0 {
            let (path, bytes) = (layer.path().display(), self.done.damaged);
            log::error!(
                "{path}: {bytes} bytes beside damaged data were left where they are; check the layer"
            );
        }
        let moved = (layer.core().log.traffic.moved - moved) * BLOCK_SIZE;
        Ok(Compacted { moved, used_before, used_after: layer.info().used_bytes, ..self.done })
    }

    /// Sees to it that a leaf can be appended again.
    async fn prepare(&mut self, leaf: u32, blocks: u64) -> Result {
        self.driver.open_lanes().await?;
        self.keep_bounds().await?;
        let written = self.driver.layer.core().log.traffic.total();
        let occupied = self.driver.layer.core().segments.occupied_bytes();
        if occupied > self.limit && written >= self.again_at {
            let next = u64::from(leaf) * LEAF_BLOCKS;
            let split = next + blocks.saturating_sub(next) / SOON_PART;
            self.make_room(self.limit, Some(split)).await?;
        }
        Ok(())
    }

    /// Refuses to go on where that would use what is kept back, and bounds what a recovery replays.
    async fn keep_bounds(&self) -> Result {
        let is_due = {
            let core = self.driver.layer.core();
            match core.latched {
                Some(error) => return Err(error),
                None if core.closing => return Err(DeviceError::Latched),
                None if core.is_full_host() => return Err(DeviceError::NoSpace),
                None => core.is_log_long() || core.is_map_dirty(),
            }
        };
        if is_due { self.driver.checkpoint(None, false).await } else { Ok(()) }
    }

    /// Empties segments until those that hold something take at most `limit` bytes, or none is worth it.
    async fn make_room(&mut self, limit: u64, split: Option<u64>) -> Result {
        let driver = self.driver;
        loop {
            self.free().await?;
            let start = driver.layer.core().segments.occupied_bytes();
            let is_enough = |core: &Core| core.segments.held_bytes() + self.step / 2 <= limit;
            if is_enough(&driver.layer.core()) {
                return Ok(());
            }
            let mut found = false;
            for segment in driver.choose_victims() {
                self.keep_bounds().await?;
                let is_over = |core: &Core| core.segments.occupied_bytes() >= start + self.step;
                let is_step_done = |core: &Core| is_enough(core) || is_over(core);
                if is_step_done(&driver.layer.core()) {
                    break;
                }
                found |= driver.clean_segment(segment, split, &mut self.scratch).await?;
            }
            if !found {
                self.again_at = driver.layer.core().log.traffic.total() + self.step / BLOCK_SIZE;
                return Ok(());
            }
        }
    }

    /// Frees the segments that nothing is in: it takes two checkpoints.
    async fn free(&self) -> Result {
        for _ in 0..2 {
            if self.driver.layer.core().segments.awaiting_checkpoint() > 0 {
                self.driver.checkpoint(None, false).await?;
            }
        }
        self.driver.layer.core().segments.reap();
        Ok(())
    }

    async fn finish(&mut self) -> Result {
        let limit = {
            let core = self.driver.layer.core();
            let live = core.segments.live_blocks() * BLOCK_SIZE;
            live + live / DEAD_PART + DEAD_SEGMENTS * core.segments.bytes()
        };
        self.make_room(limit, None).await?;
        self.free().await
    }

    /// Appends the blocks of a leaf in their order, if it is fragmented.
    async fn order(&mut self, leaf: u32) -> Result {
        let driver = self.driver;
        let start = u64::from(leaf) * LEAF_BLOCKS;
        let _pins = driver.pin(&(start..start + LEAF_BLOCKS)).await?;
        let blocks = driver.layer.core().mapped(leaf);
        let runs = runs(&blocks);
        self.done.runs_before += runs;
        let segment_blocks = driver.layer.core().segments.segment_blocks();
        if runs > runs_max(blocks.len(), segment_blocks) {
            self.compare(&blocks).await?;
            self.append(leaf).await?;
        }
        self.done.runs_after += self::runs(&driver.layer.core().mapped(leaf));
        Ok(())
    }

    /// Compares the segments of these blocks with their checksums where that was not done.
    async fn compare(&mut self, blocks: &[Live]) -> Result {
        let driver = self.driver;
        let unknown: BTreeSet<u32> = {
            let core = driver.layer.core();
            let is_unknown = |live: &&Live| core.segments.is_whole(live.place, &core.log.published).is_none();
            blocks.iter().filter(is_unknown).map(|live| core.segments.of_place(live.place)).collect()
        };
        for segment in unknown {
            let (offset, settled, epoch) = {
                let mut core = driver.layer.core();
                let settled = core.segments.settled(segment, &core.log.published);
                if settled == 0 {
                    // The log has just left it, with records in flight.
                    continue;
                }
                (core.segments.offset(segment), settled, core.segments.enter())
            };
            let len = settled as usize * BLOCK_BYTES;
            let mut buf = std::mem::replace(&mut self.scratch, AlignedBuf::zeroed(0));
            if buf.len() != len {
                buf = AlignedBuf::zeroed(len);
            }
            let read = driver.io.run(Op::read(driver.layer.file(), offset, buf)).await;
            let read = read.zero_filled().map(Memory::into_buf);
            let whole = read.as_ref().map_or(0, |contents| whole_blocks(contents));
            // It must not become another segment before that is noted.
            let mut core = driver.layer.core();
            core.segments.note_checked(segment, settled, whole);
            core.segments.leave(epoch);
            drop(core);
            if let Ok(contents) = read {
                self.scratch = contents;
            }
        }
        Ok(())
    }

    /// Reads the blocks of a pinned leaf that are known to be whole, and appends them again.
    async fn append(&mut self, leaf: u32) -> Result {
        let driver = self.driver;
        let (blocks, epoch) = {
            let mut core = driver.layer.core();
            let mut blocks = core.mapped(leaf);
            blocks.retain(|live| {
                let is_whole = core.segments.is_whole(live.place, &core.log.published) == Some(true);
                let is_damaged = !is_whole && core.segments.is_checked(live.place);
                self.done.damaged += u64::from(is_damaged) * BLOCK_SIZE;
                is_whole
            });
            (blocks, core.segments.enter())
        };
        let pieces = read_places(driver, &blocks).await;
        driver.layer.core().segments.leave(epoch);
        let pieces = pieces?;
        let data = |live: &Live| {
            let (first, piece) = &pieces[pieces.partition_point(|(first, _)| *first <= live.place) - 1];
            let at = (live.place - first) as usize * BLOCK_BYTES;
            &piece[at..at + BLOCK_BYTES]
        };
        driver.append_again(&blocks, data, |_| age::ORDERED, 0).await.map(drop)
    }
}

/// Reads blocks, neighbours together: the contents from each first place on, by place.
async fn read_places<E: Engine>(driver: &Driver<E>, blocks: &[Live]) -> Result<Vec<(u32, AlignedBuf)>> {
    let mut places: Vec<u32> = blocks.iter().map(|live| live.place).collect();
    places.sort_unstable();
    let stretches: Vec<&[u32]> = places.chunk_by(|a, b| a + 1 == *b).collect();
    let mut pieces = Vec::with_capacity(stretches.len());
    for batch in stretches.chunks(READS) {
        let reads = batch.iter().map(async |stretch| {
            let len = stretch.len() * BLOCK_BYTES;
            let read = Op::read(driver.layer.file(), Core::file_offset(stretch[0]), AlignedBuf::zeroed(len));
            let outcome = driver.io.run(read).await;
            if outcome.result? < len {
                return Err(DeviceError::Corrupt);
            }
            Ok((stretch[0], outcome.zero_filled()?.into_buf()))
        });
        for read in join_all(reads).await {
            pieces.push(read?);
        }
    }
    Ok(pieces)
}

impl Core {
    /// The mapped blocks of a leaf that is in memory.
    fn mapped(&self, leaf: u32) -> Vec<Live> {
        let start = u64::from(leaf) * LEAF_BLOCKS;
        let mut blocks = Vec::new();
        let found = self.map.for_each_run(start..start + LEAF_BLOCKS, |start, count, entry| {
            if let Some(place) = entry.place() {
                let pairs = (start..start + count).zip(place..);
                blocks.extend(pairs.map(|(block, place)| Live { block, place, sum: 0 }));
            }
        });
        found.expect("a pinned leaf is in memory");
        blocks
    }
}

/// Stretches of consecutive places.
fn runs(blocks: &[Live]) -> u64 {
    blocks.chunk_by(|a, b| a.place + 1 == b.place).count() as u64
}

/// Most runs of a leaf with so many blocks that is in order: no run goes beyond its segment.
fn runs_max(blocks: usize, segment_blocks: u32) -> u64 {
    let whole = blocks.div_ceil(RUN_BLOCKS).max(2 * blocks.div_ceil(segment_blocks as usize));
    whole as u64 + 1
}
