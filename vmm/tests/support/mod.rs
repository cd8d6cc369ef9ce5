//! What the tests of devices share: a machine without processors, in which the test is both the driver and KVM.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod driver;
pub mod server;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use rustix::fs::{MemfdFlags, memfd_create};
use sapwood_vmm::Disk;
use sapwood_vmm::bus::Bus;
use sapwood_vmm::interrupts::{Events, Interrupts};
use sapwood_vmm::virtio::{Devices, Error};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory: two regions.
pub const LOW_BYTES: u64 = 2 << 20;
pub const HIGH: u64 = 1 << 32;
pub const HIGH_BYTES: u64 = 2 << 20;

/// What KVM would keep, kept here.
#[derive(Default)]
pub struct FakeKvm {
    irqfds: Mutex<BTreeMap<u32, EventFd>>,
    pub ioeventfds: Mutex<BTreeMap<u64, EventFd>>,
    routes: Mutex<BTreeMap<u32, (u64, u32)>>,
}

impl Events for FakeKvm {
    fn irqfd(&self, event: &EventFd, gsi: u32, connect: bool) -> io::Result<()> {
        change(&mut self.irqfds.lock().unwrap(), gsi, event, connect)
    }

    fn ioeventfd(&self, event: &EventFd, address: u64, connect: bool) -> io::Result<()> {
        change(&mut self.ioeventfds.lock().unwrap(), address, event, connect)
    }

    #[allow(unsafe_code)]
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let messages = routes.iter().filter(|route| route.type_ == KVM_IRQ_ROUTING_MSI);
        *self.routes.lock().unwrap() = messages
            .map(|route| {
                // SAFETY: the type says which member it is.
                let msi = unsafe { route.u.msi };
                (route.gsi, (u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo), msi.data))
            })
            .collect();
        Ok(())
    }
}

fn change<K: Ord>(map: &mut BTreeMap<K, EventFd>, key: K, event: &EventFd, connect: bool) -> io::Result<()> {
    match (connect, map.contains_key(&key)) {
        (true, true) => Err(io::ErrorKind::AlreadyExists.into()),
        (true, false) => {
            map.insert(key, event.try_clone()?);
            Ok(())
        }
        (false, true) => {
            map.remove(&key);
            Ok(())
        }
        (false, false) => Err(io::ErrorKind::NotFound.into()),
    }
}

impl FakeKvm {
    /// The data of the messages that have been sent since this was asked last.
    pub fn interrupts(&self) -> Vec<u32> {
        let routes = self.routes.lock().unwrap();
        let irqfds = self.irqfds.lock().unwrap();
        irqfds
            .iter()
            .filter(|(_, event)| event.read().is_ok())
            .filter_map(|(gsi, _)| routes.get(gsi).map(|route| route.1))
            .collect()
    }
}

/// Devices, and what they are connected with.
pub struct Machine {
    pub kvm: Arc<FakeKvm>,
    pub memory: GuestMemoryMmap<()>,
    pub ports: Bus,
    mmio: Bus,
    pub devices: Devices,
}

pub fn memory() -> GuestMemoryMmap<()> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(LOW_BYTES + HIGH_BYTES).unwrap();
    let file = Arc::new(file);
    let region = |start, len: u64, offset| {
        (GuestAddress(start), len as usize, Some(FileOffset::from_arc(Arc::clone(&file), offset)))
    };
    let regions = [region(0, LOW_BYTES, 0), region(HIGH, HIGH_BYTES, LOW_BYTES)];
    GuestMemoryMmap::from_ranges_with_files(regions).unwrap()
}

impl Machine {
    pub fn new(disks: &[Disk], cpus: u8) -> Result<Self, Error> {
        let kvm = Arc::new(FakeKvm::default());
        let interrupts = Interrupts::with(kvm.clone()).unwrap();
        let memory = memory();
        let devices = Devices::with(kvm.clone(), &memory, &interrupts, disks, cpus)?;
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        devices.attach(&mut ports, &mut mmio);
        Ok(Self { kvm, memory, ports, mmio, devices })
    }

    /// A guest's write, as KVM takes it: a descriptor that is connected there takes it first.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.kvm.ioeventfds.lock().unwrap().get(&address) {
            Some(event) => event.write(1).unwrap(),
            None => self.mmio.write(address, data),
        }
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    /// Configuration mechanism 1.
    pub fn config_read(&self, slot: u32, register: u32) -> u32 {
        self.ports.write(0xcf8, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
        let mut data = [0; 4];
        self.ports.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn config_write(&self, slot: u32, register: u32, value: u32) {
        self.ports.write(0xcf8, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
        self.ports.write(0xcfc, &value.to_le_bytes());
    }
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never: {what}");
}

/// Random numbers from a seed (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}
