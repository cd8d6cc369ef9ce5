//! Disks: Sapwood's own backend over a raw file, driven through the registers and queues of the virtio device.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use sapwood_blockdev::engine::UringEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_vhost::features::protocol_offered;
use sapwood_vmm::Disk;
use sapwood_vmm::virtio::Error;
use support::driver::{CONFIG_INTERRUPT, Driver, STATUS_OK, VERSION_1};
use support::server::{self, Process};
use support::{Machine, Random, eventually};
use vhost::vhost_user::VhostUserProtocolFeatures;

const SIZE: u64 = 4 << 20;
const SLOT: u32 = 1;

const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const EVENT_IDX: u64 = 1 << 29;
const FEATURES: u64 = VERSION_1 | FLUSH | CONFIG_WCE | EVENT_IDX;

const READ: u32 = 0;
const WRITE: u32 = 1;

/// Not a test by itself: the backend's process.
#[test]
fn server_process() {
    server::be_a_server();
}

fn disk(socket: &Path) -> Disk {
    Disk { socket: socket.to_owned() }
}

/// Writes bytes and reads them back, by both queues if there are two.
#[track_caller]
fn works(driver: &mut Driver, sector: u64, byte: u8) {
    let last = driver.queue_count() - 1;
    driver.put(driver.data(0, 0), &[byte; 4096]);
    driver.request(0, 0, WRITE, sector, 4096);
    assert_eq!((driver.wait(0), driver.request_status(0, 0)), ((0, 1), 0));
    driver.put(driver.data(last, 1), &[0; 4096]);
    driver.request(last, 1, READ, sector, 4096);
    assert_eq!((driver.wait(last), driver.request_status(last, 1)), ((4, 4097), 0));
    assert_eq!(driver.get(driver.data(last, 1), 4096), [byte; 4096]);
}

fn capacity(driver: &Driver) -> u64 {
    u64::from(driver.read32(driver.config + 4)) << 32 | u64::from(driver.read32(driver.config))
}

#[test]
fn reads_and_writes_reach_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 4, false);
    let machine = Machine::new(&[disk(&socket)], 2).unwrap();
    assert_eq!(machine.config_read(SLOT, 0), 0x1042_1af4);
    let mut driver = Driver::find(&machine, SLOT);
    let offered = driver.offered();
    assert_eq!(offered & (FEATURES | MQ), FEATURES | MQ);
    assert_eq!(offered & (RO | 1 << 30), 0, "nor the protocol's bit");
    assert_eq!(driver.queue_count(), 2, "as many as processors, of four");
    assert_eq!(driver.read16(driver.config + 34), 2, "num_queues says the same");
    assert_eq!(capacity(&driver), SIZE / 512);
    for (round, features) in [FEATURES | MQ, VERSION_1, FEATURES].into_iter().enumerate() {
        driver.start(features);
        machine.kvm.interrupts();
        let sector = round as u64 * 8;
        works(&mut driver, sector, 0x51 + round as u8);
        let mut interrupts = Vec::new();
        eventually("interrupts of both queues", || {
            interrupts.extend(machine.kvm.interrupts());
            interrupts.contains(&(CONFIG_INTERRUPT + 1)) && interrupts.contains(&(CONFIG_INTERRUPT + 2))
        });
        let mut bytes = [0; 4096];
        std::fs::File::open(&file).unwrap().read_exact_at(&mut bytes, sector * 512).unwrap();
        assert_eq!(bytes, [0x51 + round as u8; 4096]);
        driver.reset();
    }
    assert_eq!(machine.devices.notified(), 0);
}

#[test]
fn the_driver_switches_the_write_cache() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 1, false);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    assert_eq!(driver.offered() & MQ, 0, "there is one queue");
    driver.start(VERSION_1 | FLUSH);
    driver.write8(driver.config + 32, 0);
    assert_eq!(driver.read8(driver.config + 32), 1, "without CONFIG_WCE it cannot");
    driver.start(FEATURES);
    driver.write8(driver.config, 0xff);
    assert_eq!(capacity(&driver), SIZE / 512, "nothing else may be written");
    driver.write8(driver.config + 32, 0);
    assert_eq!(driver.read8(driver.config + 32), 0);
    works(&mut driver, 0, 1);
    driver.reset();
    eventually("the next driver finds it switched on", || driver.read8(driver.config + 32) == 1);
}

#[test]
fn the_write_cache_stays_as_the_driver_has_it() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let backend = Process::start(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.begin(FEATURES);
    driver.write8(driver.config + 32, 0);
    // Time for the disk's thread: the backend does not know the features yet, and would refuse.
    std::thread::sleep(std::time::Duration::from_millis(50));
    driver.set_status(STATUS_OK);
    works(&mut driver, 0, 1);
    assert_eq!(driver.read8(driver.config + 32), 0);
    backend.kill();
    let _backend = Process::start(&file, &socket);
    works(&mut driver, 0, 2);
    assert_eq!(driver.read8(driver.config + 32), 0, "a new backend has it switched on at first");
    driver.write8(driver.config + 32, 2);
    assert_eq!(driver.read8(driver.config + 32), 0, "a backend would refuse it, each time again");
    // One that does not get as far as DRIVER_OK leaves nothing behind.
    driver.begin(FEATURES);
    driver.write8(driver.config + 32, 0);
    driver.start(FEATURES);
    assert_eq!(driver.read8(driver.config + 32), 1);
    works(&mut driver, 0, 3);
}

#[test]
fn read_only_disks_say_so() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 1, true);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    assert_eq!(driver.offered() & (RO | CONFIG_WCE), RO);
    driver.start(VERSION_1 | RO);
    driver.request(0, 0, READ, 0, 4096);
    assert_eq!((driver.wait(0), driver.request_status(0, 0)), ((0, 4097), 0));
    driver.request(0, 1, WRITE, 0, 4096);
    driver.wait(0);
    assert_eq!(driver.request_status(0, 1), 1);
}

#[test]
fn a_resized_disk_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (server, device) = server::serve(&file, &socket, 1, false);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(FEATURES);
    let generation = driver.read8(driver.common + 0x15);
    let io = Io::new(UringEngine::new().unwrap());
    let (on, resized) = (io.clone(), std::sync::Arc::clone(&device));
    block_on(&io, async move { resized.resize(&on, 2 * SIZE).await }).unwrap();
    assert_eq!(capacity(&driver), SIZE / 512, "it was not told yet");
    server.config_changed();
    eventually("the capacity", || capacity(&driver) == 2 * SIZE / 512);
    assert_ne!(driver.read8(driver.common + 0x15), generation);
    eventually("the interrupt", || machine.kvm.interrupts().contains(&CONFIG_INTERRUPT));
    assert_eq!(driver.read8(driver.isr), 2);
    works(&mut driver, SIZE / 512, 7);
}

#[test]
fn a_backend_that_comes_back_finds_its_queues() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let mut backend = Process::start(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 2).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(FEATURES | MQ);
    for round in 0..3 {
        works(&mut driver, round * 8, 1 + round as u8);
        backend.kill();
        backend = Process::start(&file, &socket);
        works(&mut driver, round * 8, 100 + round as u8);
    }
    // A driver that resets meanwhile does not wait for it.
    backend.kill();
    driver.reset();
    driver.start(FEATURES);
    let backend = Process::start(&file, &socket);
    works(&mut driver, 0, 9);
    drop(backend);
    assert!(machine.devices.failure().take().is_none());
}

#[test]
fn requests_in_flight_outlive_the_backend_or_end_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let backend = Process::start(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(FEATURES);
    works(&mut driver, 0, 1);
    backend.pause();
    driver.put(driver.data(0, 0), &[0x77; 4096]);
    driver.request(0, 0, WRITE, 16, 4096);
    backend.kill();
    let _backend = Process::start(&file, &socket);
    if protocol_offered().contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
        assert_eq!((driver.wait(0), driver.request_status(0, 0)), ((0, 1), 0));
        let mut bytes = [0; 4096];
        std::fs::File::open(&file).unwrap().read_exact_at(&mut bytes, 16 * 512).unwrap();
        assert_eq!(bytes, [0x77; 4096]);
        works(&mut driver, 32, 3);
        assert!(machine.devices.failure().take().is_none());
    } else {
        eventually("the failure", || machine.devices.failure().event().read().is_ok());
        let error = machine.devices.failure().take().unwrap().to_string();
        assert!(error.contains("disk.sock") && error.contains("INFLIGHT"), "{error}");
        assert_eq!(driver.status() & 64, 64, "and the driver hears of it");
    }
}

#[test]
fn a_backend_of_another_disk_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let smaller = directory.path().join("smaller.raw");
    std::fs::File::create(&smaller).unwrap().set_len(SIZE / 2).unwrap();
    let backend = Process::start(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(FEATURES);
    backend.kill();
    for (other, read_only) in [(&smaller, false), (&file, true)] {
        let backend = Process::spawn(other, &socket, read_only);
        driver.request(0, 0, READ, 0, 512);
        std::thread::sleep(std::time::Duration::from_millis(400));
        assert_eq!(driver.answer(0), None);
        backend.kill();
        // What was offered meanwhile was never taken: it is no reason to give up.
        let right = Process::start(&file, &socket);
        driver.wait(0);
        right.kill();
    }
}

#[test]
fn who_is_no_backend_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let error = |socket: &Path| match Machine::new(&[disk(socket)], 1) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("a machine without a backend"),
    };
    assert!(error(&socket).contains("disk.sock: cannot connect"), "{}", error(&socket));
    let listener = UnixListener::bind(&socket).unwrap();
    let started = std::time::Instant::now();
    assert!(error(&socket).contains("does not answer"));
    assert!(started.elapsed().as_secs() < 10);
    let thread = std::thread::spawn(move || {
        for stream in listener.incoming().take(2) {
            use std::io::{Read, Write};
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    // The first one is the connection that was never accepted.
    assert!(error(&socket).contains("GET_FEATURES"), "{}", error(&socket));
    drop(thread);
    let disks = vec![disk(&socket); 31];
    assert!(matches!(Machine::new(&disks, 1), Err(Error::TooManyDisks(31))));
}

#[test]
fn a_backend_that_falls_silent_is_given_up() {
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let backend = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 12]).unwrap();
        // Features, and nothing after that.
        let answer = [1u32, 5, 8, 0, 0].map(u32::to_ne_bytes);
        stream.write_all(answer.as_flattened()).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    });
    let error = Machine::new(&[disk(&socket)], 1).err().unwrap().to_string();
    assert!(error.contains("does not answer"), "{error}");
    backend.join().unwrap();
}

#[test]
fn machines_end_while_their_backend_is_away() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let backend = Process::start(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 1).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    driver.start(FEATURES);
    works(&mut driver, 0, 1);
    // It holds the connection and does not answer any more.
    backend.pause();
    driver.set_status(0);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_ne!(driver.status(), 0, "the reset waits for the backend");
    let started = std::time::Instant::now();
    drop(machine);
    assert!(started.elapsed().as_secs() < 5);
    backend.kill();
}

/// A backend of another make, which keeps no note of what is in flight.
#[test]
fn a_backend_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let mut backend = server::qemu_storage_daemon(&file, &socket);
    let machine = Machine::new(&[disk(&socket)], 2).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    assert_eq!((driver.queue_count(), capacity(&driver)), (2, SIZE / 512));
    for round in 0..2 {
        driver.start(FEATURES | MQ);
        driver.write8(driver.config + 32, 0);
        works(&mut driver, round, 1 + round as u8);
        backend.kill();
        std::fs::remove_file(&socket).unwrap();
        backend = server::qemu_storage_daemon(&file, &socket);
        works(&mut driver, 100, 3 + round as u8);
        driver.reset();
    }
    assert!(machine.devices.failure().take().is_none());
}

/// A guest that resets at any time, while requests are in flight.
#[test]
fn resets_while_queues_run() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 2, false);
    let machine = Machine::new(&[disk(&socket)], 2).unwrap();
    let mut driver = Driver::find(&machine, SLOT);
    let mut random = Random(11);
    for _ in 0..100 {
        driver.start(FEATURES | MQ);
        for number in 0..random.below(5).min(4) as u16 {
            driver.request((random.below(2)) as u16, number, READ, random.below(1000), 4096);
        }
        if random.below(3) == 0 {
            std::thread::sleep(std::time::Duration::from_micros(random.below(500)));
        }
        if random.below(4) == 0 {
            // Not the way to do it, but nothing may come of it.
            driver.set_status(0);
            driver.set_status(3);
        }
    }
    driver.start(FEATURES | MQ);
    works(&mut driver, 0, 5);
}

/// Anything, anywhere, in any width, at a disk whose backend answers: a driver that comes then finds a disk that works.
#[test]
fn random_accesses_are_harmless() {
    let directory = tempfile::tempdir().unwrap();
    let (file, socket) = server::disk(directory.path(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 2, false);
    let machine = Machine::new(&[disk(&socket)], 2).unwrap();
    for seed in 1..=10 {
        let mut driver = Driver::find(&machine, SLOT);
        driver.start(FEATURES | MQ);
        driver.disturb(&mut Random(seed * 0x9e37_79b9), 2000);
        driver.start(FEATURES | MQ);
        works(&mut driver, seed * 8, seed as u8);
    }
}

#[test]
fn disks_are_found_in_their_order() {
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [first, second] = [SIZE, 2 * SIZE].map(|size| {
        let directory = &directories[usize::from(size > SIZE)];
        let (file, socket) = server::disk(directory.path(), size);
        (server::serve(&file, &socket, 1, false), disk(&socket))
    });
    let machine = Machine::new(&[first.1.clone(), second.1.clone()], 1).unwrap();
    let mut one = Driver::find(&machine, 1);
    let mut two = Driver::find(&machine, 2);
    assert_eq!((capacity(&one), capacity(&two)), (SIZE / 512, 2 * SIZE / 512));
    assert_eq!(machine.config_read(3, 0), 0x1044_1af4, "then the source of random numbers");
    assert_eq!(machine.config_read(4, 0), u32::MAX);
    one.start(FEATURES);
    works(&mut one, 0, 1);
    two.start(FEATURES);
    works(&mut two, SIZE / 512, 2);
}
