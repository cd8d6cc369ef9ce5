//! The log: what waits to be written, what is being written, and in what order it counts.
//!
//! Parts wait in `pending` until a record is formed of them; at most two records are in flight,
//! so that what arrives meanwhile gathers into the next and records grow with the load. A record
//! gets its sequence number when it is formed, which happens only when it has a place and the log
//! knows where it goes on after the segment: space comes before the number. Parts for another lane
//! than that of the first are passed over, but no part is written before an earlier one of the same block.
//!
//! Invariant: records leave `flights` at the front only, in sequence, completed or void.

mod taken;

use std::collections::VecDeque;
use std::ops::Range;

use super::layout::LayerId;
use super::position::{Advance, Lane, LogPosition, MAIN, NODES};
use super::record::{Index, Run, fits};
use super::segments::Segments;
use super::traffic::Traffic;
use super::waiter::Waiter;
use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::{AlignedBuf, Memory, Piece};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};
use taken::{Passed, Taken};

/// Records in flight at once where there is one lane, and where there are more: then one in each of them, so that
/// enough gathers for the next.
const FLIGHTS_MAX: usize = 2;
const FLIGHTS_MAX_LANES: usize = 3;
/// Parts for other lanes that are passed over for one record.
const PASSED_MAX: usize = 512;

/// One thing to put on record: a run, its data, and who waits for it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) run: Run,
    /// `run.data_blocks()` blocks, and the checksum of each.
    pub(super) data: Option<(AlignedBuf, Vec<u32>)>,
    pub(super) waiter: Waiter,
    /// It helps to make space, or takes next to none: it may use what is kept back.
    pub(super) upkeep: bool,
    /// Its data is a guest's, written now; not moved, and not copied from below.
    pub(super) of_guest: bool,
    /// The lane that it is for, while that is open.
    pub(super) lane: usize,
    /// When its data was written, as far as that tells how long it will live (see `age`); `None`: now.
    pub(super) estimate: Option<u64>,
}

impl Part {
    /// A part with data: the blocks of `buf`.
    pub(super) fn data(run: Run, buf: AlignedBuf, waiter: Waiter) -> Self {
        assert_eq!(buf.len(), run.data_blocks() as usize * BLOCK_BYTES, "whole blocks");
        let sums = buf.chunks_exact(BLOCK_BYTES).map(crc32fast::hash).collect();
        let upkeep = matches!(run, Run::Nodes { .. });
        let lane = if upkeep { NODES } else { MAIN };
        Self { run, data: Some((buf, sums)), waiter, upkeep, of_guest: !upkeep, lane, estimate: None }
    }

    /// A part that is all said in the index block.
    pub(super) fn index_only(run: Run, waiter: Waiter) -> Self {
        assert_eq!(run.data_blocks(), 0);
        Self { run, data: None, waiter, upkeep: true, of_guest: false, lane: MAIN, estimate: None }
    }

    /// The guest blocks whose entries it changes.
    fn guest_blocks(&self) -> Range<u64> {
        guest_blocks(&self.run)
    }
}

/// The guest blocks whose entries a run changes.
pub(super) fn guest_blocks(run: &Run) -> Range<u64> {
    match *run {
        Run::Data { start, count } | Run::Zero { start, count } | Run::Absent { start, count } => {
            start..start + u64::from(count)
        }
        _ => 0..0,
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// How far a record in flight has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlightState {
    Writing,
    Done,
    /// The write failed; a void record must take its place before any later one is reported.
    Failed(Errno),
    Voiding(Errno),
    Voided(Errno),
}

/// A record in flight.
#[derive(Debug)]
pub(super) struct Flight {
    /// How it moves the position on.
    pub(super) end: Advance,
    /// The position before it.
    begin: LogPosition,
    /// The block of its index.
    pub(super) place: u32,
    data_blocks: u32,
    /// What it says, and where the data of each part begins.
    pub(super) runs: Vec<(Run, u32)>,
    /// Who waits: one entry for each part.
    pub(super) waiters: Vec<(Waiter, u32)>,
    /// The leaves that its parts keep in memory: one entry for each.
    pub(super) leaves: Vec<Range<u32>>,
    /// Writes of guests that have data in it.
    pub(super) writes: u64,
    /// Blocks of the disk whose data in it is not a guest's.
    pub(super) not_of_guests: Vec<Range<u64>>,
    pub(super) state: FlightState,
}

impl Flight {
    /// Whether the records after it carry another nonce.
    pub(super) fn changes_nonce(&self) -> bool {
        self.begin.nonce != self.end.nonce
    }
}

/// A record ready to be written.
#[derive(Debug)]
pub(super) struct RecordWrite {
    pub(super) sequence: u64,
    pub(super) offset: FileOffset,
    pub(super) memory: Memory,
}

/// The writing end of the log.
#[derive(Debug)]
pub(super) struct Log {
    layer_id: LayerId,
    pub(super) pending: VecDeque<Part>,
    /// Bytes of data in `pending`.
    pub(super) pending_bytes: usize,
    pub(super) flights: VecDeque<Flight>,
    /// After the last record formed.
    pub(super) head: LogPosition,
    /// After the last record that counts: it and all before it have completed.
    pub(super) published: LogPosition,
    /// The newest record that changed what the guest sees.
    pub(super) guest_sequence: u64,
    /// What was written, records in flight included.
    pub(super) traffic: Traffic,
    /// The rest of the main lane's segment, and its next one, have their space.
    pub(super) opened: bool,
    /// The segment after the next one, with its space.
    pub(super) spare: Option<u32>,
    pub(super) bytes_since_checkpoint: u64,
    /// A lane is being opened.
    pub(super) is_opening: bool,
}

impl Log {
    /// A log that goes on from `head`.
    pub(super) fn new(layer_id: LayerId, head: LogPosition) -> Self {
        Self {
            layer_id,
            pending: VecDeque::new(),
            pending_bytes: 0,
            flights: VecDeque::new(),
            head,
            published: head,
            guest_sequence: head.sequence,
            traffic: Traffic::default(),
            opened: false,
            spare: None,
            bytes_since_checkpoint: 0,
            is_opening: false,
        }
    }

    /// Appends a part to what waits.
    pub(super) fn push(&mut self, part: Part) {
        if let Some((buf, _)) = &part.data {
            self.pending_bytes += buf.len();
        }
        self.pending.push_back(part);
    }

    /// Whether a part that waits, or a record that does not count yet, changes one of `blocks`.
    pub(super) fn is_writing(&self, blocks: &Range<u64>) -> bool {
        self.pending.iter().any(|part| overlap(&part.guest_blocks(), blocks))
            || self.flights.iter().any(|f| f.runs.iter().any(|(run, _)| overlap(&guest_blocks(run), blocks)))
    }

    /// Whether data of guests waits.
    pub(super) fn has_guest_data(&self) -> bool {
        self.pending.iter().any(|part| !part.upkeep)
    }

    /// Whether the next record needs space that is not there yet.
    pub(super) fn wants_space(&self) -> bool {
        !self.pending.is_empty() && (!self.opened || self.spare.is_none())
    }

    /// Whether nothing can be written before space is found.
    pub(super) fn is_out_of_space(&self, segment_blocks: u32) -> bool {
        let fits_here =
            self.opened && self.pending.front().is_some_and(|p| self.fits_segment(p, segment_blocks));
        !self.pending.is_empty() && !fits_here && (!self.opened || self.spare.is_none())
    }

    fn fits_segment(&self, part: &Part, segment_blocks: u32) -> bool {
        part.run.data_blocks() < segment_blocks - self.lane_of(part).1.block
    }

    /// The lane that a part is written to.
    fn lane_of(&self, part: &Part) -> (usize, Lane) {
        match self.head.lane(part.lane) {
            Some(lane) => (part.lane, lane),
            None => (MAIN, self.head.main()),
        }
    }

    fn is_lane_busy(&self, number: usize) -> bool {
        let in_lane = self.flights.iter().filter(|flight| flight.end.number == number).count();
        in_lane > 0 && self.head.lanes().count() > 1 || in_lane >= FLIGHTS_MAX
    }

    /// Opens and closes lanes: the record that says so has completed. Those that were closed are returned.
    pub(super) fn follow(&mut self, runs: &[(Run, u32)]) -> Vec<Lane> {
        self.published.follow(runs);
        self.head.follow(runs)
    }

    /// Forms the next record, if there is something to write, a place for it, and few enough in
    /// flight. On a `full` host, no data of guests.
    pub(super) fn form(&mut self, segments: &mut Segments, full: bool) -> Option<RecordWrite> {
        let many = self.head.lanes().count() > 1;
        if !self.opened || self.flights.len() >= if many { FLIGHTS_MAX_LANES } else { FLIGHTS_MAX } {
            return None;
        }
        let first = self.next_part(full)?;
        let (number, mut lane) = self.lane_of(first);
        let segment_blocks = segments.segment_blocks();
        if !self.fits_segment(first, segment_blocks) {
            let spare = self.spare.take()?;
            segments.set_used(lane.segment, self.head.sequence);
            lane = Lane { segment: lane.next_segment, block: 0, next_segment: spare };
        }
        let mut taken = self.take_parts(number, segment_blocks - lane.block - 1, full);
        assert!(!taken.waiters.is_empty(), "every part fits into an empty segment");
        let place = segments.first_block(lane.segment) + lane.block;
        taken.set_place(place + 1);
        for &(estimate, blocks) in &taken.estimates {
            segments.note_written(lane.segment, estimate, blocks);
        }
        Some(self.launch(number, lane, place, taken, segments))
    }

    /// The first part that can be written now: its lane has not enough in flight, and no earlier part
    /// of the same blocks waits.
    fn next_part(&self, full: bool) -> Option<&Part> {
        let mut passed = Passed::default();
        for (i, part) in self.pending.iter().enumerate().take(PASSED_MAX) {
            let is_size = matches!(part.run, Run::Size { .. });
            if full && !part.upkeep || is_size && i > 0 {
                return None;
            }
            if !self.is_lane_busy(self.lane_of(part).0) && !passed.overlaps(part, self.pending.iter().take(i))
            {
                return Some(part);
            }
            if is_size {
                return None;
            }
            passed.add(part);
        }
        None
    }

    /// Takes parts for one lane from the front while they fit into one record of at most `room` data
    /// blocks.
    fn take_parts(&mut self, number: usize, room: u32, full: bool) -> Taken {
        let mut taken = Taken::default();
        let (mut passed, mut parts) = (Passed::default(), Vec::new());
        while let Some(part) = self.pending.front() {
            // What changes the size of the disk passes nothing, and nothing passes it.
            let refused = full && !part.upkeep || matches!(part.run, Run::Size { .. }) && !parts.is_empty();
            if self.lane_of(part).0 != number || passed.overlaps(part, parts.iter()) {
                if parts.len() == PASSED_MAX || refused || matches!(part.run, Run::Size { .. }) {
                    break;
                }
                passed.add(part);
                parts.extend(self.pending.pop_front());
                continue;
            }
            let blocks = taken.blocks + part.run.data_blocks();
            if blocks > room || !fits(taken.runs.len() + 1, blocks) || taken.ends_here || refused {
                break;
            }
            let part = self.pending.pop_front().expect("looked at above");
            self.pending_bytes -= part.data.as_ref().map_or(0, |(buf, _)| buf.len());
            self.traffic.count(&part);
            taken.add(part, self.traffic.guest);
        }
        parts.into_iter().rev().for_each(|part| self.pending.push_front(part));
        taken
    }

    /// Gives a record its sequence number and puts it in flight.
    fn launch(
        &mut self,
        number: usize,
        mut lane: Lane,
        place: u32,
        taken: Taken,
        segments: &Segments,
    ) -> RecordWrite {
        let begin = self.head;
        let sequence = begin.sequence + 1;
        let index = Index {
            layer_id: self.layer_id,
            nonce: begin.nonce,
            sequence,
            previous: begin.chain,
            stands_for: None,
            data_blocks: taken.blocks,
            lane: number,
            next_segment: lane.next_segment,
            runs: taken.runs.iter().map(|(run, _)| *run).collect(),
            checksums: taken.checksums,
        };
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        let chain = index.encode(&mut block);
        let nonce = match index.runs.last() {
            Some(Run::CheckpointEnd { nonce, .. }) => *nonce,
            _ => begin.nonce,
        };
        lane.block += 1 + taken.blocks;
        assert!(lane.block <= segments.segment_blocks(), "a record lies in one segment");
        let end = Advance { number, lane, sequence, chain, nonce };
        self.head.advance(&end);
        self.traffic.index += 1;
        if index.runs.iter().any(Run::changes_disk) {
            self.guest_sequence = sequence;
        }
        self.bytes_since_checkpoint += u64::from(1 + taken.blocks) * BLOCK_SIZE;
        self.flights.push_back(Flight {
            end,
            begin,
            place,
            data_blocks: taken.blocks,
            runs: taken.runs,
            waiters: taken.waiters,
            leaves: taken.leaves,
            writes: taken.writes,
            not_of_guests: taken.not_of_guests,
            state: FlightState::Writing,
        });
        let mut memory = Memory::from(block);
        for buf in taken.memory.into_owned() {
            memory.push(Piece::Owned(buf));
        }
        RecordWrite { sequence, offset: FileOffset(u64::from(place) * BLOCK_SIZE), memory }
    }

    /// The record with this sequence number, while it is in flight.
    pub(super) fn flight(&mut self, sequence: u64) -> &mut Flight {
        let first = self.flights.front().expect("a record in flight").end.sequence;
        &mut self.flights[(sequence - first) as usize]
    }

    /// A record that must be replaced by a void one: returns the void record's write.
    pub(super) fn form_void(&mut self) -> Option<RecordWrite> {
        let layer_id = self.layer_id;
        let flight = self.flights.iter_mut().find(|f| matches!(f.state, FlightState::Failed(_)))?;
        let FlightState::Failed(errno) = flight.state else { unreachable!("found as failed") };
        flight.state = FlightState::Voiding(errno);
        let index = Index {
            layer_id,
            nonce: flight.begin.nonce,
            sequence: flight.end.sequence,
            previous: flight.begin.chain,
            stands_for: Some(flight.end.chain),
            data_blocks: flight.data_blocks,
            lane: flight.end.number,
            next_segment: flight.end.lane.next_segment,
            runs: Vec::new(),
            checksums: Vec::new(),
        };
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        index.encode(&mut block);
        Some(RecordWrite {
            sequence: index.sequence,
            offset: FileOffset(u64::from(flight.place) * BLOCK_SIZE),
            memory: block.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::waiter::Ticket;
    use super::*;
    use std::sync::Arc;

    fn part(start: u64, count: u32, lane: usize) -> Part {
        let waiter = Waiter::Ticket(Arc::new(Ticket::default()));
        let buf = AlignedBuf::zeroed(count as usize * BLOCK_BYTES);
        Part { lane, ..Part::data(Run::Data { start, count }, buf, waiter) }
    }

    /// A log with two lanes, and its segments.
    fn two_lanes() -> (Log, Segments) {
        let mut segments = Segments::new(64, 4);
        (0..4).for_each(|segment| segments.set_log(segment));
        let main = Lane { segment: 0, block: 0, next_segment: 1 };
        let mut log = Log::new([7; 16], LogPosition::new(main, 0, 0, 1));
        log.opened = true;
        let lane = Lane { segment: 2, block: 0, next_segment: 3 };
        log.follow(&[(Run::Lane { number: 2, lane }, 0)]);
        (log, segments)
    }

    /// The runs and the lane of the next record.
    fn next(log: &mut Log, segments: &mut Segments) -> Option<(Vec<Run>, usize)> {
        log.form(segments, false)?;
        let flight = log.flights.back().expect("it was formed");
        Some((flight.runs.iter().map(|(run, _)| *run).collect(), flight.end.number))
    }

    #[test]
    fn a_lane_s_parts_pass_others_but_none_of_the_same_block() {
        let (mut log, mut segments) = two_lanes();
        for (start, count, lane) in [(10, 1, 0), (20, 4, 2), (11, 1, 0), (22, 1, 0), (30, 1, 0)] {
            log.push(part(start, count, lane));
        }
        let data = |start, count| Run::Data { start, count };
        let first = next(&mut log, &mut segments);
        assert_eq!(first, Some((vec![data(10, 2), data(30, 1)], 0)), "22 waits for 20 to 23");
        assert_eq!(next(&mut log, &mut segments), Some((vec![data(20, 4)], 2)));
        assert_eq!(next(&mut log, &mut segments), None, "one record in each lane at once");
        log.flights.pop_front();
        assert_eq!(next(&mut log, &mut segments), Some((vec![data(22, 1)], 0)));
    }

    #[test]
    fn nothing_passes_a_change_of_size() {
        let (mut log, mut segments) = two_lanes();
        log.push(part(10, 1, 0));
        log.push(part(20, 1, 2));
        log.push(Part::index_only(Run::Size { bytes: 512 }, Waiter::Ticket(Arc::default())));
        log.push(part(11, 1, 0));
        assert_eq!(next(&mut log, &mut segments).map(|(runs, _)| runs.len()), Some(1));
        assert_eq!(next(&mut log, &mut segments).map(|(_, lane)| lane), Some(2));
        log.flights.clear();
        let runs = next(&mut log, &mut segments).map(|(runs, _)| runs.len());
        assert_eq!(runs, Some(2), "the change of size, and what came after it");
    }
}
