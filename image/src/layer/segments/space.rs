//! Gives the space of free segments back to the host.

use super::{Segments, State};

impl Segments {
    /// A free segment, number `from` or later, that still has the host's space, if there are more than `keep`
    /// of them; it cannot be chosen until [`punched`](Self::punched).
    pub(in crate::layer) fn start_punch(&mut self, keep: usize, from: u32) -> Option<u32> {
        if self.free_allocated.len() <= keep || self.free_allocated.last().is_none_or(|&last| last < from) {
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

    /// Free segments that still have the host's space.
    pub(in crate::layer) fn free_with_space(&self) -> usize {
        self.free_allocated.len()
    }

    /// The first free segments, which are taken first when the layer is opened again.
    pub(in crate::layer) fn first_free(&self, count: usize) -> Vec<u32> {
        let mut free: Vec<u32> = self.free.iter().chain(&self.free_allocated).copied().collect();
        free.sort_unstable();
        free.truncate(count);
        free
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
