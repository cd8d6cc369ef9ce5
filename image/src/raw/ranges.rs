//! Ranges held by outstanding writes, so that read-modify-write of a cut edge meets no other write
//! of the same bytes. Used only where the storage cannot write single sectors.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// The held ranges of one device.
#[derive(Default)]
pub(super) struct Ranges(Mutex<State>);

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    /// Threads that found a range held, to be woken when any is released.
    waiting: Vec<Waker>,
}

/// A held range; released when dropped.
pub(super) struct Held {
    ranges: Arc<Ranges>,
    range: Range<u64>,
}

impl Ranges {
    /// Holds `range`; `None` when a part of it is held: then `waker` is woken when it is worth
    /// trying again.
    pub(super) fn hold(self: &Arc<Self>, range: Range<u64>, waker: impl FnOnce() -> Waker) -> Option<Held> {
        let mut state = self.state();
        if state.held.iter().any(|held| held.start < range.end && range.start < held.end) {
            state.waiting.push(waker());
            return None;
        }
        state.held.push(range.clone());
        Some(Held { ranges: Arc::clone(self), range })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.ranges.state();
        let index = state.held.iter().position(|held| *held == self.range).expect("held until dropped");
        state.held.swap_remove(index);
        state.waiting.drain(..).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_waits_and_neighbours_do_not() {
        let ranges = Arc::new(Ranges::default());
        let hold = |range| ranges.hold(range, || Waker::noop().clone());
        let first = hold(0..4096).expect("free");
        assert!(hold(4096..8192).is_some(), "a neighbour");
        assert!(hold(512..1024).is_none(), "held");
        assert_eq!(ranges.state().waiting.len(), 1);
        drop(first);
        assert!(ranges.state().waiting.is_empty(), "woken");
        assert!(hold(512..1024).is_some());
    }
}
