//! The log: what waits to be written, what is being written, and in what order it counts.
//!
//! Parts wait in `pending` until a record is formed of them; at most two records are in flight,
//! so that what arrives meanwhile gathers into the next and records grow with the load. A record
//! gets its sequence number when it is formed, which happens only when it has a place and the log
//! knows where it goes on after the segment: space comes before the number.
//!
//! Invariant: records leave `flights` at the front only, in sequence, completed or void.

use std::collections::VecDeque;
use std::ops::Range;

use super::layout::LayerId;
use super::map::leaves_of;
use super::record::{Index, Run, fits};
use super::segments::Segments;
use super::slot::LogPosition;
use super::waiter::Waiter;
use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::{AlignedBuf, Memory, Piece};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};

/// Records in flight at once.
const FLIGHTS_MAX: usize = 2;

/// One thing to put on record: a run, its data, and who waits for it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) run: Run,
    /// `run.data_blocks()` blocks, and the checksum of each.
    pub(super) data: Option<(AlignedBuf, Vec<u32>)>,
    pub(super) waiter: Waiter,
    /// It helps to make space, or takes next to none: it may use what is kept back.
    pub(super) upkeep: bool,
}

impl Part {
    /// A part with data: the blocks of `buf`.
    pub(super) fn data(run: Run, buf: AlignedBuf, waiter: Waiter) -> Self {
        assert_eq!(buf.len(), run.data_blocks() as usize * BLOCK_BYTES, "whole blocks");
        let sums = buf.chunks_exact(BLOCK_BYTES).map(crc32fast::hash).collect();
        Self { run, data: Some((buf, sums)), waiter, upkeep: matches!(run, Run::Nodes { .. }) }
    }

    /// A part that is all said in the index block.
    pub(super) fn index_only(run: Run, waiter: Waiter) -> Self {
        assert_eq!(run.data_blocks(), 0);
        Self { run, data: None, waiter, upkeep: true }
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
    /// The position after it.
    pub(super) end: LogPosition,
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
    /// The rest of the segment being filled, and the next one, have their space.
    pub(super) opened: bool,
    /// The segment after the next one, with its space.
    pub(super) spare: Option<u32>,
    pub(super) bytes_since_checkpoint: u64,
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
            opened: false,
            spare: None,
            bytes_since_checkpoint: 0,
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
        let overlaps = |r: Range<u64>| r.start < blocks.end && blocks.start < r.end;
        self.pending.iter().any(|part| overlaps(part.guest_blocks()))
            || self.flights.iter().any(|f| f.runs.iter().any(|(run, _)| overlaps(guest_blocks(run))))
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
        part.run.data_blocks() < segment_blocks - self.head.block
    }

    /// Forms the next record, if there is something to write, a place for it, and fewer than
    /// [`FLIGHTS_MAX`] in flight. On a `full` host, no data of guests.
    pub(super) fn form(&mut self, segments: &mut Segments, full: bool) -> Option<RecordWrite> {
        let first = self.pending.front()?;
        if self.flights.len() >= FLIGHTS_MAX || !self.opened || (full && !first.upkeep) {
            return None;
        }
        let segment_blocks = segments.segment_blocks();
        if !self.fits_segment(first, segment_blocks) {
            let spare = self.spare.take()?;
            segments.set_used(self.head.segment, self.head.sequence);
            self.head =
                LogPosition { segment: self.head.next_segment, block: 0, next_segment: spare, ..self.head };
        }
        let place = segments.first_block(self.head.segment) + self.head.block;
        let taken = self.take_parts(place, segment_blocks - self.head.block - 1, full);
        assert!(!taken.waiters.is_empty(), "every part fits into an empty segment");
        Some(self.launch(place, taken, segments))
    }

    /// Takes parts from the front while they fit into one record of at most `room` data blocks
    /// whose index block is at `place`.
    fn take_parts(&mut self, place: u32, room: u32, full: bool) -> Taken {
        let mut taken = Taken { memory: Memory::default(), ..Taken::default() };
        while let Some(part) = self.pending.front() {
            let blocks = taken.blocks + part.run.data_blocks();
            let refused = full && !part.upkeep;
            if blocks > room || !fits(taken.runs.len() + 1, blocks) || taken.ends_here || refused {
                break;
            }
            let part = self.pending.pop_front().expect("looked at above");
            let data_place = place + 1 + taken.blocks;
            taken.ends_here = matches!(part.run, Run::CheckpointEnd { .. });
            taken.blocks = blocks;
            taken.leaves.extend(Some(leaves_of(&part.guest_blocks())).filter(|leaves| !leaves.is_empty()));
            let absorbed = taken.runs.last_mut().is_some_and(|(last, _)| last.absorb(&part.run));
            if !absorbed {
                taken.runs.push((part.run, data_place));
            }
            if let Some((buf, sums)) = part.data {
                self.pending_bytes -= buf.len();
                taken.checksums.extend(sums);
                taken.memory.push(Piece::Owned(buf));
            }
            taken.waiters.push((part.waiter, data_place));
        }
        taken
    }

    /// Gives a record its sequence number and puts it in flight.
    fn launch(&mut self, place: u32, taken: Taken, segments: &Segments) -> RecordWrite {
        let begin = self.head;
        let sequence = begin.sequence + 1;
        let index = Index {
            layer_id: self.layer_id,
            nonce: begin.nonce,
            sequence,
            previous: begin.chain,
            stands_for: None,
            data_blocks: taken.blocks,
            next_segment: begin.next_segment,
            runs: taken.runs.iter().map(|(run, _)| *run).collect(),
            checksums: taken.checksums,
        };
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        let chain = index.encode(&mut block);
        let nonce = match index.runs.last() {
            Some(Run::CheckpointEnd { nonce, .. }) => *nonce,
            _ => begin.nonce,
        };
        self.head = LogPosition { block: begin.block + 1 + taken.blocks, sequence, chain, nonce, ..begin };
        assert!(self.head.block <= segments.segment_blocks(), "a record lies in one segment");
        if index.runs.iter().any(|run| !matches!(run, Run::Nodes { .. } | Run::CheckpointEnd { .. })) {
            self.guest_sequence = sequence;
        }
        self.bytes_since_checkpoint += u64::from(1 + taken.blocks) * BLOCK_SIZE;
        self.flights.push_back(Flight {
            end: self.head,
            begin,
            place,
            data_blocks: taken.blocks,
            runs: taken.runs,
            waiters: taken.waiters,
            leaves: taken.leaves,
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
            next_segment: flight.end.next_segment,
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

/// Parts taken for one record.
#[derive(Default)]
struct Taken {
    runs: Vec<(Run, u32)>,
    checksums: Vec<u32>,
    memory: Memory,
    waiters: Vec<(Waiter, u32)>,
    leaves: Vec<Range<u32>>,
    blocks: u32,
    /// The record changes the nonce, so it is the last with the old one: nothing may follow in it.
    ends_here: bool,
}
