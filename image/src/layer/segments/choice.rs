//! Which segments the cleaner empties, and where the log goes on beside the main lane.
//!
//! To empty a segment costs what is still live in it, and the price falls while one waits, because more dies. The
//! best candidate is not the emptiest segment but the one whose price falls least: with a share `e` of
//! it dead, one byte of space costs `(1 - e) / e` to gain, and that falls as fast as data is
//! overwritten there, `(1 - e)` of it once in its lifetime: `(1 - e) / e^2 / lifetime` ("minimum
//! declining cost", Lomet and Luo, ICDE 2021). The lifetime is estimated by the time since the data
//! was written.

use std::ops::Range;

use super::{Segments, State};

/// A segment that can be emptied.
#[derive(Clone, Copy, Debug)]
pub(in crate::layer) struct Candidate {
    pub(in crate::layer) segment: u32,
    /// How fast the price of emptying it falls: the lowest is the best.
    pub(in crate::layer) decline: f64,
}

impl Segments {
    /// The candidates in a range of segments, whose records are all published, at `now` on the layer's
    /// clock. Those that are nearly full are none.
    pub(in crate::layer) fn candidates(&self, range: Range<u32>, published: u64, now: u64) -> Vec<Candidate> {
        let bytes = self.bytes();
        let end = (range.end as usize).min(self.list.len());
        let segments = (range.start..).zip(&self.list[(range.start as usize).min(end)..end]);
        segments
            .filter(|(_, s)| s.state == State::Used && s.last_sequence <= published)
            .filter(|(_, s)| !s.pinned && !s.emptied && !s.is_empty() && s.live_bytes() < bytes * 7 / 8)
            .map(|(segment, s)| {
                let live = s.live_bytes() as f64 / bytes as f64;
                let lifetime = now.saturating_sub(s.written).max(1) as f64;
                Candidate { segment, decline: live / (1.0 - live).powi(2) / lifetime }
            })
            .collect()
    }

    /// Whether a candidate is one still.
    pub(in crate::layer) fn is_candidate(&self, segment: u32, published: u64) -> bool {
        !self.candidates(segment..segment + 1, published, 0).is_empty()
    }

    /// The cleaner has moved all blocks of a segment, and marked the nodes in it for the next checkpoint: until then
    /// there is nothing more to do for it. Says whether there are such nodes.
    pub(in crate::layer) fn note_emptied(&mut self, segment: u32) -> bool {
        let emptied = &mut self.list[segment as usize];
        if emptied.live_blocks > 0 || emptied.is_empty() {
            return false;
        }
        if !std::mem::replace(&mut emptied.emptied, true) {
            self.emptied.push(segment);
        }
        true
    }

    /// A checkpoint begins, which stores what was marked.
    pub(in crate::layer) fn forget_emptied(&mut self) {
        for segment in std::mem::take(&mut self.emptied) {
            self.list[segment as usize].emptied = false;
        }
    }

    /// Chooses a free segment whose space was reserved in this session.
    pub(in crate::layer) fn choose_reserved(&mut self) -> Option<u32> {
        let segment = self.free_allocated.iter().copied().find(|&segment| self.is_reserved(segment))?;
        self.set_log(segment);
        Some(segment)
    }

    /// Notes when data was written that the log puts into a segment.
    pub(in crate::layer) fn note_written(&mut self, segment: u32, estimate: u64, blocks: u32) {
        let segment = &mut self.list[segment as usize];
        let (old, new) = (u128::from(segment.written_blocks), u128::from(blocks));
        if new > 0 {
            let sum = u128::from(segment.written) * old + u128::from(estimate) * new;
            segment.written = (sum / (old + new)) as u64;
            segment.written_blocks = segment.written_blocks.saturating_add(blocks);
        }
    }

    /// When the data of a segment was written, on average.
    pub(in crate::layer) fn written(&self, segment: u32) -> u64 {
        self.list[segment as usize].written
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::layout::FIRST_SEGMENT_BLOCK;
    use super::*;

    fn best(segments: &Segments, now: u64) -> Option<u32> {
        let all = segments.candidates(0..segments.count(), 9, now);
        all.into_iter().min_by(|a, b| a.decline.total_cmp(&b.decline)).map(|best| best.segment)
    }

    #[test]
    fn of_segments_of_one_age_the_emptiest_is_the_best_and_of_equally_empty_ones_the_oldest() {
        let mut segments = Segments::new(16, 3);
        for (segment, live, written) in [(0, 8, 50), (1, 8, 10), (2, 7, 50)] {
            segments.note_written(segment, written, 16);
            segments.take_blocks(FIRST_SEGMENT_BLOCK + segment * 16, live);
        }
        assert_eq!(best(&segments, 100), Some(1), "old");
        assert_eq!(best(&segments, 100_000), Some(2), "empty");
        (0..3).for_each(|segment| segments.take_blocks(FIRST_SEGMENT_BLOCK + segment * 16, 7));
        assert_eq!(best(&segments, 100), None, "nearly full");
    }
}
