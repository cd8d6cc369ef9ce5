//! Opens a layer: finds the newest checkpoint, replays the log after it, and starts a session.
//!
//! Order: the lock on the open file description that is read; header and slots; base; map; log;
//! then, for a writer, a checkpoint under a new nonce, durable before anything is served. A
//! reader changes nothing.

use std::path::Path;
use std::sync::Arc;

use super::base::Base;
use super::core::{Core, Root};
use super::device::Layer;
use super::driver::Driver;
use super::layout::{Header, LayerId, PREAMBLE_BYTES, Slot, SlotState, slot_offset};
use super::load::Reader;
use super::log::Log;
use super::record::Run;
use super::replay::Replay;
use super::segments::Segments;
use super::tuning::breaks;
use super::{OpenLayer, open_file};
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_SIZE;

/// How many segments beyond the end of the file the log may name: the next one and the spare, and
/// some more whose growth of the file was lost. A bound for files that lie.
const SEGMENTS_BEYOND_END: u64 = 64;

/// What the slots say.
struct Newest {
    slot: Slot,
    /// The one before, if it is still there.
    other: Option<Slot>,
    /// The other slot is damaged: the log must reach the checkpoint that it may have named.
    other_damaged: bool,
}

impl<E: Engine> Layer<E> {
    /// Opens a layer, recovering it from a crash if there was one.
    ///
    /// # Errors
    /// A layer that is in use, damaged, or not one; a base that is missing or changed; what the
    /// storage says.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
    ) -> Result<Arc<Self>, ImageError> {
        Self::open_below(storage, io, path, options, &[]).await
    }

    /// Opens a layer that is the base of others: `above`, topmost first.
    pub(super) async fn open_below<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
        above: &[LayerId],
    ) -> Result<Arc<Self>, ImageError> {
        let (mode, lock) = match options.read_only {
            true => (OpenOptions::READ, Lock::Shared),
            false => (OpenOptions::WRITE, Lock::Exclusive),
        };
        let file = match open_file(storage, path, mode, lock) {
            Err(e)
                if matches!(e.kind, ErrorKind::Locked { .. })
                    && breaks!(options.tuning, RecoveryIgnoresLock) =>
            {
                storage.open(path, mode).map_err(|e| ImageError::io(path, "open", e))?
            }
            other => other?,
        };
        let reader = Reader { io, file: &file, path };
        let start = reader.read(0, 3 * BLOCK_SIZE).await?;
        let header = Header::decode(&start).map_err(|damage| reader.error(0, damage))?;
        if above.contains(&header.layer_id) {
            return Err(ImageError::new(path, ErrorKind::Base("its bases form a loop".to_owned())));
        }
        let newest = choose_slot(&reader, &header, &start)?;
        let chain = [above, &[header.layer_id]].concat();
        let base = match &header.base {
            Some(record) => Some(Base::open_recorded(storage, io, path, record, &chain).await?),
            None => None,
        };
        let (mut core, interrupted) = recover(&reader, &header, &newest, options).await?;
        core.checkpointed_at = io.now();
        let clean = newest.slot.clean && core.log.head == newest.slot.log;
        core.was_clean = clean;
        if options.read_only && !clean {
            // What a killed writer left may be in the host's cache only.
            let sync = io.run(Op::Sync { file: file.clone() }).await;
            sync.result.map_err(|errno| ImageError::errno(path, "sync", errno))?;
        }
        let skip = options.read_only || breaks!(options.tuning, RecoveryWithoutSync);
        if breaks!(options.tuning, RecoveryWithoutSync) {
            core.assume_durable();
        }
        let layer = Self::new(file, path, header, base, options.read_only, core);
        if !skip {
            let mut nonce = [0; 8];
            storage.random(&mut nonce).map_err(|e| ImageError::io(path, "make random numbers for", e))?;
            let driver = Driver::new(Arc::clone(&layer), io.clone());
            let mut result = driver.checkpoint(Some(u64::from_le_bytes(nonce)), false).await;
            if interrupted && result.is_ok() {
                // The log of the slot before holds another end record of the same number.
                result = driver.checkpoint(None, false).await;
            }
            driver.retire().await;
            result.map_err(|error| ImageError::new(path, error))?;
        }
        Ok(layer)
    }
}

/// Finds the newest checkpoint.
fn choose_slot<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    start: &[u8],
) -> Result<Newest, ImageError> {
    let mut valid = Vec::new();
    let mut damaged = None;
    for parity in [0, 1] {
        let at = slot_offset(parity).0;
        match Slot::decode(&start[at as usize..(at + BLOCK_SIZE) as usize], header) {
            SlotState::Blank => {}
            SlotState::Valid(slot) if slot.generation % 2 == parity => valid.push(slot),
            SlotState::Valid(_) => {
                let damage = super::layout::damage("slot.generation", 0, "it belongs into the other slot");
                damaged = Some(reader.error(at, damage));
            }
            SlotState::Damaged(damage) => damaged = Some(reader.error(at, damage)),
        }
    }
    valid.sort_by_key(|slot| slot.generation);
    match (valid.pop(), damaged) {
        (Some(slot), damaged) => Ok(Newest { slot, other: valid.pop(), other_damaged: damaged.is_some() }),
        (None, Some(error)) => Err(error),
        (None, None) => Err(ImageError::corrupt(reader.path, "slot", BLOCK_SIZE, "both slots are blank")),
    }
}

/// How many segments there are, and how many the log may name.
fn count_segments<E: Engine>(reader: &Reader<'_, E>, header: &Header) -> Result<(u64, u64), ImageError> {
    let size = reader.file.size().map_err(|e| ImageError::io(reader.path, "measure", e))?;
    let room = size.saturating_sub(PREAMBLE_BYTES);
    let segment_bytes = u64::from(header.segment_blocks) * BLOCK_SIZE;
    if reader.file.is_device() {
        return Ok((room / segment_bytes, room / segment_bytes));
    }
    // The log may go on in segments that were cut off the end of the file when it was closed.
    let count = room.div_ceil(segment_bytes);
    Ok((count, count + SEGMENTS_BEYOND_END))
}

/// Loads the newest checkpoint and replays the log after it. Says, too, whether the log holds the
/// end of a next checkpoint, which no slot names.
async fn recover<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    newest: &Newest,
    options: &OpenLayer,
) -> Result<(Core, bool), ImageError> {
    let slot = &newest.slot;
    let (count, reach) = count_segments(reader, header)?;
    let count_max = u64::from(Segments::count_max(header.segment_blocks));
    let mut segments = Segments::new(header.segment_blocks, count.min(count_max) as u32);
    if u64::from(slot.log.segment.max(slot.log.next_segment)) >= reach.min(count_max) {
        let at = slot_offset(slot.generation).0;
        return Err(ImageError::corrupt(reader.path, "slot.log_segment", at, "it lies outside the file"));
    }
    let map = reader.load_map(slot, &mut segments).await?;
    let log = Log::new(header.layer_id, slot.log);
    let mut core = Core::new(options.tuning, slot.size, map, segments, log, slot.log.sequence);
    core.generation = slot.generation;
    core.root = Root { offset: slot.root, len: slot.root_len };
    core.segments.set_log(slot.log.segment);
    core.segments.set_log(slot.log.next_segment);

    let mut replay = Replay::new(reader, header, &options.tuning, slot.log);
    let mut found_end = false;
    while let Some(record) = replay.next().await? {
        found_end |= record.runs.iter().any(
            |(run, _)| matches!(run, Run::CheckpointEnd { generation, .. } if *generation == slot.generation + 1),
        );
        if u64::from(record.end.next_segment) >= reach {
            let offset = core.segments.offset(record.end.segment).0;
            return Err(ImageError::corrupt(
                reader.path,
                "record.next_segment",
                offset,
                record.end.next_segment,
            ));
        }
        core.replay(&record.runs, record.end);
    }
    if newest.other_damaged && !found_end && !breaks!(options.tuning, FallbackWithoutLog) {
        let at = slot_offset(slot.generation + 1).0;
        let detail = format!(
            "one slot is damaged, and the log after checkpoint {} in the other one does not reach the next \
             checkpoint: writes may be missing. Restore the layer from a copy",
            slot.generation
        );
        return Err(ImageError::corrupt(reader.path, "slot", at, detail));
    }
    if let Some(place) = core.find_ahead() {
        let offset = Core::file_offset(place).0;
        let detail =
            "the map refers to what the log has not written: a part of the log is damaged, or the map";
        return Err(ImageError::corrupt(reader.path, "map", offset, detail));
    }
    if reader.file.is_device() {
        core.segments.fix_count();
        free_unneeded(reader, header, newest, options, &mut core.segments).await?;
    }
    if let Some(other) = newest
        .other
        .filter(|other| other.clean && slot.clean && other.root == slot.root && core.log.head == slot.log)
    {
        // A clean stop: both slots name one map, so what it does not use can be used at once.
        core.segments.free_unused(other.log.segment);
    }
    Ok((core, found_end))
}

/// Frees what neither slot needs, on a device: a recovery has to write, and cannot let the file grow
/// until two checkpoints have told what is free.
async fn free_unneeded<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    newest: &Newest,
    options: &OpenLayer,
    segments: &mut Segments,
) -> Result<(), ImageError> {
    let mut needed = Segments::new(header.segment_blocks, segments.count());
    if let Some(other) = &newest.other {
        match count_needs(reader, header, other, options, &mut needed).await {
            // Nobody can fall back to a checkpoint whose map is damaged.
            Ok(()) | Err(ImageError { kind: ErrorKind::Corrupt { .. }, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    segments.free_unneeded(&needed);
    Ok(())
}

/// Counts what a fall back to `slot` would need: what its map refers to, and its log.
async fn count_needs<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    slot: &Slot,
    options: &OpenLayer,
    segments: &mut Segments,
) -> Result<(), ImageError> {
    let count = segments.count();
    reader.load_map(slot, segments).await?;
    let mut replay = Replay::new(reader, header, &options.tuning, slot.log);
    let mut end = slot.log;
    loop {
        for segment in [end.segment, end.next_segment].into_iter().filter(|&segment| segment < count) {
            segments.set_log(segment);
        }
        match replay.next().await? {
            Some(record) => end = record.end,
            None => return Ok(()),
        }
    }
}

impl Core {
    /// A place that something refers to although the log has yet to write it.
    fn find_ahead(&self) -> Option<u32> {
        let head = self.log.head;
        let (start, blocks) = (self.segments.first_block(head.segment), self.segments.segment_blocks());
        let (filling, next) =
            (start + head.block..start + blocks, self.segments.first_block(head.next_segment));
        let is_ahead = |place: u32| filling.contains(&place) || (next..next + blocks).contains(&place);
        let root = (self.root.offset.0 / BLOCK_SIZE) as u32;
        let root = Some(root).filter(|&place| self.root.len > 0 && is_ahead(place));
        root.or_else(|| self.map.find_place(is_ahead))
    }

    /// Enters a record that was found on recovery.
    fn replay(&mut self, runs: &[(Run, u32)], end: super::layout::LogPosition) {
        if end.segment != self.log.head.segment {
            self.segments.set_used(self.log.head.segment, self.log.head.sequence);
        }
        self.segments.set_log(end.segment);
        self.segments.set_log(end.next_segment);
        self.apply(runs);
        self.log.head = end;
        self.log.published = end;
        self.log.guest_sequence = end.sequence;
    }

    /// The mutation that takes what was found for durable.
    fn assume_durable(&mut self) {
        self.set_durable(self.log.published.sequence);
    }
}
