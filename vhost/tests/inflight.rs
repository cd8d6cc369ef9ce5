//! What a killed backend has left in flight, as its successor gets it: a region filled in by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, memfd_create};
use sapwood_vhost::request::layout::{TYPE_FLUSH, TYPE_GET_ID, TYPE_READ};
use support::ramdisk::RamDisk;
use support::rig::Rig;
use support::{Served, serve};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const SIZE: usize = 1 << 20;
/// Descriptors in the rig's ring.
const ENTRIES: u16 = 16;

fn connected() -> (Served, Rig) {
    let served = serve(RamDisk::new(SIZE), 1);
    let rig = Rig::connect(&served.socket);
    (served, rig)
}

fn region(rig: &mut Rig) -> (VhostUserInflight, File) {
    rig.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, ENTRIES)).unwrap()
}

/// Marks requests in the order given.
fn mark(file: &File, heads: &[u16]) {
    for (counter, head) in heads.iter().enumerate() {
        let entry = 16 + u64::from(*head) * 16;
        file.write_all_at(&(counter as u64).to_le_bytes(), entry + 8).unwrap();
        file.write_all_at(&[1], entry).unwrap();
    }
}

fn marks(file: &File) -> Vec<u16> {
    let marked = |head: &u16| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, 16 + u64::from(*head) * 16).unwrap();
        byte == [1]
    };
    (0..ENTRIES).filter(marked).collect()
}

fn used_index(file: &File) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 14).unwrap();
    u16::from_le_bytes(bytes)
}

#[test]
fn what_was_taken_is_done_again_before_what_is_new() {
    let (_served, mut rig) = connected();
    let (message, file) = region(&mut rig);
    rig.frontend.set_mem_table(&[rig.region()]).unwrap();
    // Made available: 0, 1, 2; taken: 0 and 1; the used index, which is the base, says none. These
    // are answered at once, so that the answers are in order.
    for number in 0..3 {
        rig.request(number, TYPE_GET_ID, 0, 20, true);
    }
    let header = [1u16, ENTRIES, 0, 0].map(u16::to_le_bytes).concat();
    file.write_all_at(&header, 8).unwrap();
    mark(&file, &[4, 0]);
    rig.frontend.set_inflight_fd(&message, file.as_raw_fd()).unwrap();
    rig.call.read().unwrap_err();
    rig.set_ring(&Rig::addresses(), 0);
    assert_eq!([rig.used().0, rig.used().0, rig.used().0], [4, 0, 8]);
    assert_eq!([rig.status(0), rig.status(1), rig.status(2)], [0; 3]);
    assert_eq!(rig.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!((marks(&file), used_index(&file)), (vec![], 3), "nothing is in flight any more");
}

#[test]
fn the_region_says_what_is_in_flight() {
    let (served, mut rig) = connected();
    served.disk.delay_us.store(300_000, Ordering::Relaxed);
    // Without being sent back: it may be that only the next backend gets it.
    let (_, file) = region(&mut rig);
    rig.start();
    rig.request(0, TYPE_READ, 0, 512, true);
    rig.request(2, TYPE_FLUSH, 0, 16, true);
    support::eventually("taken", || served.disk.outstanding.load(Ordering::Relaxed) == 2);
    assert_eq!(marks(&file), [0, 8]);
    rig.used();
    rig.used();
    rig.frontend.get_vring_base(0).unwrap();
    assert_eq!((marks(&file), used_index(&file)), (vec![], 2));
}

#[test]
fn a_notification_is_made_up_for() {
    let (_served, mut rig) = connected();
    let (message, file) = region(&mut rig);
    rig.frontend.set_mem_table(&[rig.region()]).unwrap();
    rig.frontend.set_inflight_fd(&message, file.as_raw_fd()).unwrap();
    rig.set_ring(&Rig::addresses(), 0);
    assert!(rig.call.read().is_ok(), "a predecessor may have published and died");
}

#[test]
fn a_head_that_cannot_be_tracked_stops_the_queue() {
    let (_served, mut rig) = connected();
    region(&mut rig);
    rig.start();
    rig.offer(ENTRIES);
    assert!(rig.failed());
}

#[test]
fn a_region_of_nonsense_stops_the_queue() {
    let (_served, mut rig) = connected();
    let (message, file) = region(&mut rig);
    file.write_all_at(&[9], 8).unwrap();
    rig.frontend.set_inflight_fd(&message, file.as_raw_fd()).unwrap();
    rig.start();
    assert!(rig.failed());
}

#[test]
fn a_region_that_cannot_be_ends_the_session() {
    let small = File::from(memfd_create("small", MemfdFlags::CLOEXEC).unwrap());
    for (bytes, queues) in [(64, 1), (4096, 2)] {
        let (served, mut rig) = connected();
        small.set_len(64).unwrap();
        let message = VhostUserInflight::new(bytes, 0, queues, ENTRIES);
        assert!(rig.frontend.set_inflight_fd(&message, small.as_raw_fd()).is_err());
        assert!(rig.frontend.get_features().is_err(), "the session is over");
        let mut rig = Rig::connect(&served.socket);
        assert!(rig.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 9, ENTRIES)).is_err());
        let mut rig = Rig::connect(&served.socket);
        rig.start();
        rig.request(3, TYPE_READ, 0, 512, true);
        assert_eq!(rig.used(), (12, 513), "the next one is served");
    }
}
