//! Timers of one reactor.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::task::Waker;

use crate::engine::Time;

/// Sleeping tasks, soonest first.
#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    added: u64,
}

struct Entry {
    deadline: Time,
    /// Order of addition: equal deadlines fire in it, so that a simulation replays.
    order: u64,
    waker: Waker,
}

impl Timers {
    pub(super) fn add(&mut self, deadline: Time, waker: Waker) {
        self.added += 1;
        self.heap.push(Reverse(Entry { deadline, order: self.added, waker }));
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse(entry)| entry.deadline)
    }

    /// Wakes every task whose deadline has come.
    pub(super) fn fire(&mut self, now: Time) {
        while self.next().is_some_and(|deadline| deadline <= now) {
            if let Some(Reverse(entry)) = self.heap.pop() {
                entry.waker.wake();
            }
        }
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.deadline, self.order).cmp(&(other.deadline, other.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}
