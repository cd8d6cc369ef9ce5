//! A disk in memory over a real engine, with what tests want to decide: how long requests take,
//! whether they fail.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sapwood_blockdev::Errno;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceError, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time, UringEngine, WatchFd};

pub struct RamDisk<E = UringEngine> {
    engine: PhantomData<fn() -> E>,
    data: Mutex<Vec<u8>>,
    pub read_only: bool,
    /// How long each request takes, in microseconds.
    pub delay_us: AtomicU64,
    /// Whether requests fail.
    pub fail: AtomicBool,
    pub write_cache: AtomicBool,
    pub flushes: AtomicUsize,
    /// Requests submitted and not yet reported, on all queues.
    pub outstanding: AtomicUsize,
    pub queues: AtomicUsize,
}

impl<E> RamDisk<E> {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self::with(size, false))
    }

    pub fn with(size: usize, read_only: bool) -> Self {
        Self {
            engine: PhantomData,
            data: Mutex::new(vec![0; size]),
            read_only,
            delay_us: AtomicU64::new(0),
            fail: AtomicBool::new(false),
            write_cache: AtomicBool::new(true),
            flushes: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
            queues: AtomicUsize::new(0),
        }
    }

    pub fn resize(&self, size: usize) {
        self.data.lock().unwrap().resize(size, 0);
    }

    fn perform(&self, request: Request) -> Result<(), DeviceError> {
        let mut data = self.data.lock().unwrap();
        if self.fail.load(Ordering::Relaxed) {
            return Err(DeviceError::Io(Errno::IO));
        }
        let (start, len) = (request.offset.0 as usize, request.len as usize);
        if matches!(request.command, Command::Flush) {
            self.flushes.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let place = data.get_mut(start..start + len).ok_or(DeviceError::OutOfRange)?;
        match request.command {
            Command::Read(mut memory) => memory.write_at(0, place),
            _ if self.read_only => return Err(DeviceError::ReadOnly),
            Command::Write(memory) => memory.read_at(0, place),
            Command::WriteZeroes => place.fill(0),
            Command::Discard => {
                let first = start.next_multiple_of(4096) - start;
                let last = (start + len) / 4096 * 4096;
                if last > start + first {
                    place[first..last - start].fill(0);
                }
            }
            Command::Flush => unreachable!(),
        }
        Ok(())
    }
}

pub struct RamQueue<E> {
    disk: Arc<RamDisk<E>>,
    engine: E,
    pending: Vec<(Time, Request)>,
}

impl<E: WatchFd> BlockDevice for RamDisk<E> {
    type Engine = E;
    type Queue = RamQueue<E>;

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.data.lock().unwrap().len() as u64,
            read_only: self.read_only,
            physical_block: 4096,
            discard_granularity: 4096,
        }
    }

    fn queue(self: &Arc<Self>, engine: E) -> RamQueue<E> {
        self.queues.fetch_add(1, Ordering::Relaxed);
        RamQueue { disk: Arc::clone(self), engine, pending: Vec::new() }
    }

    fn set_write_cache(&self, enabled: bool) {
        self.write_cache.store(enabled, Ordering::Relaxed);
    }
}

impl<E: Engine> DeviceQueue for RamQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        self.disk.outstanding.fetch_add(1, Ordering::Relaxed);
        // Some requests take longer: completions are out of order.
        let delay = self.disk.delay_us.load(Ordering::Relaxed) * (1 + request.offset.0 / 512 % 3);
        self.pending.push((self.engine.now() + Duration::from_micros(delay), request));
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.engine.collect(&mut Vec::new());
        let now = self.engine.now();
        let mut index = 0;
        while index < self.pending.len() {
            if self.pending[index].0 > now {
                index += 1;
                continue;
            }
            let (_, request) = self.pending.swap_remove(index);
            self.disk.outstanding.fetch_sub(1, Ordering::Relaxed);
            done.push(Done { tag: request.tag, result: self.disk.perform(request) });
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        let first = self.pending.iter().map(|(until, _)| *until).min();
        let until = [deadline, first].into_iter().flatten().min();
        self.engine.wait(until);
    }

    fn outstanding(&self) -> usize {
        self.pending.len()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        f(&mut self.engine)
    }
}
