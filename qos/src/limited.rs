//! A disk whose requests wait until the [`Governor`] lets them begin.
//!
//! Requests wait in the thread that brought them, in a `turnstile`. Flushes never
//! wait: what they promise is about writes that were reported. When a queue is stopped nothing waits any more, but it counts: who
//! stops and starts does not get more than others.

use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time, monotonic_now};

use crate::arbiter::{NodeId, Settings};
use crate::governor::{Governor, Seat};
use crate::limits::Direction;
use crate::turnstile::{Turnstile, mark};

/// See the module's documentation.
#[derive(Debug)]
pub struct Limited<D> {
    inner: Arc<D>,
    seat: Arc<Seat>,
}

impl<D> Limited<D> {
    /// Puts a disk below a governor, into the group `parent`.
    pub fn new(inner: Arc<D>, governor: &Arc<Governor>, parent: NodeId, settings: &Settings) -> Arc<Self> {
        Arc::new(Self { inner, seat: Seat::new(governor, parent, settings, monotonic_now()) })
    }

    /// The disk itself.
    pub fn inner(&self) -> &Arc<D> {
        &self.inner
    }

    /// The disk, as the governor knows it.
    pub fn node(&self) -> NodeId {
        self.seat.node()
    }

    /// For how long requests have waited that were let through, all together.
    pub fn waited(&self) -> Time {
        self.seat.waited()
    }
}

impl<D: BlockDevice> BlockDevice for Limited<D> {
    type Engine = D::Engine;
    type Queue = LimitedQueue<D::Queue>;

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn queue(self: &Arc<Self>, engine: D::Engine) -> Self::Queue {
        LimitedQueue::new(&self.seat, self.inner.queue(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        self.inner.set_write_cache(enabled);
    }
}

/// A queue of a [`Limited`] disk.
#[derive(Debug)]
pub struct LimitedQueue<Q: DeviceQueue> {
    inner: Q,
    turnstile: Turnstile<Request>,
}

/// In which direction a request moves so many bytes, if it can wait.
fn work(request: &Request) -> Option<(Direction, u64)> {
    match request.command {
        Command::Read(_) => Some((Direction::Read, request.len)),
        Command::Write(_) => Some((Direction::Write, request.len)),
        Command::Discard | Command::WriteZeroes => Some((Direction::Write, 0)),
        Command::Flush => None,
    }
}

impl<Q: DeviceQueue> LimitedQueue<Q> {
    fn new(seat: &Arc<Seat>, mut inner: Q) -> Self {
        let member = seat.join(inner.with_engine(|engine| engine.waker()));
        Self { inner, turnstile: Turnstile::new(member) }
    }

    fn now(&mut self) -> Time {
        self.inner.with_engine(|engine| engine.now())
    }

    fn start(&mut self, mut request: Request, is_granted: bool) {
        request.tag = mark(request.tag, is_granted);
        self.inner.submit(request);
    }

    /// Starts what may begin; whether that was anything.
    fn start_granted(&mut self) -> bool {
        let mut is_any = false;
        while let Some(request) = self.turnstile.next() {
            self.start(request, true);
            is_any = true;
        }
        is_any
    }

    /// Asks the governor, if it is time to; whether anything began.
    fn ask(&mut self) -> bool {
        let inner = &mut self.inner;
        self.turnstile.ask(|| inner.with_engine(|engine| engine.now()));
        self.start_granted()
    }
}

impl<Q: DeviceQueue> DeviceQueue for LimitedQueue<Q> {
    type Engine = Q::Engine;

    fn submit(&mut self, request: Request) {
        self.turnstile.mark();
        match work(&request).filter(|_| self.turnstile.is_governed()) {
            Some((direction, bytes)) => self.turnstile.push(direction, bytes, request),
            None => self.start(request, false),
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.ask();
        loop {
            let first = done.len();
            self.inner.poll(done);
            for done in &mut done[first..] {
                done.tag = self.turnstile.ended(done.tag);
            }
            if !self.turnstile.has_ended() || !self.ask() {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.inner.wait(deadline.into_iter().chain(self.turnstile.alarm()).min());
    }

    fn hurry(&mut self) {
        self.ask();
        let now = self.now();
        self.turnstile.release(now);
        self.start_granted();
        self.inner.hurry();
    }

    fn outstanding(&self) -> usize {
        self.turnstile.waiting() + self.inner.outstanding()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Self::Engine) -> R) -> R {
        self.inner.with_engine(f)
    }
}

impl<Q: DeviceQueue> Drop for LimitedQueue<Q> {
    fn drop(&mut self) {
        let now = self.now();
        self.turnstile.leave(now);
    }
}

#[cfg(test)]
mod tests;
