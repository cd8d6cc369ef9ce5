//! The arbiter before a host in virtual time, and in random histories.

use std::collections::HashMap;

use super::*;
use crate::limits::{Limits, Rate};
use crate::random::random;

fn at(ns: u64) -> Duration {
    Duration::from_nanos(ns)
}

const SECOND: u64 = 1_000_000_000;

fn weight(weight: u32) -> Settings {
    Settings { weight, ..Settings::default() }
}

fn limited(iops: u64) -> Settings {
    let limits = Limits { iops_total: Some(Rate { per_second: iops, burst: None }), ..Limits::default() };
    Settings { limits, ..Settings::default() }
}

fn reserving(iops: u64, weight: u32) -> Settings {
    Settings { reserve_iops: Some(iops), weight, ..Settings::default() }
}

/// A host that serves so many requests at a time, each in `service` nanoseconds.
struct Host {
    arbiter: Arbiter,
    now: u64,
    service: u64,
    /// Ends of what is under way.
    busy: BTreeSet<(u64, u64, NodeId)>,
    number: u64,
    /// Disks whose guests keep requests waiting, and how many were served since the last count.
    guests: Vec<(NodeId, bool, u64)>,
    /// A guest of which one request waits at a time.
    shy: Option<NodeId>,
}

impl Host {
    fn new(in_flight: usize, service: u64) -> Self {
        let arbiter = Arbiter::new(Some(in_flight), at(0));
        Self { arbiter, now: 0, service, busy: BTreeSet::new(), number: 0, guests: Vec::new(), shy: None }
    }

    fn guest(&mut self, parent: NodeId, settings: &Settings) -> usize {
        let disk = self.arbiter.add_disk(parent, settings, at(self.now));
        self.guests.push((disk, false, 0));
        self.guests.len() - 1
    }

    /// The guest wants as much as it can get, from now on.
    fn start(&mut self, guest: usize) {
        let (disk, wants, _) = &mut self.guests[guest];
        *wants = true;
        let disk = *disk;
        for n in 0..32 {
            let direction = if n % 2 == 0 { Direction::Read } else { Direction::Write };
            self.arbiter.arrive(Flow { disk, queue: n % 4, direction }, 4096, at(self.now));
        }
    }

    /// The guest waits for the end of one request before it makes another.
    fn start_shy(&mut self, guest: usize) {
        self.shy = Some(self.guests[guest].0);
        let flow = Flow { disk: self.guests[guest].0, queue: 0, direction: Direction::Read };
        self.arbiter.arrive(flow, 4096, at(self.now));
    }

    fn stop(&mut self, guest: usize) {
        self.guests[guest].1 = false;
    }

    /// Goes on until `end`: what each guest was served.
    fn run(&mut self, end: u64) -> Vec<u64> {
        let mut granted = Vec::new();
        self.guests.iter_mut().for_each(|guest| guest.2 = 0);
        loop {
            let next = self.arbiter.dispatch(at(self.now), &mut granted);
            for flow in granted.drain(..) {
                self.number += 1;
                self.busy.insert((self.now + self.service, self.number, flow.disk));
                let guest = self.guests.iter_mut().find(|guest| guest.0 == flow.disk).unwrap();
                guest.2 += 1;
                if guest.1 {
                    self.arbiter.arrive(flow, 4096, at(self.now));
                }
            }
            assert_eq!(self.arbiter.in_flight(), self.busy.len());
            let ends = self.busy.first().map(|(at, ..)| *at);
            let wakes = next.map(|next| next.as_nanos() as u64);
            let Some(then) = ends.into_iter().chain(wakes).min().filter(|then| *then < end) else { break };
            assert!(then >= self.now, "time does not go back");
            self.now = then;
            while self.busy.first().is_some_and(|(at, ..)| *at <= self.now) {
                let (.., disk) = self.busy.pop_first().unwrap();
                self.arbiter.finished(1);
                if self.shy == Some(disk) {
                    let flow = Flow { disk, queue: 0, direction: Direction::Read };
                    self.arbiter.arrive(flow, 4096, at(self.now));
                }
            }
        }
        self.now = end;
        self.guests.iter().map(|guest| guest.2).collect()
    }
}

/// Jain's index of what was served, divided by the weights: 1 is fair.
fn jain(served: &[u64], weights: &[u32]) -> f64 {
    let shares: Vec<f64> =
        served.iter().zip(weights).map(|(served, weight)| *served as f64 / f64::from(*weight)).collect();
    let (sum, squares): (f64, f64) = (shares.iter().sum(), shares.iter().map(|share| share * share).sum());
    sum * sum / (shares.len() as f64 * squares)
}

#[test]
fn what_the_host_can_do_is_shared_by_weight() {
    let weights = [100, 100, 200, 400];
    let mut host = Host::new(8, 800_000);
    let guests = weights.map(|w| host.guest(Arbiter::ROOT, &weight(w)));
    guests.iter().for_each(|guest| host.start(*guest));
    let served = host.run(5 * SECOND);
    assert!(served.iter().sum::<u64>() >= 49_900, "nothing is left lying: {served:?}");
    assert!(jain(&served, &weights) > 0.9999, "{served:?}");
    // Half of them have had enough: the others have all, in the same ratio.
    host.stop(guests[0]);
    host.stop(guests[3]);
    host.run(6 * SECOND);
    let served = host.run(11 * SECOND);
    assert_eq!((served[0], served[3]), (0, 0));
    assert!(
        jain(&[served[1], served[2]], &[100, 200]) > 0.9999 && served[1] + served[2] > 49_900,
        "{served:?}"
    );
    // One comes back, and neither catches up nor falls behind.
    host.start(guests[3]);
    let served = host.run(12 * SECOND);
    assert!(jain(&served[1..], &weights[1..]) > 0.9999, "{served:?}");
}

/// A guest that asks for what it gets in `period` in the second half of each: how much of that it was served, at once.
fn served_in_spells(settings: &Settings, period: u64) -> f64 {
    let mut host = Host::new(8, 800_000);
    let (late, other) = (host.guest(Arbiter::ROOT, settings), host.guest(Arbiter::ROOT, &weight(100)));
    host.start(other);
    let flow = Flow { disk: host.guests[late].0, queue: 0, direction: Direction::Read };
    let (share, mut served) = (period / 100_000 / 2, 0);
    for _ in 0..100 {
        host.run(host.now + period / 2);
        (0..share).for_each(|_| host.arbiter.arrive(flow, 4096, at(host.now)));
        served += host.run(host.now + period / 2)[late];
        host.arbiter.forget(flow.disk, flow.queue);
    }
    served as f64 / (share * 100) as f64
}

#[test]
fn who_is_late_for_a_moment_loses_nothing() {
    // 5000 requests a second are the half of what the host can do.
    for settings in [weight(100), reserving(5_000, 1)] {
        let (brief, long) =
            (served_in_spells(&settings, 8_000_000), served_in_spells(&settings, 400_000_000));
        assert!(brief > 0.9, "{settings:?}: {brief}");
        assert!((0.5..0.56).contains(&long), "{settings:?}: {long}");
    }
}

#[test]
fn a_reservation_is_met_while_others_flood() {
    for others in [3, 63] {
        let mut host = Host::new(32, 3_200_000);
        let reserved = host.guest(Arbiter::ROOT, &reserving(2_000, 1));
        let flooding: Vec<usize> = (0..others).map(|_| host.guest(Arbiter::ROOT, &weight(10_000))).collect();
        host.start(reserved);
        flooding.iter().for_each(|guest| host.start(*guest));
        for second in 1..6 {
            let served = host.run(second * SECOND);
            assert!((1_900..=2_100).contains(&served[reserved]), "{others}: {served:?}");
            assert!(jain(&served[1..], &vec![1; others]) > 0.99, "{others}: {served:?}");
            assert!(served.iter().sum::<u64>() >= 9_900);
        }
    }
}

#[test]
fn a_reservation_starves_nobody_who_comes_later_or_wants_little() {
    for weight_of_reserved in [1, 100] {
        let mut host = Host::new(3, 1_000_000);
        let reserved = host.guest(Arbiter::ROOT, &reserving(2_000, weight_of_reserved));
        let (flooding, late) =
            (host.guest(Arbiter::ROOT, &weight(100)), host.guest(Arbiter::ROOT, &weight(100)));
        let shy = host.guest(Arbiter::ROOT, &weight(100));
        host.start(reserved);
        host.start(flooding);
        host.run(600 * SECOND);
        host.start(late);
        host.start_shy(shy);
        let served = host.run(604 * SECOND);
        assert!(served[reserved] >= 7_900, "{served:?}");
        let both = served[flooding] + served[late];
        assert!(served[late] * 100 >= both * 48 && served[late] * 100 <= both * 52, "{served:?}");
        // Its next request comes when its last one has ended, and then it is next.
        assert!(served[shy] >= served[late] * 9 / 10, "{served:?}");
    }
}

#[test]
fn who_waited_for_a_limit_of_the_group_has_nothing_to_catch_up() {
    let mut arbiter = Arbiter::new(None, at(0));
    let limits = Limits { iops_write: Some(Rate { per_second: 10, burst: None }), ..Limits::default() };
    let group = arbiter.add_group(Arbiter::ROOT, &Settings { limits, ..Settings::default() }, at(0));
    let disks: Vec<NodeId> = (0..3).map(|_| arbiter.add_disk(group, &Settings::default(), at(0))).collect();
    let (write, read) = (Direction::Write, Direction::Read);
    let arrive = |arbiter: &mut Arbiter, disk: usize, direction, now| {
        arbiter.arrive(Flow { disk: disks[disk], queue: 0, direction }, 4096, at(now));
    };
    // One writes, as far as it may; another reads a lot.
    (0..200).for_each(|_| arrive(&mut arbiter, 0, write, 0));
    let mut granted = Vec::new();
    for now in (0..5 * SECOND).step_by(1_000_000) {
        arrive(&mut arbiter, 1, read, now);
        arbiter.dispatch(at(now), &mut granted);
    }
    let reads = granted.iter().filter(|flow| flow.direction == read).count();
    assert_eq!(reads, 5_000, "no read has waited");
    // A third one writes: half of what may be written is its.
    (0..200).for_each(|_| arrive(&mut arbiter, 2, write, 5 * SECOND));
    granted.clear();
    for now in (5 * SECOND..15 * SECOND).step_by(1_000_000) {
        arrive(&mut arbiter, 1, read, now);
        arbiter.dispatch(at(now), &mut granted);
    }
    let writes = |disk: usize| {
        granted.iter().filter(|flow| flow.disk == disks[disk] && flow.direction == write).count()
    };
    assert!((48..=52).contains(&writes(0)) && (48..=52).contains(&writes(2)), "{} {}", writes(0), writes(2));
}

#[test]
fn groups_share_by_their_own_weights_and_limits() {
    let mut host = Host::new(8, 800_000);
    let heavy = host.arbiter.add_group(Arbiter::ROOT, &weight(300), at(0));
    let inner = host.arbiter.add_group(heavy, &weight(100), at(0));
    let lone = host.guest(Arbiter::ROOT, &weight(100));
    let direct = host.guest(heavy, &weight(100));
    let nested = [host.guest(inner, &weight(100)), host.guest(inner, &weight(300))];
    [lone, direct, nested[0], nested[1]].iter().for_each(|guest| host.start(*guest));
    let served = host.run(4 * SECOND);
    assert!(jain(&served, &[800, 1_200, 300, 900]) > 0.9999, "{served:?}");
    // A limit of the group: the rest goes to whoever is left.
    host.arbiter.change(heavy, &Settings { weight: 300, ..limited(1_000) }, at(host.now));
    let served = host.run(8 * SECOND);
    let inside: u64 = served[1..].iter().sum();
    assert!((3_980..=4_030).contains(&inside), "{served:?}");
    assert!(jain(&served[1..], &[400, 100, 300]) > 0.999, "{served:?}");
    assert!(served[0] >= 35_900, "{served:?}");
}

#[test]
fn a_limit_of_writes_holds_back_no_read() {
    let mut arbiter = Arbiter::new(None, at(0));
    let limits = Limits { iops_write: Some(Rate { per_second: 10, burst: None }), ..Limits::default() };
    let disk = arbiter.add_disk(Arbiter::ROOT, &Settings { limits, ..Settings::default() }, at(0));
    let flow = |direction| Flow { disk, queue: 0, direction };
    for _ in 0..5 {
        arbiter.arrive(flow(Direction::Write), 4096, at(0));
    }
    let mut granted = Vec::new();
    assert_eq!(arbiter.dispatch(at(0), &mut granted), Some(at(90_000_000)));
    assert_eq!(std::mem::take(&mut granted), [flow(Direction::Write)]);
    arbiter.arrive(flow(Direction::Read), 4096, at(5));
    assert_eq!(arbiter.dispatch(at(5), &mut granted), Some(at(90_000_000)));
    assert_eq!(std::mem::take(&mut granted), [flow(Direction::Read)]);
    assert_eq!(arbiter.dispatch(at(90_000_000), &mut granted), Some(at(190_000_000)));
    assert_eq!(std::mem::take(&mut granted), [flow(Direction::Write)]);
}

#[test]
fn flows_of_a_disk_take_turns_and_keep_their_order() {
    let mut arbiter = Arbiter::new(Some(1), at(0));
    let disk = arbiter.add_disk(Arbiter::ROOT, &Settings::default(), at(0));
    let flows = [(0, Direction::Read), (1, Direction::Read), (0, Direction::Write)];
    let flows = flows.map(|(queue, direction)| Flow { disk, queue, direction });
    (0..3).for_each(|_| arbiter.arrive(flows[0], 512, at(0)));
    (0..2).for_each(|_| arbiter.arrive(flows[1], 512, at(0)));
    arbiter.arrive(flows[2], 512, at(0));
    let mut granted = Vec::new();
    for _ in 0..6 {
        assert_eq!(arbiter.dispatch(at(0), &mut granted), None);
        arbiter.finished(1);
    }
    assert_eq!(granted, [0, 1, 2, 0, 1, 0].map(|flow| flows[flow]));
    assert_eq!((arbiter.dispatch(at(0), &mut granted), granted.len(), arbiter.in_flight()), (None, 6, 0));
}

/// Lets only time go on, and requests end, until nothing is left.
fn finish(arbiter: &mut Arbiter, mut now: u64, mut under_way: usize, waiting: &mut HashMap<NodeId, i64>) {
    for step in 0.. {
        assert!(step < 100_000, "{waiting:?}");
        arbiter.finished(under_way);
        let mut granted = Vec::new();
        let next = arbiter.dispatch(at(now), &mut granted);
        under_way = granted.len();
        granted.iter().for_each(|flow| *waiting.get_mut(&flow.disk).unwrap() -= 1);
        match next {
            Some(next) => {
                assert!(next > at(now), "it waits for what has been");
                now = next.as_nanos() as u64;
            }
            None if under_way == 0 => break,
            None => {}
        }
    }
}

/// Anything that may happen, in any order: no request is lost or granted twice, nothing waits while it need not, and time alone
/// brings everything to its end.
#[test]
fn any_history_ends_with_every_request_granted_once() {
    for seed in 0..400_u64 {
        let mut state = seed;
        let mut now = 0;
        let mut arbiter = Arbiter::new((!seed.is_multiple_of(3)).then_some(4), at(0));
        let any = |state: &mut u64| {
            let n = random(state);
            let mut settings =
                if n.is_multiple_of(2) { limited(1 + n % 5_000) } else { weight(1 + (n % 300) as u32) };
            settings.reserve_iops = n.is_multiple_of(5).then_some(n % 2_000);
            settings
        };
        let mut groups = vec![Arbiter::ROOT];
        let mut disks = Vec::new();
        let (mut waiting, mut under_way) = (HashMap::new(), 0_usize);
        for _ in 0..300 {
            let n = random(&mut state);
            let parent = groups[(n >> 8) as usize % groups.len()];
            match n % 16 {
                0 if groups.len() < 5 => groups.push(arbiter.add_group(parent, &any(&mut state), at(now))),
                1 if disks.len() < 9 => disks.push(arbiter.add_disk(parent, &any(&mut state), at(now))),
                2 => arbiter.change(parent, &any(&mut state), at(now)),
                3 if !disks.is_empty() => {
                    arbiter.change(disks[(n >> 16) as usize % disks.len()], &any(&mut state), at(now));
                }
                4..=9 if !disks.is_empty() => {
                    let disk = disks[(n >> 16) as usize % disks.len()];
                    let direction = if n & 1024 == 0 { Direction::Read } else { Direction::Write };
                    arbiter.arrive(
                        Flow { disk, queue: (n >> 32) as u16 % 3, direction },
                        n % 100_000,
                        at(now),
                    );
                    *waiting.entry(disk).or_insert(0_i64) += 1;
                }
                10 | 11 => {
                    let count = under_way.min((n >> 8) as usize % 5);
                    arbiter.finished(count);
                    under_way -= count;
                }
                12 if disks.len() > 2 => {
                    let disk = disks.swap_remove((n >> 16) as usize % disks.len());
                    arbiter.remove(disk);
                    waiting.remove(&disk);
                }
                _ => now += n % 3_000_000,
            }
            let mut granted = Vec::new();
            arbiter.dispatch(at(now), &mut granted);
            under_way += granted.len();
            granted.iter().for_each(|flow| *waiting.get_mut(&flow.disk).unwrap() -= 1);
            assert!(waiting.values().all(|count| *count >= 0), "seed {seed}");
        }
        finish(&mut arbiter, now, under_way, &mut waiting);
        assert!(waiting.values().all(|count| *count == 0), "seed {seed}: {waiting:?}");
    }
}
