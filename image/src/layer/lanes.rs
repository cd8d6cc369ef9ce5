//! Opens and closes the lanes of the log beside the main one.
//!
//! They are there while the cleaner has something to sort: each takes two segments, so that small layers
//! do without. A lane counts when the record that opens it does; a session ends, and begins, with the
//! main lane alone.

use std::ops::Range;

use super::core::Core;
use super::driver::Driver;
use super::log::Part;
use super::position::{LANES, Lane, MAIN};
use super::record::Run;
use super::tuning::breaks;
use super::waiter::Result;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

impl Core {
    /// Chooses the segments of a lane that is to be opened now, if one is, and nobody else opens one: they have their space already.
    fn next_lane(&mut self) -> Option<(usize, Lane)> {
        let live_bytes = self.segments.live_blocks() * BLOCK_SIZE;
        // What is kept back is made up for with the next segment that the log asks for; on a full host it is not.
        let kept = if self.tuning.lanes_from_segments == 0 { 0 } else { self.reserve_segments() };
        if self.log.is_opening
            || self.closing
            || self.is_full_host()
            || live_bytes < self.tuning.lanes_from_segments * self.segments.bytes()
            || self.segments.free_reserved() < kept + 2
        {
            return None;
        }
        let number = (1..LANES).find(|&number| self.log.head.lane(number).is_none())?;
        let segment = self.segments.choose_reserved()?;
        let Some(next_segment) = self.segments.choose_reserved() else {
            self.segments.unchoose(segment);
            return None;
        };
        self.log.is_opening = true;
        Some((number, Lane { segment, block: 0, next_segment }))
    }

    /// Opens and closes lanes as a record says that counts now. Of those that were closed, what nothing was written
    /// to is free: neither slot, nor the log after it, names anything there.
    pub(super) fn follow_lanes(&mut self, runs: &[(Run, u32)]) {
        for lane in self.log.follow(runs) {
            self.segments.unchoose(lane.next_segment);
            match lane.block {
                0 => self.segments.unchoose(lane.segment),
                _ => self.segments.set_used(lane.segment, self.log.head.sequence),
            }
        }
    }
}

impl<E: Engine> Driver<E> {
    /// Opens the lanes for which there is room.
    pub(super) async fn open_lanes(&self) -> Result {
        loop {
            let Some((number, lane)) = self.layer.core().next_lane() else { return Ok(()) };
            let run = Run::Lane { number, lane };
            let opened = self.append(|waiter| vec![Part::index_only(run, waiter.clone())]).await;
            let mut core = self.layer.core();
            core.log.is_opening = false;
            if let Err(error) = opened {
                lane.segments().into_iter().for_each(|segment| core.segments.unchoose(segment));
                return Err(error);
            }
        }
    }

    /// Closes all lanes but the main one, when nothing else is being written: the bytes of the file that they
    /// leave unwritten at the ends of their segments.
    pub(super) async fn close_lanes(&self) -> Result<Vec<Range<u64>>> {
        let unwritten: Vec<Range<u64>> = {
            let core = self.layer.core();
            let others = core.log.head.lanes().filter(|(number, _)| *number != MAIN);
            let rest = |(_, lane): (usize, Lane)| {
                let start = core.segments.offset(lane.segment).0;
                start + u64::from(lane.block) * BLOCK_SIZE..start + core.segments.bytes()
            };
            others.map(rest).collect()
        };
        if breaks!(self.layer.core().tuning, LanesClosedSilently) {
            self.layer.core().follow_lanes(&[(Run::LanesClosed, 0)]);
        } else if !unwritten.is_empty() {
            self.append(|waiter| vec![Part::index_only(Run::LanesClosed, waiter.clone())]).await?;
        }
        Ok(unwritten)
    }
}
