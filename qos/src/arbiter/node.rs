//! A disk or a group, as the arbiter knows it.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::Flow;
use crate::limits::{Direction, Limits, Meter, Work};

/// The weight of a node that is given none (as in cgroups).
pub const WEIGHT_DEFAULT: u32 = 100;
/// The largest weight; the smallest is 1.
pub const WEIGHT_MAX: u32 = 10_000;
/// Of shares: what a request counts besides its bytes.
const REQUEST: u128 = 1 << 32;
/// Of shares: bytes that count as much as a request does.
const REQUEST_BYTES: u128 = 64 << 10;
/// Requests that a node was served before its turn, by its reservation, and that count against it when it was idle meanwhile.
const LEAD_REQUESTS: u128 = 256;
/// Who is idle for less than this has what it would have had otherwise: its guest's or our thread was late.
const BRIEF: Duration = Duration::from_millis(10);
/// A reservation that was not met for longer than this is not made up for.
const BEHIND_MAX: Duration = Duration::from_secs(1);

/// Which disk or group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) u32);

impl NodeId {
    pub(super) fn at(self) -> usize {
        self.0 as usize
    }
}

/// What a disk or group may do, and gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Not more than this.
    pub limits: Limits,
    /// Its part of what its group gets, among the others there that want something: from 1 to [`WEIGHT_MAX`].
    pub weight: u32,
    /// Requests each second that it gets in any case, as long as the host can do as much. They count as those of
    /// [`Limits::iops_size`] do.
    pub reserve_iops: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { limits: Limits::default(), weight: WEIGHT_DEFAULT, reserve_iops: None }
    }
}

/// Directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mask {
    read: bool,
    write: bool,
}

impl Mask {
    pub(super) const ALL: Self = Self { read: true, write: true };

    pub(super) fn and(self, other: Self) -> Self {
        Self { read: self.read && other.read, write: self.write && other.write }
    }

    pub(super) fn is_empty(self) -> bool {
        !self.read && !self.write
    }

    fn has(self, direction: Direction) -> bool {
        match direction {
            Direction::Read => self.read,
            Direction::Write => self.write,
        }
    }

    fn of(mut has: impl FnMut(Direction) -> bool) -> Self {
        Self { read: has(Direction::Read), write: has(Direction::Write) }
    }
}

/// Whether a node takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing waits in it, or only in members that sleep.
    Idle,
    /// Something waits, and may be next.
    Active,
    /// Nothing of it may be next before that.
    Asleep(Duration),
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) parent: Option<NodeId>,
    pub(super) kind: Kind,
    pub(super) state: State,
    /// The service that it has had, divided by its weight.
    pub(super) share: u128,
    /// When the next request of its reservation is due.
    pub(super) due: Duration,
    meter: Meter,
    weight: u32,
    reserve_iops: Option<u64>,
}

#[derive(Debug)]
pub(super) enum Kind {
    Group(Group),
    Disk(Disk),
}

#[derive(Debug, Default)]
pub(super) struct Group {
    /// Active members, by their shares.
    pub(super) active: BTreeSet<(u128, NodeId)>,
    /// The share of whoever was served last by weight.
    served: u128,
    /// What that was half of [`BRIEF`] ago at least, and then, or later.
    before: [u128; 2],
    /// When the later of these was.
    at: Duration,
}

impl Group {
    /// By weight a member is served that has had such a share.
    pub(super) fn serve(&mut self, share: u128, now: Duration) {
        self.look_back(now);
        self.served = self.served.max(share);
    }

    /// Where members begin that were idle: the least and the most that they can have had.
    pub(super) fn begins(&mut self, now: Duration) -> (u128, u128) {
        self.look_back(now);
        (self.before[0], self.served)
    }

    fn look_back(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at);
        if passed >= BRIEF / 2 {
            // When as much has passed twice, nothing was served in the second half.
            let older = if passed >= BRIEF { self.served } else { self.before[1] };
            (self.before, self.at) = ([older, self.served], now);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Disk {
    /// Bytes of the requests that wait, by flow.
    flows: Vec<VecDeque<u64>>,
    /// Flows in which something waits, in the order of their turns.
    turns: VecDeque<usize>,
}

impl Kind {
    pub(super) fn group() -> Self {
        Self::Group(Group::default())
    }

    pub(super) fn disk() -> Self {
        Self::Disk(Disk::default())
    }
}

fn index(flow: Flow) -> usize {
    usize::from(flow.queue) * 2 + usize::from(flow.direction == Direction::Write)
}

fn direction(index: usize) -> Direction {
    if index.is_multiple_of(2) { Direction::Read } else { Direction::Write }
}

impl Disk {
    /// The flow whose turn it is, of those that are open.
    pub(super) fn first(&self, disk: NodeId, open: Mask) -> Option<Flow> {
        let index = *self.turns.iter().find(|index| open.has(direction(**index)))?;
        Some(Flow { disk, queue: (index / 2) as u16, direction: direction(index) })
    }
}

impl Node {
    pub(super) fn new(kind: Kind, parent: Option<NodeId>, settings: &Settings, now: Duration) -> Self {
        Self {
            parent,
            kind,
            state: State::Idle,
            share: 0,
            due: now,
            meter: Meter::new(&settings.limits, now),
            weight: settings.weight.clamp(1, WEIGHT_MAX),
            reserve_iops: settings.reserve_iops,
        }
    }

    pub(super) fn change(&mut self, settings: &Settings, now: Duration) {
        self.meter.change(&settings.limits, now);
        self.weight = settings.weight.clamp(1, WEIGHT_MAX);
        self.reserve_iops = settings.reserve_iops;
        self.due = self.due.min(now);
    }

    pub(super) fn reserves(&self) -> bool {
        self.reserve_iops.is_some_and(|iops| iops > 0)
    }

    pub(super) fn group(&self) -> &Group {
        match &self.kind {
            Kind::Group(group) => group,
            Kind::Disk(_) => panic!("a disk has no members"),
        }
    }

    pub(super) fn group_mut(&mut self) -> &mut Group {
        match &mut self.kind {
            Kind::Group(group) => group,
            Kind::Disk(_) => panic!("a disk has no members"),
        }
    }

    fn disk_mut(&mut self) -> &mut Disk {
        match &mut self.kind {
            Kind::Disk(disk) => disk,
            Kind::Group(_) => panic!("requests are of disks"),
        }
    }

    pub(super) fn push(&mut self, flow: Flow, bytes: u64) {
        let (disk, index) = (self.disk_mut(), index(flow));
        if disk.flows.len() <= index {
            disk.flows.resize_with(index + 1, VecDeque::new);
        }
        if disk.flows[index].is_empty() {
            disk.turns.push_back(index);
        }
        disk.flows[index].push_back(bytes);
    }

    /// Takes the first request of a flow; the flow's next turn is after all others.
    pub(super) fn pop(&mut self, flow: Flow) -> u64 {
        let (disk, index) = (self.disk_mut(), index(flow));
        disk.turns.retain(|turn| *turn != index);
        let bytes = disk.flows[index].pop_front().expect("a request that was found");
        if !disk.flows[index].is_empty() {
            disk.turns.push_back(index);
        }
        bytes
    }

    /// How many requests of a flow wait.
    pub(super) fn waiting(&self, flow: Flow) -> usize {
        match &self.kind {
            Kind::Group(_) => 0,
            Kind::Disk(disk) => disk.flows.get(index(flow)).map_or(0, VecDeque::len),
        }
    }

    /// Forgets what waits in a queue of a disk.
    pub(super) fn forget(&mut self, queue: u16) {
        let disk = self.disk_mut();
        disk.turns.retain(|index| index / 2 != usize::from(queue));
        for flow in disk.flows.iter_mut().skip(usize::from(queue) * 2).take(2) {
            flow.clear();
        }
    }

    /// The directions in which requests of a disk wait; of a group, all.
    pub(super) fn wanted(&self) -> Mask {
        match &self.kind {
            Kind::Group(_) => Mask::ALL,
            Kind::Disk(disk) => Mask::of(|wanted| disk.turns.iter().any(|turn| direction(*turn) == wanted)),
        }
    }

    /// Whether nothing waits in it, but for members that sleep.
    pub(super) fn is_over(&self) -> bool {
        match &self.kind {
            Kind::Group(group) => group.active.is_empty(),
            Kind::Disk(disk) => disk.turns.is_empty(),
        }
    }

    /// What of `mask` the limits let through now; when they let more of it through.
    pub(super) fn open(&mut self, mask: Mask, now: Duration) -> (Mask, Option<Duration>) {
        let mut until: Option<Duration> = None;
        let open = Mask::of(|direction| {
            let ready = mask.has(direction).then(|| self.meter.ready_at(direction, now));
            let closed = ready.filter(|ready| *ready > now);
            until = until.into_iter().chain(closed).min();
            ready.is_some() && closed.is_none()
        });
        (open, until)
    }

    /// Begins again, where its siblings are.
    pub(super) fn begin(&mut self, (least, most): (u128, u128), now: Duration) {
        let lead_max = LEAD_REQUESTS * REQUEST / u128::from(self.weight);
        self.state = State::Active;
        self.share = self.share.clamp(least, most + lead_max);
        self.due = self.due.max(now.saturating_sub(BRIEF));
    }

    /// Counts work that begins; `is_due`: by the reservation.
    pub(super) fn count(&mut self, work: &Work, is_due: bool, now: Duration) {
        self.meter.take(work);
        let service = REQUEST + u128::from(work.bytes) * REQUEST / REQUEST_BYTES;
        self.share += service / u128::from(self.weight);
        if let Some(iops) = self.reserve_iops.filter(|iops| is_due && *iops > 0) {
            let nanos = self.meter.requests_nano(work).unsigned_abs() / u128::from(iops);
            let step = Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX));
            self.due = self.due.max(now.saturating_sub(BEHIND_MAX)).saturating_add(step);
        }
    }
}
