//! A server that is killed under load and started again: a guest that goes on meanwhile gets every
//! request done, once, and finds on the disk what was reported.
//!
//! The frontend here keeps what QEMU keeps: the memory, the file of what is in flight, the
//! descriptors. It does not know where the server was, and says "at the used index".

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use sapwood_tests::sim::rng::Rng;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::harness::Place;
use crate::serve::Server;

const QUEUES: usize = 2;
const DEPTH: usize = 32;
const QUEUE_SIZE: u16 = 128;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 2048;

/// Where the guest and the frontend see the memory, and what lies where in each queue's part.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000;
const PART: u64 = 0x8_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const RANGES: u64 = 0x3800;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x1_0000;

/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE`.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// How long an answer may take, a restart included.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write(u64),
    Flush,
    WriteZeroes,
    Discard,
}

/// A request that the server has: what it is and its block.
type Request = (Kind, u64);

/// One queue of the guest.
struct Queue {
    at: u64,
    available: u16,
    seen: u16,
    requests: Vec<Option<Request>>,
    kick: EventFd,
    call: EventFd,
}

struct Guest {
    memory: File,
    queues: Vec<Queue>,
    frontend: Option<Frontend>,
    inflight: Option<(VhostUserInflight, File)>,
    event_idx: bool,
    rng: Rng,
    /// The number of the write that each block holds; 0: zeroes.
    disk: Vec<u64>,
    /// Blocks that a request is about.
    busy: Vec<bool>,
    writes: u64,
    completed: u64,
}

fn contents(number: u64, block: u64) -> Vec<u8> {
    let both =
        if number == 0 { [0; 16] } else { (u128::from(number) << 64 | u128::from(block)).to_le_bytes() };
    both.repeat(BLOCK / 16)
}

impl Guest {
    fn new(seed: u64, event_idx: bool) -> Self {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(PART * QUEUES as u64).unwrap();
        let eventfd = || EventFd::new(OFlags::NONBLOCK.bits() as i32).unwrap();
        let queue = |index| Queue {
            at: index as u64 * PART,
            available: 0,
            seen: 0,
            requests: vec![None; DEPTH],
            kick: eventfd(),
            call: eventfd(),
        };
        Self {
            memory,
            queues: (0..QUEUES).map(queue).collect(),
            frontend: None,
            inflight: None,
            event_idx,
            rng: Rng::new(seed),
            disk: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            writes: 0,
            completed: 0,
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, address).unwrap();
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }

    /// Connects as QEMU does, first and again.
    fn connect(&mut self, socket: &Path) {
        let mut frontend = Frontend::connect(socket, QUEUES as u64).unwrap();
        frontend.set_owner().unwrap();
        let unwanted = if self.event_idx { 0 } else { EVENT_IDX };
        let features = frontend.get_features().unwrap() & !unwanted;
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
        let (message, file) = self.inflight.get_or_insert_with(|| {
            let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, QUEUE_SIZE);
            frontend.get_inflight_fd(&wanted).unwrap()
        });
        frontend.set_inflight_fd(message, file.as_raw_fd()).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: PART * QUEUES as u64,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        for (index, queue) in self.queues.iter().enumerate() {
            let start = USER + queue.at;
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: start,
                used_ring_addr: start + USED,
                avail_ring_addr: start + AVAILABLE,
                log_addr: None,
            };
            frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            frontend.set_vring_base(index, u16::from_le_bytes(self.get(queue.at + USED + 2))).unwrap();
            frontend.set_vring_addr(index, &addresses).unwrap();
            frontend.set_vring_call(index, &queue.call).unwrap();
            frontend.set_vring_kick(index, &queue.kick).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
        self.frontend = Some(frontend);
    }

    /// Requests marked in the region.
    fn marked(&self) -> usize {
        let (message, file) = self.inflight.as_ref().expect("connected before");
        let mut bytes = vec![0; message.mmap_size as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let regions = bytes.chunks_exact(bytes.len() / QUEUES);
        let heads = |region: &[u8]| (0..QUEUE_SIZE as usize).filter(|i| region[16 + i * 16] == 1).count();
        regions.map(heads).sum()
    }

    fn outstanding(&self) -> usize {
        self.queues.iter().flat_map(|queue| &queue.requests).flatten().count()
    }

    fn choose(&mut self) -> Option<Request> {
        let block = self.rng.below(BLOCKS);
        let kind = match self.rng.below(20) {
            0 => Kind::Flush,
            1 => Kind::WriteZeroes,
            2 => Kind::Discard,
            3..10 => Kind::Read,
            _ => Kind::Write(self.writes + 1),
        };
        if kind == Kind::Flush {
            return Some((kind, block));
        }
        if std::mem::replace(&mut self.busy[block as usize], true) {
            return None;
        }
        self.writes += 1;
        Some((kind, block))
    }

    /// Makes a request available in a free slot of a queue.
    fn submit(&mut self, index: usize, slot: usize, (kind, block): Request) {
        let at = self.queues[index].at;
        let (number, header) = (slot as u64, at + HEADERS + slot as u64 * 16);
        let (code, sector) = match kind {
            Kind::Read => (0u32, block * 8),
            Kind::Write(_) => (1, block * 8),
            Kind::Flush => (4, 0),
            Kind::Discard => (11, 0),
            Kind::WriteZeroes => (13, 0),
        };
        let head = (u128::from(sector) << 64 | u128::from(code)).to_le_bytes();
        self.put(header, &head);
        self.put(at + STATUS + number, &[0xff]);
        let data = match kind {
            Kind::Read => Some((DATA + number * BLOCK as u64, BLOCK as u32, WRITE)),
            Kind::Write(_) => Some((DATA + number * BLOCK as u64, BLOCK as u32, 0)),
            Kind::Flush => None,
            Kind::Discard | Kind::WriteZeroes => Some((RANGES + number * 16, 16, 0)),
        };
        match kind {
            Kind::Read => self.put(at + DATA + number * BLOCK as u64, &[0xee; BLOCK]),
            Kind::Write(n) => self.put(at + DATA + number * BLOCK as u64, &contents(n, block)),
            Kind::Discard | Kind::WriteZeroes => {
                let range = (u128::from(8u32) << 64 | u128::from(block * 8)).to_le_bytes();
                self.put(at + RANGES + number * 16, &range);
            }
            Kind::Flush => {}
        }
        let parts = [Some((HEADERS + number * 16, 16, 0)), data, Some((STATUS + number, 1, WRITE))];
        let parts: Vec<(u64, u32, u16)> = parts.into_iter().flatten().collect();
        let first = slot as u16 * 3;
        for (i, (address, len, flags)) in parts.iter().enumerate() {
            let place = first + i as u16;
            let flags = if i + 1 < parts.len() { flags | NEXT } else { *flags };
            let descriptor = u128::from(GUEST + at + address)
                | u128::from(*len) << 64
                | u128::from(flags) << 96
                | u128::from(place + 1) << 112;
            self.put(at + u64::from(place) * 16, &descriptor.to_le_bytes());
        }
        let available = self.queues[index].available;
        let entry = at + AVAILABLE + 4 + u64::from(available % QUEUE_SIZE) * 2;
        self.put(entry, &first.to_le_bytes());
        let available = available.wrapping_add(1);
        self.put(at + AVAILABLE + 2, &available.to_le_bytes());
        self.queues[index].available = available;
        self.queues[index].requests[slot] = Some((kind, block));
    }

    /// Fills the queues and notifies the server, whether there is one or not.
    fn fill(&mut self) {
        for index in 0..QUEUES {
            for slot in 0..DEPTH {
                if self.queues[index].requests[slot].is_none()
                    && let Some(request) = self.choose()
                {
                    self.submit(index, slot, request);
                }
            }
            self.queues[index].kick.write(1).unwrap();
        }
    }

    /// Takes what is done on a queue. Each request must be one that the server had.
    fn collect(&mut self, index: usize) {
        let at = self.queues[index].at;
        loop {
            let seen = self.queues[index].seen;
            if self.event_idx {
                let event = at + AVAILABLE + 4 + u64::from(QUEUE_SIZE) * 2;
                self.put(event, &seen.to_le_bytes());
            }
            if u16::from_le_bytes(self.get(at + USED + 2)) == seen {
                return;
            }
            let head = u32::from_le_bytes(self.get(at + USED + 4 + u64::from(seen % QUEUE_SIZE) * 8));
            self.queues[index].seen = seen.wrapping_add(1);
            let slot = head as usize / 3;
            let request = self.queues[index].requests.get_mut(slot).and_then(Option::take);
            let (kind, block) =
                request.unwrap_or_else(|| panic!("head {head} of queue {index} is done twice"));
            assert_eq!(self.get(at + STATUS + slot as u64), [0], "{kind:?} of block {block}");
            self.completed += 1;
            if kind != Kind::Flush {
                self.busy[block as usize] = false;
            }
            match kind {
                Kind::Flush => {}
                Kind::Write(number) => self.disk[block as usize] = number,
                Kind::WriteZeroes | Kind::Discard => self.disk[block as usize] = 0,
                Kind::Read => {
                    let data: [u8; BLOCK] = self.get(at + DATA + (slot * BLOCK) as u64);
                    let expected = contents(self.disk[block as usize], block);
                    assert!(data[..] == expected[..], "block {block}: {:x?}", &data[..16]);
                }
            }
        }
    }

    /// Waits for a notification of any queue, and takes what is done. Without one the guest does
    /// not look.
    fn wait(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let mut came = false;
            for index in 0..QUEUES {
                if self.queues[index].call.read().is_ok() {
                    self.collect(index);
                    came = true;
                }
            }
            if came || Instant::now() >= end {
                return came;
            }
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Keeps the queues full for a while.
    fn work(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.fill();
            self.wait(Duration::from_millis(1));
        }
    }

    /// Asks for nothing new, and waits until everything is done.
    fn drain(&mut self) {
        while self.outstanding() > 0 {
            assert!(self.wait(LIMIT), "{} requests were never reported", self.outstanding());
        }
    }

    /// Reads the whole disk.
    fn verify(&mut self) {
        for first in (0..BLOCKS).step_by(DEPTH) {
            for slot in 0..DEPTH {
                self.busy[first as usize + slot] = true;
                self.submit(0, slot, (Kind::Read, first + slot as u64));
            }
            self.queues[0].kick.write(1).unwrap();
            self.drain();
        }
    }
}

/// Kills the server and starts it again, many times; then it ends in order.
fn survives(disk: &str, seed: u64, event_idx: bool, kills: u32) {
    let place = Place::new();
    place.sapwood(&format!("create {disk} 8M")).text();
    let disk = disk.split_whitespace().last().expect("a name");
    let format = if disk.ends_with("raw") { "raw" } else { "layer" };
    let line = format!("-f {format} {disk} --queues {QUEUES}");
    let mut guest = Guest::new(seed, event_idx);
    let mut server = Server::start(&place, &line).0;
    guest.connect(&place.path("socket"));
    let (mut again, mut in_use) = (0, 0);
    for _ in 0..kills {
        let time = 5 + guest.rng.below(40);
        guest.work(Duration::from_millis(time));
        drop(server);
        (again, in_use) = (again + guest.marked(), in_use + u32::from(guest.marked() > 0));
        // The guest does not know.
        guest.work(Duration::from_millis(2));
        server = Server::start(&place, &line).0;
        guest.connect(&place.path("socket"));
    }
    guest.drain();
    guest.verify();
    assert!(in_use > kills / 2, "in {in_use} of {kills} kills something was in flight");
    println!("{kills} kills: {} requests done, {again} of them in flight at a kill", guest.completed);

    // An end in order leaves nothing in flight, and nothing undone that was taken.
    guest.work(Duration::from_millis(20));
    server.stops();
    assert_eq!(guest.marked(), 0);
    let (server, _) = Server::start(&place, &line);
    guest.connect(&place.path("socket"));
    guest.drain();
    guest.verify();
    drop(guest.frontend.take());
    server.stops();
    if format == "layer" {
        place.sapwood(&format!("check {disk}")).text();
    }
    place.sapwood(&format!("convert -f {format} -O raw {disk} copy.raw")).text();
    let expected = (0..BLOCKS).flat_map(|block| contents(guest.disk[block as usize], block));
    assert!(place.bytes("copy.raw").into_iter().eq(expected), "the disk is not what was reported");
}

#[test]
fn a_layer_whose_server_is_killed_under_load() {
    survives("disk.layer", 1, true, 25);
}

#[test]
fn a_raw_disk_whose_server_is_killed_under_load() {
    survives("-f raw disk.raw", 2, false, 25);
}
