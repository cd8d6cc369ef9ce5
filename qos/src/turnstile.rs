//! What waits in a thread until the [governor](crate::governor) lets it begin.
//!
//! Reads and writes wait apart from each other, each in their order.

use std::collections::VecDeque;

use sapwood_blockdev::engine::Time;

use crate::governor::{Grants, Member};
use crate::limits::Direction;

/// The lowest bit of the tags of what has begun: it was granted.
const GRANTED: u64 = 1;

/// A tag for what begins, by which [`Turnstile::ended`] knows whether it was granted; tags leave the highest bit free.
pub(crate) fn mark(tag: u64, is_granted: bool) -> u64 {
    assert!(tag <= u64::MAX >> 1, "tags leave a bit");
    tag << 1 | if is_granted { GRANTED } else { 0 }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Turnstile<T> {
    member: Member,
    /// Reads, writes.
    waiting: [VecDeque<Waiting<T>>; 2],
    /// Of those, how many the governor does not know of; they are the last.
    untold: [usize; 2],
    /// What may begin.
    ready: VecDeque<T>,
    /// Requests that were granted and have not ended.
    granted: usize,
    /// Of those that were granted, how many have ended without the governor knowing.
    finished: usize,
}

#[derive(Debug)]
struct Waiting<T> {
    what: T,
    bytes: u64,
    /// Since when, once the governor knows of it.
    since: Option<Time>,
}

impl<T> Turnstile<T> {
    pub(crate) fn new(member: Member) -> Self {
        Self {
            member,
            waiting: [VecDeque::new(), VecDeque::new()],
            untold: [0; 2],
            ready: VecDeque::new(),
            granted: 0,
            finished: 0,
        }
    }

    /// A guest asks for something.
    pub(crate) fn mark(&self) {
        self.member.seat().mark();
    }

    /// Whether requests have to wait here at all.
    pub(crate) fn is_governed(&self) -> bool {
        self.member.seat().is_governed()
    }

    /// A request waits.
    pub(crate) fn push(&mut self, direction: Direction, bytes: u64, what: T) {
        let direction = usize::from(direction == Direction::Write);
        self.waiting[direction].push_back(Waiting { what, bytes, since: None });
        self.untold[direction] += 1;
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum::<usize>() + self.ready.len()
    }

    /// The next one that may begin.
    pub(crate) fn next(&mut self) -> Option<T> {
        self.ready.pop_front()
    }

    /// Something that has begun has ended: the tag that it was given, without its [mark].
    pub(crate) fn ended(&mut self, tag: u64) -> u64 {
        let is_granted = tag & GRANTED;
        self.finished += is_granted as usize;
        self.granted -= is_granted as usize;
        tag >> 1
    }

    /// Whether the governor is to be told that something has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.finished > 0
    }

    /// When this thread has to [ask](Self::ask) at the latest, if nothing else happens.
    pub(crate) fn alarm(&self) -> Option<Time> {
        self.member.alarm()
    }

    /// Tells the governor what is new, if it is time to; what it grants is [next](Self::next).
    pub(crate) fn ask(&mut self, now: impl FnOnce() -> Time) {
        let is_waiting = self.waiting.iter().any(|waiting| !waiting.is_empty());
        if !is_waiting && self.finished == 0 && self.member.alarm().is_none() && !self.member.has_mail() {
            return;
        }
        let now = now();
        let mail = self.member.take_mail();
        self.take(mail, now);
        let has_news = self.untold != [0; 2] || self.finished > 0;
        let is_due = self.member.alarm().is_some_and(|at| at <= now);
        if !has_news && !is_due && !self.member.is_nudged() {
            return;
        }
        let untold = std::mem::take(&mut self.untold);
        let parts = self.waiting.iter_mut().zip(untold).zip([Direction::Read, Direction::Write]);
        let arrived = parts.flat_map(|((waiting, untold), direction)| {
            let told = waiting.len() - untold;
            waiting.iter_mut().skip(told).map(move |waiting| {
                waiting.since = Some(now);
                (direction, waiting.bytes)
            })
        });
        let grants = self.member.exchange(arrived, std::mem::take(&mut self.finished), now);
        self.take(grants, now);
    }

    /// Lets everything begin that waits, whatever the limits say.
    pub(crate) fn release(&mut self, now: Time) {
        let grants = self.member.release(now);
        self.take(grants, now);
    }

    /// Takes what was granted.
    fn take(&mut self, grants: Grants, now: Time) {
        for (waiting, count) in self.waiting.iter_mut().zip(grants) {
            for _ in 0..count {
                let Waiting { what, since, .. } = waiting.pop_front().expect("what is granted waits here");
                if let Some(since) = since {
                    self.member.seat().add_waited(now.saturating_sub(since));
                }
                self.granted += 1;
                self.ready.push_back(what);
            }
        }
    }

    /// Leaves the governor.
    pub(crate) fn leave(&mut self, now: Time) {
        self.member.leave(self.finished + self.granted, now);
    }
}
