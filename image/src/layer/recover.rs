//! Opens a layer: finds the newest checkpoint, replays the log after it, and starts a session.
//!
//! Order: the lock on the open file description that is read; header, slots, base record; base; map; log;
//! then, for a writer, a checkpoint under a new nonce, durable before anything is served. A
//! reader changes nothing.

use std::path::Path;
use std::sync::Arc;

use super::base::{Below, OpenBase};
use super::base_record::{BaseRecord, base_offset};
use super::core::{Core, Root};
use super::device::Layer;
use super::driver::Driver;
use super::handover;
use super::header::Header;
use super::in_store::ResolveBase;
use super::layout::{HEAD_BYTES, LayerId, PREAMBLE_BYTES};
use super::load::Reader;
use super::log::{Log, guest_blocks};
use super::map::by_branch;
use super::position::{Advance, Lane};
use super::record::Run;
use super::replay::{Replay, Replayed};
use super::segments::Segments;
use super::slot::{Slot, SlotState, slot_offset};
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
        Self::open_with(storage, io, path, options, OpenBase::Opened, None).await
    }

    pub(crate) async fn open_with<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
        bases: OpenBase,
        resolver: Option<&dyn ResolveBase<E>>,
    ) -> Result<Arc<Self>, ImageError> {
        let head = Head::read(storage, io, path, options).await?;
        let record = head.record.clone();
        let was_open = record.is_base_open() && !options.read_only && !matches!(bases, OpenBase::Nothing);
        let is_closed = was_open && handover::close_base(storage, io, path, &record, &options.tuning).await;
        let in_store = record.base.as_ref().is_some_and(|base| base.in_store().is_some());
        let (below, base) = match bases {
            OpenBase::Nothing => (Below::over(record, None), None),
            OpenBase::UnlessInStore if in_store => (Below::over(record, None), None),
            _ => Below::open_found(storage, io, path, record, &options.tuning, resolver, None).await?,
        };
        let (layer, interrupted) = Self::open_over(io, path, options, head, below, false).await?;
        if breaks!(options.tuning, RecoveryWithoutSync) {
            layer.core().assume_durable();
        } else if !options.read_only {
            layer.begin_session(storage, io, interrupted).await?;
        }
        if let Some(identity) = base.filter(|_| is_closed) {
            layer.record_closed_base(io, identity).await?;
        }
        Ok(layer)
    }

    /// Loads a layer whose base is open; `is_known` says that the caller knows the number of
    /// its newest checkpoint and compares it. Says whether its log holds the end of a next checkpoint, which
    /// no slot names.
    pub(super) async fn open_over(
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
        head: Head<E>,
        below: Below<E>,
        is_known: bool,
    ) -> Result<(Arc<Self>, bool), ImageError> {
        let Head { file, header, newest, .. } = head;
        let reader = Reader { io, file: &file, path };
        let core = load(&reader, &header, &newest, options).await?;
        let layer = Self::new(file.clone(), path, header, below, options.read_only, core);
        // After a clean stop there is no log to follow, unless the slot is not the newest that was written.
        let is_ended = is_known && newest.slot.clean && !newest.other_damaged;
        let interrupted = layer.recover(&reader, &newest, is_ended).await?;
        {
            let mut core = layer.core();
            core.checkpointed_at = io.now();
            core.was_clean = newest.slot.clean && core.log.head == newest.slot.log;
        }
        if options.read_only && !layer.core().was_clean {
            // What a killed writer left may be in the host's cache only.
            let sync = io.run(Op::Sync { file: file.clone() }).await;
            sync.result.map_err(|errno| ImageError::errno(path, "sync", errno))?;
        }
        Ok((layer, interrupted))
    }

    /// Makes a checkpoint after which records carry a new nonce. With `interrupted`, the log of the
    /// slot before holds another end record of the same number.
    pub(super) async fn begin_session<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        interrupted: bool,
    ) -> Result<(), ImageError> {
        let path = self.path();
        let mut nonce = [0; 8];
        storage.random(&mut nonce).map_err(|e| ImageError::io(path, "make random numbers for", e))?;
        let driver = Driver::new(Arc::clone(self), io.clone());
        let mut result = driver.close_lanes().await.map(drop);
        if result.is_ok() {
            result = driver.checkpoint(Some(u64::from_le_bytes(nonce)), false).await;
        }
        if interrupted && result.is_ok() {
            result = driver.checkpoint(None, false).await;
        }
        driver.retire().await;
        result.map_err(|error| ImageError::new(path, error))
    }
}

/// What the first blocks of a locked file say.
pub(super) struct Head<E: Engine> {
    pub(super) file: E::File,
    pub(super) header: Header,
    newest: Newest,
    pub(super) record: BaseRecord,
}

impl<E: Engine> Head<E> {
    pub(super) async fn read<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        options: &OpenLayer,
    ) -> Result<Self, ImageError> {
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
        Self::of(io, path, file).await
    }

    /// What the first blocks of an open file say.
    pub(super) async fn of(io: &Io<E>, path: &Path, file: E::File) -> Result<Self, ImageError> {
        let reader = Reader { io, file: &file, path };
        let start = reader.read(0, HEAD_BYTES).await?;
        let header = Header::decode(&start).map_err(|damage| reader.error(0, damage))?;
        let newest = choose_slot(&reader, &header, &start)?;
        let record = base_record(&reader, &header, &newest.slot, &start)?;
        Ok(Self { file, header, newest, record })
    }

    /// The id of the layer in an open file that others may be writing.
    pub(super) async fn id_of(io: &Io<E>, path: &Path, file: E::File) -> Result<LayerId, ImageError> {
        let reader = Reader { io, file: &file, path };
        let start = reader.read(0, HEAD_BYTES).await?;
        Ok(Header::decode(&start).map_err(|damage| reader.error(0, damage))?.layer_id)
    }

    /// Whether a slot cannot be read.
    pub(super) fn is_slot_damaged(&self) -> bool {
        self.newest.other_damaged
    }

    /// The newest checkpoint.
    pub(super) fn slot(&self) -> Slot {
        self.newest.slot
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

/// How many segments there are.
fn count_segments<E: Engine>(reader: &Reader<'_, E>, header: &Header) -> Result<u32, ImageError> {
    let size = reader.file.size().map_err(|e| ImageError::io(reader.path, "measure", e))?;
    let room = size.saturating_sub(PREAMBLE_BYTES);
    let segment_bytes = u64::from(header.segment_blocks) * BLOCK_SIZE;
    let count = match reader.file.is_device() {
        true => room / segment_bytes,
        false => room.div_ceil(segment_bytes),
    };
    Ok(count.min(u64::from(Segments::count_max(header.segment_blocks))) as u32)
}

/// How many segments the log may name where there are `count`. It may go on in segments that were
/// cut off the end of a file when that was closed.
fn reach<E: Engine>(reader: &Reader<'_, E>, count: u32) -> u64 {
    u64::from(count) + if reader.file.is_device() { 0 } else { SEGMENTS_BEYOND_END }
}

/// The base record that a slot names.
fn base_record<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    slot: &Slot,
    start: &[u8],
) -> Result<BaseRecord, ImageError> {
    let at = base_offset(slot.base).0;
    BaseRecord::decode(&start[at as usize..(at + BLOCK_SIZE) as usize], header, slot.base)
        .map_err(|damage| reader.error(at, damage))
}

/// Loads what the newest checkpoint says and is always kept in memory.
async fn load<E: Engine>(
    reader: &Reader<'_, E>,
    header: &Header,
    newest: &Newest,
    options: &OpenLayer,
) -> Result<Core, ImageError> {
    let slot = &newest.slot;
    let count = count_segments(reader, header)?;
    let mut segments = Segments::new(header.segment_blocks, count);
    let reach = reach(reader, count).min(u64::from(Segments::count_max(header.segment_blocks)));
    if slot.log.lanes().any(|(_, lane)| lane.segments().into_iter().any(|s| u64::from(s) >= reach)) {
        let at = slot_offset(slot.generation).0;
        return Err(ImageError::corrupt(reader.path, "slot.log_segment", at, "it lies outside the file"));
    }
    let map = reader.load_root(slot, &mut segments, options.tuning.map_cache_bytes).await?;
    let mut log = Log::new(header.layer_id, slot.log);
    log.traffic = slot.traffic;
    let mut core = Core::new(options.tuning, slot.size, map, segments, log, slot.log.sequence);
    core.generation = slot.generation;
    core.found_generation = slot.generation;
    core.base_sequence = slot.base;
    core.slot_bases = [slot.base, newest.other.map_or(slot.base, |other| other.base)];
    core.root = Root { offset: slot.root, len: slot.root_len };
    for segment in slot.log.lanes().flat_map(|(_, lane)| lane.segments()) {
        core.segments.set_log(segment);
    }
    Ok(core)
}

impl<E: Engine> Layer<E> {
    /// Replays the log after the newest checkpoint, unless it is known to have ended there. Says whether it holds the end of a next
    /// checkpoint, which no slot names.
    async fn recover(
        self: &Arc<Self>,
        reader: &Reader<'_, E>,
        newest: &Newest,
        is_ended: bool,
    ) -> Result<bool, ImageError> {
        let (slot, tuning) = (&newest.slot, self.core().tuning);
        let reach = reach(reader, self.core().segments.count());
        let replay = Replay::new(reader, self.header(), &tuning, slot.log);
        // After a clean stop there is nothing to read.
        let mut replay = if slot.clean { replay.expecting_its_end() } else { replay };
        let mut found_end = false;
        while let Some(record) = if is_ended { None } else { replay.next().await? } {
            let is_next = |run: &Run| matches!(run, Run::CheckpointEnd { generation, .. } if *generation == slot.generation + 1);
            found_end |= record.runs.iter().any(|(run, _)| is_next(run));
            let lane = record.end.lane;
            let mut named = replay.position.lanes().flat_map(|(_, lane)| lane.segments());
            if let Some(beyond) = named.find(|&segment| u64::from(segment) >= reach) {
                let offset = self.core().segments.offset(lane.segment).0;
                return Err(ImageError::corrupt(reader.path, "record.next_segment", offset, beyond));
            }
            self.replay(reader.io, &record).await?;
        }
        if newest.other_damaged && !found_end && !breaks!(tuning, FallbackWithoutLog) {
            let at = slot_offset(slot.generation + 1).0;
            let detail = format!(
                "one slot is damaged, and the log after checkpoint {} in the other one does not reach the next \
                 checkpoint: writes may be missing. Restore the layer from a copy",
                slot.generation
            );
            return Err(ImageError::corrupt(reader.path, "slot", at, detail));
        }
        self.core().check_ahead(reader)?;
        if reader.file.is_device() {
            self.free_unneeded(reader, newest).await?;
        }
        let mut core = self.core();
        if let Some(other) = newest
            .other
            .filter(|other| other.clean && slot.clean && other.root == slot.root && core.log.head == slot.log)
        {
            // A clean stop: both slots name one map, so what it does not use can be used at once.
            core.segments.free_unused(other.log.main().segment);
        }
        Ok(found_end)
    }

    /// Enters a record that was found on recovery. Long runs are entered one branch at a time, so that
    /// what has to be in memory for it is bounded; nobody sees the layer in between.
    async fn replay(self: &Arc<Self>, io: &Io<E>, record: &Replayed) -> Result<(), ImageError> {
        self.core().replay_position(record);
        for &(run, place) in &record.runs {
            let blocks = guest_blocks(&run);
            if blocks.is_empty() {
                self.core().apply(&[(run, place)]);
            }
            for part in by_branch(blocks.clone()) {
                let (skip, count) = ((part.start - blocks.start) as u32, (part.end - part.start) as u32);
                let run = run.part(part.start, count);
                let _pins = self.pin(io, &part).await?;
                self.core().apply(&[(run, place + skip)]);
            }
        }
        Ok(())
    }

    /// Has the device's segments be all that there are, and frees what neither slot needs: a recovery
    /// has to write, and cannot let the file grow until two checkpoints have told what is free.
    ///
    /// What the newest slot and the log after it need is known by now; of the other slot the usage of
    /// segments is read for it, and forgotten again.
    async fn free_unneeded(&self, reader: &Reader<'_, E>, newest: &Newest) -> Result<(), ImageError> {
        let (count, tuning) = {
            let mut core = self.core();
            core.segments.fix_count();
            (core.segments.count(), core.tuning)
        };
        if self.is_read_only() {
            return Ok(());
        }
        let mut needed = Segments::new(self.header().segment_blocks, count);
        if let Some(other) = &newest.other {
            match reader.load_root(other, &mut needed, 0).await {
                // Nobody can fall back to a checkpoint whose root or usage is damaged.
                Ok(_) | Err(ImageError { kind: ErrorKind::Corrupt { .. }, .. }) => {}
                Err(error) => return Err(error),
            }
            let mut replay = Replay::new(reader, self.header(), &tuning, other.log);
            take_log(&mut replay, newest.slot.log.sequence, &mut needed).await?;
        }
        self.core().segments.free_unneeded(&needed);
        Ok(())
    }
}

/// Marks the segments through which the log goes up to the record number `sequence`.
async fn take_log<E: Engine>(
    replay: &mut Replay<'_, E>,
    sequence: u64,
    segments: &mut Segments,
) -> Result<(), ImageError> {
    let count = segments.count();
    loop {
        let named = replay.position.lanes().flat_map(|(_, lane)| lane.segments());
        named.filter(|&segment| segment < count).for_each(|segment| segments.set_log(segment));
        if replay.position.sequence >= sequence || replay.next().await?.is_none() {
            return Ok(());
        }
    }
}

impl Core {
    /// Refuses a root or usage that speaks of what the log has yet to write; leaves are looked at when
    /// they are loaded.
    fn check_ahead<E: Engine>(&self, reader: &Reader<'_, E>) -> Result<(), ImageError> {
        let next = |(_, lane): (usize, Lane)| lane.next_segment;
        let used = self.log.head.lanes().map(next).find(|&next| self.segments.live_bytes_in(next) > 0);
        let root_ahead = self.root.len > 0 && !self.can_be_mapped((self.root.offset.0 / BLOCK_SIZE) as u32);
        let segment = match used {
            Some(next) => next,
            None if root_ahead => self.log.head.main().segment,
            None => return Ok(()),
        };
        let offset = self.segments.offset(segment).0;
        let detail = "the map refers to what the log has not written: the slot is damaged, or the map";
        Err(ImageError::corrupt(reader.path, "map", offset, detail))
    }

    /// The log goes on after a record that was found on recovery.
    fn replay_position(&mut self, record: &Replayed) {
        let Advance { number, lane, sequence, .. } = record.end;
        if let Some(old) = self.log.head.lane(number).filter(|old| old.segment != lane.segment) {
            self.segments.set_used(old.segment, self.log.head.sequence);
        }
        self.log.head.advance(&record.end);
        self.log.published = self.log.head;
        self.follow_lanes(&record.runs);
        for segment in self.log.head.lanes().flat_map(|(_, lane)| lane.segments()) {
            self.segments.set_log(segment);
        }
        self.log.guest_sequence = sequence;
        self.log.traffic.count_found(&record.runs);
        let blocks = record.runs.iter().map(|(run, _)| run.data_blocks()).sum();
        self.segments.note_written(lane.segment, self.log.traffic.guest, blocks);
    }

    /// The mutation that takes what was found for durable.
    fn assume_durable(&mut self) {
        self.set_durable(self.log.published.sequence);
    }
}
