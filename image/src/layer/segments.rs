//! Segments: which are live, which can be used again, and when.
//!
//! The life of a segment:
//!
//! ```text
//! Free -> Log (being filled, or chosen to be next) -> Used -> Retired -> Draining -> Free
//! ```
//!
//! A used segment without live blocks is *retired* by the first durable checkpoint that neither
//! refers to it nor replays it, and *drains* from the second on (then both slots name such
//! checkpoints), until every read that may have looked it up before has finished.

mod checked;
mod choice;
mod fixed;
mod readers;
mod space;
mod usage;

use std::collections::{BTreeSet, VecDeque};

use super::layout::{FIRST_SEGMENT_BLOCK, PREAMBLE_BYTES, usage_nodes_max};
use super::node::{NODE_ALIGNMENT, NodeRef, USAGE_SEGMENTS};
use super::position::LogPosition;
pub(super) use choice::Candidate;
use readers::Readers;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};
use usage::Group;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Log,
    Used,
    Retired,
    Draining,
    Punching,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    state: State,
    /// Mapped blocks.
    live_blocks: u32,
    /// Bytes of leaves that the newest checkpoint refers to.
    leaf_bytes: u32,
    /// Bytes of other nodes that it refers to.
    node_bytes: u32,
    /// The newest record in it.
    last_sequence: u64,
    /// The host may have given it space, which is to be given back.
    allocated: bool,
    /// All its space was reserved in this session: writing it cannot fail for want of space.
    reserved: bool,
    /// It holds live blocks that cannot be moved, because they are damaged.
    pinned: bool,
    /// The cleaner has emptied it but for nodes, which the next checkpoint stores elsewhere.
    emptied: bool,
    /// So many of its blocks were compared with the checksums of their records since the log began to fill it,
    checked: u32,
    /// and so many, from its beginning, were whole.
    whole: u32,
    /// When its data was written, on average, on the layer's clock (see `age`),
    written: u64,
    /// and how many blocks that says it of, while the log fills it.
    written_blocks: u32,
}

impl Segment {
    const FREE: Self = Self {
        state: State::Free,
        live_blocks: 0,
        leaf_bytes: 0,
        node_bytes: 0,
        last_sequence: 0,
        allocated: false,
        reserved: false,
        pinned: false,
        emptied: false,
        checked: 0,
        whole: 0,
        written: 0,
        written_blocks: 0,
    };

    fn is_empty(&self) -> bool {
        self.live_blocks == 0 && self.leaf_bytes == 0 && self.node_bytes == 0
    }

    /// Whether it will be free once two checkpoints have been made and its readers have gone.
    fn is_in_limbo(&self) -> bool {
        matches!(self.state, State::Used | State::Retired | State::Draining) && self.is_empty()
    }

    /// Whether the log fills it, or the map or its nodes lie in it.
    fn is_referenced(&self) -> bool {
        self.state == State::Log || !self.is_empty()
    }

    /// Bytes in use.
    fn live_bytes(&self) -> u64 {
        u64::from(self.live_blocks) * BLOCK_SIZE + u64::from(self.leaf_bytes) + u64::from(self.node_bytes)
    }
}

/// All segments of a layer.
pub(super) struct Segments {
    list: Vec<Segment>,
    /// Free segments without space of the host, and those with it.
    free: BTreeSet<u32>,
    free_allocated: BTreeSet<u32>,
    /// Draining segments and the epoch whose reads they wait for, oldest first.
    draining: VecDeque<(u32, u64)>,
    segment_blocks: u32,
    /// Most segments there can be.
    limit: u32,
    live_blocks: u64,
    /// Segments that are on their way to be free.
    limbo: u32,
    /// Segments that the log fills, or will fill next.
    logs: u32,
    /// Free segments whose space is being given back.
    punching: usize,
    /// Segments that are marked as emptied.
    emptied: Vec<u32>,
    groups: Vec<Group>,
    /// A checkpoint is being written: the usage as of its start must not be lost.
    frozen: bool,
    readers: Readers,
}

impl Segments {
    /// `count` segments of which nothing is known yet: in use until checkpoints say otherwise.
    pub(super) fn new(segment_blocks: u32, count: u32) -> Self {
        let used = Segment { state: State::Used, allocated: true, ..Segment::FREE };
        // Room to grow a little: to grow at once doubles the memory.
        let mut list = Vec::with_capacity(count as usize + count as usize / 16 + 64);
        list.resize(count as usize, used);
        Self {
            list,
            free: BTreeSet::new(),
            free_allocated: BTreeSet::new(),
            draining: VecDeque::new(),
            segment_blocks,
            limit: Self::count_max(segment_blocks),
            live_blocks: 0,
            limbo: count,
            logs: 0,
            punching: 0,
            emptied: Vec::new(),
            groups: Vec::new(),
            frozen: false,
            readers: Readers::default(),
        }
    }

    /// Bytes of the segments that the map or the log uses.
    pub(super) fn used_bytes(&self) -> u64 {
        self.list.iter().filter(|segment| segment.is_referenced()).count() as u64 * self.bytes()
    }

    /// Bytes of nodes that the newest checkpoint refers to, the root and usage nodes included.
    pub(super) fn node_bytes(&self) -> u64 {
        self.list.iter().map(|segment| u64::from(segment.leaf_bytes) + u64::from(segment.node_bytes)).sum()
    }

    /// Most segments a file can have: places are 32-bit block numbers, and the root names the usage
    /// of all of them.
    pub(super) fn count_max(segment_blocks: u32) -> u32 {
        let places = (u32::MAX - FIRST_SEGMENT_BLOCK) / segment_blocks;
        places.min(usage_nodes_max(segment_blocks).saturating_mul(USAGE_SEGMENTS as u32))
    }

    pub(super) fn segment_blocks(&self) -> u32 {
        self.segment_blocks
    }

    /// Segments that the file has room for.
    pub(super) fn count(&self) -> u32 {
        self.list.len() as u32
    }

    /// Block of the file at which a segment starts.
    pub(super) fn first_block(&self, segment: u32) -> u32 {
        FIRST_SEGMENT_BLOCK + segment * self.segment_blocks
    }

    /// Byte of the file at which a segment starts.
    pub(super) fn offset(&self, segment: u32) -> FileOffset {
        FileOffset(u64::from(self.first_block(segment)) * BLOCK_SIZE)
    }

    /// Bytes in a segment.
    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.segment_blocks) * BLOCK_SIZE
    }

    /// The segment that holds a block of the file.
    pub(super) fn of_place(&self, place: u32) -> u32 {
        (place - FIRST_SEGMENT_BLOCK) / self.segment_blocks
    }

    /// Whether bytes of the file lie in one segment.
    pub(super) fn holds(&self, offset: u64, len: usize) -> bool {
        let Some(start) = offset.checked_sub(PREAMBLE_BYTES) else { return false };
        start / self.bytes() < self.list.len() as u64 && start % self.bytes() + len as u64 <= self.bytes()
    }

    fn of_offset(&self, offset: u64) -> u32 {
        self.of_place((offset / BLOCK_SIZE) as u32)
    }

    /// Mapped blocks in all segments.
    pub(super) fn live_blocks(&self) -> u64 {
        self.live_blocks
    }

    /// Bytes of segments that are neither free for use nor the log's to fill.
    pub(super) fn occupied_bytes(&self) -> u64 {
        let free = self.free.len() + self.free_allocated.len() + self.punching + self.logs as usize;
        (self.list.len() - free) as u64 * self.bytes()
    }

    /// Blocks of used segments that are not mapped, those of the lanes of the log included.
    pub(super) fn dead_blocks(&self, head: &LogPosition) -> u64 {
        let taken = |(i, s): (u32, &Segment)| match s.state {
            State::Used | State::Retired | State::Draining => {
                self.segment_blocks.saturating_sub(s.live_blocks)
            }
            State::Log => {
                let lane = head.lanes().find(|(_, lane)| lane.segment == i);
                lane.map_or(0, |(_, lane)| lane.block.saturating_sub(s.live_blocks))
            }
            _ => 0,
        };
        (0..).zip(&self.list).map(taken).map(u64::from).sum()
    }

    /// Bytes of segments that are neither free for use nor on their way to be.
    pub(super) fn held_bytes(&self) -> u64 {
        self.occupied_bytes() - u64::from(self.limbo) * self.bytes()
    }

    /// Segments that a checkpoint would bring nearer to being free.
    pub(super) fn awaiting_checkpoint(&self) -> usize {
        self.limbo as usize - self.draining.len() + self.emptied.len()
    }

    /// Changes a segment; everything that may begin or end its being on the way to be free.
    fn edit(&mut self, segment: u32, f: impl FnOnce(&mut Segment)) {
        let segment = &mut self.list[segment as usize];
        let before = [segment.is_in_limbo(), segment.state == State::Log];
        f(segment);
        let after = [segment.is_in_limbo(), segment.state == State::Log];
        for (i, count) in [&mut self.limbo, &mut self.logs].into_iter().enumerate() {
            *count = *count + u32::from(after[i]) - u32::from(before[i]);
        }
    }

    fn set_state(&mut self, segment: u32, state: State) {
        self.edit(segment, |segment| segment.state = state);
    }

    /// Counts newly mapped places, all in one segment. The counts of a map that lies stop at their
    /// ends.
    pub(super) fn take_blocks(&mut self, place: u32, count: u32) {
        self.live_blocks += u64::from(count);
        self.change(self.of_place(place), |s| s.live_blocks = s.live_blocks.saturating_add(count));
    }

    /// Counts a place that is no longer mapped.
    pub(super) fn release_block(&mut self, place: u32) {
        self.live_blocks = self.live_blocks.saturating_sub(1);
        self.change(self.of_place(place), |s| s.live_blocks = s.live_blocks.saturating_sub(1));
    }

    /// Counts a leaf that the map no longer refers to.
    pub(super) fn release_leaf(&mut self, leaf: NodeRef) {
        if let Some((offset, len)) = leaf.stored() {
            self.change(self.of_offset(offset), |s| s.leaf_bytes = s.leaf_bytes.saturating_sub(len as u32));
        }
    }

    /// Counts a node other than a leaf that the map refers to.
    pub(super) fn take_node(&mut self, node: NodeRef) {
        if let Some((offset, len)) = node.stored() {
            self.take_node_bytes(offset, len);
        }
    }

    /// Counts a node other than a leaf that the map no longer refers to.
    pub(super) fn release_node(&mut self, node: NodeRef) {
        if let Some((offset, len)) = node.stored() {
            self.release_node_bytes(offset, len);
        }
    }

    /// Counts `len` bytes of nodes, all in one segment.
    pub(super) fn take_node_bytes(&mut self, offset: u64, len: usize) {
        let len = len.next_multiple_of(NODE_ALIGNMENT) as u32;
        self.edit(self.of_offset(offset), |s| s.node_bytes = s.node_bytes.saturating_add(len));
    }

    /// The opposite of [`take_node_bytes`](Self::take_node_bytes).
    pub(super) fn release_node_bytes(&mut self, offset: u64, len: usize) {
        let len = len.next_multiple_of(NODE_ALIGNMENT) as u32;
        self.edit(self.of_offset(offset), |s| s.node_bytes = s.node_bytes.saturating_sub(len));
    }

    /// Marks a segment that the log fills or will fill next. The list grows to hold it.
    pub(super) fn set_log(&mut self, segment: u32) {
        while self.list.len() <= segment as usize {
            self.free.insert(self.list.len() as u32);
            self.list.push(Segment::FREE);
        }
        self.forget_free(segment);
        self.set_state(segment, State::Log);
    }

    /// The log has left a segment; `last_sequence` is the newest record in it.
    pub(super) fn set_used(&mut self, segment: u32, last_sequence: u64) {
        self.set_state(segment, State::Used);
        self.list[segment as usize].last_sequence = last_sequence;
    }

    /// Chooses the segment for the log to fill after those it has: a free one, best one that has its
    /// space, else a new one at the end of the file. `None` when the file cannot have more.
    pub(super) fn choose(&mut self) -> Option<u32> {
        self.reap();
        let free = self.free_allocated.first().or_else(|| self.free.first());
        let segment = free.copied().unwrap_or(self.count());
        if segment >= self.limit {
            return None;
        }
        self.set_log(segment);
        Some(segment)
    }

    /// Most segments that the file can have.
    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    /// Free segments whose space was reserved in this session.
    pub(super) fn free_reserved(&self) -> usize {
        self.free_allocated.iter().filter(|&&segment| self.is_reserved(segment)).count()
    }

    /// Chooses a free or new segment whose space was not reserved.
    pub(super) fn choose_unreserved(&mut self) -> Option<u32> {
        let allocated = self.free_allocated.iter().find(|&&segment| !self.is_reserved(segment));
        let segment = allocated.or_else(|| self.free.first()).copied().unwrap_or(self.count());
        if segment >= self.limit {
            return None;
        }
        self.set_log(segment);
        Some(segment)
    }

    /// Gives back a segment that was chosen and not used.
    pub(super) fn unchoose(&mut self, segment: u32) {
        self.set_state(segment, State::Free);
        let freed = &mut self.list[segment as usize];
        (freed.pinned, freed.checked, freed.whole) = (false, 0, 0);
        (freed.written, freed.written_blocks) = (0, 0);
        let set = if freed.allocated { &mut self.free_allocated } else { &mut self.free };
        set.insert(segment);
    }

    fn forget_free(&mut self, segment: u32) {
        self.free.remove(&segment);
        self.free_allocated.remove(&segment);
    }

    /// Whether a block of the file lies in a segment that the log has filled and that is not free.
    pub(super) fn is_filled(&self, place: u32) -> bool {
        let state = self.list.get(self.of_place(place) as usize).map(|segment| segment.state);
        matches!(state, Some(State::Used | State::Retired | State::Draining))
    }

    /// Mapped blocks in a segment.
    pub(super) fn live_blocks_in(&self, segment: u32) -> u32 {
        self.list[segment as usize].live_blocks
    }

    /// Bytes in use in a segment.
    pub(super) fn live_bytes_in(&self, segment: u32) -> u64 {
        self.list[segment as usize].live_bytes()
    }

    /// Has the cleaner leave a segment alone from now on.
    pub(super) fn pin(&mut self, segment: u32) {
        self.list[segment as usize].pinned = true;
    }

    /// Whether all space of a segment was reserved in this session.
    pub(super) fn is_reserved(&self, segment: u32) -> bool {
        self.list[segment as usize].reserved
    }

    pub(super) fn set_reserved(&mut self, segment: u32) {
        let segment = &mut self.list[segment as usize];
        (segment.allocated, segment.reserved) = (true, true);
    }

    /// Segments that a checkpoint as of `sequence` neither refers to nor replays. To be asked at
    /// the freeze, after the nodes it replaces were released.
    pub(super) fn dead(&self, sequence: u64) -> Vec<u32> {
        let is_dead = |s: &Segment| {
            matches!(s.state, State::Used | State::Retired) && s.is_empty() && s.last_sequence <= sequence
        };
        (0..).zip(&self.list).filter(|(_, s)| is_dead(s)).map(|(i, _)| i).collect()
    }

    /// A checkpoint that found these segments dead has become durable. `at_once` skips the second
    /// checkpoint, which only a mutation does.
    pub(super) fn retire(&mut self, dead: &[u32], at_once: bool) {
        let epoch = self.readers.advance();
        for &segment in dead {
            match self.list[segment as usize].state {
                State::Used if !at_once => self.set_state(segment, State::Retired),
                State::Used | State::Retired => {
                    self.set_state(segment, State::Draining);
                    self.draining.push_back((segment, epoch));
                }
                // A checkpoint that was repeated has let it go the first time.
                _ => {}
            }
        }
        self.reap();
    }

    /// Frees the draining segments that nobody can be reading any more.
    pub(super) fn reap(&mut self) {
        while let Some(&(segment, epoch)) = self.draining.front() {
            if epoch >= self.readers.oldest() {
                return;
            }
            self.draining.pop_front();
            self.unchoose(segment);
        }
    }

    /// The mutation that frees segments under the eyes of their readers.
    pub(super) fn forget_readers(&mut self) {
        while let Some((segment, _)) = self.draining.pop_front() {
            self.unchoose(segment);
        }
    }

    /// Frees the segments that nothing refers to, but for `keep`: when both slots name the map as it
    /// is now.
    pub(super) fn free_unused(&mut self, keep: u32) {
        for index in 0..self.count() {
            let segment = self.list[index as usize];
            let unused = segment.state == State::Used && segment.is_empty();
            if unused && index != keep {
                self.list[index as usize].allocated = false;
                self.unchoose(index);
            }
        }
    }

    /// Notes a read of places looked up now; returns what to [`leave`](Self::leave) with.
    pub(super) fn enter(&mut self) -> u64 {
        self.readers.enter()
    }

    /// Starts a new epoch; returns the one that ended.
    pub(super) fn end_epoch(&mut self) -> u64 {
        self.readers.advance()
    }

    /// Whether no read is in flight any more that began in an epoch, or before it.
    pub(super) fn has_outlasted(&self, epoch: u64) -> bool {
        epoch < self.readers.oldest()
    }

    /// Ends a read.
    pub(super) fn leave(&mut self, epoch: u64) {
        self.readers.leave(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_free_after_two_checkpoints_and_its_readers() {
        let mut segments = Segments::new(16, 2);
        segments.set_used(0, 5);
        segments.set_log(1);
        assert!(segments.dead(4).is_empty());
        let dead = segments.dead(5);
        assert_eq!(dead, [0]);
        let reader = segments.enter();
        segments.retire(&dead, false);
        assert_eq!(segments.choose(), Some(2), "one checkpoint is not enough");
        segments.retire(&segments.dead(6), false);
        assert_eq!(segments.choose(), Some(3), "a reader holds it");
        segments.leave(reader);
        assert_eq!(segments.choose(), Some(0));
        segments.retire(&dead, false);
        assert_eq!(segments.choose(), Some(4), "what is in use again is left alone");
    }

    #[test]
    fn a_pinned_segment_is_no_victim_until_it_was_freed() {
        let mut segments = Segments::new(16, 2);
        segments.set_log(1);
        segments.take_blocks(FIRST_SEGMENT_BLOCK, 1);
        assert_eq!(segments.candidates(0..2, 0, 0).len(), 1);
        segments.pin(0);
        assert_eq!(segments.candidates(0..2, 0, 0).len(), 0);
        segments.release_block(FIRST_SEGMENT_BLOCK);
        (0..2).for_each(|_| segments.retire(&segments.dead(0), false));
        assert_eq!(segments.choose(), Some(0));
        segments.set_used(0, 0);
        segments.take_blocks(FIRST_SEGMENT_BLOCK, 1);
        assert_eq!(segments.candidates(0..2, 0, 0).len(), 1);
    }

    #[test]
    fn a_segment_that_holds_nodes_only_is_emptied_once_for_each_checkpoint() {
        let mut segments = Segments::new(16, 2);
        segments.set_log(1);
        segments.take_blocks(FIRST_SEGMENT_BLOCK, 1);
        segments.take_node_bytes(segments.offset(0).0, 512);
        assert!(!segments.note_emptied(0), "there are blocks");
        segments.release_block(FIRST_SEGMENT_BLOCK);
        let waiting = segments.awaiting_checkpoint();
        assert!(segments.note_emptied(0) && segments.note_emptied(0));
        assert_eq!(segments.candidates(0..2, 0, 0).len(), 0);
        assert_eq!(segments.awaiting_checkpoint(), waiting + 1, "a checkpoint is due");
        segments.forget_emptied();
        assert_eq!(segments.candidates(0..2, 0, 0).len(), 1);
    }
}
