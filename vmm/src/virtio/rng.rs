//! An entropy device (virtio 1.2, section 5.4): one queue, whose writable buffers are filled with random bytes of the
//! host's kernel.
//!
//! Bounds: a request gets at most [`REQUEST_BYTES_MAX`], whatever it asks for, which a device may do. A ring that
//! cannot be breaks the device until the driver resets it.

use std::io::Write;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::interrupts::borrow;
use crate::pci::Complaints;
use crate::virtio::device::{Device, Link, Start, Worker};
use crate::virtio::transport::FEATURE_VERSION_1;

/// Bytes that one request gets at most.
pub const REQUEST_BYTES_MAX: usize = 4096;

/// The virtio device type.
const KIND: u16 = 4;
/// PCI class: other.
const CLASS: u32 = 0xff_0000;
/// Entries in the queue at most.
const QUEUE_SIZE_MAX: u16 = 64;
/// `VIRTIO_F_EVENT_IDX`.
const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// The device, and its thread.
///
/// # Errors
/// The system has no threads or descriptors left.
pub fn start(memory: GuestMemoryMmap<()>) -> std::io::Result<(Device, Worker)> {
    let link = Link::new(Vec::new())?;
    let device = Device {
        kind: KIND,
        class: CLASS,
        features: FEATURE_VERSION_1 | FEATURE_EVENT_IDX,
        queues: 1,
        queue_size_max: QUEUE_SIZE_MAX,
        writable: None,
        link: Arc::clone(&link),
    };
    let run = Arc::clone(&link);
    let rng = Rng { link: run, memory, active: None, complaints: Complaints::default() };
    let worker = Worker::spawn("rng".into(), &link, || {}, move || rng.run())?;
    Ok((device, worker))
}

struct Rng {
    link: Arc<Link>,
    memory: GuestMemoryMmap<()>,
    /// The epoch that runs; its queue if it has one that works.
    active: Option<Active>,
    complaints: Complaints,
}

struct Active {
    start: Arc<Start>,
    queue: Queue,
}

impl Rng {
    fn run(mut self) {
        let mut epoch = 0;
        loop {
            let wanted = self.link.take();
            if wanted.end {
                return;
            }
            if wanted.epoch != epoch {
                epoch = wanted.epoch;
                self.active = wanted.start.and_then(Active::new);
                self.link.reach(epoch);
            } else if let (true, Some(active), Some(start)) =
                (wanted.calls_changed, &mut self.active, wanted.start)
            {
                active.start = start;
            }
            if let Some(active) = &mut self.active
                && let Err(error) = active.serve(&self.memory, || self.link.is_behind())
            {
                if let Some(n) = self.complaints.count() {
                    log::warn!("the random number device needs a reset (number {n}): {error}");
                }
                self.active = None;
                self.link.break_down();
            }
            self.sleep();
        }
    }

    fn sleep(&self) {
        let kick = self.active.as_ref().and_then(Active::kick);
        let fds = [Some(self.link.wake_event()), kick];
        let mut fds: Vec<_> = fds.into_iter().flatten().map(|event| borrow(event)).collect();
        let mut fds: Vec<_> = fds.drain(..).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // A signal: look again.
        let _ = poll(&mut fds, None);
        drop(fds);
        if let Some(kick) = kick {
            let _ = kick.read();
        }
    }
}

impl Active {
    /// The queue that a driver has set up, if it has. The transport has checked where it lies.
    fn new(start: Arc<Start>) -> Option<Self> {
        let of = start.queues.first()?.as_ref()?;
        let mut queue = Queue::new(QUEUE_SIZE_MAX).ok()?;
        queue.try_set_size(of.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(of.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(of.available)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(of.used)).ok()?;
        queue.set_event_idx(start.features & FEATURE_EVENT_IDX != 0);
        queue.set_ready(true);
        Some(Self { start, queue })
    }

    fn kick(&self) -> Option<&vmm_sys_util::eventfd::EventFd> {
        self.start.queues.first()?.as_ref().map(|queue| &*queue.kick)
    }

    /// Answers what is available. A driver that never stops asking does not keep the thread from what else is wanted
    /// of it, which `interrupted` tells.
    fn serve(
        &mut self,
        memory: &GuestMemoryMmap<()>,
        interrupted: impl Fn() -> bool,
    ) -> Result<(), virtio_queue::Error> {
        let mut answered = false;
        loop {
            self.queue.disable_notification(memory)?;
            while !interrupted() {
                let Some(chain) = self.queue.iter(memory)?.next() else { break };
                let head = chain.head_index();
                let len = match chain.writer(memory) {
                    Ok(mut writer) => fill(&mut writer),
                    // Memory that is not there: the buffer goes back as it came.
                    Err(_) => 0,
                };
                self.queue.add_used(memory, head, len)?;
                answered = true;
            }
            if interrupted() || !self.queue.enable_notification(memory)? {
                break;
            }
        }
        if answered && self.queue.needs_notification(memory)? {
            self.interrupt();
        }
        Ok(())
    }

    fn interrupt(&self) {
        if let Some(Some(queue)) = self.start.queues.first() {
            // A full counter is a pending interrupt.
            let _ = queue.call.write(1);
        }
    }
}

/// Random bytes into a chain; how many.
fn fill(writer: &mut virtio_queue::Writer<'_, ()>) -> u32 {
    let mut bytes = [0; REQUEST_BYTES_MAX];
    let len = writer.available_bytes().min(bytes.len());
    if let Err(error) = getrandom::fill(&mut bytes[..len]) {
        log::error!("the host has no random bytes: {error}");
        return 0;
    }
    // It stops where memory does.
    writer.write(&bytes[..len]).unwrap_or(0) as u32
}
