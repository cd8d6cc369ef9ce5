//! The registers of a modern virtio-pci device (virtio 1.2, section 4.1.4), and the states that a driver leads the
//! device through (section 3.1.1).
//!
//! A driver may access them in any width, at any offset, in any order: what the specification does not allow has no
//! effect. A reset ends when the device's thread has stopped the queues: until then the status does not read as
//! zero, and drivers wait for that (section 4.1.4.3.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupts::eventfd;
use crate::pci::Complaints;
use crate::pci::msix::Msix;
use crate::virtio::device::{Device, Queue, Start};

/// Bytes of the common configuration.
pub const COMMON_BYTES: usize = 0x3c;
/// A queue or the configuration has no interrupt.
pub const NO_VECTOR: u16 = 0xffff;
/// `VIRTIO_F_VERSION_1`: the driver must accept it.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// ACKNOWLEDGE and DRIVER: the driver's own notes.
const STATUS_NOTES: u8 = 1 | 2;
/// The driver drives.
const STATUS_DRIVER_OK: u8 = 4;
/// Features have been agreed on.
const STATUS_FEATURES_OK: u8 = 8;
/// DEVICE_NEEDS_RESET: the device says so.
const STATUS_NEEDS_RESET: u8 = 64;
/// The driver has given up.
const STATUS_FAILED: u8 = 128;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_AVAILABLE: usize = 0x28;
const QUEUE_USED: usize = 0x30;

/// Bytes of a descriptor (section 2.7.5).
const DESCRIPTOR_BYTES: u64 = 16;
/// Bytes of an available entry, and of the fields around them with the event index (section 2.7.6).
const AVAILABLE_BYTES: (u64, u64) = (2, 6);
/// The same of the used ring (section 2.7.8).
const USED_BYTES: (u64, u64) = (8, 6);

/// What a driver has written about a queue.
#[derive(Clone, Copy)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// The registers of a device.
pub struct Transport {
    device: Device,
    memory: GuestMemoryMmap<()>,
    pub(super) msix: Msix,
    kicks: Vec<Arc<EventFd>>,
    /// Goes to nobody: the interrupt of queues that have none.
    silent: Arc<EventFd>,
    status: u8,
    /// The epoch of the last reset, and what the status was before it.
    reset: (u64, u8),
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// Notifications that came through here and not through a descriptor.
    notified: Arc<AtomicU64>,
    complaints: Complaints,
}

impl Transport {
    /// The registers after a reset.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(device: Device, memory: GuestMemoryMmap<()>, msix: Msix) -> std::io::Result<Self> {
        let kicks = (0..device.queues).map(|_| eventfd().map(Arc::new)).collect::<Result<_, _>>()?;
        let queues = vec![QueueRegisters::new(device.queue_size_max); usize::from(device.queues)];
        Ok(Self {
            device,
            memory,
            msix,
            kicks,
            silent: Arc::new(eventfd()?),
            status: 0,
            reset: (0, 0),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues,
            notified: Arc::default(),
            complaints: Complaints::default(),
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What notifications of the queues signal.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Notifications that came through here and not through a descriptor.
    pub fn notified(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.notified)
    }

    /// A notification that did not find its descriptor: by way of the configuration space, for example.
    pub fn notify(&mut self, queue: usize) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        if let Some(kick) = self.kicks.get(queue) {
            // A full counter is a pending notification.
            let _ = kick.write(1);
        }
    }

    /// The driver reads the common configuration; beyond its end are zeroes.
    pub fn read_common(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.common();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn common(&self) -> [u8; COMMON_BYTES] {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut bytes = [0; COMMON_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.device.features, self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &self.device.queues.to_le_bytes());
        put(DEVICE_STATUS, &[self.status()]);
        put(CONFIG_GENERATION, &[self.device.link.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(QUEUE_AVAILABLE, &queue.available.to_le_bytes());
            put(QUEUE_USED, &queue.used.to_le_bytes());
        } else {
            put(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        bytes
    }

    /// The device status as it reads.
    fn status(&self) -> u8 {
        let (epoch, before) = self.reset;
        if self.status == 0 && !self.device.link.has_reached(epoch) {
            return before;
        }
        let broken = self.status != 0 && self.device.link.is_broken();
        self.status | if broken { STATUS_NEEDS_RESET } else { 0 }
    }

    /// The driver writes the common configuration. Each field has its own width (section 4.1.3.1); addresses may
    /// also be written in halves.
    pub fn write_common(&mut self, offset: usize, data: &[u8]) {
        if let Ok(byte) = <[u8; 1]>::try_from(data) {
            if offset == DEVICE_STATUS {
                self.write_status(byte[0]);
            }
        } else if let Ok(bytes) = data.try_into() {
            self.write_common_u16(offset, u16::from_le_bytes(bytes));
        } else if let Ok(bytes) = data.try_into() {
            self.write_common_u32(offset, u32::from_le_bytes(bytes));
        } else if data.len() == 8 && offset >= QUEUE_DESCRIPTORS && offset.is_multiple_of(8) {
            let (low, high) = data.split_at(4);
            for (at, half) in [(offset, low), (offset + 4, high)] {
                self.write_common_u32(at, u32::from_le_bytes(half.try_into().expect("four bytes")));
            }
        }
    }

    fn write_common_u16(&mut self, offset: usize, value: u16) {
        match offset {
            CONFIG_VECTOR => {
                self.config_vector = self.vector(value);
                let event = self.msix.event(self.config_vector.into()).cloned();
                self.device.link.set_config_event(event);
            }
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_VECTOR => self.set_queue_vector(value),
            QUEUE_SIZE => {
                let max = self.device.queue_size_max;
                if let Some(queue) = self.selected().filter(|_| value.is_power_of_two() && value <= max) {
                    queue.size = value;
                }
            }
            QUEUE_ENABLE if value == 1 => self.enable_queue(),
            _ => {}
        }
    }

    fn write_common_u32(&mut self, offset: usize, value: u32) {
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE if self.status & STATUS_FEATURES_OK == 0 => {
                let (value, features) = (u64::from(value), self.driver_features);
                match self.driver_feature_select {
                    0 => self.driver_features = features & !0xffff_ffff | value,
                    1 => self.driver_features = features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            _ => {
                let Some(queue) = self.selected() else { return };
                let (field, shift) = match offset & !4 {
                    QUEUE_DESCRIPTORS => (&mut queue.descriptors, offset & 4),
                    QUEUE_AVAILABLE => (&mut queue.available, offset & 4),
                    QUEUE_USED => (&mut queue.used, offset & 4),
                    _ => return,
                };
                let shift = shift as u32 * 8;
                *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
        }
    }

    /// The selected queue if it may still be changed.
    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled)
    }

    /// A vector as it reads back: one that there is not is none (section 4.1.5.1.2.1).
    fn vector(&self, value: u16) -> u16 {
        if usize::from(value) < self.msix.len() { value } else { NO_VECTOR }
    }

    fn set_queue_vector(&mut self, value: u16) {
        let value = self.vector(value);
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get_mut(index) else { return };
        queue.vector = value;
        if self.status & STATUS_DRIVER_OK == 0 {
            return;
        }
        let call = self.call(value);
        self.device.link.want(|wanted| {
            let Some(start) = &mut wanted.start else { return };
            if let Some(Some(queue)) = Arc::make_mut(start).queues.get_mut(index) {
                queue.call = call;
                wanted.calls_changed = true;
            }
        });
    }

    fn call(&self, vector: u16) -> Arc<EventFd> {
        Arc::clone(self.msix.event(vector.into()).unwrap_or(&self.silent))
    }

    /// Enables the selected queue if it can be one. Queues are set up between FEATURES_OK and DRIVER_OK.
    fn enable_queue(&mut self) {
        let right_time =
            self.status & STATUS_FEATURES_OK != 0 && self.status & (STATUS_DRIVER_OK | STATUS_FAILED) == 0;
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get(index).filter(|queue| right_time && !queue.enabled) else { return };
        match queue.misplaced(&self.memory) {
            None => self.queues[index].enabled = true,
            Some(part) => {
                if let Some(n) = self.complaints.count() {
                    let why = format!("its {part} is not in memory or not aligned");
                    log::warn!("queue {index} is not enabled (number {n}): {why}");
                }
            }
        }
    }

    fn write_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        // Bits are only ever added (section 2.1.1).
        let added = status & !self.status;
        self.status |= added & (STATUS_NOTES | STATUS_FAILED);
        let agreed = self.driver_features & !self.device.features == 0
            && self.driver_features & FEATURE_VERSION_1 != 0;
        if added & STATUS_FEATURES_OK != 0 && agreed {
            self.status |= STATUS_FEATURES_OK;
        }
        if added & STATUS_DRIVER_OK != 0 && self.status & STATUS_FEATURES_OK != 0 {
            self.status |= STATUS_DRIVER_OK;
            self.start();
        }
    }

    fn start(&mut self) {
        let queues = self.queues.iter().zip(&self.kicks).map(|(queue, kick)| {
            queue.enabled.then(|| Queue {
                size: queue.size,
                descriptors: queue.descriptors,
                available: queue.available,
                used: queue.used,
                kick: Arc::clone(kick),
                call: self.call(queue.vector),
            })
        });
        let start = Arc::new(Start { features: self.driver_features, queues: queues.collect() });
        self.device.link.want(|wanted| {
            wanted.epoch += 1;
            wanted.start = Some(start);
        });
    }

    fn reset(&mut self) {
        let before = self.status();
        let started = self.status & STATUS_DRIVER_OK != 0;
        let epoch = self.device.link.want(|wanted| {
            wanted.written = None;
            if started {
                wanted.epoch += 1;
                wanted.start = None;
            }
            wanted.epoch
        });
        if started {
            self.reset = (epoch, before);
        }
        self.status = 0;
        self.device.link.reset();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
        self.queues.fill(QueueRegisters::new(self.device.queue_size_max));
    }

    /// The driver writes the device's own configuration space. Anything but 0 and 1 a backend would refuse.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Some((writable, feature)) = self.device.writable else { return };
        let allowed = self.status & STATUS_FEATURES_OK != 0 && self.driver_features & feature != 0;
        if let ([byte @ 0..=1], true) = (data, allowed && offset == writable) {
            self.device.link.write_config(offset, *byte);
            self.device.link.want(|wanted| wanted.written = Some(*byte));
        }
    }
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        Self { size, vector: NO_VECTOR, enabled: false, descriptors: 0, available: 0, used: 0 }
    }

    /// The first part that is not aligned (section 2.7) or does not lie in one region of guest memory.
    fn misplaced(&self, memory: &GuestMemoryMmap<()>) -> Option<&'static str> {
        let size = u64::from(self.size);
        let ring = |(entry, around)| entry * size + around;
        [
            ("descriptor table", self.descriptors, DESCRIPTOR_BYTES * size, 16),
            ("available ring", self.available, ring(AVAILABLE_BYTES), 2),
            ("used ring", self.used, ring(USED_BYTES), 4),
        ]
        .into_iter()
        .find(|(_, address, len, alignment)| {
            let region = memory.find_region(GuestAddress(*address));
            let inside =
                region.is_some_and(|region| region.len() - (address - region.start_addr().0) >= *len);
            !inside || !address.is_multiple_of(*alignment)
        })
        .map(|(part, ..)| part)
    }
}
