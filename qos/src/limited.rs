//! A disk whose requests wait until the [`Governor`] lets them begin.
//!
//! Reads and writes of a queue wait apart from each other, each in their order, and in the thread that brought them. Flushes never
//! wait: what they promise is about writes that were reported. When a queue is stopped nothing waits any more, but it counts: who
//! stops and starts does not get more than others.

use std::collections::VecDeque;
use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time, monotonic_now};

use crate::arbiter::{NodeId, Settings};
use crate::governor::{Governor, Grants, Member, Seat};
use crate::limits::Direction;

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

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    request: Request,
    /// Since when, once the governor knows of it.
    since: Option<Time>,
}

/// A queue of a [`Limited`] disk.
#[derive(Debug)]
pub struct LimitedQueue<Q: DeviceQueue> {
    inner: Q,
    member: Member,
    /// Reads, writes.
    waiting: [VecDeque<Waiting>; 2],
    /// Of those, how many the governor does not know of; they are the last.
    untold: [usize; 2],
    /// Requests that were granted and that the device has.
    granted: usize,
    /// Of those that were granted, how many have ended without the governor knowing.
    finished: usize,
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

/// The lowest bit of the tags that the device sees: the request was granted.
const GRANTED: u64 = 1;

impl<Q: DeviceQueue> LimitedQueue<Q> {
    fn new(seat: &Arc<Seat>, mut inner: Q) -> Self {
        let member = seat.join(inner.with_engine(|engine| engine.waker()));
        let waiting = [VecDeque::new(), VecDeque::new()];
        Self { inner, member, waiting, untold: [0; 2], granted: 0, finished: 0 }
    }

    fn now(&mut self) -> Time {
        self.inner.with_engine(|engine| engine.now())
    }

    fn start(&mut self, mut request: Request, is_granted: u64) {
        assert!(request.tag <= u64::MAX >> 1, "tags leave a bit");
        request.tag = request.tag << 1 | is_granted;
        self.inner.submit(request);
    }

    /// Starts what was granted; whether that was anything.
    fn start_granted(&mut self, grants: Grants, now: Time) -> bool {
        for (direction, count) in grants.into_iter().enumerate() {
            for _ in 0..count {
                let Waiting { request, since } =
                    self.waiting[direction].pop_front().expect("what is granted waits here");
                if let Some(since) = since {
                    self.member.seat().add_waited(now.saturating_sub(since));
                }
                self.granted += 1;
                self.start(request, GRANTED);
            }
        }
        grants != [0; 2]
    }

    /// Tells the governor what is new, if it is time to, and starts what it grants; whether that was anything.
    fn ask(&mut self) -> bool {
        let is_waiting = self.waiting.iter().any(|waiting| !waiting.is_empty());
        if !is_waiting && self.finished == 0 && self.member.alarm().is_none() && !self.member.has_mail() {
            return false;
        }
        let now = self.now();
        let mail = self.member.take_mail();
        let has_started = self.start_granted(mail, now);
        let has_news = self.untold != [0; 2] || self.finished > 0;
        let is_due = self.member.alarm().is_some_and(|at| at <= now);
        if !has_news && !is_due && !self.member.is_nudged() {
            return has_started;
        }
        let (untold, waiting) = (std::mem::take(&mut self.untold), &mut self.waiting);
        let arrived = waiting.iter_mut().zip(untold).flat_map(|(waiting, untold)| {
            let told = waiting.len() - untold;
            waiting.iter_mut().skip(told)
        });
        let arrived = arrived.filter_map(|waiting| {
            waiting.since = Some(now);
            work(&waiting.request)
        });
        let grants = self.member.exchange(arrived, std::mem::take(&mut self.finished), now);
        self.start_granted(grants, now) || has_started
    }
}

impl<Q: DeviceQueue> DeviceQueue for LimitedQueue<Q> {
    type Engine = Q::Engine;

    fn submit(&mut self, request: Request) {
        match work(&request).filter(|_| self.member.seat().is_governed()) {
            Some((direction, _)) => {
                let direction = usize::from(direction == Direction::Write);
                self.waiting[direction].push_back(Waiting { request, since: None });
                self.untold[direction] += 1;
            }
            None => self.start(request, 0),
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.ask();
        loop {
            let first = done.len();
            self.inner.poll(done);
            for done in &mut done[first..] {
                let is_granted = done.tag & GRANTED;
                self.finished += is_granted as usize;
                self.granted -= is_granted as usize;
                done.tag >>= 1;
            }
            if self.finished == 0 || !self.ask() {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.inner.wait(deadline.into_iter().chain(self.member.alarm()).min());
    }

    fn hurry(&mut self) {
        self.ask();
        let now = self.now();
        let grants = self.member.release(now);
        self.start_granted(grants, now);
        self.inner.hurry();
    }

    fn outstanding(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum::<usize>() + self.inner.outstanding()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Self::Engine) -> R) -> R {
        self.inner.with_engine(f)
    }
}

impl<Q: DeviceQueue> Drop for LimitedQueue<Q> {
    fn drop(&mut self) {
        let now = self.now();
        self.member.leave(self.finished + self.granted, now);
    }
}

#[cfg(test)]
mod tests;
