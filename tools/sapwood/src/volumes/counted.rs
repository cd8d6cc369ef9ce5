//! A device that counts the requests of its guest: who works in the background looks whether it is busy.
//!
//! Each queue has a counter of its own, which only its thread writes: counting costs the guest nothing that it
//! would notice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sapwood_blockdev::device::{BlockDevice, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::Time;

/// On a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Counter(AtomicU64);

/// A device with counters.
pub struct Counted<D> {
    inner: Arc<D>,
    counters: Mutex<Vec<Arc<Counter>>>,
}

/// A queue with its counter.
pub struct CountedQueue<Q> {
    inner: Q,
    counter: Arc<Counter>,
}

impl<D> Counted<D> {
    /// Counts the requests to a device.
    pub fn new(inner: Arc<D>) -> Arc<Self> {
        Arc::new(Self { inner, counters: Mutex::default() })
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        let counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        counters.iter().map(|counter| counter.0.load(Ordering::Relaxed)).sum()
    }
}

impl<D: BlockDevice> BlockDevice for Counted<D> {
    type Engine = D::Engine;
    type Queue = CountedQueue<D::Queue>;

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn queue(self: &Arc<Self>, engine: D::Engine) -> Self::Queue {
        let counter = Arc::<Counter>::default();
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counter));
        CountedQueue { inner: self.inner.queue(engine), counter }
    }

    fn set_write_cache(&self, enabled: bool) {
        self.inner.set_write_cache(enabled);
    }
}

impl<Q: DeviceQueue> DeviceQueue for CountedQueue<Q> {
    type Engine = Q::Engine;

    fn submit(&mut self, request: Request) {
        let counted = self.counter.0.load(Ordering::Relaxed);
        self.counter.0.store(counted.wrapping_add(1), Ordering::Relaxed);
        self.inner.submit(request);
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.inner.poll(done);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.inner.wait(deadline);
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Self::Engine) -> R) -> R {
        self.inner.with_engine(f)
    }
}
