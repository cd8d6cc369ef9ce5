//! A device between two threads: the processors' transport says what it wants the device to do, the device's own
//! thread does it when it can and says what has become of it. Neither waits for the other: a processor is never
//! held up by a backend, and what the guest wants is a state, not a queue of orders that could grow.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::interrupts::eventfd;

/// A queue as the driver has set it up. Its parts lie in guest memory, each in one region.
#[derive(Clone)]
pub struct Queue {
    /// Entries, a power of two.
    pub size: u16,
    /// Guest address of the descriptors.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// What the driver's notifications signal.
    pub kick: Arc<EventFd>,
    /// What interrupts the driver.
    pub call: Arc<EventFd>,
}

/// What a driver has agreed on when it said DRIVER_OK.
#[derive(Clone)]
pub struct Start {
    /// Features.
    pub features: u64,
    /// All queues of the device; those that are not enabled are `None`.
    pub queues: Vec<Option<Queue>>,
}

/// What the device's thread is to bring about.
#[derive(Clone, Default)]
pub struct Wanted {
    /// Counts starts and resets.
    pub epoch: u64,
    /// `None`: the driver has reset the device, or has not started it yet.
    pub start: Option<Arc<Start>>,
    /// A queue's interrupt has another descriptor since the thread has looked.
    pub calls_changed: bool,
    /// What the driver has written to the writable byte of the configuration space since it began.
    pub written: Option<u8>,
    /// The machine ends.
    pub end: bool,
}

/// The configuration space as the guest reads it.
#[derive(Default)]
struct Config {
    bytes: Vec<u8>,
    generation: u8,
    /// What the driver has written since it began, and where: it reads that, whatever the device says.
    written: Option<(usize, u8)>,
    /// What interrupts the driver when it changes.
    event: Option<Arc<EventFd>>,
}

/// What both threads see.
pub struct Link {
    wanted: Mutex<Wanted>,
    /// Tells the device's thread to look at what is wanted.
    wake: EventFd,
    /// The epoch that the device's thread has brought about.
    reached: AtomicU64,
    /// The epoch in which the device broke: it cannot go on until the driver resets it. Zero: none; a driver starts with
    /// the first.
    broken: AtomicU64,
    isr: AtomicU8,
    config: Mutex<Config>,
}

/// ISR status: the configuration has changed (virtio 1.2, section 4.1.4.5).
pub const ISR_CONFIG: u8 = 2;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// A device at rest.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new(config: Vec<u8>) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            wanted: Mutex::default(),
            wake: eventfd()?,
            reached: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            isr: AtomicU8::new(0),
            config: Mutex::new(Config { bytes: config, ..Config::default() }),
        }))
    }

    /// Changes what is wanted, and tells the device's thread.
    pub fn want<R>(&self, change: impl FnOnce(&mut Wanted) -> R) -> R {
        let result = change(&mut lock(&self.wanted));
        self.wake();
        result
    }

    /// Lets the device's thread look.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is woken anyway.
        let _ = self.wake.write(1);
    }

    /// What signals that something else is wanted.
    pub fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// For the device's thread: what is wanted now. What it is told only once is taken.
    pub fn take(&self) -> Wanted {
        let _ = self.wake.read();
        let mut wanted = lock(&self.wanted);
        let taken = wanted.clone();
        wanted.calls_changed = false;
        taken
    }

    /// For the device's thread, while it waits for something else: whether anything new is wanted.
    pub fn is_behind(&self) -> bool {
        let wanted = lock(&self.wanted);
        wanted.end || wanted.epoch != self.reached.load(Ordering::Acquire)
    }

    /// Whether the machine ends.
    pub fn is_ending(&self) -> bool {
        lock(&self.wanted).end
    }

    /// For the device's thread: an epoch has been brought about.
    pub fn reach(&self, epoch: u64) {
        self.reached.store(epoch, Ordering::Release);
    }

    /// Whether the device's thread has brought an epoch about.
    pub fn has_reached(&self, epoch: u64) -> bool {
        self.reached.load(Ordering::Acquire) >= epoch
    }

    /// For the device's thread: the device needs a reset (virtio 1.2, section 2.1.2), unless the driver has reset it
    /// meanwhile.
    pub fn break_down(&self) {
        self.broken.store(self.reached.load(Ordering::Acquire), Ordering::Release);
        self.interrupt_config(&lock(&self.config));
    }

    /// Whether the device needs a reset.
    pub fn is_broken(&self) -> bool {
        let broken = self.broken.load(Ordering::Acquire);
        broken != 0 && broken == lock(&self.wanted).epoch
    }

    /// The driver has reset the device.
    pub fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        let mut config = lock(&self.config);
        (config.event, config.written) = (None, None);
    }

    /// The configuration space is different now; the driver hears of it.
    pub fn set_config(&self, bytes: &[u8]) {
        let mut config = lock(&self.config);
        if config.bytes != bytes {
            config.bytes = bytes.to_vec();
            config.generation = config.generation.wrapping_add(1);
            self.interrupt_config(&config);
        }
    }

    /// The configuration space before any driver has seen it.
    pub fn write_all_config(&self, bytes: Vec<u8>) {
        lock(&self.config).bytes = bytes;
    }

    /// A driver's own change, of which it need not hear.
    pub fn write_config(&self, offset: usize, byte: u8) {
        lock(&self.config).written = Some((offset, byte));
    }

    /// The configuration space.
    pub fn config(&self) -> Vec<u8> {
        lock(&self.config).bytes.clone()
    }

    /// The driver reads the configuration space; beyond its end are zeroes.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = lock(&self.config);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.bytes.iter().skip(offset)) {
            *to = *from;
        }
        if let Some((at, byte)) = config.written
            && let Some(to) = at.checked_sub(offset).and_then(|at| data.get_mut(at))
        {
            *to = byte;
        }
    }

    /// Changes whenever the configuration space does.
    pub fn generation(&self) -> u8 {
        lock(&self.config).generation
    }

    /// What interrupts the driver when the configuration changes.
    pub fn set_config_event(&self, event: Option<Arc<EventFd>>) {
        lock(&self.config).event = event;
    }

    /// Reads and clears the ISR status.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    fn interrupt_config(&self, config: &Config) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        if let Some(event) = &config.event {
            // A full counter is a pending interrupt.
            let _ = event.write(1);
        }
    }
}

/// A device as the transport sees it.
pub struct Device {
    /// The virtio device type (virtio 1.2, section 5).
    pub kind: u16,
    /// The PCI class code.
    pub class: u32,
    /// Features offered.
    pub features: u64,
    /// Queues, at least one.
    pub queues: u16,
    /// Entries in a queue at most, a power of two.
    pub queue_size_max: u16,
    /// The one byte of the configuration space that a driver may write, to 0 or 1, and the feature that it needs for
    /// that.
    pub writable: Option<(usize, u64)>,
    /// What it shares with its thread.
    pub link: Arc<Link>,
}

/// How long a device's thread may take to end in order.
const END_MAX: Duration = Duration::from_secs(2);

/// The thread of a device. Dropping it ends it.
pub struct Worker {
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    /// Closed when the thread ends.
    ended: Receiver<()>,
    /// When it has to have ended, once it was told to.
    deadline: Option<Instant>,
    /// Makes it leave what it waits for besides the wake event.
    interrupt: Box<dyn Fn() + Send + Sync>,
}

impl Worker {
    /// Runs `body` in a thread of its own until it returns, which it does soon after the end is wanted, at the latest
    /// when `interrupt` has been called.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn spawn(
        name: String,
        link: &Arc<Link>,
        interrupt: impl Fn() + Send + Sync + 'static,
        body: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (end, ended) = channel::<()>();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            body();
            drop(end);
        })?;
        let interrupt = Box::new(interrupt);
        Ok(Self { link: Arc::clone(link), thread: Some(thread), ended, deadline: None, interrupt })
    }

    /// Tells the thread to end, without waiting.
    pub fn tell_end(&mut self) {
        self.link.want(|wanted| wanted.end = true);
        self.deadline.get_or_insert_with(|| Instant::now() + END_MAX);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell_end();
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(left.unwrap_or(END_MAX)) {
            (self.interrupt)();
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a device's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_breaks_while_it_is_reset_is_not_broken_for_the_next_driver() {
        let link = Link::new(Vec::new()).unwrap();
        let epoch = || link.want(|wanted| wanted.epoch += 1);
        epoch();
        link.reach(1);
        link.break_down();
        assert!(link.is_broken());
        epoch();
        link.reset();
        assert!(!link.is_broken());
        // The thread has not seen the reset yet.
        link.break_down();
        link.reach(2);
        assert!(!link.is_broken());
    }
}
