//! Epochs: which reads may still look at a place that is no longer mapped.

use std::collections::VecDeque;

/// Reads in flight, by the epoch in which they looked their places up.
#[derive(Default)]
pub(super) struct Readers {
    epoch: u64,
    /// Counts of the epochs from `epoch - counts.len() + 1` to `epoch`.
    counts: VecDeque<u32>,
}

impl Readers {
    pub(super) fn enter(&mut self) -> u64 {
        if self.counts.is_empty() {
            self.counts.push_back(0);
        }
        *self.counts.back_mut().expect("not empty") += 1;
        self.epoch
    }

    pub(super) fn leave(&mut self, epoch: u64) {
        let age = (self.epoch - epoch) as usize;
        let index = self.counts.len() - 1 - age;
        self.counts[index] -= 1;
        while self.counts.front() == Some(&0) {
            self.counts.pop_front();
        }
    }

    /// Starts a new epoch; returns the one that ended.
    pub(super) fn advance(&mut self) -> u64 {
        let ended = self.epoch;
        self.epoch += 1;
        if !self.counts.is_empty() {
            self.counts.push_back(0);
        }
        ended
    }

    /// The oldest epoch that still has a read in flight, or the next one to come.
    pub(super) fn oldest(&self) -> u64 {
        self.epoch + 1 - self.counts.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_hold_back_their_epoch() {
        let mut readers = Readers::default();
        let a = readers.enter();
        let ended = readers.advance();
        assert_eq!(ended, a);
        let b = readers.enter();
        assert!(readers.oldest() <= ended);
        readers.leave(b);
        assert!(readers.oldest() <= ended);
        readers.leave(a);
        assert!(readers.oldest() > ended);
        let ended = readers.advance();
        assert!(readers.oldest() > ended);
    }
}
