//! A frontend that does as it likes: messages by the `vhost` crate, rings written by hand into
//! shared memory.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use sapwood_vhost::request::layout::{DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, Header};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

pub const MEMORY: u64 = 1 << 20;
/// Where the guest and the frontend see the memory.
pub const GUEST: u64 = 0x10_0000;
pub const USER: u64 = 0x7000_0000;

const SIZE: u16 = 16;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x4000;
pub const DATA: u64 = 0x10000;

pub struct Rig {
    pub frontend: Frontend,
    pub memory: File,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    pub features: u64,
    next: u16,
    seen: u16,
}

impl Rig {
    /// Connected, negotiated, nothing running.
    pub fn connect(socket: &Path) -> Self {
        let frontend = Frontend::connect(socket, 1).unwrap();
        let memory = File::from(memfd_create("rig", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let eventfd = || EventFd::new(libc_nonblock()).unwrap();
        let (kick, call, error) = (eventfd(), eventfd(), eventfd());
        let mut rig = Self { frontend, memory, kick, call, error, features: 0, next: 0, seen: 0 };
        rig.frontend.set_owner().unwrap();
        rig.negotiate(!0);
        let protocol = rig.frontend.get_protocol_features().unwrap();
        rig.frontend.set_protocol_features(protocol & VhostUserProtocolFeatures::all()).unwrap();
        rig.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        rig
    }

    /// Accepts what is offered and in `mask`.
    pub fn negotiate(&mut self, mask: u64) {
        self.features = self.frontend.get_features().unwrap() & mask;
        self.frontend.set_features(self.features).unwrap();
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        }
    }

    pub fn addresses() -> VringConfigData {
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: USER,
            used_ring_addr: USER + USED,
            avail_ring_addr: USER + AVAILABLE,
            log_addr: None,
        }
    }

    /// Everything up to a running ring.
    pub fn start(&mut self) {
        self.frontend.set_mem_table(&[self.region()]).unwrap();
        self.start_ring();
    }

    pub fn start_ring(&mut self) {
        self.memory.write_all_at(&[0; 4], AVAILABLE).unwrap();
        self.memory.write_all_at(&[0; 4], USED).unwrap();
        (self.next, self.seen) = (0, 0);
        self.set_ring(&Self::addresses(), 0);
    }

    /// Starts the ring where the memory says it is.
    pub fn set_ring(&mut self, addresses: &VringConfigData, base: u16) {
        self.frontend.set_vring_num(0, SIZE).unwrap();
        self.frontend.set_vring_base(0, base).unwrap();
        self.frontend.set_vring_addr(0, addresses).unwrap();
        self.frontend.set_vring_err(0, &self.error).unwrap();
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    pub fn descriptor(&self, index: u16, descriptor: Descriptor) {
        self.memory.write_all_at(&descriptor.bytes(), u64::from(index) * 16).unwrap();
    }

    /// Makes the chain at `head` available; the first three descriptors of each four are one
    /// request's.
    pub fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.next % SIZE) * 2;
        self.memory.write_all_at(&head.to_le_bytes(), slot).unwrap();
        self.next = self.next.wrapping_add(1);
        self.set_available(self.next);
    }

    pub fn set_available(&self, index: u16) {
        self.memory.write_all_at(&index.to_le_bytes(), AVAILABLE + 2).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Offers an ordinary request with `len` bytes of data; `number` is below 4.
    pub fn request(&mut self, number: u16, kind: u32, sector: u64, len: u32, writable: bool) {
        let head = number * 4;
        let header = HEADERS + u64::from(number) * 16;
        self.memory.write_all_at(&Header { kind, sector }.bytes(), header).unwrap();
        self.memory.write_all_at(&[0xff], STATUS + u64::from(number)).unwrap();
        let part = |address, len, flags, next| Descriptor { address: GUEST + address, len, flags, next };
        self.descriptor(head, part(header, 16, DESCRIPTOR_NEXT, head + 1));
        let direction = if writable { DESCRIPTOR_WRITE } else { 0 };
        let data = DATA + u64::from(number) * 0x10000;
        self.descriptor(head + 1, part(data, len, direction | DESCRIPTOR_NEXT, head + 2));
        self.descriptor(head + 2, part(STATUS + u64::from(number), 1, DESCRIPTOR_WRITE, 0));
        self.offer(head);
    }

    pub fn status(&self, number: u16) -> u8 {
        let mut byte = [0];
        self.memory.read_exact_at(&mut byte, STATUS + u64::from(number)).unwrap();
        byte[0]
    }

    /// The next finished request: head and length. Waits for it.
    pub fn used(&mut self) -> (u32, u32) {
        for _ in 0..2000 {
            let mut index = [0; 2];
            self.memory.read_exact_at(&mut index, USED + 2).unwrap();
            if u16::from_le_bytes(index) != self.seen {
                let mut entry = [0; 8];
                let slot = USED + 4 + u64::from(self.seen % SIZE) * 8;
                self.memory.read_exact_at(&mut entry, slot).unwrap();
                self.seen = self.seen.wrapping_add(1);
                let entry = u64::from_le_bytes(entry);
                return (entry as u32, (entry >> 32) as u32);
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("the request never finished");
    }

    /// Whether the queue has signalled an error, waiting for it a while.
    pub fn failed(&self) -> bool {
        for _ in 0..1000 {
            if self.error.read().is_ok() {
                return true;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        false
    }
}

fn libc_nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits() as i32
}
