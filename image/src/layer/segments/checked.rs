//! What of a segment is known to be whole: compared with the checksums of its records since the log began
//! to fill it.

use super::super::position::LogPosition;
use super::{Segments, State};

impl Segments {
    /// Whether a place holds what its record says; `None` when it has to be compared first.
    pub(in crate::layer) fn is_whole(&self, place: u32, published: &LogPosition) -> Option<bool> {
        let number = self.of_place(place);
        let segment = &self.list[number as usize];
        let at = place - self.first_block(number);
        // A segment that is being filled is looked at once, and again when it is full.
        let is_known = at < segment.checked || segment.checked > 0 && segment.state == State::Log;
        match at < segment.whole {
            false if !is_known && at < self.settled(number, published) => None,
            is_whole => Some(is_whole),
        }
    }

    /// Whether a place was compared.
    pub(in crate::layer) fn is_checked(&self, place: u32) -> bool {
        let number = self.of_place(place);
        place - self.first_block(number) < self.list[number as usize].checked
    }

    /// Blocks at the beginning of a segment whose records count, so that nobody writes there any more.
    pub(in crate::layer) fn settled(&self, number: u32, published: &LogPosition) -> u32 {
        let segment = &self.list[number as usize];
        let is_full = segment.state == State::Used && segment.last_sequence <= published.sequence;
        let lane = published.lanes().find(|(_, lane)| lane.segment == number);
        match lane {
            _ if is_full => self.segment_blocks,
            Some((_, lane)) => lane.block,
            None => 0,
        }
    }

    /// Takes note that so many blocks of a segment were compared, and that so many at its beginning are whole.
    pub(in crate::layer) fn note_checked(&mut self, segment: u32, checked: u32, whole: u32) {
        let segment = &mut self.list[segment as usize];
        (segment.checked, segment.whole) = (checked, whole.min(checked));
    }
}
