//! One [`Arbiter`] for the disks of a process, shared by the threads of their queues.
//!
//! A thread keeps the requests that wait (see `crate::turnstile`); the arbiter knows how many there are, and grants. Whoever looks
//! grants to all: what another thread may begin is put into its mailbox, and it is woken. Of all that wait for a limit one thread
//! has the *alarm*: it looks again when the first limit lets something through, while the others sleep until they are woken.
//!
//! Disks without limits pass by, without a lock, for as long as nobody shares by weight or reservation (`is_governed`). What is
//! done in the background ([`Background`]) is one disk more, which counts for nothing as long as no guest shares. It knows whether
//! guests ask for anything by their [`Pulse`](crate::pulse).

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use sapwood_blockdev::engine::{Time, monotonic_now};

use crate::arbiter::{Arbiter, Flow, NodeId, Settings};
use crate::limits::{Direction, Limits};
use crate::pulse::Pulse;

/// Requests under way at most, of all disks, where they share by weight or reservation, if nobody says another number.
pub const IN_FLIGHT_DEFAULT: usize = 32;

/// The weight of [`Background`] work, if nobody says another.
pub const BACKGROUND_WEIGHT_DEFAULT: u32 = 10;

/// What [`Background`] work gets in any case, in requests each second, of which a large one counts as several
/// ([`BACKGROUND_SIZE`]): whatever guests weigh, it comes to an end.
const BACKGROUND_RESERVED: u64 = 50;
/// Bytes of such a request.
const BACKGROUND_SIZE: NonZeroU64 = NonZeroU64::new(64 << 10).expect("it is not zero");

/// A queue of a disk.
type Key = (NodeId, u16);

/// See the module's documentation.
#[derive(Debug)]
pub struct Governor {
    state: Mutex<State>,
    pulse: Pulse,
}

#[derive(Debug)]
struct State {
    arbiter: Arbiter,
    /// What was set, by node.
    settings: HashMap<NodeId, (Option<NodeId>, Settings)>,
    /// Requests under way at most while anybody shares.
    in_flight_max: usize,
    /// Whether anybody shares.
    is_sharing: bool,
    disks: HashMap<NodeId, Arc<Shown>>,
    queues: HashMap<Key, Arc<Mail>>,
    alarm: Option<(Time, Key)>,
    granted: Vec<Flow>,
}

/// What was changed of what is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changed {
    Nothing,
    /// A disk has come or gone, or a group that nothing is in has come.
    One(NodeId),
    All,
}

/// A disk's place among the others, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    governor: Arc<Governor>,
    node: NodeId,
    shown: Arc<Shown>,
}

/// What of a disk is seen without the lock.
#[derive(Debug, Default)]
struct Shown {
    is_governed: AtomicBool,
    /// For how long requests that were granted had waited, in nanoseconds, all together.
    waited_ns: AtomicU64,
}

/// What other threads tell a queue's.
#[derive(Debug)]
struct Mail {
    /// Requests that may begin: reads, writes.
    granted: [AtomicU32; 2],
    /// It is to look, perhaps to take the alarm.
    nudged: AtomicBool,
    waker: Waker,
    /// Its thread does other things besides, and is not there when an alarm comes.
    is_background: bool,
}

/// All work of a process that no guest waits for: its reads and writes share with those of guests, by a weight.
#[derive(Clone, Debug)]
pub struct Background(Arc<Seat>);

/// Requests that may begin: reads, writes.
pub(crate) type Grants = [usize; 2];

/// A queue's access to the governor.
#[derive(Debug)]
pub(crate) struct Member {
    seat: Arc<Seat>,
    queue: u16,
    mail: Arc<Mail>,
    /// When this thread is to look again, if it has the alarm.
    alarm: Option<Time>,
}

impl Seat {
    pub(crate) fn new(governor: &Arc<Governor>, parent: NodeId, settings: &Settings, now: Time) -> Arc<Self> {
        let (governor, shown) = (Arc::clone(governor), Arc::<Shown>::default());
        let mut state = governor.state();
        let node = state.arbiter.add_disk(parent, settings, now);
        state.settings.insert(node, (Some(parent), settings.clone()));
        state.disks.insert(node, Arc::clone(&shown));
        Governor::settle(state, Changed::One(node), now);
        Arc::new(Self { governor, node, shown })
    }

    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn is_governed(&self) -> bool {
        self.shown.is_governed.load(Ordering::Relaxed)
    }

    /// The disk's guest asks for something.
    pub(crate) fn mark(&self) {
        self.governor.pulse.mark();
    }

    pub(crate) fn add_waited(&self, waited: Time) {
        let nanos = waited.as_nanos().try_into().unwrap_or(u64::MAX);
        self.shown.waited_ns.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn waited(&self) -> Time {
        Time::from_nanos(self.shown.waited_ns.load(Ordering::Relaxed))
    }

    /// A queue of the disk, whose thread `waker` wakes.
    pub(crate) fn join(self: &Arc<Self>, waker: Waker) -> Member {
        self.enter(waker, false)
    }

    fn enter(self: &Arc<Self>, waker: Waker, is_background: bool) -> Member {
        let granted = [AtomicU32::new(0), AtomicU32::new(0)];
        let mail = Arc::new(Mail { granted, nudged: AtomicBool::new(false), waker, is_background });
        let mut state = self.governor.state();
        let is_free = |queue: &u16| !state.queues.contains_key(&(self.node, *queue));
        let queue = (0..u16::MAX).find(is_free).expect("a disk has fewer queues");
        state.queues.insert((self.node, queue), Arc::clone(&mail));
        Member { seat: Arc::clone(self), queue, mail, alarm: None }
    }
}

impl Background {
    /// A thread that works in the background, and that `waker` wakes.
    pub(crate) fn join(&self, waker: Waker) -> Member {
        self.0.enter(waker, true)
    }

    /// Whether guests have asked for anything since that was asked last, or for a tenth of a second after.
    pub fn guests_are_busy(&self, now: Time) -> bool {
        self.0.governor.pulse.is_busy(now)
    }

    /// Whether any guest has a weight or a reservation, so that this work waits for its turns.
    pub fn waits(&self) -> bool {
        self.0.is_governed()
    }

    /// Its part of what all can do, from 1 to [`WEIGHT_MAX`](crate::arbiter::WEIGHT_MAX).
    pub fn set_weight(&self, weight: u32, now: Time) {
        let mut state = self.0.governor.state();
        state.arbiter.change(self.0.node, &background_settings(weight), now);
        Governor::settle(state, Changed::Nothing, now);
    }
}

fn background_settings(weight: u32) -> Settings {
    let limits = Limits { iops_size: Some(BACKGROUND_SIZE), ..Limits::default() };
    Settings { limits, weight, reserve_iops: Some(BACKGROUND_RESERVED) }
}

impl Drop for Seat {
    fn drop(&mut self) {
        Governor::remove(self.governor.state(), self.node, Changed::One(self.node), monotonic_now());
    }
}

impl Governor {
    /// A governor for disks that together have not more than `in_flight_max` requests under way while any of them has a weight
    /// or a reservation.
    pub fn new(in_flight_max: usize, now: Time) -> Arc<Self> {
        let state = State {
            arbiter: Arbiter::new(None, now),
            settings: HashMap::from([(Arbiter::ROOT, (None, Settings::default()))]),
            in_flight_max,
            is_sharing: false,
            disks: HashMap::new(),
            queues: HashMap::new(),
            alarm: None,
            granted: Vec::new(),
        };
        Arc::new(Self { state: Mutex::new(state), pulse: Pulse::default() })
    }

    /// Another bound for requests under way while anybody shares, from now on.
    pub fn set_in_flight_max(&self, max: usize, now: Time) {
        let mut state = self.state();
        state.in_flight_max = max;
        Self::settle(state, Changed::All, now);
    }

    /// A place for work in the background.
    pub fn background(self: &Arc<Self>, now: Time) -> Background {
        let shown = Arc::<Shown>::default();
        let settings = background_settings(BACKGROUND_WEIGHT_DEFAULT);
        let mut state = self.state();
        // No settings are kept of it: its weight alone makes nobody share.
        let node = state.arbiter.add_disk(Arbiter::ROOT, &settings, now);
        state.disks.insert(node, Arc::clone(&shown));
        Self::settle(state, Changed::One(node), now);
        Background(Arc::new(Seat { governor: Arc::clone(self), node, shown }))
    }

    /// Adds a group to the group `parent`, which may be [`Arbiter::ROOT`].
    pub fn add_group(&self, parent: NodeId, settings: &Settings, now: Time) -> NodeId {
        let mut state = self.state();
        let node = state.arbiter.add_group(parent, settings, now);
        state.settings.insert(node, (Some(parent), settings.clone()));
        Self::settle(state, Changed::One(node), now);
        node
    }

    /// Changes what a disk, a group or all together may do, and in which group it is. What waits goes by it at once.
    pub fn change(&self, node: NodeId, parent: NodeId, settings: &Settings, now: Time) {
        let mut state = self.state();
        let old = state.settings.insert(node, (Some(parent), settings.clone()));
        let (old_parent, old_settings) = old.expect("a node that was added");
        if node == Arbiter::ROOT {
            state.settings.insert(node, (None, settings.clone()));
        } else if old_parent != Some(parent) {
            state.arbiter.move_to(node, parent, now);
        }
        if old_settings != *settings {
            state.arbiter.change(node, settings, now);
        }
        Self::settle(state, Changed::All, now);
    }

    /// The group in which a disk or group is.
    pub fn parent_of(&self, node: NodeId) -> Option<NodeId> {
        self.state().settings.get(&node).and_then(|(parent, _)| *parent)
    }

    /// Removes a group, which is not [`Arbiter::ROOT`]; what is in it goes to the group that it was in.
    pub fn remove_group(&self, node: NodeId, now: Time) {
        let mut state = self.state();
        let State { arbiter, settings, .. } = &mut *state;
        let above = settings[&node].0.expect("the root stays");
        for (member, (parent, _)) in settings.iter_mut().filter(|(_, (parent, _))| *parent == Some(node)) {
            arbiter.move_to(*member, above, now);
            *parent = Some(above);
        }
        Self::remove(state, node, Changed::All, now);
    }

    fn remove(mut state: MutexGuard<'_, State>, node: NodeId, changed: Changed, now: Time) {
        state.arbiter.remove(node);
        state.settings.remove(&node);
        state.disks.remove(&node);
        Self::settle(state, changed, now);
    }

    /// Requests that were granted and have not ended.
    pub fn in_flight(&self) -> usize {
        self.state().arbiter.in_flight()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change: who is governed, and what may begin now.
    fn settle(mut state: MutexGuard<'_, State>, changed: Changed, now: Time) {
        state.find_governed(changed);
        let next = state.dispatch(now);
        let mut delivered = state.deliver(None);
        state.nudge(next, &mut delivered);
        drop(state);
        delivered.wake();
    }
}

impl State {
    /// Finds out which disks have to ask.
    fn find_governed(&mut self, changed: Changed) {
        if changed == Changed::Nothing {
            return;
        }
        let default = Settings::default();
        let shares = |settings: &Settings| {
            settings.weight != default.weight || settings.reserve_iops != default.reserve_iops
        };
        let is_sharing = self.settings.values().any(|(_, settings)| shares(settings));
        self.arbiter.set_in_flight_max(is_sharing.then_some(self.in_flight_max));
        let was_sharing = std::mem::replace(&mut self.is_sharing, is_sharing);
        match changed {
            Changed::One(node) if is_sharing == was_sharing => {
                self.disks.get(&node).into_iter().for_each(|shown| self.govern(node, shown));
            }
            _ => self.disks.iter().for_each(|(node, shown)| self.govern(*node, shown)),
        }
    }

    /// Finds out whether a disk has to ask.
    fn govern(&self, disk: NodeId, shown: &Shown) {
        let (mut is_governed, mut next) = (self.is_sharing, Some(disk));
        while let Some((parent, settings)) = next.and_then(|node| self.settings.get(&node)) {
            is_governed |= !settings.limits.is_empty();
            next = *parent;
        }
        shown.is_governed.store(is_governed, Ordering::Relaxed);
    }

    /// Has the arbiter grant; when to look again.
    fn dispatch(&mut self, now: Time) -> Option<Time> {
        self.arbiter.dispatch(now, &mut self.granted)
    }

    /// Has somebody else look when it is time, who has no alarm yet, or has it for too late.
    fn nudge(&self, next: Option<Time>, delivered: &mut Delivered) {
        if next.is_none_or(|next| self.alarm.is_some_and(|(at, _)| at <= next)) {
            return;
        }
        let holder = self.alarm.and_then(|(_, key)| self.queues.get(&key));
        let found = holder.or_else(|| self.queues.values().find(|mail| !mail.is_background));
        if let Some(mail) = found {
            mail.nudged.store(true, Ordering::Release);
            delivered.others.push(Arc::clone(mail));
        }
    }

    /// Tells everybody what they may begin; what `me` may is returned.
    fn deliver(&mut self, me: Option<Key>) -> Delivered {
        let mut delivered = Delivered::default();
        let mut last = None;
        for flow in self.granted.drain(..) {
            let (key, direction) = ((flow.disk, flow.queue), usize::from(flow.direction == Direction::Write));
            if me == Some(key) {
                delivered.own[direction] += 1;
            } else if let Some(mail) = self.queues.get(&key) {
                mail.granted[direction].fetch_add(1, Ordering::Release);
                if last.replace(key) != Some(key) {
                    delivered.others.push(Arc::clone(mail));
                }
            }
        }
        delivered
    }
}

/// What was granted.
#[derive(Default)]
struct Delivered {
    own: Grants,
    /// Whose threads have mail.
    others: Vec<Arc<Mail>>,
}

impl Delivered {
    /// Wakes the others; without the lock, which they want first.
    fn wake(self) -> Grants {
        for mail in self.others {
            mail.waker.wake_by_ref();
        }
        self.own
    }
}

impl Member {
    fn key(&self) -> Key {
        (self.seat.node, self.queue)
    }

    /// The disk's place.
    pub(crate) fn seat(&self) -> &Seat {
        &self.seat
    }

    /// When this thread has to look again at the latest, whatever it waits for.
    pub(crate) fn alarm(&self) -> Option<Time> {
        self.alarm
    }

    /// Whether others have granted or told something.
    pub(crate) fn has_mail(&self) -> bool {
        let is_granted = self.mail.granted.iter().any(|granted| granted.load(Ordering::Relaxed) > 0);
        is_granted || self.mail.nudged.load(Ordering::Relaxed)
    }

    /// What others granted.
    pub(crate) fn take_mail(&self) -> Grants {
        self.mail.granted.each_ref().map(|granted| match granted.load(Ordering::Relaxed) {
            0 => 0,
            _ => granted.swap(0, Ordering::Acquire) as usize,
        })
    }

    /// Whether this thread was told to look.
    pub(crate) fn is_nudged(&self) -> bool {
        self.mail.nudged.load(Ordering::Relaxed) && self.mail.nudged.swap(false, Ordering::Acquire)
    }

    /// Tells of requests that wait from now on, by their bytes, and of how many that were granted have ended; what may begin.
    pub(crate) fn exchange(
        &mut self,
        arrived: impl Iterator<Item = (Direction, u64)>,
        finished: usize,
        now: Time,
    ) -> Grants {
        let key = self.key();
        let mut state = self.seat.governor.state();
        state.arbiter.finished(finished);
        for (direction, bytes) in arrived {
            state.arbiter.arrive(Flow { disk: key.0, queue: key.1, direction }, bytes, now);
        }
        let next = state.dispatch(now);
        let mut delivered = state.deliver(Some(key));
        let is_mine =
            state.alarm.is_none_or(|(at, holder)| holder == key || next.is_some_and(|next| next < at));
        if self.mail.is_background {
            state.nudge(next, &mut delivered);
        } else if is_mine {
            state.alarm = next.map(|next| (next, key));
            self.alarm = next;
        } else {
            self.alarm = None;
        }
        drop(state);
        delivered.wake()
    }

    /// Lets everything begin that waits in this queue, whatever the limits say.
    pub(crate) fn release(&mut self, now: Time) -> Grants {
        self.seat.governor.state().arbiter.release(self.seat.node, self.queue, now)
    }

    /// Leaves, with so many requests that were granted and not reported.
    pub(crate) fn leave(&mut self, finished: usize, now: Time) {
        let key = self.key();
        let mut state = self.seat.governor.state();
        state.queues.remove(&key);
        state.arbiter.forget(key.0, key.1);
        // What was granted and never begun has ended, too.
        state.arbiter.finished(finished + self.take_mail().into_iter().sum::<usize>());
        if state.alarm.is_some_and(|(_, holder)| holder == key) {
            state.alarm = None;
        }
        Governor::settle(state, Changed::Nothing, now);
    }
}
