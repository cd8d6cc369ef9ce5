//! The device seam: what an image format offers to a guest, and how a server drives it.
//!
//! A [`BlockDevice`] is shared by threads; each thread that does I/O on it makes itself a
//! [`DeviceQueue`] over an engine of its own. A queue is a state machine that is polled: it has
//! no thread and never blocks except in [`DeviceQueue::wait`].

use std::fmt;
use std::sync::Arc;

use crate::Errno;
use crate::buffer::Memory;
use crate::engine::{Engine, Time};
use crate::units::GuestOffset;

/// What a request asks for.
#[derive(Debug)]
pub enum Command {
    /// Fills the memory from the disk.
    Read(Memory),
    /// Writes the memory to the disk.
    Write(Memory),
    /// Makes every write that was reported before this request was submitted durable. The
    /// request's range is ignored.
    Flush,
    /// The guest no longer needs the range. It reads as zeroes afterwards where whole 4 KiB
    /// blocks were discarded; partial blocks may keep their contents. Of a raw disk whose storage
    /// cannot give space back as zeroes, what is discarded reads as anything.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
}

/// One request to a device.
#[derive(Debug)]
pub struct Request {
    /// Comes back in [`Done`]; chosen by the caller, unique among its queue's outstanding ones.
    pub tag: u64,
    /// First byte. Reads and writes: a multiple of the logical block size (512).
    pub offset: GuestOffset,
    /// Length in bytes, a multiple of 512; for reads and writes that of the memory.
    pub len: u64,
    /// What to do.
    pub command: Command,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Done {
    /// The request's tag.
    pub tag: u64,
    /// Success, or why not.
    pub result: Result<(), DeviceError>,
}

/// Why a request failed, in the detail that a guest or a tool can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The storage below failed.
    Io(Errno),
    /// No space is left for the write on the host. As after any failed write, each sector is as it
    /// was or as it was to be; the write can be repeated when there is space again.
    NoSpace,
    /// The device, or its image, is read-only.
    ReadOnly,
    /// The range is not inside the disk or not aligned to sectors.
    OutOfRange,
    /// An earlier failure of a write or sync made the device read-only until it is reopened: the
    /// host may have lost data that it had accepted.
    Latched,
    /// Stored bytes do not make sense (a checksum or reference is wrong).
    Corrupt,
    /// The device does not do this.
    Unsupported,
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(errno) => write!(f, "input/output error: {errno}"),
            Self::NoSpace => f.write_str("no space left on the host"),
            Self::ReadOnly => f.write_str("the device is read-only"),
            Self::OutOfRange => f.write_str("the range does not lie on sectors of the disk"),
            Self::Latched => f.write_str("an earlier write or sync failed: read-only until reopened"),
            Self::Corrupt => f.write_str("stored data is corrupt"),
            Self::Unsupported => f.write_str("the device does not support this"),
        }
    }
}

impl std::error::Error for DeviceError {}

impl From<Errno> for DeviceError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace,
            other => Self::Io(other),
        }
    }
}

/// What a device tells about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512. Changes when the disk is resized.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The size in bytes that writes should be a multiple of, and aligned to, to be cheap.
    pub physical_block: u32,
    /// The granularity in bytes of discards.
    pub discard_granularity: u32,
}

/// A disk: shared by threads, used through queues.
pub trait BlockDevice: Send + Sync + 'static {
    /// The engine its queues run on.
    type Engine: Engine;
    /// A queue of one thread.
    type Queue: DeviceQueue<Engine = Self::Engine>;

    /// Size and properties now.
    fn geometry(&self) -> Geometry;

    /// A queue for the calling thread, which must also be the one that uses it.
    fn queue(self: &Arc<Self>, engine: Self::Engine) -> Self::Queue;

    /// Whether a write may be reported before it is durable (the default). When off, each write
    /// completes after a sync (virtio 1.2, section 5.2.5, `VIRTIO_BLK_F_CONFIG_WCE`).
    fn set_write_cache(&self, enabled: bool);
}

/// One thread's access to a device. Dropping it abandons what is outstanding; drain first.
pub trait DeviceQueue {
    /// The engine below.
    type Engine: Engine;

    /// Accepts a request; it starts with the next poll. All outcomes arrive through
    /// [`poll`](Self::poll), never in submission order by promise.
    fn submit(&mut self, request: Request);

    /// Starts what was submitted, moves everything on that can move, and appends finished
    /// requests to `done`. Does not block.
    fn poll(&mut self, done: &mut Vec<Done>);

    /// Blocks until polling may bring something new, or `deadline`. May return early.
    fn wait(&mut self, deadline: Option<Time>);

    /// Lets nothing wait any more that a device could do but holds back, such as for a limit: the caller takes no more
    /// requests, and waits for all to end.
    fn hurry(&mut self) {}

    /// Requests submitted and not yet reported, and whatever else the device does on this queue's
    /// engine, which must end before the queue is dropped. That ends without a report: poll, look
    /// here, and only then wait (as [`drain`] does).
    fn outstanding(&self) -> usize;

    /// Access to the thread's engine: to watch a descriptor, to tell the time, to get a waker.
    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Self::Engine) -> R) -> R;
}

/// Polls until nothing is outstanding, appending to `done`.
pub fn drain<Q: DeviceQueue>(queue: &mut Q, done: &mut Vec<Done>) {
    loop {
        queue.poll(done);
        if queue.outstanding() == 0 {
            return;
        }
        queue.wait(None);
    }
}

/// Submits one request and waits for it: for tools.
///
/// # Errors
/// What the device reported.
///
/// # Panics
/// If other requests are outstanding.
pub fn run<Q: DeviceQueue>(
    queue: &mut Q,
    offset: GuestOffset,
    len: u64,
    command: Command,
) -> Result<(), DeviceError> {
    assert_eq!(queue.outstanding(), 0, "run() is for one request at a time");
    queue.submit(Request { tag: 0, offset, len, command });
    let mut done = Vec::with_capacity(1);
    drain(queue, &mut done);
    done.pop().expect("the one request").result
}
