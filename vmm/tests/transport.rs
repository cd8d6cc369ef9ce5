//! The registers of a virtio device: the states that a driver leads it through, and whatever else a guest may do to
//! them. The device is the one that gives random numbers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use support::driver::{CONFIG_INTERRUPT, DATA, Driver, QUEUE_SIZE, STATUS_OK, VERSION_1};
use support::{HIGH, LOW_BYTES, Machine, Random};

const SLOT: u32 = 1;
const EVENT_IDX: u64 = 1 << 29;

fn machine() -> Machine {
    Machine::new(&[], 1).unwrap()
}

/// Asks for random bytes and looks whether they come, with an interrupt.
#[track_caller]
fn works(driver: &mut Driver) {
    driver.machine.kvm.interrupts();
    driver.put(DATA, &[0; 64]);
    driver.descriptor(0, 3, DATA, 64, 2, 0);
    driver.offer(0, 3);
    driver.kick(0);
    assert_eq!(driver.wait(0), (3, 64));
    assert_ne!(driver.get(DATA, 64), [0; 64], "64 zeroes are not random");
    support::eventually("an interrupt", || driver.machine.kvm.interrupts().contains(&(CONFIG_INTERRUPT + 1)));
}

#[test]
fn identity_and_capabilities() {
    let machine = machine();
    assert_eq!(machine.config_read(SLOT, 0), 0x1044_1af4);
    assert_eq!(machine.config_read(SLOT, 8) & 0xff, 1, "the revision of a modern device");
    let driver = Driver::find(&machine, SLOT);
    for place in [driver.common, driver.notify, driver.isr, driver.config, driver.table, driver.pending] {
        assert!((driver.bar()..driver.bar() + 0x8000).contains(&place), "{place:#x}");
    }
    assert_ne!(driver.access, 0);
    assert_eq!(driver.queue_count(), 1);
    assert_eq!(driver.offered() & VERSION_1, VERSION_1);
    assert_eq!(driver.read16(driver.common + 0x18), 64, "entries at most");
}

#[test]
fn a_driver_leads_the_device_to_work_and_back() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        driver.start(features);
        works(&mut driver);
        works(&mut driver);
        driver.reset();
        assert_eq!(driver.read16(driver.common + 0x1c), 0, "the queue is not enabled any more");
        assert_eq!(driver.read16(driver.common + 0x1a), 0xffff, "and has no interrupt");
    }
    assert_eq!(machine.devices.notified(), 0, "notifications have a way of their own");
}

#[test]
fn features_are_agreed_on_or_not() {
    let machine = machine();
    let driver = Driver::find(&machine, SLOT);
    for (features, good) in [
        (0, false),
        (EVENT_IDX, false),
        (VERSION_1 | 1 << 40, false),
        (VERSION_1 | 1, false),
        (VERSION_1, true),
    ] {
        driver.reset();
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(0xb);
        assert_eq!(driver.status() == 0xb, good, "{features:#x}");
        driver.set_status(STATUS_OK);
        assert_eq!(driver.status() & 4 != 0, good, "DRIVER_OK with {features:#x}");
    }
    driver.accept(VERSION_1 | EVENT_IDX);
    driver.write32(driver.common + 8, 0);
    assert_eq!(driver.read32(driver.common + 12), 0, "they do not change after that");
}

#[test]
fn status_bits_are_only_added() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(VERSION_1);
    driver.set_status(1);
    assert_eq!(driver.status(), STATUS_OK);
    driver.set_status(64);
    assert_eq!(driver.status(), STATUS_OK, "DEVICE_NEEDS_RESET is not the driver's");
    works(&mut driver);
}

#[test]
fn queues_lie_in_memory_and_aligned_or_are_not_enabled() {
    let machine = machine();
    let driver = Driver::find(&machine, SLOT);
    let enabled = |descriptors: u64, available: u64, used: u64, size: u16| {
        driver.reset();
        driver.set_status(3);
        driver.accept(VERSION_1);
        driver.set_status(0xb);
        driver.write16(driver.common + 0x18, size);
        for (register, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            machine.write(driver.common + register, &address.to_le_bytes());
        }
        driver.write16(driver.common + 0x1c, 1);
        driver.read16(driver.common + 0x1c) == 1
    };
    assert!(enabled(0x1000, 0x2000, 0x3000, 16));
    assert!(enabled(HIGH, HIGH + 0x1002, HIGH + 0x2004, 16));
    assert!(enabled(LOW_BYTES - 256, 0x2000, 0x3000, 16), "to the last byte");
    assert!(!enabled(LOW_BYTES - 240, 0x2000, 0x3000, 16), "beyond the last byte");
    assert!(!enabled(0x1008, 0x2000, 0x3000, 16), "descriptors not aligned");
    assert!(!enabled(0x1000, 0x2001, 0x3000, 16), "available not aligned");
    assert!(!enabled(0x1000, 0x2000, 0x3002, 16), "used not aligned");
    assert!(!enabled(0x1000, LOW_BYTES, 0x3000, 16), "between the regions");
    assert!(!enabled(0x1000, 0x2000, u64::MAX - 3, 16), "at the end of all addresses");
    // Sizes that cannot be leave the size before.
    enabled(0x1000, 0x2000, 0x3000, 16);
    for size in [0, 3, 128, 0x8000, 0xffff] {
        assert!(enabled(0x1000, 0x2000, 0x3000, size));
        assert_eq!(driver.read16(driver.common + 0x18), 64, "{size}");
    }
    driver.write16(driver.common + 0x16, 1);
    assert_eq!(driver.read16(driver.common + 0x18), 0, "there is no second queue");
}

#[test]
fn masked_interrupts_wait() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(VERSION_1);
    driver.mask(1, true);
    driver.descriptor(0, 0, DATA, 8, 2, 0);
    driver.offer(0, 0);
    driver.kick(0);
    driver.wait(0);
    support::eventually("it is pending", || driver.read8(driver.pending) == 2);
    assert!(machine.kvm.interrupts().is_empty());
    driver.mask(1, false);
    assert_eq!(driver.read8(driver.pending), 0);
    assert_eq!(machine.kvm.interrupts(), [CONFIG_INTERRUPT + 1]);
}

#[test]
fn a_bar_that_moves_takes_its_notifications_along() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(VERSION_1);
    let old = driver.notify;
    machine.config_write(SLOT, 4, 0);
    assert!(machine.kvm.ioeventfds.lock().unwrap().is_empty(), "memory is off");
    machine.config_write(SLOT, 0x10, 0xd000_0000);
    machine.config_write(SLOT, 4, 2);
    let mut driver_there = Driver::find(&machine, SLOT);
    assert_eq!(driver_there.bar(), 0xd000_0000);
    assert_eq!(
        machine.kvm.ioeventfds.lock().unwrap().keys().copied().collect::<Vec<_>>(),
        [driver_there.notify]
    );
    assert_ne!(driver_there.notify, old);
    driver_there.start(VERSION_1);
    works(&mut driver_there);
    assert_eq!(driver.read8(driver.common + 0x14), 0xff, "nothing is at the old place");
}

#[test]
fn registers_are_reached_by_the_configuration_space() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(VERSION_1);
    let access = driver.access;
    let bar = |offset: u64, len: u32| {
        machine.config_write(SLOT, access + 4, 0);
        machine.config_write(SLOT, access + 8, offset as u32);
        machine.config_write(SLOT, access + 12, len);
    };
    bar(0x14, 1);
    assert_eq!(machine.config_read(SLOT, access + 16), u32::from(STATUS_OK));
    bar(0x12, 2);
    assert_eq!(machine.config_read(SLOT, access + 16), 1);
    bar(0x12, 4);
    let before = machine.config_read(SLOT, access + 16);
    assert_eq!(before, 1, "an access that is not aligned reads nothing new");
    // A notification by this way works too, and is counted.
    bar(driver.notify - driver.bar(), 4);
    driver.descriptor(0, 0, DATA, 8, 2, 0);
    driver.offer(0, 0);
    machine.config_write(SLOT, access + 16, 0);
    driver.wait(0);
    assert_eq!(machine.devices.notified(), 1);
}

#[test]
fn long_and_hostile_chains_of_the_random_number_device() {
    let machine = machine();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(VERSION_1);
    works(&mut driver);
    // More than one request gets; memory that is not there; a loop; a buffer to read; a head beyond the table.
    driver.descriptor(0, 0, DATA, 100_000, 2, 0);
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.wait(0), (0, 4096));
    driver.descriptor(0, 1, HIGH - 8, 16, 2, 0);
    driver.descriptor(0, 2, DATA, u32::MAX, 3, 2);
    driver.descriptor(0, 4, DATA, 64, 0, 0);
    driver.descriptor(0, 5, DATA, 64, 4, 0);
    for head in [1, 2, 4, 5] {
        driver.offer(0, head);
        driver.kick(0);
        let (answered, len) = driver.wait(0);
        assert_eq!(answered, u32::from(head));
        assert!(len <= 4096);
    }
    works(&mut driver);
    // An index that cannot be breaks the device until it is reset.
    driver.set_available(0, QUEUE_SIZE * 100);
    driver.kick(0);
    support::eventually("it needs a reset", || driver.status() == STATUS_OK | 64);
    support::eventually("the interrupt", || machine.kvm.interrupts().contains(&CONFIG_INTERRUPT));
    assert_eq!(driver.read8(driver.isr), 2);
    assert_eq!(driver.read8(driver.isr), 0, "reading clears it");
    driver.start(VERSION_1);
    works(&mut driver);
    // So does a head beyond the table, of which the used ring cannot even tell.
    driver.offer(0, 0xffff);
    driver.kick(0);
    support::eventually("it needs a reset", || driver.status() == STATUS_OK | 64);
    driver.start(VERSION_1);
    works(&mut driver);
}

/// Anything, anywhere, in any width: nothing panics, memory outside the queues is left alone, and a driver that
/// comes then finds a device that works.
#[test]
fn random_accesses_are_harmless() {
    for seed in 1..=40 {
        let machine = machine();
        let mut driver = Driver::find(&machine, SLOT);
        let mut random = Random(seed * 0x9e37_79b9);
        driver.start(VERSION_1);
        driver.disturb(&mut random, 3000);
        driver.start(VERSION_1);
        works(&mut driver);
    }
}
