//! Segments of a block device: there are never more, so that recovery has to find free ones among them.

use super::{Segment, Segments, State};

impl Segment {
    /// Whether something lies in it, or did when the newest checkpoint was made, or the log has filled
    /// it since: after a recovery, which checkpoint and log must survive.
    fn is_known(&self) -> bool {
        self.is_referenced() || self.last_sequence > 0
    }
}

impl Segments {
    /// Has the segments be all that there will ever be, as on a block device. Nothing is known of
    /// the space of those that neither the map nor the log has used, and so it is not given back.
    pub(in crate::layer) fn fix_count(&mut self) {
        self.limit = self.count();
        for segment in &mut self.list {
            segment.allocated = segment.is_known();
        }
    }

    /// Frees the segments that neither the newest checkpoint's map uses, nor the log that was replayed,
    /// nor the other slot whose needs `other` counts: on a device recovery cannot take new ones at the
    /// end instead.
    pub(in crate::layer) fn free_unneeded(&mut self, other: &Self) {
        for index in 0..self.count() {
            let segment = self.list[index as usize];
            if segment.state == State::Used
                && !segment.is_known()
                && !other.list[index as usize].is_referenced()
            {
                self.unchoose(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::layout::FIRST_SEGMENT_BLOCK;
    use super::super::super::node::{NodeRef, USAGE_SEGMENTS, Usage};
    use super::*;

    #[test]
    fn what_the_newest_checkpoint_uses_is_not_freed_when_the_log_has_emptied_it() {
        let mut segments = Segments::new(16, 3);
        // The log was still in segment 0 when its usage was stored: no record is named.
        let mut table = [Usage::default(); USAGE_SEGMENTS];
        table[0].live_blocks = 1;
        assert!(segments.load_usage(0, NodeRef::ABSENT, &table));
        segments.set_log(1);
        segments.release_block(FIRST_SEGMENT_BLOCK);
        segments.fix_count();
        segments.free_unneeded(&Segments::new(16, 3));
        assert_eq!(segments.choose(), Some(2), "a crash would need segment 0 again");
        assert_eq!(segments.choose(), None);
    }
}
