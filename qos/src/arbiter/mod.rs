//! Who is next, among disks and groups of disks that share one host: in the manner of mClock (Gulati, Merchant, Varman: "mClock:
//! Handling Throughput Variability for Hypervisor IO Scheduling", OSDI 2010).
//!
//! Disks are the leaves of a tree of groups. Each node has limits, which it never exceeds; a weight, by which it shares with its
//! siblings what the host can do; and perhaps a reservation, which it gets before anybody is served by weight. What the
//! host can do shows in how many requests are under way: not more than a bound, so that the rest waits here, in an order of our
//! own, and not in the host's queues. Without a bound requests wait for limits only.
//!
//! Two tags decide, as in the paper, kept for each node and not for each request:
//! - *reservation*: the time at which the next request is due. The node that is due for the longest time is served first. What is
//!   served by weight does not count against it.
//! - *share*: the service that a node has had, divided by its weight. The node with the least is served; one that was idle, or was held
//!   back by limits, begins where its siblings are, so it neither catches up nor falls behind. For a few milliseconds nobody is idle:
//!   a guest or a thread that is late loses nothing.
//!
//! Requests of a disk wait in flows, one for each queue and direction, which take turns: a read does not wait behind a write
//! that waits for a limit. Each flow keeps its order.

mod node;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::Duration;

use crate::limits::{Direction, Work};
use node::{Kind, Mask, Node, State};
pub use node::{NodeId, Settings, WEIGHT_DEFAULT, WEIGHT_MAX};

/// A flow of requests that keep their order: those of one queue in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The disk.
    pub disk: NodeId,
    /// The disk's queue.
    pub queue: u16,
    /// The direction.
    pub direction: Direction,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Arbiter {
    nodes: Vec<Option<Node>>,
    /// Nodes that wait for their limits, by when that ends.
    asleep: BTreeSet<(Duration, NodeId)>,
    /// Active nodes with a reservation, by when the next request is due.
    due: BTreeSet<(Duration, NodeId)>,
    in_flight: usize,
    in_flight_max: Option<usize>,
}

/// Why nothing can be served: until when, as far as that depends on time.
type Blocked = Option<Duration>;

impl Arbiter {
    /// The group in which all others are.
    pub const ROOT: NodeId = NodeId(0);

    /// An arbiter of a host that has not more than `in_flight_max` requests under way; `None`: any number.
    pub fn new(in_flight_max: Option<usize>, now: Duration) -> Self {
        let root = Node::new(Kind::group(), None, &Settings::default(), now);
        Self {
            nodes: vec![Some(root)],
            asleep: BTreeSet::new(),
            due: BTreeSet::new(),
            in_flight: 0,
            in_flight_max: in_flight_max.map(|max| max.max(1)),
        }
    }

    /// Adds a group to the group `parent`.
    pub fn add_group(&mut self, parent: NodeId, settings: &Settings, now: Duration) -> NodeId {
        self.add(Node::new(Kind::group(), Some(parent), settings, now))
    }

    /// Adds a disk to the group `parent`.
    pub fn add_disk(&mut self, parent: NodeId, settings: &Settings, now: Duration) -> NodeId {
        self.add(Node::new(Kind::disk(), Some(parent), settings, now))
    }

    fn add(&mut self, node: Node) -> NodeId {
        let free = self.nodes.iter().position(Option::is_none);
        let at = free.unwrap_or(self.nodes.len());
        if free.is_none() {
            self.nodes.push(None);
        }
        self.nodes[at] = Some(node);
        NodeId(at as u32)
    }

    /// Removes a disk, or a group without members; requests that wait are forgotten. The id may be given again.
    pub fn remove(&mut self, id: NodeId) {
        self.rest(id);
        self.nodes[id.at()] = None;
    }

    /// Changes the limits, the weight and the reservation of a node, or of the [root](Self::ROOT), from now on.
    pub fn change(&mut self, id: NodeId, settings: &Settings, now: Duration) {
        let was_active = self.node(id).state != State::Idle;
        self.rest(id);
        self.node_mut(id).change(settings, now);
        if was_active {
            self.activate(id, now);
        }
    }

    /// Moves a node to another group, of which it is not a part. What it had there counts no more.
    pub fn move_to(&mut self, id: NodeId, parent: NodeId, now: Duration) {
        let was_active = self.node(id).state != State::Idle;
        self.rest(id);
        self.node_mut(id).parent = Some(parent);
        if was_active {
            self.activate(id, now);
        }
    }

    /// Another bound for requests under way. Those that are go on.
    pub fn set_in_flight_max(&mut self, max: Option<usize>) {
        self.in_flight_max = max.map(|max| max.max(1));
    }

    /// A request waits.
    pub fn arrive(&mut self, flow: Flow, bytes: u64, now: Duration) {
        self.node_mut(flow.disk).push(flow, bytes);
        self.activate(flow.disk, now);
    }

    /// Grants everything that waits in a queue of a disk, whatever the limits say, and counts it: reads, writes.
    pub fn release(&mut self, disk: NodeId, queue: u16, now: Duration) -> [usize; 2] {
        [Direction::Read, Direction::Write].map(|direction| {
            let flow = Flow { disk, queue, direction };
            let waiting = self.node(disk).waiting(flow);
            for _ in 0..waiting {
                self.activate(disk, now);
                self.serve(flow, None, now);
            }
            waiting
        })
    }

    /// Forgets what waits in a queue of a disk.
    pub fn forget(&mut self, disk: NodeId, queue: u16) {
        let node = self.node_mut(disk);
        node.forget(queue);
        if node.is_over() {
            self.rest(disk);
        }
    }

    /// So many requests that were granted have ended.
    pub fn finished(&mut self, count: usize) {
        self.in_flight = self.in_flight.saturating_sub(count);
    }

    /// Requests that were granted and have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Grants what may begin now: for each entry of `granted` the first request of that flow. When to look again, if nothing arrives or
    /// ends before; `None`: then only.
    pub fn dispatch(&mut self, now: Duration, granted: &mut Vec<Flow>) -> Option<Duration> {
        while let Some((_, id)) = self.asleep.first().copied().filter(|(until, _)| *until <= now) {
            self.activate(id, now);
        }
        while self.in_flight_max.is_none_or(|max| self.in_flight < max) {
            let found = match self.find_due(now) {
                Some((flow, by)) => Ok((flow, Some(by))),
                None => self.find(Self::ROOT, Mask::ALL, now).map(|flow| (flow, None)),
            };
            match found {
                Ok((flow, by)) => {
                    self.serve(flow, by, now);
                    granted.push(flow);
                }
                Err(until) => return until.into_iter().chain(self.asleep.first().map(|(at, _)| *at)).min(),
            }
        }
        None
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.at()].as_ref().expect("ids of nodes that were removed are not used")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.at()].as_mut().expect("ids of nodes that were removed are not used")
    }

    /// Lets a node, and all groups that it is in, take part.
    fn activate(&mut self, id: NodeId, now: Duration) {
        let mut next = Some(id);
        while let Some(id) = next {
            let node = self.node(id);
            let (parent, state) = (node.parent, node.state);
            if state != State::Active {
                if let State::Asleep(until) = state {
                    self.asleep.remove(&(until, id));
                }
                let begins = parent.map_or((0, 0), |parent| self.node_mut(parent).group_mut().begins(now));
                let node = self.node_mut(id);
                node.begin(begins, now);
                let (share, due, reserves) = (node.share, node.due, node.reserves());
                if let Some(parent) = parent {
                    self.node_mut(parent).group_mut().active.insert((share, id));
                }
                if reserves {
                    self.due.insert((due, id));
                }
            }
            next = parent;
        }
    }

    /// Takes a node out of what takes part.
    fn rest(&mut self, id: NodeId) {
        let node = self.node(id);
        let (parent, tags) = (node.parent, (node.share, node.due));
        if let State::Asleep(until) = node.state {
            self.asleep.remove(&(until, id));
        }
        self.rest_from(id, parent, tags);
        self.node_mut(id).state = State::Idle;
    }

    fn sleep(&mut self, id: NodeId, until: Duration) {
        self.rest(id);
        self.node_mut(id).state = State::Asleep(until);
        self.asleep.insert((until, id));
    }

    /// Whose request is due, by the reservation of which node.
    fn find_due(&mut self, now: Duration) -> Option<(Flow, NodeId)> {
        let mut after = None;
        loop {
            let mut rest = match after {
                None => self.due.range(..),
                Some(after) => self.due.range((Bound::Excluded(after), Bound::Unbounded)),
            };
            let (at, id) = *rest.next().filter(|(at, _)| *at <= now)?;
            after = Some((at, id));
            let mask = self.mask_above(id, now);
            if let Ok(flow) = self.find(id, mask, now) {
                return Some((flow, id));
            }
        }
    }

    /// What the limits of the groups that a node is in let through now.
    fn mask_above(&mut self, id: NodeId, now: Duration) -> Mask {
        let (mut mask, mut next) = (Mask::ALL, self.node(id).parent);
        while let Some(id) = next {
            let node = self.node_mut(id);
            mask = node.open(mask, now).0;
            next = node.parent;
        }
        mask
    }

    /// The next request of a node by weight, of those that `mask` lets through.
    fn find(&mut self, id: NodeId, mask: Mask, now: Duration) -> Result<Flow, Blocked> {
        let node = self.node_mut(id);
        let mask = mask.and(node.wanted());
        let (open, mut until) = node.open(mask, now);
        if let Kind::Disk(disk) = &node.kind {
            return disk.first(id, open).ok_or(until);
        }
        let (mut after, mut passed) = (None, Vec::new());
        while !open.is_empty() {
            let active = &self.node(id).group().active;
            let mut rest = match after {
                None => active.range(..),
                Some(after) => active.range((Bound::Excluded(after), Bound::Unbounded)),
            };
            let Some(&(share, child)) = rest.next() else { break };
            after = Some((share, child));
            match self.find(child, open, now) {
                Ok(flow) => {
                    self.lift(id, &passed, share);
                    return Ok(flow);
                }
                Err(blocked) => {
                    until = until.into_iter().chain(blocked).min();
                    match blocked {
                        // What its groups hold back it waits for here.
                        _ if open != Mask::ALL => passed.push((share, child)),
                        Some(blocked) => self.sleep(child, blocked),
                        // Its members sleep.
                        None => self.rest(child),
                    }
                }
            }
        }
        Err(until)
    }

    /// Lets members that could not be served, in the order of their shares, have no more to catch up than whoever is served in their
    /// place. Among themselves they stay as they are.
    fn lift(&mut self, group: NodeId, passed: &[(u128, NodeId)], share: u128) {
        let Some((last, _)) = passed.last() else { return };
        let more = share - last;
        for (old, id) in passed {
            self.node_mut(*id).share = old + more;
            let active = &mut self.node_mut(group).group_mut().active;
            active.remove(&(*old, *id));
            active.insert((old + more, *id));
        }
    }

    /// Takes the first request of a flow, and counts it, for the disk and its groups. `by`: it was due by the reservation of that one.
    fn serve(&mut self, flow: Flow, by: Option<NodeId>, now: Duration) {
        let bytes = self.node_mut(flow.disk).pop(flow);
        let work = Work { direction: flow.direction, bytes };
        let (mut next, mut is_due) = (Some(flow.disk), false);
        while let Some(id) = next {
            is_due |= by == Some(id);
            let node = self.node(id);
            let (parent, old, is_over) = (node.parent, (node.share, node.due), node.is_over());
            self.rest_from(id, parent, old);
            let node = self.node_mut(id);
            node.count(&work, is_due, now);
            let (share, due, reserves) = (node.share, node.due, node.reserves());
            if is_over {
                node.state = State::Idle;
            } else if reserves {
                self.due.insert((due, id));
            }
            if let Some(parent) = parent {
                let group = self.node_mut(parent).group_mut();
                if by.is_none() {
                    group.serve(old.0, now);
                }
                if !is_over {
                    group.active.insert((share, id));
                }
            }
            next = parent;
        }
        self.in_flight += 1;
    }

    fn rest_from(&mut self, id: NodeId, parent: Option<NodeId>, (share, due): (u128, Duration)) {
        self.due.remove(&(due, id));
        if let Some(parent) = parent {
            self.node_mut(parent).group_mut().active.remove(&(share, id));
        }
    }
}
