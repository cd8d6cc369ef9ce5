//! A vhost-user-blk client without a VM: requests of any buffers against any server's socket.
//!
//! [`Frontend::connect`] negotiates, [`Queue`] submits and completes requests asynchronously.
//! A queue may move to a thread of its own. Data is copied to and from shared memory that the
//! client owns ([`arena`]): each request in flight has a slot of it.

mod arena;

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use arena::{Arena, Slot};

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtqueues to use.
    pub queues: usize,
    /// Entries in each; a power of two.
    pub queue_size: u16,
    /// Virtio features to accept if they are offered.
    pub features: u64,
    /// Requests with data in flight on one queue.
    pub slots: usize,
    /// Bytes of data in one request.
    pub slot_bytes: usize,
    /// Bytes by which buffers are out of alignment.
    pub misalignment: usize,
    /// Data is split into segments of at most this many bytes.
    pub segment_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            features: every_feature(),
            slots: 32,
            slot_bytes: 128 * 1024,
            misalignment: 0,
            segment_bytes: usize::MAX,
        }
    }
}

/// The features that this client can use.
pub fn every_feature() -> u64 {
    let blk = VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::RO
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES;
    let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    blk.bits() | ring.bits()
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Reads that many bytes.
    Read(u64, usize),
    /// Writes these bytes.
    Write(u64, &'a [u8]),
    /// Makes completed writes durable.
    Flush,
    /// Discards that many bytes.
    Discard(u64, u64),
    /// Zeroes that many bytes; the server may or may not unmap them.
    WriteZeroes(u64, u64, bool),
}

/// A finished request.
#[derive(Debug)]
pub struct Finished<'a> {
    /// What the request was submitted with.
    pub tag: u64,
    /// How it ended.
    pub result: io::Result<()>,
    /// What was read; empty for other requests.
    pub data: &'a [u8],
}

/// A connection. Drop it, with its queues, to detach.
pub struct Frontend {
    /// The queues: take them out to use them in threads, and join those before this is dropped.
    pub queues: Vec<Queue>,
    transport: Box<VirtioBlkTransport>,
}

struct Pending {
    tag: u64,
    slot: Option<Slot>,
    /// Bytes to be read.
    len: usize,
}

/// One virtqueue.
pub struct Queue {
    inner: VirtioBlkQueue<'static, Pending>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    arena: Arena,
    outstanding: usize,
    options: Options,
    done: Vec<(Pending, i32)>,
}

impl Frontend {
    /// Connects and sets up the queues.
    ///
    /// # Errors
    /// What the server, the system or the client library says.
    pub fn connect(socket: &Path, options: &Options) -> io::Result<Self> {
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let vhost = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, options.features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
        let inner = VirtioBlkQueue::setup_queues(&mut *transport, options.queues, options.queue_size)?;
        let mut queues = Vec::new();
        for (index, mut inner) in inner.into_iter().enumerate() {
            let arena = Arena::new(options)?;
            transport.map_mem_region(arena.address(), arena.len(), arena.file().as_raw_fd(), 0)?;
            inner.set_used_notif_enabled(true);
            queues.push(Queue {
                inner,
                notifier: transport.get_submission_notifier(index),
                call: transport.get_completion_fd(index),
                arena,
                outstanding: 0,
                options: options.clone(),
                done: Vec::new(),
            });
        }
        Ok(Self { queues, transport })
    }

    /// The configuration space now.
    ///
    /// # Errors
    /// What the connection says.
    pub fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// The disk's size in bytes now.
    ///
    /// # Errors
    /// What the connection says.
    pub fn size(&self) -> io::Result<u64> {
        Ok(u64::from(self.config()?.capacity) * 512)
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// Performs one request on the first queue.
    ///
    /// # Errors
    /// How the request ended, or a timeout.
    pub fn run(&mut self, command: Command<'_>) -> io::Result<Vec<u8>> {
        self.queues[0].run(command)
    }
}

impl Queue {
    /// Requests submitted and not yet reported.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Accepts a request; the server sees it, and [`kick`](Self::kick) tells it to look.
    ///
    /// # Errors
    /// `WouldBlock` when too many requests are in flight; others as the client library says.
    ///
    /// # Panics
    /// If data is longer than a slot.
    pub fn submit(&mut self, tag: u64, command: Command<'_>) -> io::Result<()> {
        // Each request needs a descriptor for its header, one for its status and those of its data.
        let bytes = match command {
            Command::Read(_, len) => len,
            Command::Write(_, data) => data.len(),
            _ => 0,
        };
        assert!(bytes <= self.options.slot_bytes, "{bytes} bytes in one request");
        let slot = if bytes > 0 { Some(self.arena.take().ok_or(io::ErrorKind::WouldBlock)?) } else { None };
        let len = if matches!(command, Command::Read(..)) { bytes } else { 0 };
        if let (Command::Write(_, data), Some(slot)) = (command, &slot) {
            self.arena.fill(slot, data);
        }
        let segments = slot.as_ref().map(|slot| self.arena.segments(slot, bytes, self.options.segment_bytes));
        let segments = segments.unwrap_or_default();
        let copy = slot.clone();
        let pending = Pending { tag, slot, len };
        let submitted = match command {
            Command::Read(offset, _) => self.arena.read(&mut self.inner, offset, &segments, pending),
            Command::Write(offset, _) => self.arena.write(&mut self.inner, offset, &segments, pending),
            Command::Flush => self.inner.flush(pending),
            Command::Discard(offset, len) => self.inner.discard(offset, len, pending),
            Command::WriteZeroes(offset, len, unmap) => self.inner.write_zeroes(offset, len, unmap, pending),
        };
        if submitted.is_err() {
            copy.into_iter().for_each(|slot| self.arena.give(slot));
            // The library's error for a full queue is of no particular kind.
            return submitted.map_err(|error| match error.kind() {
                io::ErrorKind::Other => io::ErrorKind::WouldBlock.into(),
                _ => error,
            });
        }
        self.outstanding += 1;
        Ok(())
    }

    /// Notifies the server of what was submitted, if it wants to be.
    ///
    /// # Errors
    /// What the system says.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.inner.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Calls `f` for each finished request; gives their number. Does not block.
    pub fn poll(&mut self, mut f: impl FnMut(Finished<'_>)) -> usize {
        for completion in self.inner.completions() {
            self.done.push((completion.context, completion.ret));
        }
        let count = self.done.len();
        for (pending, status) in self.done.drain(..) {
            let result = if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-status)) };
            let data = match &pending.slot {
                Some(slot) => self.arena.data(slot, pending.len),
                None => &[],
            };
            f(Finished { tag: pending.tag, result, data });
            pending.slot.into_iter().for_each(|slot| self.arena.give(slot));
        }
        self.outstanding -= count;
        count
    }

    /// Waits for a notification; false if none came in time.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        if self.inner.completions().has_next() {
            return Ok(true);
        }
        let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
        let came = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&timeout))? > 0;
        if came {
            self.call.read()?;
        }
        Ok(came || self.inner.completions().has_next())
    }

    /// Performs one request; nothing else may be outstanding.
    ///
    /// # Errors
    /// How the request ended, or `TimedOut`.
    ///
    /// # Panics
    /// If something is outstanding.
    pub fn run(&mut self, command: Command<'_>) -> io::Result<Vec<u8>> {
        assert_eq!(self.outstanding, 0, "run() is for one request at a time");
        self.submit(0, command)?;
        self.kick()?;
        let mut outcome = None;
        loop {
            self.poll(|finished| outcome = Some(finished.result.map(|()| finished.data.to_vec())));
            if let Some(outcome) = outcome {
                return outcome;
            }
            if !self.wait(Duration::from_secs(20))? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}
