//! An open layer.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::LayerInfo;
use super::base::{Below, hex, resolve};
use super::base_record::{BaseIdentity, BaseRef};
use super::core::Core;
use super::driver::Driver;
use super::header::Header;
use super::layout::PREAMBLE_BYTES;
use super::node::Entry;
use super::queue::LayerQueue;
use super::record::Run;
use super::tuning::breaks;
use crate::counts::{Counts, Hits};
use crate::error::ImageError;
use sapwood_blockdev::device::{BlockDevice, Command, Geometry, Request};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_SIZE, GuestOffset, SECTOR_SIZE};

/// Largest part of a record, in blocks: what is left over at the end of a segment stays below it.
const PART_BLOCKS_MAX: u32 = 32;

/// An open layer: a disk that guests write, over a base that they do not.
///
/// Made by [`Layer::open`]. Background work is done by [`Layer::maintain`], which some thread must
/// run while guests write; [`Layer::close`] ends it.
pub struct Layer<E: Engine> {
    file: E::File,
    path: PathBuf,
    header: Header,
    /// Replaced as a whole when the base is changed.
    below: RwLock<Arc<Below<E>>>,
    read_only: bool,
    core: Mutex<Core>,
    /// How often a frame of a sealed snapshot below was in memory.
    pub(super) frames: Hits,
}

impl<E: Engine> Layer<E> {
    pub(super) fn new(
        file: E::File,
        path: &Path,
        header: Header,
        below: Below<E>,
        read_only: bool,
        core: Core,
    ) -> Arc<Self> {
        let below = RwLock::new(Arc::new(below));
        let (path, core, frames) = (path.to_owned(), Mutex::new(core), Hits::default());
        Arc::new(Self { file, path, header, below, read_only, core, frames })
    }

    /// The shared state. A panic elsewhere does not make it unusable: reads go on.
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn file(&self) -> E::File {
        self.file.clone()
    }

    /// Whether operations use the file now, or others do.
    pub(crate) fn is_file_shared(&self) -> bool {
        self.file.is_shared()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What a layer of `size` bytes tells about itself.
    pub(crate) fn geometry_of(size: u64, read_only: bool) -> Geometry {
        Geometry {
            size: size / SECTOR_SIZE * SECTOR_SIZE,
            read_only,
            physical_block: BLOCK_SIZE as u32,
            discard_granularity: BLOCK_SIZE as u32,
        }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn set_below(&self, below: Arc<Below<E>>) {
        let mut current = self.below.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, below);
        drop(current);
        // Not under the lock: it may be the last that keeps a file.
        drop(old);
    }

    /// Puts `new` in the place of `old`, if that is what lies below still: says whether it was.
    pub(super) fn replace_below(&self, old: &Arc<Below<E>>, new: Arc<Below<E>>) -> bool {
        let mut current = self.below.write().unwrap_or_else(PoisonError::into_inner);
        let is_same = Arc::ptr_eq(&current, old);
        if is_same {
            // The caller has the old one.
            *current = new;
        }
        is_same
    }

    /// What lies below now.
    pub(super) fn below(&self) -> Arc<Below<E>> {
        Arc::clone(&self.below.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Largest part of a record in blocks, for this layer's segments.
    pub(super) fn part_blocks_max(&self) -> u32 {
        (self.header.segment_blocks / 32).clamp(4, PART_BLOCKS_MAX)
    }

    /// What makes this layer recognisable as a base.
    pub(super) fn identity(&self) -> BaseIdentity {
        let core = self.core();
        BaseIdentity::Layer { size: core.size, id: self.header.layer_id, generation: core.generation }
    }

    /// The entry that makes a block read as zeroes. Without a base nothing needs to be said but that
    /// it is not mapped.
    pub(super) fn zero_entry(&self) -> Entry {
        if self.below().record.base.is_some() { Entry::ZERO } else { Entry::ABSENT }
    }

    /// The run that makes whole blocks, not more than a branch has, read as zeroes.
    pub(super) fn zero_run(&self, blocks: Range<u64>) -> Run {
        Run::uniform(blocks, self.zero_entry())
    }

    /// A queue over a reactor that the caller also uses for other things.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> LayerQueue<E> {
        LayerQueue::new(Arc::clone(self), io)
    }

    /// What was counted since the disk was opened.
    pub fn counts(&self) -> Counts {
        Counts { frames: self.frames.get(), ..self.core().counts }
    }

    /// Goes on with the counts of the layer that it follows, of which nothing is in use any more.
    pub(super) fn inherit_counts(&self, lower: &Self) {
        let counts = lower.counts();
        self.core().counts = counts;
        self.frames.add(counts.frames);
    }

    /// Facts about the layer as it is now.
    pub fn info(&self) -> LayerInfo {
        let below = self.below();
        let base = below.record.base.as_ref();
        let (depth, index_bytes) = below.depth();
        let named = base.filter(|base| base.in_store().is_none());
        let core = self.core();
        let live_blocks = core.segments.live_blocks();
        LayerInfo {
            size: core.size,
            id: hex(&self.header.layer_id),
            segment_size: core.segments.bytes(),
            store_base: base.and_then(BaseRef::in_store).copied(),
            base_path: named.map(|base| resolve(&self.path, &base.path)),
            base: named.map(BaseRef::spec),
            is_empty: core.map.is_empty(),
            live_blocks,
            used_bytes: core.segments.used_bytes() + PREAMBLE_BYTES,
            allowed_bytes: core.allowed_bytes(),
            beside_bytes: core.beside_bytes(),
            occupied_bytes: core.segments.occupied_bytes(),
            traffic: core.log.traffic,
            lanes: core.log.head.lanes().count(),
            dead_blocks: core.segments.dead_blocks(&core.log.head),
            generation: core.generation,
            sequence: core.log.published.sequence,
            clean: core.was_clean,
            map_stored_bytes: core.segments.node_bytes(),
            map_cache_bytes: core.tuning.map_cache_bytes,
            map_bytes: core.map.bytes(),
            map_reads: core.node_reads,
            depth,
            index_bytes,
        }
    }

    /// Gives the disk another size in bytes, a multiple of 512; durable when it returns. Bytes
    /// beyond a smaller size are gone; new bytes read as zeroes, over a base too. Requests in
    /// flight to the cut range may fail or not.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for an impossible size, otherwise what
    /// the storage says.
    pub async fn resize(self: &Arc<Self>, io: &Io<E>, size: u64) -> Result<(), ImageError> {
        super::check_size(&self.path, size, self.header.segment_blocks)?;
        if self.read_only {
            return Err(ImageError::new(&self.path, sapwood_blockdev::device::DeviceError::ReadOnly));
        }
        let driver = Driver::new(Arc::clone(self), io.clone());
        let result = driver.resize(size).await;
        driver.retire().await;
        result.map_err(|error| ImageError::new(&self.path, error))
    }
}

impl<E: Engine> Driver<E> {
    async fn resize(&self, size: u64) -> super::waiter::Result {
        let old = self.layer.core().size;
        let skip = breaks!(self.layer.core().tuning, ShrinkWithoutZeroing);
        // Shrinking: zeroes first, so that growing again later cannot bring the old bytes back.
        // Growing: zeroes first, so that a base does not show through where the disk used to end.
        let range = old.min(size)..old.max(size).next_multiple_of(BLOCK_SIZE);
        if !range.is_empty() && !skip {
            let len = range.end - range.start;
            let offset = GuestOffset(range.start);
            self.merge(Request { tag: 0, offset, len, command: Command::WriteZeroes }).await?;
        }
        let run = Run::Size { bytes: size };
        self.append(|waiter| vec![super::log::Part::index_only(run, waiter.clone())]).await?;
        self.flush().await
    }
}

impl<E: Engine> BlockDevice for Layer<E> {
    type Engine = E;
    type Queue = LayerQueue<E>;

    fn geometry(&self) -> Geometry {
        Self::geometry_of(self.core().size, self.read_only)
    }

    fn queue(self: &Arc<Self>, engine: E) -> LayerQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        self.core().write_cache = enabled;
    }
}
