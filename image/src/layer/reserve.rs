//! Space comes before the write: which segments the log has, and what is kept back.
//!
//! A record is formed only where the host has given the space. Some more segments with space are
//! kept back for what makes space: discards, checkpoints and the cleaner. When the host is full,
//! guests' data is refused before that reserve is touched; so what they discard can be let go,
//! and then they can write again without anybody's help.

use std::ops::Range;
use std::sync::Arc;

use super::core::Core;
use super::gate::SpaceGate;
use super::log::guest_blocks;
use super::map::leaves_of;
use sapwood_blockdev::Errno;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Segments kept back beside those that changed nodes of the map will need: for two checkpoints
/// and a segment's worth of moved blocks.
const RESERVE_SEGMENTS: u64 = 3;

/// Segments full of live data from which on a closed layer keeps space: some percent of them.
const KEEPING_SEGMENTS: u64 = 128;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Reserve {
    running: Option<Running>,
    /// The host had no space for guests' data when it was last asked.
    full: bool,
    /// Nor a segment for anything else: it is asked again when nothing can be written without.
    exhausted: bool,
    /// For want of space what makes space has failed, and none was found since.
    stuck: bool,
    /// What must let the file grow for guests' data.
    gate: Option<Arc<SpaceGate>>,
}

/// Space being asked for.
struct Running {
    /// The rest of the segment that the log is in, and the next one.
    opening: bool,
    spare: Option<u32>,
    /// For the reserve.
    extra: Vec<u32>,
    for_guests: bool,
}

impl Reserve {
    /// Lets the file grow for guests' data only as far as `gate` does.
    pub(super) fn set_gate(&mut self, gate: Option<Arc<SpaceGate>>) {
        self.gate = gate;
    }

    /// What lets the file grow.
    pub(super) fn gate(&self) -> Option<Arc<SpaceGate>> {
        self.gate.clone()
    }

    /// Whether guests' data has to be refused.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }
}

impl Core {
    /// Segments with space that guests' data must leave alone.
    pub(super) fn reserve_segments(&self) -> usize {
        let nodes = self.map.dirty_bytes().div_ceil(self.segments.bytes());
        let wanted = (RESERVE_SEGMENTS + nodes) as usize;
        wanted.min(self.segments.limit() as usize / 4)
    }

    /// Whether guests' data is refused.
    pub(super) fn is_full_host(&self) -> bool {
        self.reserve.full
    }

    /// Whether nobody in this process can make room: checkpoints and the cleaner need space themselves, and there is none.
    pub(super) fn is_stuck_for_space(&self) -> bool {
        self.reserve.stuck
    }

    /// Whether guests' data is refused, and cleaning may be what helps.
    pub(super) fn is_short_of_space(&self) -> bool {
        self.reserve.full && self.segments.free_reserved() <= self.reserve_segments()
    }

    /// Free segments that keep their space when the layer is closed, beside the rest of the log's segment and
    /// the next one, so that it can be opened on a full host and discards make room there. `None`: not even
    /// those, because they are much for what it holds, and the host was not full.
    pub(super) fn kept_when_closed(&self) -> Option<usize> {
        let live = self.segments.live_blocks() / u64::from(self.segments.segment_blocks());
        // The spare one, too, and one to begin with.
        let least = self.reserve_segments() + 2;
        match self.reserve.full {
            true => Some(self.segments.free_with_space().max(least)),
            false => (live >= KEEPING_SEGMENTS).then_some(least),
        }
    }

    /// Whether a segment can be emptied into what is kept back, and two checkpoints after it.
    pub(super) fn can_clean(&self) -> bool {
        !self.reserve.full || self.segments.free_reserved() >= 2
    }

    /// The ranges of the file that have to be given space next, if the log wants some.
    pub(super) fn next_reservation(&mut self) -> Option<Vec<Range<u64>>> {
        loop {
            if self.reserve.running.is_some() {
                return None;
            }
            let for_guests = !self.reserve.full || self.log.has_guest_data();
            let refused = self.reserve.full && self.log.has_guest_data();
            let out = self.log.is_out_of_space(self.segments.segment_blocks());
            let wanted = self.log.wants_space() && (!self.reserve.exhausted || out);
            if !refused && !wanted {
                return None;
            }
            match self.start_reserve(for_guests) {
                Some(ranges) => return Some(ranges),
                None => self.reservation_failed(for_guests, DeviceError::NoSpace),
            }
        }
    }

    /// Chooses segments and says which ranges of the file need space for them; `None` when there are
    /// not enough.
    fn start_reserve(&mut self, for_guests: bool) -> Option<Vec<Range<u64>>> {
        let mut running = Running { opening: !self.log.opened, spare: None, extra: Vec::new(), for_guests };
        let mut ranges = Vec::new();
        if running.opening {
            // First of all, and alone: with these two the log can be written even if there is no more.
            let head = self.log.head.main();
            let start = self.segments.offset(head.segment).0;
            ranges.push(start + u64::from(head.block) * BLOCK_SIZE..start + self.segments.bytes());
            ranges.extend(self.unreserved(head.next_segment));
        } else {
            let enough = self.choose_segments(&mut running);
            if !enough {
                self.give_up(running);
                return None;
            }
            let chosen = running.spare.iter().chain(&running.extra);
            ranges.extend(chosen.filter_map(|&segment| self.unreserved(segment)));
        }
        ranges.retain(|range| !range.is_empty());
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        let is_gated = for_guests && !running.opening;
        if is_gated && self.reserve.gate.as_ref().is_some_and(|gate| !gate.take(bytes)) {
            self.give_up(running);
            return None;
        }
        self.reserve.running = Some(running);
        Some(ranges)
    }

    fn choose_segments(&mut self, running: &mut Running) -> bool {
        if self.log.spare.is_none() {
            running.spare = self.segments.choose();
            if running.spare.is_none() {
                return false;
            }
        }
        let wanted = if running.for_guests { self.reserve_segments() } else { 0 };
        while self.segments.free_reserved() + running.extra.len() < wanted {
            match self.segments.choose_unreserved() {
                Some(segment) => running.extra.push(segment),
                None => return false,
            }
        }
        true
    }

    /// The range of a segment, unless its space was given already.
    fn unreserved(&self, segment: u32) -> Option<Range<u64>> {
        let start = self.segments.offset(segment).0;
        (!self.segments.is_reserved(segment)).then(|| start..start + self.segments.bytes())
    }

    fn give_up(&mut self, running: Running) {
        running.spare.into_iter().chain(running.extra).for_each(|segment| self.segments.unchoose(segment));
    }

    /// The space asked for is there, or is not.
    pub(super) fn reserve_done(&mut self, result: Result<(), Errno>) {
        let running = self.reserve.running.take().expect("a reservation was running");
        let for_guests = running.for_guests;
        if let Err(errno) = result {
            self.give_up(running);
            return self.reservation_failed(for_guests, errno.into());
        }
        (self.reserve.exhausted, self.reserve.stuck) = (false, false);
        if running.opening {
            self.segments.set_reserved(self.log.head.main().next_segment);
            self.log.opened = true;
            return;
        }
        if let Some(spare) = running.spare {
            self.segments.set_reserved(spare);
            self.log.spare = Some(spare);
        }
        for segment in running.extra {
            self.segments.set_reserved(segment);
            self.segments.unchoose(segment);
        }
        self.reserve.full &= !for_guests;
    }

    fn reservation_failed(&mut self, for_guests: bool, error: DeviceError) {
        if self.log.is_out_of_space(self.segments.segment_blocks()) && (!for_guests || !self.log.opened) {
            // Guests who wait for what has failed here would wait for ever.
            self.reserve.stuck = true;
            return self.fail_pending(error);
        }
        if for_guests {
            self.reserve.full = true;
            self.fail_guest_data(error);
            self.wake_maintenance();
        } else {
            self.reserve.exhausted = true;
        }
    }

    /// Fails the guests' data that waits for the log.
    fn fail_guest_data(&mut self, error: DeviceError) {
        let (kept, failed) = std::mem::take(&mut self.log.pending).into_iter().partition(|part| part.upkeep);
        self.log.pending = kept;
        for part in Vec::from(failed) {
            self.log.pending_bytes -= part.data.as_ref().map_or(0, |(buf, _)| buf.len());
            self.unpin(leaves_of(&guest_blocks(&part.run)));
            self.end(part.waiter, Err(error), 0);
        }
        self.release_held();
        self.merge_wakers.drain(..).for_each(std::task::Waker::wake);
    }
}
