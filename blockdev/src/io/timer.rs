//! Timers of one reactor.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::Io;
use crate::engine::{Engine, Time};

/// Sleeping tasks, soonest first.
#[derive(Default)]
pub(super) struct Timers {
    sleepers: BTreeMap<Key, Waker>,
    added: u64,
}

/// A deadline and the order of addition: equal deadlines fire in it, so that a simulation
/// replays.
type Key = (Time, u64);

impl Timers {
    fn add(&mut self, deadline: Time, waker: Waker) -> Key {
        self.added += 1;
        let key = (deadline, self.added);
        self.sleepers.insert(key, waker);
        key
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.sleepers.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes out one task whose deadline has come; the caller wakes it.
    pub(super) fn due(&mut self, now: Time) -> Option<Waker> {
        let first = self.sleepers.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// Tasks asleep.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.sleepers.len()
    }
}

/// The future of [`Io::sleep_until`]: at most one timer at a time, taken back when it is dropped,
/// so that a task may race a long sleep against many short events.
pub(super) struct Sleep<E: Engine> {
    pub(super) io: Io<E>,
    pub(super) deadline: Time,
    pub(super) key: Option<Key>,
}

impl<E: Engine> Future for Sleep<E> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.io.now() >= self.deadline {
            return Poll::Ready(());
        }
        let deadline = self.deadline;
        let io = self.io.clone();
        let mut timers = io.0.timers.borrow_mut();
        match self.key.and_then(|key| timers.sleepers.get_mut(&key)) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.key = Some(timers.add(deadline, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl<E: Engine> Drop for Sleep<E> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let waker = self.io.0.timers.borrow_mut().sleepers.remove(&key);
            drop(waker);
        }
    }
}
