//! A virtio driver: finds its device by the configuration space, leads it through its states, and drives queues.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::{HIGH, Machine, Random, eventually};

/// Entries in each queue.
pub const QUEUE_SIZE: u16 = 16;
/// Where the queues lie, each with its three parts.
const QUEUES: u64 = 0x1_0000;
const QUEUE_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Headers and status bytes of requests, by their first descriptor.
const HEADERS: u64 = 0x8_0000;
const HEADER_BYTES: u64 = 0x20;
/// Data of requests.
pub const DATA: u64 = HIGH;
pub const DATA_BYTES: u64 = 0x1_0000;

const VENDOR_CAPABILITY: u8 = 9;
const MSIX_CAPABILITY: u8 = 0x11;

pub const VERSION_1: u64 = 1 << 32;
pub const STATUS_OK: u8 = 0xf;

/// The data of the interrupt messages: the configuration's, and the queues' from the next one on.
pub const CONFIG_INTERRUPT: u32 = 0x40;

#[derive(Clone, Copy, Default)]
struct Progress {
    next: u16,
    seen: u16,
}

pub struct Driver<'a> {
    pub machine: &'a Machine,
    slot: u32,
    pub common: u64,
    pub notify: u64,
    multiplier: u64,
    pub isr: u64,
    pub config: u64,
    pub table: u64,
    pub pending: u64,
    msix: u32,
    /// Where the capability for access by the configuration space is.
    pub access: u32,
    queues: Vec<Progress>,
}

impl<'a> Driver<'a> {
    /// Looks the device in a slot up.
    pub fn find(machine: &'a Machine, slot: u32) -> Self {
        let mut driver = Self {
            machine,
            slot,
            common: 0,
            notify: 0,
            multiplier: 0,
            isr: 0,
            config: 0,
            table: 0,
            pending: 0,
            msix: 0,
            access: 0,
            queues: Vec::new(),
        };
        let mut at = machine.config_read(slot, 0x34) & 0xff;
        let mut left = 48;
        while at != 0 {
            assert_eq!(at % 4, 0);
            left -= 1;
            assert!(left > 0, "the list ends");
            let first = machine.config_read(slot, at).to_le_bytes();
            driver.capability(at, first);
            at = first[1].into();
        }
        driver
    }

    fn capability(&mut self, at: u32, first: [u8; 4]) {
        let read = |offset| u64::from(self.machine.config_read(self.slot, at + offset));
        let bar = self.bar();
        match first[0] {
            MSIX_CAPABILITY => {
                self.msix = at;
                self.table = bar + (read(4) & !7);
                self.pending = bar + (read(8) & !7);
            }
            VENDOR_CAPABILITY => {
                let place = bar + read(8);
                match first[3] {
                    1 => self.common = place,
                    2 => (self.notify, self.multiplier) = (place, read(16)),
                    3 => self.isr = place,
                    4 => self.config = place,
                    5 => self.access = at,
                    kind => panic!("capability of kind {kind}"),
                }
            }
            id => panic!("capability {id}"),
        }
    }

    pub fn bar(&self) -> u64 {
        (self.machine.config_read(self.slot, 0x10) & !0xf).into()
    }

    pub fn read8(&self, address: u64) -> u8 {
        let mut data = [0];
        self.machine.read(address, &mut data);
        data[0]
    }

    pub fn read16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.machine.read(address, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.machine.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write8(&self, address: u64, value: u8) {
        self.machine.write(address, &[value]);
    }

    pub fn write16(&self, address: u64, value: u16) {
        self.machine.write(address, &value.to_le_bytes());
    }

    pub fn write32(&self, address: u64, value: u32) {
        self.machine.write(address, &value.to_le_bytes());
    }

    pub fn status(&self) -> u8 {
        self.read8(self.common + 0x14)
    }

    pub fn set_status(&self, status: u8) {
        self.write8(self.common + 0x14, status);
    }

    pub fn offered(&self) -> u64 {
        self.write32(self.common, 0);
        let low = self.read32(self.common + 4);
        self.write32(self.common, 1);
        u64::from(self.read32(self.common + 4)) << 32 | u64::from(low)
    }

    pub fn accept(&self, features: u64) {
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write32(self.common + 8, half);
            self.write32(self.common + 12, value);
        }
    }

    pub fn queue_count(&self) -> u16 {
        self.read16(self.common + 0x12)
    }

    /// Resets the device and waits until it has done so.
    pub fn reset(&self) {
        self.set_status(0);
        eventually("the reset ends", || self.status() == 0);
    }

    /// From a reset to DRIVER_OK, with all queues and an interrupt for each.
    pub fn start(&mut self, features: u64) {
        self.begin(features);
        self.set_status(STATUS_OK);
        assert_eq!(self.status(), STATUS_OK);
    }

    /// All of it but DRIVER_OK.
    pub fn begin(&mut self, features: u64) {
        self.reset();
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(0xb);
        assert_eq!(self.status(), 0xb, "the features are agreed on");
        self.set_interrupts();
        self.write16(self.common + 0x10, 0);
        assert_eq!(self.read16(self.common + 0x10), 0);
        self.queues = vec![Progress::default(); self.queue_count().into()];
        for queue in 0..self.queue_count() {
            self.set_queue(queue);
        }
    }

    fn set_interrupts(&self) {
        let control = self.machine.config_read(self.slot, self.msix);
        self.machine.config_write(self.slot, self.msix, control & !(1 << 30) | 1 << 31);
        for entry in 0..=self.queue_count() {
            let at = self.table + u64::from(entry) * 16;
            self.write32(at, 0xfee0_0000);
            self.write32(at + 4, 0);
            self.write32(at + 8, CONFIG_INTERRUPT + u32::from(entry));
            self.write32(at + 12, 0);
        }
    }

    /// Holds a message back, or lets it through.
    pub fn mask(&self, entry: u16, masked: bool) {
        self.write32(self.table + u64::from(entry) * 16 + 12, masked.into());
    }

    pub fn set_queue(&self, queue: u16) {
        let at = QUEUES + u64::from(queue) * QUEUE_BYTES;
        let zeroes = vec![0; QUEUE_BYTES as usize];
        self.machine.memory.write_slice(&zeroes, GuestAddress(at)).unwrap();
        self.write16(self.common + 0x16, queue);
        self.write16(self.common + 0x18, QUEUE_SIZE);
        self.write16(self.common + 0x1a, queue + 1);
        for (register, address) in [(0x20, at), (0x28, at + AVAILABLE), (0x30, at + USED)] {
            self.write32(self.common + register, address as u32);
            self.write32(self.common + register + 4, (address >> 32) as u32);
        }
        self.write16(self.common + 0x1c, 1);
        assert_eq!(self.read16(self.common + 0x1c), 1, "queue {queue} is enabled");
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.machine.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes a descriptor: address, length, flags, next.
    pub fn descriptor(&self, queue: u16, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = QUEUES + u64::from(queue) * QUEUE_BYTES + u64::from(index) * 16;
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes a chain available, without telling the device.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let at = QUEUES + u64::from(queue) * QUEUE_BYTES + AVAILABLE;
        let progress = &mut self.queues[usize::from(queue)];
        let slot = at + 4 + u64::from(progress.next % QUEUE_SIZE) * 2;
        progress.next = progress.next.wrapping_add(1);
        let next = progress.next;
        self.put(slot, &head.to_le_bytes());
        self.machine.memory.store(next.to_le(), GuestAddress(at + 2), Ordering::Release).unwrap();
    }

    /// Writes any available index.
    pub fn set_available(&self, queue: u16, index: u16) {
        let at = QUEUES + u64::from(queue) * QUEUE_BYTES + AVAILABLE;
        self.put(at + 2, &index.to_le_bytes());
    }

    pub fn kick(&self, queue: u16) {
        self.write16(self.notify + u64::from(queue) * self.multiplier, queue);
    }

    /// Offers a request of a disk with `len` bytes of data; `number` is below 4 and says where they are.
    pub fn request(&mut self, queue: u16, number: u16, kind: u32, sector: u64, len: u32) {
        let head = number * 4;
        let slot = u64::from(queue * 4 + number);
        let header = HEADERS + slot * HEADER_BYTES;
        self.put(header, &kind.to_le_bytes());
        self.put(header + 4, &[0; 4]);
        self.put(header + 8, &sector.to_le_bytes());
        self.put(header + 16, &[0xff]);
        let data = self.data(queue, number);
        self.descriptor(queue, head, header, 16, 1, if len == 0 { head + 2 } else { head + 1 });
        self.descriptor(queue, head + 1, data, len, if kind == 0 { 3 } else { 1 }, head + 2);
        self.descriptor(queue, head + 2, header + 16, 1, 2, 0);
        self.offer(queue, head);
        self.kick(queue);
    }

    /// Where the data of a request is.
    pub fn data(&self, queue: u16, number: u16) -> u64 {
        DATA + u64::from(queue * 4 + number) * DATA_BYTES
    }

    pub fn request_status(&self, queue: u16, number: u16) -> u8 {
        self.get(HEADERS + u64::from(queue * 4 + number) * HEADER_BYTES + 16, 1)[0]
    }

    /// The next answer, if there is one: head and length.
    pub fn answer(&mut self, queue: u16) -> Option<(u32, u32)> {
        let at = QUEUES + u64::from(queue) * QUEUE_BYTES + USED;
        let index: u16 = self.machine.memory.load(GuestAddress(at + 2), Ordering::Acquire).unwrap();
        let progress = &mut self.queues[usize::from(queue)];
        if u16::from_le(index) == progress.seen {
            return None;
        }
        let entry = at + 4 + u64::from(progress.seen % QUEUE_SIZE) * 8;
        progress.seen = progress.seen.wrapping_add(1);
        let seen = progress.seen;
        // With EVENT_IDX: the next answer is to interrupt.
        let event = QUEUES + u64::from(queue) * QUEUE_BYTES + AVAILABLE + 4 + u64::from(QUEUE_SIZE) * 2;
        self.put(event, &seen.to_le_bytes());
        let bytes: [u8; 8] = self.get(entry, 8).try_into().unwrap();
        let entry = u64::from_le_bytes(bytes);
        Some((entry as u32, (entry >> 32) as u32))
    }

    /// The next answer, waited for.
    #[track_caller]
    pub fn wait(&mut self, queue: u16) -> (u32, u32) {
        let mut found = None;
        eventually("an answer", || {
            found = self.answer(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Accesses of any kind to any part of the device, and then its memory where it was.
    pub fn disturb(&self, random: &mut Random, count: usize) {
        let (machine, bar) = (self.machine, self.bar());
        let select = |random: &mut Random| {
            let address = 0x8000_0000 | self.slot << 11 | random.below(256) as u32;
            machine.ports.write(0xcf8, &address.to_le_bytes());
            0xcfc + random.below(4)
        };
        let restore = || {
            machine.config_write(self.slot, 0x10, bar as u32);
            machine.config_write(self.slot, 4, 6);
        };
        for _ in 0..count {
            let len = 1 << random.below(4);
            let data = if random.below(3) == 0 { random.below(256) } else { random.next() }.to_le_bytes();
            let parts =
                [self.common, self.isr, self.config, self.notify, self.table, self.pending, bar + 0x7ff8];
            let address = parts[random.below(parts.len() as u64) as usize] + random.below(0x48);
            match random.below(16) {
                0 | 1 => machine.read(address, &mut vec![0; len]),
                2 => machine.ports.read(select(random), &mut vec![0; len]),
                3 => {
                    machine.ports.write(select(random), &data[..len]);
                    // Or nothing else would be reached for long.
                    if random.below(2) == 0 {
                        restore();
                    }
                }
                _ => machine.write(address, &data[..len]),
            }
        }
        restore();
    }
}
