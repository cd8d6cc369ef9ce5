//! An engine for work that no guest waits for: its reads and writes wait until the [governor](crate::governor) lets them begin.
//!
//! Sealing, collecting, scrubbing and importing do not know of that: they are given such an engine. While guests ask for anything,
//! it moves [`PIECE`] bytes at a time, so that a guest's request never has a large one before it, and has not more than [`AT_ONCE`]
//! of these under way; while they also share, these take their turns with theirs. When no guest has asked for anything for a moment
//! it works as fast as it can. Syncs, and all that changes a file's names or space, do not wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use sapwood_blockdev::engine::{Completion, Engine, Op, Time, WatchFd};

use crate::governor::Background;
use crate::limits::Direction;
use crate::turnstile::{Turnstile, mark};

/// Reads and writes that are under way, or wait at the governor, at most.
const AT_ONCE: usize = 4;

/// Bytes that one of them moves at most: a multiple of every file's alignment.
const PIECE: usize = 64 << 10;

/// See the module's documentation.
#[derive(Debug)]
pub struct BackgroundEngine<E: Engine> {
    inner: E,
    background: Background,
    turnstile: Turnstile<(u64, Op<E::File>)>,
    /// What takes no part yet.
    later: VecDeque<(u64, Op<E::File>)>,
    /// Reads and writes under way.
    moving: usize,
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
        Self { inner, background: background.clone(), turnstile, later: VecDeque::new(), moving: 0 }
    }

    /// Starts what may begin; whether that was anything.
    fn ask(&mut self) -> bool {
        let before = self.moving;
        while self.turnstile.waiting() + self.moving < AT_ONCE {
            let Some((token, op)) = self.later.pop_front() else { break };
            match work(&op).filter(|_| self.turnstile.is_governed()) {
                Some((direction, bytes)) => self.turnstile.push(direction, bytes, (token, op)),
                None => self.begin(token, false, op),
            }
        }
        self.turnstile.ask(|| self.inner.now());
        while let Some((token, op)) = self.turnstile.next() {
            self.begin(token, true, op);
        }
        self.moving > before
    }

    fn begin(&mut self, token: u64, is_granted: bool, op: Op<E::File>) {
        self.moving += usize::from(work(&op).is_some());
        self.inner.submit(mark(token, is_granted), op);
    }
}

impl<E: Engine> Engine for BackgroundEngine<E> {
    type File = E::File;

    fn submit(&mut self, token: u64, mut op: Op<E::File>) {
        let is_busy = self.background.guests_are_busy(self.inner.now());
        let (Op::Read(transfer) | Op::Write(transfer)) = &mut op else {
            return self.begin(token, false, op);
        };
        transfer.at_most = if is_busy { PIECE } else { usize::MAX };
        match is_busy || self.turnstile.is_governed() {
            true => self.later.push_back((token, op)),
            false => self.begin(token, false, op),
        }
    }

    fn collect(&mut self, done: &mut Vec<Completion<E::File>>) {
        self.ask();
        loop {
            let (first, before) = (done.len(), self.moving);
            self.inner.collect(done);
            for done in &mut done[first..] {
                self.moving -= usize::from(work(&done.op).is_some());
                done.token = self.turnstile.ended(done.token);
            }
            if self.moving == before || !self.ask() {
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
