//! An open layer.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::base::{Base, resolve};
use super::core::Core;
use super::driver::Driver;
use super::layout::{BaseIdentity, Header, PREAMBLE_BYTES};
use super::node::Entry;
use super::queue::LayerQueue;
use super::record::Run;
use super::tuning::breaks;
use super::{BaseSpec, LayerInfo};
use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};
use crate::raw;
use sapwood_blockdev::device::{BlockDevice, Command, Geometry, Request};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_SIZE, GuestOffset, SECTOR_SIZE};

/// Largest part of a record, in blocks: what is left over at the end of a segment stays below it.
const PART_BLOCKS_MAX: u32 = 32;
/// Largest run of zeroes in one part, in blocks.
const ZERO_RUN_MAX: u64 = 1 << 30;

/// An open layer: a disk that guests write, over a base that they do not.
///
/// Made by [`Layer::open`]. Background work is done by [`Layer::maintain`], which some thread must
/// run while guests write; [`Layer::close`] ends it.
pub struct Layer<E: Engine> {
    file: E::File,
    path: PathBuf,
    header: Header,
    base: Option<Base<E>>,
    read_only: bool,
    core: Mutex<Core>,
}

impl<E: Engine> Layer<E> {
    pub(super) fn new(
        file: E::File,
        path: &Path,
        header: Header,
        base: Option<Base<E>>,
        read_only: bool,
        core: Core,
    ) -> Arc<Self> {
        Arc::new(Self { file, path: path.to_owned(), header, base, read_only, core: Mutex::new(core) })
    }

    /// The shared state. A panic elsewhere does not make it unusable: reads go on.
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn file(&self) -> E::File {
        self.file.clone()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn base(&self) -> Option<&Base<E>> {
        self.base.as_ref()
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

    /// The runs that make whole blocks read as zeroes. Without a base nothing needs to be said of
    /// them but that they are not mapped.
    pub(super) fn zero_runs(&self, blocks: Range<u64>) -> Vec<Run> {
        let run = |start: u64| {
            let count = ZERO_RUN_MAX.min(blocks.end - start) as u32;
            match self.base {
                Some(_) => Run::Zero { start, count },
                None => Run::Absent { start, count },
            }
        };
        blocks.clone().step_by(ZERO_RUN_MAX as usize).map(run).collect()
    }

    /// A queue over a reactor that the caller also uses for other things.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> LayerQueue<E> {
        LayerQueue::new(Arc::clone(self), io)
    }

    /// Facts about the layer as it is now.
    pub fn info(&self) -> LayerInfo {
        let core = self.core();
        let id = self.header.layer_id.iter().map(|byte| format!("{byte:02x}")).collect();
        let base = self
            .header
            .base
            .as_ref()
            .map(|base| BaseSpec { path: PathBuf::from(&base.path), format: base.identity.format() });
        let live_blocks = core.segments.live_blocks();
        LayerInfo {
            size: core.size,
            id,
            segment_size: core.segments.bytes(),
            base_path: self.header.base.as_ref().map(|base| resolve(&self.path, &base.path)),
            base,
            live_blocks,
            used_bytes: core.segments.used_bytes() + PREAMBLE_BYTES,
            dead_blocks: core.segments.dead_blocks(core.log.head.segment, core.log.head.block),
            generation: core.generation,
            sequence: core.log.published.sequence,
            clean: core.was_clean,
        }
    }

    /// What `range` of the disk, in bytes, holds, through all bases. Cut off at the disk's end.
    ///
    /// # Errors
    /// When a raw base cannot say where its holes are.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        let mut extents = Vec::new();
        self.extents_at_depth(range, 0, &mut extents)?;
        Ok(extents)
    }

    fn extents_at_depth(
        &self,
        range: Range<u64>,
        depth: u32,
        out: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        let size = self.core().size;
        let range = range.start.min(size)..range.end.min(size);
        if range.is_empty() {
            return Ok(());
        }
        let file: Arc<Path> = self.path.as_path().into();
        let mut runs = Vec::new();
        let blocks = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        self.core().map.for_each_run(blocks, |start, count, entry| runs.push((start, count, entry)));
        for (start, count, entry) in runs {
            let first = start * BLOCK_SIZE;
            let part = first.max(range.start)..(first + count * BLOCK_SIZE).min(range.end);
            let (kind, offset) = match entry.place() {
                Some(place) => (ExtentKind::Data, Some(Core::file_offset(place).0 + part.start - first)),
                None if entry == Entry::ZERO => (ExtentKind::Zero, None),
                None => {
                    self.extents_below(part, depth, out)?;
                    continue;
                }
            };
            let len = part.end - part.start;
            let file = Some(Arc::clone(&file));
            Extent::push_to(out, Extent { start: part.start, len, kind, depth, offset, file });
        }
        Ok(())
    }

    fn extents_below(&self, range: Range<u64>, depth: u32, out: &mut Vec<Extent>) -> Result<(), ImageError> {
        let end = match &self.base {
            None => range.start,
            Some(Base::Raw { file, size }) => {
                let inside = range.start.min(*size)..range.end.min(*size);
                for extent in raw::map::extents(file, inside.clone())? {
                    Extent::push_to(out, Extent { depth: depth + 1, ..extent });
                }
                inside.end.max(range.start)
            }
            Some(Base::Layer(below)) => {
                let inside_end = below.core().size.clamp(range.start, range.end);
                below.extents_at_depth(range.start..inside_end, depth + 1, out)?;
                inside_end
            }
        };
        if end < range.end {
            let (start, len) = (end, range.end - end);
            let absent = Extent { start, len, kind: ExtentKind::Absent, depth, offset: None, file: None };
            Extent::push_to(out, absent);
        }
        Ok(())
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
        Geometry {
            size: self.core().size / SECTOR_SIZE * SECTOR_SIZE,
            read_only: self.read_only,
            physical_block: BLOCK_SIZE as u32,
            discard_granularity: BLOCK_SIZE as u32,
        }
    }

    fn queue(self: &Arc<Self>, engine: E) -> LayerQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        self.core().write_cache = enabled;
    }
}
