//! The state of an open layer, shared by its threads under one lock, and its next steps.
//!
//! Nothing here does I/O. [`Core::next_job`] says what has to be done next; whoever polls does it
//! and reports back with one of the `*_done` functions. Readers look the map up here and read the
//! file without the lock.
//!
//! Rules kept here (docs/format-layer.md, "Commit protocol"): records are published in sequence;
//! a flush joins only a sync not yet submitted; a failed record is voided before any later one is
//! reported; a failed sync latches.

use std::ops::Range;
use std::task::Waker;

use super::age;
use super::log::{Flight, FlightState, Log, Part, RecordWrite, guest_blocks};
use super::map::{Map, leaves_of};
use super::node::Entry;
use super::pace::Pace;
use super::paging::{Loading, Streams};
use super::ports::Ports;
use super::position::LogPosition;
use super::record::Run;
use super::reserve::Reserve;
use super::segments::Segments;
use super::tuning::{Tuning, breaks};
use super::waiter::{Result, Waiter};
use crate::counts::Counts;
use sapwood_blockdev::Errno;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::Time;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Data that may wait for a record, in bytes: more is left with the guest.
const PENDING_BYTES_MAX: usize = 64 << 20;

/// Memory for changed nodes of the map that there always is, in bytes.
const DIRTY_BYTES_MIN: u64 = 1 << 20;

/// Something to do for the layer, by whoever asks.
#[derive(Debug)]
pub(super) enum Job {
    /// Write a record; then [`Core::record_done`].
    Record(RecordWrite),
    /// Write a void record; then [`Core::void_done`].
    Void(RecordWrite),
    /// Sync the file; then [`Core::sync_done`].
    Sync,
    /// Give these ranges of the file their space; then [`Core::reserve_done`].
    Reserve(Vec<Range<u64>>),
}

/// Flushes and the syncs that serve them.
#[derive(Default)]
struct Sync {
    /// For the next sync.
    waiting: Vec<Waiter>,
    /// For the one that is running, and the position up to which it covers the log.
    running: Option<(Vec<Waiter>, LogPosition)>,
    /// Everything up to this sequence is durable.
    durable: u64,
    /// The newest position up to which a sync of this session has covered the log.
    covered: Option<LogPosition>,
    /// When the oldest record that no sync covers yet was published.
    unsynced_since: Option<Time>,
    /// What lies below is not durable yet: nothing is reported as durable before it is.
    held: bool,
}

/// Where the root node of the map is stored; a length of 0 when nothing is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) offset: FileOffset,
    /// Length in bytes.
    pub(super) len: u32,
}

/// See the module's documentation.
pub(super) struct Core {
    pub(super) tuning: Tuning,
    /// Guest-visible size in bytes.
    pub(super) size: u64,
    pub(super) map: Map,
    /// Nodes of the map that are being read.
    pub(super) loading: Loading,
    /// Sequential accesses.
    pub(super) streams: Streams,
    /// Reads of nodes, since the layer was opened.
    pub(super) node_reads: u64,
    /// What was counted of guests' requests, but for frames.
    pub(super) counts: Counts,
    pub(super) segments: Segments,
    pub(super) log: Log,
    pub(super) ports: Ports,
    /// Blocks under merge: see `merge`.
    pub(super) merging: Vec<Range<u64>>,
    /// Tasks that wait for a merge to end or a record to be published.
    pub(super) merge_wakers: Vec<Waker>,
    /// Writes may be reported before they are durable.
    pub(super) write_cache: bool,
    /// The first failure that made the layer read-only.
    pub(super) latched: Option<DeviceError>,
    /// The newest durable checkpoint, and the one that was it when the layer was opened.
    pub(super) generation: u64,
    pub(super) found_generation: u64,
    /// The newest record that it includes.
    pub(super) checkpoint_sequence: u64,
    pub(super) root: Root,
    /// The base record that checkpoints belong to from now on.
    pub(super) base_sequence: u64,
    /// Those that the newest slot and the other one name.
    pub(super) slot_bases: [u64; 2],
    pub(super) checkpointing: bool,
    pub(super) checkpointed_at: Time,
    pub(super) closing: bool,
    /// The layer had been closed properly before it was opened.
    pub(super) was_clean: bool,
    pub(super) maintainers: usize,
    /// The maintenance sleeps without a deadline: anything written must wake it.
    pub(super) maintenance_idle: bool,
    /// Tasks that wait for background work to become due or to end.
    pub(super) maintenance_wakers: Vec<Waker>,
    sync: Sync,
    pub(super) reserve: Reserve,
    pub(super) pace: Pace,
}

impl Core {
    /// The state of a layer just recovered up to `head`, of which `durable` is known to be safe.
    pub(super) fn new(
        tuning: Tuning,
        size: u64,
        map: Map,
        segments: Segments,
        log: Log,
        durable: u64,
    ) -> Self {
        Self {
            tuning,
            size,
            map,
            loading: Loading::new(),
            streams: Streams::default(),
            node_reads: 0,
            counts: Counts::default(),
            segments,
            log,
            ports: Ports::default(),
            merging: Vec::new(),
            merge_wakers: Vec::new(),
            write_cache: true,
            latched: None,
            generation: 0,
            found_generation: 0,
            checkpoint_sequence: durable,
            root: Root::default(),
            base_sequence: 1,
            slot_bases: [1; 2],
            checkpointing: false,
            checkpointed_at: Time::ZERO,
            closing: false,
            was_clean: false,
            maintainers: 0,
            maintenance_idle: false,
            maintenance_wakers: Vec::new(),
            sync: Sync { durable, ..Sync::default() },
            reserve: Reserve::default(),
            pace: Pace::default(),
        }
    }

    /// Appends a part to the log; its waiter hears of it exactly once. The leaves whose entries it
    /// changes must be loaded; they stay so until the part has ended.
    pub(super) fn append(&mut self, mut part: Part) {
        if let Waiter::Ticket(ticket) = &part.waiter {
            ticket.add();
        }
        if self.latched.is_some() {
            return self.end(part.waiter, Err(DeviceError::Latched), 0);
        }
        for leaf in leaves_of(&guest_blocks(&part.run)) {
            self.map.pin(leaf).expect("whoever appends has loaded the leaves");
        }
        if let Run::Data { start, .. } = part.run
            && part.estimate.is_none()
        {
            self.sort(&mut part, start);
        }
        self.log.push(part);
    }

    /// Says of a guest's data when it was written, as far as that tells how long it will live, and chooses its lane: by
    /// what it overwrites. What overwrites nothing is as young as it is.
    fn sort(&self, part: &mut Part, start: u64) {
        let Some(place) = self.map.lookup(start).ok().and_then(Entry::place) else { return };
        let (now, live) = (self.log.traffic.guest, self.segments.live_blocks());
        let estimate = age::renewed(self.segments.written(self.segments.of_place(place)), now);
        part.estimate = Some(estimate);
        part.lane = age::lane_of_write(estimate, now, live);
    }

    /// Whether a part that changes these blocks can be appended at once.
    pub(super) fn can_append(&self, blocks: &Range<u64>) -> bool {
        leaves_of(blocks).all(|leaf| self.map.can_pin(leaf))
    }

    pub(super) fn unpin(&mut self, leaves: Range<u32>) {
        leaves.for_each(|leaf| self.map.unpin(leaf));
    }

    fn unpin_flight(&mut self, flight: &mut Flight) {
        std::mem::take(&mut flight.leaves).into_iter().for_each(|leaves| self.unpin(leaves));
    }

    /// Whether a queue's writes should wait until less waits for the log, and those of `data` until the cleaner
    /// has made room. Then the queue is woken when it may try again.
    pub(super) fn hold(&mut self, port: usize, data: bool) -> bool {
        let full = self.log.pending_bytes > PENDING_BYTES_MAX || self.is_map_full();
        let behind = data && self.is_behind();
        if behind {
            self.wake_maintenance();
        }
        let congested = self.latched.is_none() && (full || behind);
        self.ports.set_held(port, congested);
        congested
    }

    /// Whether changed nodes take so much memory that a checkpoint has to come first.
    pub(super) fn is_map_full(&self) -> bool {
        self.map.dirty_bytes() > DIRTY_BYTES_MIN.max(self.tuning.map_cache_bytes)
    }

    /// Whether changed nodes take so much memory that a checkpoint is due.
    pub(super) fn is_map_dirty(&self) -> bool {
        self.map.dirty_bytes() > DIRTY_BYTES_MIN.max(self.tuning.map_cache_bytes) / 2
    }

    /// Wakes the queues that hold writes back, once they need not.
    pub(super) fn release_held(&mut self) {
        if self.log.pending_bytes <= PENDING_BYTES_MAX && !self.is_map_full() && !self.is_behind() {
            self.ports.release_held();
        }
    }

    /// Makes all that is published durable, and tells `waiter`.
    pub(super) fn flush(&mut self, waiter: Waiter) {
        if let Waiter::Ticket(ticket) = &waiter {
            ticket.add();
        }
        if self.latched.is_some() {
            return self.end(waiter, Err(DeviceError::Latched), 0);
        }
        if breaks!(self.tuning, FlushWithoutSync) {
            self.sync.unsynced_since = None;
            return self.end(waiter, Ok(()), 0);
        }
        if self.sync.durable >= self.log.published.sequence && !self.sync.held {
            return self.end(waiter, Ok(()), 0);
        }
        match &mut self.sync.running {
            Some((waiters, _)) if breaks!(self.tuning, FlushJoinsSubmittedSync) => waiters.push(waiter),
            _ => self.sync.waiting.push(waiter),
        }
    }

    /// Syncs the file whether or not a record wants it, and tells `waiter`.
    pub(super) fn sync_file(&mut self, waiter: Waiter) {
        if let Waiter::Ticket(ticket) = &waiter {
            ticket.add();
        }
        match self.latched {
            Some(_) => self.end(waiter, Err(DeviceError::Latched), 0),
            None => self.sync.waiting.push(waiter),
        }
    }

    /// Has syncs, and all that waits for them, wait for what lies below to be durable, or no more.
    pub(super) fn hold_syncs(&mut self, held: bool) {
        self.sync.held = held;
        if !held {
            self.nudge();
            self.wake_maintenance();
        }
    }

    /// What to do next, if anything can be done now.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        if self.latched.is_some() {
            return None;
        }
        if let Some(void) = self.log.form_void() {
            return Some(Job::Void(void));
        }
        if self.sync.running.is_none() && !self.sync.waiting.is_empty() && !self.sync.held {
            let waiters = std::mem::take(&mut self.sync.waiting);
            self.sync.running = Some((waiters, self.log.published));
            self.sync.unsynced_since = None;
            return Some(Job::Sync);
        }
        if let Some(ranges) = self.next_reservation() {
            return Some(Job::Reserve(ranges));
        }
        let before = self.log.traffic.guest;
        let record = self.log.form(&mut self.segments, self.reserve.is_full())?;
        self.owe(self.log.traffic.guest - before);
        self.release_held();
        Some(Job::Record(record))
    }

    /// Whether there is work that [`next_job`](Self::next_job) would hand out to some queue: then
    /// one of those who wait for it is woken.
    pub(super) fn nudge(&self) {
        let failed = self.log.flights.iter().find(|f| matches!(f.state, FlightState::Failed(_)));
        let waiter = failed
            .and_then(|flight| flight.waiters.first().map(|(waiter, _)| waiter))
            .or_else(|| self.log.pending.front().map(|part| &part.waiter))
            .or_else(|| self.sync.waiting.first());
        match waiter {
            Some(Waiter::Request { port, .. }) => self.ports.wake(*port),
            Some(Waiter::Ticket(ticket)) => ticket.nudge(),
            None => {}
        }
    }

    /// Fails what waits for the log.
    pub(super) fn fail_pending(&mut self, error: DeviceError) {
        self.log.pending_bytes = 0;
        self.release_held();
        for part in std::mem::take(&mut self.log.pending) {
            self.unpin(leaves_of(&guest_blocks(&part.run)));
            self.end(part.waiter, Err(error), 0);
        }
        self.merge_wakers.drain(..).for_each(Waker::wake);
    }

    /// A record's write has ended.
    pub(super) fn record_done(&mut self, sequence: u64, result: std::result::Result<(), Errno>, now: Time) {
        if self.latched.is_some() {
            return;
        }
        let flight = self.log.flight(sequence);
        flight.state = match result {
            Ok(()) => FlightState::Done,
            Err(errno) if breaks!(self.tuning, FailedRecordNotVoided) => FlightState::Voided(errno),
            Err(errno) => FlightState::Failed(errno),
        };
        #[cfg(feature = "mutations")]
        self.breach_order(sequence);
        self.publish(now);
    }

    /// A void record's write has ended.
    pub(super) fn void_done(&mut self, sequence: u64, result: std::result::Result<(), Errno>, now: Time) {
        if self.latched.is_some() {
            return;
        }
        let flight = self.log.flight(sequence);
        let FlightState::Voiding(errno) = flight.state else { unreachable!("it was being voided") };
        // Records after one that changes the nonce already carry the new one.
        if result.is_err() || flight.changes_nonce() {
            return self.latch(DeviceError::from(errno));
        }
        self.log.flight(sequence).state = FlightState::Voided(errno);
        self.publish(now);
    }

    /// Lets the records at the front that have completed count: first in the map, then to those
    /// who wait.
    fn publish(&mut self, now: Time) {
        while let Some(flight) = self.log.flights.front() {
            let result = match flight.state {
                FlightState::Done => Ok(()),
                FlightState::Voided(errno) => Err(DeviceError::from(errno)),
                _ => break,
            };
            let mut flight = self.log.flights.pop_front().expect("looked at above");
            self.log.published.advance(&flight.end);
            if result.is_ok() {
                let others = flight.not_of_guests.iter().map(|blocks| self.map.count_unheld(blocks.clone()));
                let others: u64 = others.sum();
                self.counts.first_writes += self.apply(&flight.runs).saturating_sub(others);
                self.counts.joined_writes += flight.writes.saturating_sub(1);
                self.follow_lanes(&flight.runs);
            }
            self.unpin_flight(&mut flight);
            self.sync.unsynced_since.get_or_insert(now);
            for (waiter, place) in flight.waiters {
                let write_through = !self.write_cache && !breaks!(self.tuning, WriteThroughWithoutSync);
                if write_through && result.is_ok() && matches!(waiter, Waiter::Request { .. }) {
                    self.sync.waiting.push(waiter);
                } else {
                    self.end(waiter, result, place);
                }
            }
        }
        self.merge_wakers.drain(..).for_each(Waker::wake);
        self.release_held();
        self.wake_maintenance_if_due();
    }

    /// Enters what a record says into the map; of how many blocks there is data now and was none before.
    pub(super) fn apply(&mut self, runs: &[(Run, u32)]) -> u64 {
        let mut new = 0;
        for &(run, place) in runs {
            match run {
                Run::Data { start, count } => {
                    new += self.map.set_places(start, count, place, &mut self.segments);
                }
                Run::Zero { start, count } => {
                    self.map.set_uniform(start..start + u64::from(count), Entry::ZERO, &mut self.segments);
                }
                Run::Absent { start, count } => {
                    self.map.set_uniform(start..start + u64::from(count), Entry::ABSENT, &mut self.segments);
                }
                Run::Size { bytes } => self.size = bytes,
                Run::Nodes { .. } | Run::CheckpointEnd { .. } | Run::Lane { .. } | Run::LanesClosed => {}
            }
        }
        new
    }

    /// A sync has ended.
    pub(super) fn sync_done(&mut self, result: std::result::Result<(), Errno>) {
        let (waiters, covers) = self.sync.running.take().expect("a sync was running");
        if let Err(errno) = result {
            waiters.into_iter().for_each(|waiter| self.end(waiter, Err(DeviceError::Io(errno)), 0));
            if !breaks!(self.tuning, FailedSyncForgotten) {
                self.latch(DeviceError::Io(errno));
            }
            return;
        }
        let requests =
            waiters.iter().filter(|waiter| matches!(waiter, Waiter::Request { .. })).count() as u64;
        self.counts.joined_flushes += requests.saturating_sub(1);
        self.sync.durable = self.sync.durable.max(covers.sequence);
        self.sync.covered = Some(covers);
        waiters.into_iter().for_each(|waiter| self.end(waiter, Ok(()), 0));
    }

    /// Makes the layer read-only: what is not yet reported fails, reads go on.
    pub(super) fn latch(&mut self, error: DeviceError) {
        if self.latched.is_none() {
            log::error!("the layer is read-only from now on: {error}");
            self.latched = Some(error);
        }
        self.fail_pending(DeviceError::Latched);
        for mut flight in std::mem::take(&mut self.log.flights) {
            self.unpin_flight(&mut flight);
            flight.waiters.into_iter().for_each(|(waiter, _)| self.end(waiter, Err(DeviceError::Latched), 0));
        }
        for waiter in std::mem::take(&mut self.sync.waiting) {
            self.end(waiter, Err(DeviceError::Latched), 0);
        }
        self.merge_wakers.drain(..).for_each(Waker::wake);
        self.wake_maintenance();
    }

    /// Tells a waiter how its part, or its flush, has ended.
    pub(super) fn end(&mut self, waiter: Waiter, result: Result, place: u32) {
        match waiter {
            Waiter::Request { port, key } => self.ports.tell(port, key, result),
            Waiter::Ticket(ticket) => ticket.end(result, place),
        }
    }

    /// Takes everything up to `sequence` for durable.
    pub(super) fn set_durable(&mut self, sequence: u64) {
        self.sync.durable = sequence;
    }

    /// When the oldest unsynced record was published.
    pub(super) fn unsynced_since(&self) -> Option<Time> {
        self.sync.unsynced_since
    }

    /// Wakes the tasks that do background work or wait for it.
    pub(super) fn wake_maintenance(&mut self) {
        self.maintenance_wakers.drain(..).for_each(Waker::wake);
    }

    /// The position that a checkpoint frozen at `frozen` may name: the newest one that is durable, when only the checkpoint's own
    /// records and such that change no map came since. One before a named position that a power cut took would leave a gap
    /// between those around it.
    pub(super) fn checkpoint_position(&self, frozen: LogPosition) -> LogPosition {
        let newest = match breaks!(self.tuning, SlotNamesUnsynced) {
            true => Some(self.log.published),
            false => self.sync.covered,
        };
        let is_disk_the_same = self.log.guest_sequence <= frozen.sequence && self.log.flights.is_empty();
        newest.filter(|newest| is_disk_the_same && newest.sequence > frozen.sequence).unwrap_or(frozen)
    }

    /// The byte of the file at which a block lies.
    pub(super) fn file_offset(place: u32) -> FileOffset {
        FileOffset(u64::from(place) * BLOCK_SIZE)
    }
}
