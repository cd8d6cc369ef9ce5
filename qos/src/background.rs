//! An engine for work that no guest waits for: its reads and writes wait until the [governor](crate::governor) lets them begin.
//!
//! Sealing, collecting, scrubbing and importing do not know of that: they are given such an engine. While guests ask for anything,
//! it moves [`PIECE`] bytes at a time, so that a guest's request has no large one before it that began later, and has not more than
//! [`AT_ONCE`] of these under way; while they also share, these take their turns with theirs. When no guest has asked for anything for a moment
//! it works as fast as it can. Syncs, and all that changes a file's names or space, do not wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use sapwood_blockdev::engine::{Completion, Engine, Op, Time, Transfer, WatchFd};

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

/// What a read or write, which can wait, moves, and in which direction.
fn moved<F>(op: &mut Op<F>) -> Option<(Direction, &mut Transfer<F>)> {
    match op {
        Op::Read(transfer) => Some((Direction::Read, transfer)),
        Op::Write(transfer) => Some((Direction::Write, transfer)),
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
        let is_busy = !self.later.is_empty() && self.background.guests_are_busy(self.inner.now());
        let is_governed = self.turnstile.is_governed();
        let most = if is_busy || is_governed { AT_ONCE } else { usize::MAX };
        while self.turnstile.waiting() + self.moving < most {
            let Some((token, mut op)) = self.later.pop_front() else { break };
            let (direction, transfer) = moved(&mut op).expect("the others have begun");
            transfer.at_most = if is_busy { PIECE } else { usize::MAX };
            let bytes = transfer.wanted() as u64;
            match is_governed {
                true => self.turnstile.push(direction, bytes, (token, op)),
                false => self.begin(token, false, op),
            }
        }
        self.turnstile.ask(|| self.inner.now());
        while let Some((token, op)) = self.turnstile.next() {
            self.begin(token, true, op);
        }
        self.moving > before
    }

    fn begin(&mut self, token: u64, is_granted: bool, op: Op<E::File>) {
        self.moving += 1;
        self.inner.submit(mark(token, is_granted), op);
    }
}

impl<E: Engine> Engine for BackgroundEngine<E> {
    type File = E::File;

    fn submit(&mut self, token: u64, mut op: Op<E::File>) {
        match moved(&mut op) {
            Some(_) => self.later.push_back((token, op)),
            None => self.inner.submit(mark(token, false), op),
        }
    }

    fn collect(&mut self, done: &mut Vec<Completion<E::File>>) {
        self.ask();
        loop {
            let (first, before) = (done.len(), self.moving);
            self.inner.collect(done);
            for done in &mut done[first..] {
                self.moving -= usize::from(moved(&mut done.op).is_some());
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
