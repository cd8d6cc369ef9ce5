//! The devices of a guest: disks that vhost-user backends serve, and a source of random numbers, as modern virtio
//! devices on a PCI bus. References are to virtio 1.2.
//!
//! - [`device`]: what the processors' side and a device's own thread have in common;
//! - [`transport`]: the registers and the states that a driver leads a device through;
//! - [`mod@function`]: the same as a function on the bus;
//! - [`rng`]: random numbers;
//! - [`block`]: disks that vhost-user backends serve.
//!
//! Notifications reach a device, and interrupts the guest, by descriptors that KVM knows: no request of a guest
//! passes through this process.

pub mod block;
pub mod device;
pub mod function;
pub mod rng;
pub mod transport;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::config::Disk;
use crate::interrupts::{self, Events, Interrupts, eventfd};
use crate::layout::PCI_WINDOW;
use crate::pci::msix::Msix;
use crate::pci::root::{Root, SLOTS};
use device::{Device, Worker};
use function::{BAR_BYTES, VirtioFunction};
use transport::Transport;

/// Disks at most: the bus has [`SLOTS`], one is the host bridge's and one the random number device's.
pub const DISKS_MAX: usize = SLOTS - 2;

/// Why the devices cannot be made, or why one of them cannot go on.
#[derive(Debug, Error)]
pub enum Error {
    /// More disks than there are slots.
    #[error("{0} disks: there can be at most {DISKS_MAX}")]
    TooManyDisks(usize),
    /// A backend does not answer, or is not one.
    #[error("{}: {error}", socket.display())]
    Disk {
        /// The backend's socket.
        socket: PathBuf,
        /// What is wrong.
        error: block::Error,
    },
    /// Interrupts could not be made.
    #[error(transparent)]
    Interrupts(#[from] interrupts::Error),
    /// Threads or descriptors could not be made.
    #[error("cannot make a device: {0}")]
    System(#[from] io::Error),
}

/// Says that a device cannot go on, and the machine with it.
pub struct Failure {
    event: EventFd,
    error: Mutex<Option<Error>>,
}

impl Failure {
    /// Becomes readable when a device has failed.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Why, if one has; only the first is kept, and only told once.
    pub fn take(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn report(&self, error: Error) {
        log::error!("{error}");
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        // A full counter is readable.
        let _ = self.event.write(1);
    }
}

/// The devices of a machine. Dropping them ends their threads: not before the processors have stopped.
pub struct Devices {
    root: Arc<Mutex<Root>>,
    workers: Vec<Worker>,
    failure: Arc<Failure>,
    notified: Vec<Arc<AtomicU64>>,
}

impl Devices {
    /// Connects to the backends and makes the devices: the disks in their order from the first slot on, then the
    /// random number device. `cpus` bounds the queues of each disk.
    ///
    /// # Errors
    /// A backend that does not answer within a few seconds, or cannot serve this guest; what the system says.
    pub fn new(
        vm: Arc<VmFd>,
        memory: &GuestMemoryMmap<()>,
        interrupts: &Interrupts,
        disks: &[Disk],
        cpus: u8,
    ) -> Result<Self, Error> {
        Self::with(vm, memory, interrupts, disks, cpus)
    }

    /// The same over anything that takes events.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(
        events: Arc<dyn Events>,
        memory: &GuestMemoryMmap<()>,
        interrupts: &Interrupts,
        disks: &[Disk],
        cpus: u8,
    ) -> Result<Self, Error> {
        if disks.len() > DISKS_MAX {
            return Err(Error::TooManyDisks(disks.len()));
        }
        let failure = Arc::new(Failure { event: eventfd()?, error: Mutex::default() });
        let mut devices = Vec::with_capacity(disks.len() + 1);
        for disk in disks {
            let report = Arc::clone(&failure);
            let socket = disk.socket.clone();
            let started = block::start(disk, memory, cpus, move |error| {
                report.report(Error::Disk { socket: socket.clone(), error });
            });
            devices.push(started.map_err(|error| Error::Disk { socket: disk.socket.clone(), error })?);
        }
        devices.push(rng::start(memory.clone())?);

        let mut root = Root::default();
        let mut workers = Vec::with_capacity(devices.len());
        let mut notified = Vec::with_capacity(devices.len());
        for ((device, worker), bar) in
            devices.into_iter().zip((PCI_WINDOW.start as u32..).step_by(BAR_BYTES as usize))
        {
            let function = function(device, memory, interrupts, bar, &events)?;
            notified.push(function.transport().notified());
            root.add(Box::new(function));
            workers.push(worker);
        }
        let root = Arc::new(Mutex::new(root));
        Ok(Self { root, workers, failure, notified })
    }

    /// Puts the devices where the processors reach them.
    pub fn attach(&self, ports: &mut Bus, memory: &mut Bus) {
        Root::attach(&self.root, ports, memory);
    }

    /// Says when a device cannot go on.
    pub fn failure(&self) -> &Arc<Failure> {
        &self.failure
    }

    /// Notifications that took the way through this process, since no descriptor was connected where they went: none,
    /// if the guest does nothing unusual.
    pub fn notified(&self) -> u64 {
        self.notified.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // All at once: each waits a while for a backend that does not answer.
        self.workers.iter_mut().for_each(Worker::tell_end);
    }
}

fn function(
    device: Device,
    memory: &GuestMemoryMmap<()>,
    interrupts: &Interrupts,
    bar: u32,
    events: &Arc<dyn Events>,
) -> Result<VirtioFunction, Error> {
    let msix = Msix::new(interrupts, usize::from(device.queues) + 1)?;
    let transport = Transport::new(device, memory.clone(), msix)?;
    Ok(VirtioFunction::new(transport, bar, Arc::clone(events)))
}
