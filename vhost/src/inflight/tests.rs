//! A device that dies after any store, and a driver that goes on meanwhile.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::{offset_of, size_of};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use vhost::vhost_user::message::{DescStateSplit, QueueRegionSplit};

use super::crash::{Cut, with_hook};
use super::*;
use crate::guest::{GuestMap, Place, Region};
use crate::queue::{Ring, RingAddresses};

const SIZE: u16 = 4;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Bytes of the used ring: the window that is not the region.
const USED_BYTES: usize = 4 + 8 * SIZE as usize + 2;

/// Small, and good enough to choose the next step.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    NoMark,
    NoCounter,
    NoNext,
    NoLastBatch,
    NoUsedIndex,
    NeverUnmarked,
    UnmarkedWhenPushed,
    UsedIndexFirst,
}

/// Memory, and the driver's view of it.
struct World {
    map: GuestMap,
    region: QueueRegion,
    mutation: Option<Mutation>,
    rng: Rng,
    available: u16,
    seen: u16,
    serial: u64,
    /// Requests that the device has: serial numbers by head.
    owned: BTreeMap<u16, u64>,
    performed: BTreeSet<u64>,
    completed: u64,
}

/// A life of the device: requests taken and not pushed, and the serial of the last one taken.
struct Life {
    ring: Ring,
    taken: Vec<u16>,
    last: Option<u64>,
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut map = GuestMap::default();
        let place = Place { guest: 0, user: 0, len: 0x1000 };
        map.add(Region::new(place, SharedBuf::heap(0x1000)).unwrap()).unwrap();
        Self {
            map,
            region: QueueRegion::heap(SIZE),
            mutation,
            rng: Rng(seed),
            available: 0,
            seen: 0,
            serial: 0,
            owned: BTreeMap::new(),
            performed: BTreeSet::new(),
            completed: 0,
        }
    }

    fn get(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.map.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn offer(&mut self) {
        let free: Vec<u16> = (0..SIZE).filter(|head| !self.owned.contains_key(head)).collect();
        if free.is_empty() {
            return;
        }
        let head = free[self.rng.below(free.len())];
        self.owned.insert(head, self.serial);
        self.serial += 1;
        let slot = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.map.write(slot, &head.to_le_bytes()).unwrap();
        self.available = self.available.wrapping_add(1);
        self.map.write(AVAILABLE + 2, &self.available.to_le_bytes()).unwrap();
    }

    /// The driver looks at what is done.
    fn collect(&mut self) -> Result<(), String> {
        while self.seen != self.get(USED + 2) {
            let head = self.get(USED + 4 + u64::from(self.seen % SIZE) * 8);
            self.seen = self.seen.wrapping_add(1);
            let serial = self.owned.remove(&head).ok_or(format!("head {head} is done twice"))?;
            if !self.performed.contains(&serial) {
                return Err(format!("request {serial} is done and was not performed"));
            }
            self.completed += 1;
        }
        Ok(())
    }

    fn driver_step(&mut self) -> Result<(), String> {
        if self.rng.below(2) == 0 {
            self.offer();
            return Ok(());
        }
        self.collect()
    }

    /// The next life begins as QEMU has it: at the used index.
    fn begin(&self) -> Result<Life, String> {
        let addresses = RingAddresses { descriptors: 0, available: AVAILABLE, used: USED };
        let mut ring = Ring::new(&self.map, addresses, SIZE.into(), self.get(USED + 2), true).unwrap();
        ring.track(self.region.clone()).map_err(|error| error.to_string())?;
        Ok(Life { ring, taken: Vec::new(), last: None })
    }

    fn pop(&mut self, life: &mut Life) -> Result<(), String> {
        let Some(head) = life.ring.pop().map_err(|error| error.to_string())? else { return Ok(()) };
        let &serial = self.owned.get(&head).ok_or(format!("head {head} is not the device's"))?;
        if life.last.is_some_and(|last| last >= serial) {
            return Err(format!("request {serial} after {:?}", life.last));
        }
        life.last = Some(serial);
        life.taken.push(head);
        self.performed.insert(serial);
        Ok(())
    }

    fn device_step(&mut self, life: &mut Life) -> Result<(), String> {
        match self.rng.below(5) {
            0 | 1 => self.pop(life),
            2 | 3 if !life.taken.is_empty() => {
                let head = life.taken.swap_remove(self.rng.below(life.taken.len()));
                life.ring.push(head, 1);
                Ok(())
            }
            _ => {
                life.ring.publish();
                Ok(())
            }
        }
    }

    fn live(&mut self, steps: usize) -> Result<(), String> {
        let mut life = self.begin()?;
        for _ in 0..steps {
            if self.rng.below(3) == 0 {
                self.driver_step()?;
            } else {
                self.device_step(&mut life)?;
            }
        }
        Ok(())
    }

    /// A life that ends after `cut` stores. Whether it came to that.
    fn live_until(&mut self, steps: usize, cut: usize) -> Result<bool, String> {
        let stores = Rc::new(Cell::new(0));
        let (counter, mutation) = (Rc::clone(&stores), self.mutation);
        let region = self.region.window.clone();
        let hook = move |window: &SharedBuf, offset: usize| {
            if let Some(mutation) = mutation {
                mutate(mutation, &region, window, offset);
            }
            counter.set(counter.get() + 1);
            if counter.get() > cut {
                std::panic::resume_unwind(Box::new(Cut));
            }
        };
        let lived = with_hook(Box::new(hook), || self.live(steps));
        lived.transpose().map(|lived| lived.is_none())
    }

    /// The last life does what there is to do, and stops in order.
    fn finish(&mut self) -> Result<(), String> {
        let mut life = self.begin()?;
        for _ in 0..4 * SIZE {
            self.pop(&mut life)?;
            for head in life.taken.drain(..) {
                life.ring.push(head, 1);
            }
            life.ring.publish();
            self.collect()?;
        }
        if self.owned.is_empty() { Ok(()) } else { Err(format!("lost: {:?}", self.owned)) }
    }
}

/// Breaks a rule, after the store at `offset` of `window`.
fn mutate(mutation: Mutation, region: &SharedBuf, window: &SharedBuf, offset: usize) {
    let in_table = |field| offset >= HEADER_BYTES && offset % ENTRY_BYTES == field;
    if window.len() == USED_BYTES {
        if mutation == Mutation::UsedIndexFirst && offset == 2 {
            let mut index = [0; 2];
            window.read_at(2, &mut index);
            region.write_at(USED_INDEX_OFFSET, &index);
        }
        return;
    }
    match mutation {
        Mutation::NoMark if in_table(0) => region.write_at(offset, &[0]),
        Mutation::NeverUnmarked if in_table(0) => region.write_at(offset, &[1]),
        Mutation::NoCounter if in_table(ENTRY_COUNTER) => region.write_at(offset, &[0; 8]),
        Mutation::NoNext if in_table(ENTRY_NEXT) => region.write_at(offset, &[0; 2]),
        Mutation::UnmarkedWhenPushed if offset == LAST_BATCH_OFFSET => {
            let mut head = [0; 2];
            region.read_at(offset, &mut head);
            region.write_at(Tracker::entry(u16::from_le_bytes(head)), &[0]);
        }
        Mutation::NoLastBatch if offset == LAST_BATCH_OFFSET => region.write_at(offset, &[0; 2]),
        Mutation::NoUsedIndex if offset == USED_INDEX_OFFSET => region.write_at(offset, &[0; 2]),
        _ => {}
    }
}

/// Cuts a run after every store, and its successor after every store of its beginning. Gives the
/// number of runs.
fn every_cut(seed: u64, mutation: Option<Mutation>) -> Result<u64, String> {
    let mut runs = 0;
    for first in 0.. {
        for second in 0..24 {
            let mut world = World::new(seed, mutation);
            let context = |error| format!("seed {seed}, cuts {first} and {second}: {error}");
            let mut cut = false;
            for at in [first, second] {
                cut = world.live_until(80, at).map_err(context)?;
                // The driver goes on while no device is there.
                for _ in 0..3 {
                    world.driver_step().map_err(context)?;
                }
                if !cut && at == first {
                    return Ok(runs);
                }
            }
            world.finish().map_err(context)?;
            runs += 1;
            if !cut {
                break;
            }
        }
    }
    unreachable!("a run has an end")
}

#[test]
fn whatever_store_is_the_last_every_request_is_done_once() {
    let runs: u64 = (0..12).map(|seed| every_cut(seed, None).unwrap()).sum();
    println!("{runs} runs");
    assert!(runs > 10_000, "{runs} runs only");
}

#[test]
fn a_broken_rule_is_noticed() {
    for mutation in [
        Mutation::NoMark,
        Mutation::NoCounter,
        Mutation::NoNext,
        Mutation::NoLastBatch,
        Mutation::NoUsedIndex,
        Mutation::NeverUnmarked,
        Mutation::UnmarkedWhenPushed,
        Mutation::UsedIndexFirst,
    ] {
        let noticed = (0..12).find_map(|seed| every_cut(seed, Some(mutation)).err());
        println!("{mutation:?}: {}", noticed.as_deref().unwrap_or("not noticed"));
        assert!(noticed.is_some(), "{mutation:?} is not noticed");
    }
}

#[test]
fn many_lives_wrap_the_indices() {
    let mut world = World::new(99, None);
    for life in 0..6000 {
        let cut = world.rng.below(60);
        world.live_until(80, cut).unwrap();
        world.driver_step().unwrap();
        if life % 100 == 0 {
            world.finish().unwrap();
        }
    }
    for _ in 0..60_000 {
        world.offer();
        world.collect().unwrap();
        let mut life = world.begin().unwrap();
        world.pop(&mut life).unwrap();
        life.taken.drain(..).for_each(|head| life.ring.push(head, 1));
        life.ring.publish();
    }
    world.finish().unwrap();
    assert!(world.completed > 65_536, "{}", world.completed);
}

#[test]
fn the_region_is_that_of_the_specification() {
    assert_eq!(HEADER_BYTES, offset_of!(QueueRegionSplit, desc));
    assert_eq!(VERSION_OFFSET, offset_of!(QueueRegionSplit, version));
    assert_eq!(DESCRIPTORS_OFFSET, offset_of!(QueueRegionSplit, desc_num));
    assert_eq!(LAST_BATCH_OFFSET, offset_of!(QueueRegionSplit, last_batch_head));
    assert_eq!(USED_INDEX_OFFSET, offset_of!(QueueRegionSplit, used_idx));
    assert_eq!(ENTRY_BYTES, size_of::<DescStateSplit>());
    assert_eq!(ENTRY_NEXT, offset_of!(DescStateSplit, next));
    assert_eq!(ENTRY_COUNTER, offset_of!(DescStateSplit, counter));
}

/// A region in use, in which `heads` are marked in this order.
fn region_with(heads: &[u16]) -> QueueRegion {
    let region = QueueRegion::heap(8);
    let (mut tracker, left) = Tracker::new(region.clone(), 8, 7).unwrap();
    assert_eq!(left, Left::default());
    heads.iter().for_each(|head| tracker.take(*head));
    region
}

#[test]
fn what_makes_no_sense_is_refused() {
    let put = |offset, value: u16| {
        let region = region_with(&[3, 1]);
        region.window.write_at(offset, &value.to_le_bytes());
        region
    };
    let recover = |region, used| Tracker::new(region, 8, used).map(|(_, left)| left.again);
    assert_eq!(recover(region_with(&[3, 1]), 7).unwrap(), [3, 1]);
    assert!(matches!(recover(put(VERSION_OFFSET, 2), 7), Err(InflightError::Version(2))));
    assert!(matches!(recover(put(DESCRIPTORS_OFFSET, 4), 7), Err(InflightError::Descriptors { .. })));
    assert!(matches!(recover(put(LAST_BATCH_OFFSET, 8), 8), Err(InflightError::LastBatch(8))));
    assert!(matches!(
        recover(region_with(&[3, 1]), 16),
        Err(InflightError::UsedIndex { region: 7, ring: 16 })
    ));
    assert!(matches!(recover(region_with(&[3, 1]), 6), Err(InflightError::UsedIndex { .. })));
    assert!(recover(region_with(&[]), 0).unwrap().is_empty(), "a ring that was set up anew");
    let larger = Tracker::new(QueueRegion::heap(8), 16, 0).unwrap_err();
    assert!(matches!(larger, InflightError::Descriptors { region: 8, ring: 16 }));
}

#[test]
fn any_bytes_do_no_harm() {
    let mut rng = Rng(1);
    let mut taken_over = 0;
    for _ in 0..50_000 {
        let mut bytes: Vec<u8> = (0..region_bytes(8)).map(|_| rng.below(4) as u8).collect();
        bytes[VERSION_OFFSET..LAST_BATCH_OFFSET].copy_from_slice(&[1, 0, 8, 0]);
        let region = QueueRegion::heap(8);
        region.window.write_at(0, &bytes);
        let Ok((mut tracker, left)) = Tracker::new(region, 8, rng.below(1000) as u16) else { continue };
        taken_over += 1;
        assert!(left.again.len() <= 8 && left.again.iter().all(|head| *head < 8));
        tracker.take(0);
        tracker.push(0);
        tracker.published(1);
    }
    assert!(taken_over > 100, "{taken_over}");
}

#[test]
fn files_and_messages_are_checked() {
    let (made, message, file) = Inflight::create(2, 128, 2).unwrap();
    assert_eq!(message.mmap_size, 2 * 2112);
    assert!(file.set_len(0).is_err(), "sealed");
    let first = made.queue(0).unwrap();
    first.window.write_at(0, b"here");
    let again = Inflight::map(&message, &file, 2).unwrap();
    let mut seen = [0; 4];
    again.queue(0).unwrap().window.read_at(0, &mut seen);
    assert_eq!(&seen, b"here");
    again.queue(1).unwrap().window.read_at(0, &mut seen);
    assert_eq!(&seen, &[0; 4], "each queue has its own");
    assert!(again.queue(2).is_none());

    for (queues, size) in [(0, 128), (3, 128), (1, 0), (1, 32769)] {
        assert!(matches!(Inflight::create(queues, size, 2), Err(InflightError::Shape { .. })));
        let bad = VhostUserInflight::new(message.mmap_size, 0, queues, size);
        assert!(matches!(Inflight::map(&bad, &file, 2), Err(InflightError::Shape { .. })));
    }
    let with =
        |len, offset| Inflight::map(&VhostUserInflight::new(len, offset, 2, 128), &file, 2).unwrap_err();
    assert!(matches!(with(2 * 2112 - 1, 0), InflightError::Memory { .. }));
    assert!(matches!(with(2 * 2112, 8), InflightError::Memory { .. }));
    assert!(matches!(with(2 * 2112, 64), InflightError::Map(RegionError::FileTooShort { .. })));
    assert!(matches!(with(2 * 2112, u64::MAX - 63), InflightError::Map(RegionError::Range { .. })));
    let socket = File::from(OwnedFd::from(UnixStream::pair().unwrap().0));
    assert!(matches!(Inflight::map(&message, &socket, 2), Err(InflightError::Memory { .. })));
}
