//! An engine for work that no guest waits for: its reads and writes wait until the [governor](crate::governor) lets them begin.
//!
//! Sealing, collecting, scrubbing and importing do not know of that: they are given such an engine. Not more than
//! [`AT_ONCE`] of its operations take part at a time, as the thread may be busy with other things when one is granted.
//! Syncs, and all that changes a file's names or space, do not wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use sapwood_blockdev::engine::{Completion, Engine, Op, Time, WatchFd};

use crate::governor::Background;
use crate::limits::Direction;
use crate::turnstile::{Turnstile, mark};

/// Operations of an engine that wait at the governor, or were granted, at most.
const AT_ONCE: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub struct BackgroundEngine<E: Engine> {
    inner: E,
    turnstile: Turnstile<(u64, Op<E::File>)>,
    /// What takes no part yet.
    later: VecDeque<(u64, Op<E::File>)>,
}

/// In which direction an operation moves so many bytes, if it can wait.
fn work<F>(op: &Op<F>) -> Option<(Direction, u64)> {
    match op {
        Op::Read(transfer) => Some((Direction::Read, (transfer.memory.len() - transfer.done) as u64)),
        Op::Write(transfer) => Some((Direction::Write, (transfer.memory.len() - transfer.done) as u64)),
        _ => None,
    }
}

impl<E: Engine> BackgroundEngine<E> {
    /// Has the operations of an engine take part.
    pub fn new(inner: E, background: &Background) -> Self {
        let turnstile = Turnstile::new(background.join(inner.waker()));
        Self { inner, turnstile, later: VecDeque::new() }
    }

    /// Starts what may begin; whether that was anything.
    fn ask(&mut self) -> bool {
        while self.turnstile.waiting() + self.turnstile.granted() < AT_ONCE {
            let Some((token, op)) = self.later.pop_front() else { break };
            let (direction, bytes) = work(&op).expect("the others have begun");
            self.turnstile.push(direction, bytes, (token, op));
        }
        self.turnstile.ask(|| self.inner.now());
        let mut is_any = false;
        while let Some((token, op)) = self.turnstile.next() {
            self.inner.submit(mark(token, true), op);
            is_any = true;
        }
        is_any
    }
}

impl<E: Engine> Engine for BackgroundEngine<E> {
    type File = E::File;

    fn submit(&mut self, token: u64, op: Op<E::File>) {
        match work(&op).filter(|_| self.turnstile.is_governed()) {
            Some(_) => self.later.push_back((token, op)),
            None => self.inner.submit(mark(token, false), op),
        }
    }

    fn collect(&mut self, done: &mut Vec<Completion<E::File>>) {
        self.ask();
        loop {
            let first = done.len();
            self.inner.collect(done);
            for done in &mut done[first..] {
                done.token = self.turnstile.ended(done.token);
            }
            if !self.turnstile.has_ended() || !self.ask() {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.ask();
        self.inner.wait(deadline);
    }

    fn in_flight(&self) -> usize {
        self.later.len() + self.turnstile.waiting() + self.inner.in_flight()
    }

    fn now(&self) -> Time {
        self.inner.now()
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}

impl<E: WatchFd> WatchFd for BackgroundEngine<E> {
    fn watch(&mut self, fd: Option<Arc<OwnedFd>>) {
        self.inner.watch(fd);
    }
}

impl<E: Engine> Drop for BackgroundEngine<E> {
    fn drop(&mut self) {
        self.turnstile.leave(self.inner.now());
    }
}

#[cfg(test)]
mod tests;
