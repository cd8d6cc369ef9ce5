//! A frontend and a guest that do the unusual, the malformed and the malicious.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sapwood_vhost::config::WRITEBACK_OFFSET;
use sapwood_vhost::features::Features;
use sapwood_vhost::request::layout::{
    DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, TYPE_FLUSH, TYPE_GET_ID, TYPE_READ, TYPE_WRITE,
};
use support::ramdisk::RamDisk;
use support::rig::{DATA, GUEST, MEMORY, Rig, USER};
use support::{Served, serve};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

const SIZE: usize = 1 << 20;

fn running() -> (Served, Rig) {
    let served = serve(RamDisk::new(SIZE), 1);
    let mut rig = Rig::connect(&served.socket);
    rig.start();
    (served, rig)
}

fn works(rig: &mut Rig) {
    rig.request(3, TYPE_READ, 0, 512, true);
    assert_eq!(rig.used(), (12, 513));
    assert_eq!(rig.status(3), 0);
}

#[test]
fn used_lengths_say_what_was_written() {
    let (_served, mut rig) = running();
    rig.memory.write_all_at(&[7; 1024], DATA).unwrap();
    rig.request(0, TYPE_WRITE, 2, 1024, false);
    assert_eq!(rig.used(), (0, 1), "a write: the status");
    rig.request(1, TYPE_READ, 2, 1024, true);
    assert_eq!(rig.used(), (4, 1025), "a read: data and status");
    let mut back = [0; 1024];
    rig.memory.read_exact_at(&mut back, DATA + 0x10000).unwrap();
    assert_eq!(back, [7; 1024]);
    rig.request(2, TYPE_GET_ID, 0, 20, true);
    assert_eq!(rig.used(), (8, 21));
    let mut name = [0; 20];
    rig.memory.read_exact_at(&mut name, DATA + 0x20000).unwrap();
    assert_eq!(&name, b"a name of more than ");
    rig.request(0, TYPE_READ, 1 << 40, 512, true);
    assert_eq!((rig.used(), rig.status(0)), ((0, 1), 1), "an error: the status");
    rig.request(0, 99, 0, 512, true);
    assert_eq!((rig.used(), rig.status(0)), ((0, 1), 2));
}

#[test]
fn malformed_chains_are_given_back_and_the_queue_goes_on() {
    let (_served, mut rig) = running();
    let descriptor = |address, len, flags, next| Descriptor { address, len, flags, next };
    let cases = [
        ("a loop", descriptor(GUEST, 16, DESCRIPTOR_NEXT, 8)),
        ("a next beyond the table", descriptor(GUEST, 16, DESCRIPTOR_NEXT, 999)),
        ("no status", descriptor(GUEST, 16, 0, 0)),
        ("a status outside memory", descriptor(u64::MAX, 1, DESCRIPTOR_WRITE, 0)),
    ];
    for (name, bad) in cases {
        rig.descriptor(8, bad);
        rig.offer(8);
        assert_eq!(rig.used(), (8, 0), "{name}");
        works(&mut rig);
    }
    rig.offer(0xffff);
    assert_eq!(rig.used(), (0xffff, 0), "a head beyond the table");
    works(&mut rig);
}

#[test]
fn an_impossible_index_stops_the_queue_alone() {
    let (_served, mut rig) = running();
    works(&mut rig);
    rig.set_available(5000);
    assert!(rig.failed());
    assert_eq!(rig.frontend.get_vring_base(0).unwrap(), 1, "what was taken");
    rig.start_ring();
    works(&mut rig);
}

#[test]
fn rings_that_are_nowhere() {
    let (_served, mut rig) = running();
    for addresses in [
        VringConfigData { desc_table_addr: USER + MEMORY - 16, ..Rig::addresses() },
        VringConfigData { used_ring_addr: 0, ..Rig::addresses() },
        VringConfigData { avail_ring_addr: u64::MAX - 1, ..Rig::addresses() },
    ] {
        rig.frontend.get_vring_base(0).unwrap();
        rig.set_ring(&addresses, 0);
        assert!(rig.failed());
        rig.frontend.get_vring_base(0).unwrap();
        rig.start_ring();
        works(&mut rig);
    }
    rig.frontend.get_vring_base(0).unwrap();
    rig.frontend.set_vring_num(0, 7).unwrap();
    rig.frontend.set_vring_kick(0, &rig.kick).unwrap();
    assert!(rig.failed(), "a size that is no power of two");
}

#[test]
fn stopping_a_ring_drains_it() {
    let (served, mut rig) = running();
    served.disk.delay_us.store(20_000, Ordering::Relaxed);
    for number in 0..3 {
        rig.request(number, TYPE_READ, number.into(), 512, true);
    }
    support::eventually("taken", || served.disk.outstanding.load(Ordering::Relaxed) == 3);
    assert_eq!(rig.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(served.disk.outstanding.load(Ordering::Relaxed), 0);
    for _ in 0..3 {
        rig.used();
    }
    // What comes now stays until the ring runs again, from there on.
    rig.request(0, TYPE_READ, 0, 512, true);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.status(0), 0xff);
    rig.set_ring(&Rig::addresses(), 3);
    assert_eq!(rig.used(), (0, 513));
}

#[test]
fn disabled_rings_rest() {
    let (_served, mut rig) = running();
    rig.frontend.set_vring_enable(0, false).unwrap();
    rig.request(0, TYPE_READ, 0, 512, true);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.status(0), 0xff);
    rig.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(rig.used(), (0, 513));
}

#[test]
fn reset_device_begins_anew() {
    let (served, mut rig) = running();
    served.disk.delay_us.store(5_000, Ordering::Relaxed);
    for _ in 0..3 {
        rig.request(0, TYPE_READ, 0, 512, true);
        rig.frontend.reset_device().unwrap();
        assert_eq!(served.disk.outstanding.load(Ordering::Relaxed), 0);
        rig.negotiate(!Features::FLUSH);
        rig.start_ring();
        works(&mut rig);
        rig.request(0, TYPE_FLUSH, 0, 0, true);
        rig.used();
        assert_eq!(rig.status(0), 2, "what was not negotiated is not there");
    }
}

#[test]
fn memory_is_exchanged_under_load() {
    let (served, mut rig) = running();
    served.disk.delay_us.store(1_000, Ordering::Relaxed);
    for turn in 0..50 {
        for number in 0..3 {
            rig.request(number, TYPE_READ, turn, 4096, true);
        }
        rig.frontend.set_mem_table(&[rig.region()]).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.used().1, 4097);
        }
    }
    // Memory that the ring is not in: the ring cannot run, and can again later.
    let elsewhere = VhostUserMemoryRegionInfo { userspace_addr: 0, guest_phys_addr: 0, ..rig.region() };
    rig.frontend.set_mem_table(&[elsewhere]).unwrap();
    assert!(rig.failed());
    rig.frontend.set_mem_table(&[rig.region()]).unwrap();
    works(&mut rig);
}

#[test]
fn regions_are_added_and_removed_while_the_ring_runs() {
    let (_served, mut rig) = running();
    assert!(rig.frontend.get_max_mem_slots().unwrap() >= 32);
    let more = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST + MEMORY,
        userspace_addr: USER + MEMORY,
        memory_size: 4096,
        mmap_offset: DATA,
        ..rig.region()
    };
    let read = |rig: &mut Rig| {
        rig.request(0, TYPE_READ, 0, 512, true);
        rig.used();
        let past = Descriptor { address: GUEST + MEMORY - 512, len: 1024, flags: 3, next: 2 };
        rig.descriptor(1, past);
        rig.offer(0);
        rig.used();
        rig.status(0)
    };
    assert_eq!(read(&mut rig), 1, "not there yet");
    rig.frontend.add_mem_region(&more).unwrap();
    assert_eq!(read(&mut rig), 0, "data over both regions");
    assert!(rig.frontend.add_mem_region(&more).is_err(), "it is there already");
    rig.frontend.remove_mem_region(&more).unwrap();
    assert!(rig.frontend.remove_mem_region(&more).is_err());
    assert_eq!(read(&mut rig), 1);
    works(&mut rig);
}

#[test]
fn a_file_that_is_too_short_is_no_memory() {
    let (_served, mut rig) = running();
    let beyond = VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 40, mmap_offset: 4096, ..rig.region() };
    assert!(rig.frontend.add_mem_region(&beyond).is_err());
    works(&mut rig);
}

#[test]
fn a_changed_size_is_told() {
    let (served, mut rig) = running();
    let (ours, theirs) = UnixStream::pair().unwrap();
    rig.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    served.disk.resize(SIZE * 2);
    served.server.config_changed();
    let mut message = [0; 12];
    (&ours).read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "CONFIG_CHANGE_MSG, version 1, no payload");
    let (_, space) = rig.frontend.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    assert_eq!(space[..8], (SIZE as u64 * 2 / 512).to_le_bytes());
    rig.request(0, TYPE_READ, SIZE as u64 / 512, 512, true);
    assert_eq!(rig.used(), (0, 513), "the new end is in use");
    // Without a channel there is nobody to tell.
    drop(rig);
    served.server.config_changed();
}

#[test]
fn only_the_cache_switch_is_writable() {
    let (served, mut rig) = running();
    let mut set = |offset: usize, byte: u8| {
        rig.frontend.set_config(offset as u32, VhostUserConfigFlags::WRITABLE, &[byte])
    };
    set(WRITEBACK_OFFSET, 0).unwrap();
    assert!(!served.disk.write_cache.load(Ordering::Relaxed));
    set(WRITEBACK_OFFSET, 1).unwrap();
    assert!(served.disk.write_cache.load(Ordering::Relaxed));
    assert!(set(WRITEBACK_OFFSET, 2).is_err());
    assert!(set(0, 0).is_err());
    works(&mut rig);
}

#[test]
fn rubbish_ends_the_session_only() {
    let served = serve(RamDisk::new(SIZE), 1);
    for rubbish in [&[0xff; 4096][..], &[0; 12], &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[5]] {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream.write_all(rubbish).unwrap();
    }
    let mut rig = Rig::connect(&served.socket);
    rig.start();
    works(&mut rig);
    // A frontend that stops in the middle of a message does not keep the server from stopping.
    drop(rig);
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream.write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    served.server.stop();
}
