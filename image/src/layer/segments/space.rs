//! Gives the space of free segments back to the host.

use super::{Segments, State};

impl Segments {
    /// A free segment that still has the host's space, if there are more than `keep` of them; it
    /// cannot be chosen until [`punched`](Self::punched).
    pub(in crate::layer) fn start_punch(&mut self, keep: usize) -> Option<u32> {
        if self.free_allocated.len() <= keep {
            return None;
        }
        let segment = self.free_allocated.pop_last()?;
        self.set_state(segment, State::Punching);
        self.punching += 1;
        Some(segment)
    }

    /// The space of a segment was given back (or could not be).
    pub(in crate::layer) fn punched(&mut self, segment: u32, given_back: bool) {
        self.punching -= 1;
        let punched = &mut self.list[segment as usize];
        punched.allocated = !given_back;
        punched.reserved &= !given_back;
        self.unchoose(segment);
    }

    /// Forgets the free segments at the end of the file and returns how many are left.
    pub(in crate::layer) fn trim(&mut self) -> u32 {
        while self.list.last().is_some_and(|s| s.state == State::Free) {
            self.list.pop();
            self.forget_free(self.count());
        }
        self.count()
    }
}
