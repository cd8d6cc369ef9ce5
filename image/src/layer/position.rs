//! Where the log goes on: its lanes, and what the next record must say.
//!
//! The log is one chain of records by their numbers, but it fills several segments at once: each *lane* has
//! a segment of its own, so that data of one age lie together, whatever is written in between. Lane
//! 0 is always there. The others are opened in the course of a session and closed at its end, by records that
//! say so.

use super::record::Run;

/// Lanes that a log can have.
pub(super) const LANES: usize = 5;
/// The lane that is always there.
pub(super) const MAIN: usize = 0;
/// The lane for nodes of the map: all of what one checkpoint stored is dead when the next ones have replaced it.
pub(super) const NODES: usize = 4;

/// Where one lane goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// The segment being filled.
    pub(super) segment: u32,
    /// Blocks of it that are taken.
    pub(super) block: u32,
    /// The segment in which the lane goes on when this one is full.
    pub(super) next_segment: u32,
}

impl Lane {
    /// The two segments of the lane, neither of which is free.
    pub(super) fn segments(&self) -> [u32; 2] {
        [self.segment, self.next_segment]
    }
}

/// A position in the log: between two records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogPosition {
    lanes: [Option<Lane>; LANES],
    /// Sequence number of the last record before this position.
    pub(super) sequence: u64,
    /// Chain value of that record.
    pub(super) chain: u32,
    /// The nonce that the next record carries.
    pub(super) nonce: u64,
}

/// How a record moves the position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Advance {
    /// The lane that the record is in, and where that goes on.
    pub(super) number: usize,
    pub(super) lane: Lane,
    /// As in [`LogPosition`].
    pub(super) sequence: u64,
    pub(super) chain: u32,
    pub(super) nonce: u64,
}

impl LogPosition {
    /// A position with one lane, before record `sequence` + 1.
    pub(super) fn new(lane: Lane, sequence: u64, chain: u32, nonce: u64) -> Self {
        let mut lanes = [None; LANES];
        lanes[MAIN] = Some(lane);
        Self { lanes, sequence, chain, nonce }
    }

    /// The lane that is always there.
    pub(super) fn main(&self) -> Lane {
        self.lanes[MAIN].expect("the main lane is never closed")
    }

    /// A lane, if it is open.
    pub(super) fn lane(&self, number: usize) -> Option<Lane> {
        self.lanes.get(number).copied().flatten()
    }

    /// The open lanes and their numbers.
    pub(super) fn lanes(&self) -> impl Iterator<Item = (usize, Lane)> + use<> {
        let lanes = self.lanes;
        (0..).zip(lanes).filter_map(|(number, lane)| Some((number, lane?)))
    }

    /// Whether a lane can be opened with these segments: it is not open, and no lane has them.
    pub(super) fn can_open(&self, number: usize, lane: Lane) -> bool {
        let is_taken = |segment| self.lanes().any(|(_, lane)| lane.segments().contains(&segment));
        (1..LANES).contains(&number)
            && self.lanes[number].is_none()
            && lane.segment != lane.next_segment
            && !lane.segments().into_iter().any(is_taken)
    }

    /// Opens a lane.
    pub(super) fn open(&mut self, number: usize, lane: Lane) {
        assert!(self.can_open(number, lane), "a lane has segments of its own");
        self.lanes[number] = Some(lane);
    }

    /// Goes on to after a record.
    pub(super) fn advance(&mut self, to: &Advance) {
        let Advance { number, lane, sequence, chain, nonce } = *to;
        self.lanes[number] = Some(lane);
        (self.sequence, self.chain, self.nonce) = (sequence, chain, nonce);
    }

    /// Opens and closes the lanes as the runs of a record say. Those that were closed are returned.
    pub(super) fn follow(&mut self, runs: &[(Run, u32)]) -> Vec<Lane> {
        let mut closed = Vec::new();
        for (run, _) in runs {
            match *run {
                Run::Lane { number, lane } => self.open(number, lane),
                Run::LanesClosed => closed.extend(self.lanes[MAIN + 1..].iter_mut().filter_map(Option::take)),
                _ => {}
            }
        }
        closed
    }
}
