//! Rings made by hand, as a driver makes them and as none should.

use super::*;
use crate::guest::{Place, Region};

const SIZE: u16 = 8;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A queue and the driver's side of it.
struct Driver {
    map: GuestMap,
    ring: Ring,
}

impl Driver {
    /// Rings whose indices both stand at `base`.
    fn new(base: u16, event_idx: bool) -> Self {
        let mut map = GuestMap::default();
        let place = Place { guest: 0, user: 0, len: 0x3000 };
        map.add(Region::new(place, SharedBuf::heap(0x3000)).unwrap()).unwrap();
        map.write(AVAILABLE + 2, &base.to_le_bytes()).unwrap();
        map.write(USED + 2, &base.to_le_bytes()).unwrap();
        let addresses = RingAddresses { descriptors: 0, available: AVAILABLE, used: USED };
        let ring = Ring::new(&map, addresses, SIZE.into(), base, event_idx).unwrap();
        Self { map, ring }
    }

    fn put(&self, address: u64, value: u16) {
        self.map.write(address, &value.to_le_bytes()).unwrap();
    }

    fn get(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.map.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn offer(&self, index: u16, head: u16) {
        self.put(AVAILABLE + 4 + u64::from(index % SIZE) * 2, head);
        self.put(AVAILABLE + 2, index.wrapping_add(1));
    }

    fn set_used_event(&self, index: u16) {
        self.put(AVAILABLE + 4 + u64::from(SIZE) * 2, index);
    }

    fn available_event(&self) -> u16 {
        self.get(USED + 4 + u64::from(SIZE) * 8)
    }
}

#[test]
fn indices_wrap() {
    let mut driver = Driver::new(65533, true);
    for turn in 0..20u16 {
        let index = 65533u16.wrapping_add(turn);
        assert_eq!(driver.ring.pop().unwrap(), None);
        assert!(!driver.ring.enable_kicks().unwrap());
        assert_eq!(driver.available_event(), index, "a kick is wanted for the next request");
        driver.offer(index, turn % SIZE);
        assert!(driver.ring.enable_kicks().unwrap(), "looking again finds it");
        assert_eq!(driver.ring.pop().unwrap(), Some(turn % SIZE));
        driver.set_used_event(index);
        driver.ring.push(turn % SIZE, 1);
        assert!(driver.ring.publish(), "the event index was passed");
        assert_eq!(driver.get(USED + 2), index.wrapping_add(1));
        assert!(!driver.ring.publish(), "nothing new");
    }
    assert_eq!(driver.ring.next_available(), 65533u16.wrapping_add(20));
}

#[test]
fn notification_follows_the_event_index() {
    let event = |event, new, old| wants_event(Wrapping(event), Wrapping(new), Wrapping(old));
    assert!(event(5, 6, 5));
    assert!(!event(6, 6, 5), "not there yet");
    assert!(event(5, 8, 5));
    assert!(event(7, 8, 5));
    assert!(!event(4, 8, 5), "passed before");
    assert!(event(65535, 0, 65535), "across the wrap");
    assert!(event(65535, 3, 65530));
    assert!(!event(3, 3, 65530));
}

#[test]
fn flags_rule_without_event_index() {
    let mut driver = Driver::new(0, false);
    driver.ring.disable_kicks();
    assert_eq!(driver.get(USED), 1);
    driver.ring.enable_kicks().unwrap();
    assert_eq!(driver.get(USED), 0);
    driver.ring.push(0, 0);
    assert!(driver.ring.publish());
    driver.put(AVAILABLE, 1);
    driver.ring.push(1, 0);
    assert!(!driver.ring.publish());
}

#[test]
fn a_full_ring_is_legal_and_one_more_is_not() {
    let mut driver = Driver::new(65530, true);
    driver.put(AVAILABLE + 2, 65530u16.wrapping_add(SIZE));
    assert!(driver.ring.enable_kicks().unwrap());
    driver.put(AVAILABLE + 2, 65530u16.wrapping_add(SIZE + 1));
    let jump = RingError::Jump { from: 65530, to: 65530u16.wrapping_add(SIZE + 1), size: SIZE };
    assert_eq!(driver.ring.pop(), Err(jump));
    assert_eq!(driver.ring.enable_kicks(), Err(jump));
    driver.put(AVAILABLE + 2, 65529);
    assert!(driver.ring.pop().is_err(), "backwards");
}

#[test]
fn bad_queues_are_refused() {
    let map = Driver::new(0, true).map;
    let good = RingAddresses { descriptors: 0, available: AVAILABLE, used: USED };
    let make = |addresses, size| Ring::new(&map, addresses, size, 0, true).map(|_| ()).unwrap_err();
    for size in [0, 3, 32769, 65536, u32::MAX] {
        assert_eq!(make(good, size), RingError::Size(size));
    }
    assert!(matches!(make(good, 1024), RingError::Address("descriptor table", _)));
    for (part, bad) in [
        ("descriptor table", RingAddresses { descriptors: 8, ..good }),
        ("descriptor table", RingAddresses { descriptors: u64::MAX - 15, ..good }),
        ("available ring", RingAddresses { available: 0x2ffe, ..good }),
        ("available ring", RingAddresses { available: 0x1001, ..good }),
        ("used ring", RingAddresses { used: 0x2002, ..good }),
        ("used ring", RingAddresses { used: 0x3000, ..good }),
    ] {
        let error = make(bad, SIZE.into());
        assert!(matches!(error, RingError::Address(name, _) if name == part), "{part}: {error}");
    }
}
