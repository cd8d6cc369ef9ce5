//! One connection to a vhost-user backend.
//!
//! The backend is no enemy, since it has the guest's memory, but it may be slow or broken: what it says is checked,
//! and what can hang is done in the disk's own thread, where [`shut_down`] ends it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::interrupts::borrow;
use crate::virtio::block::{CONFIG_WRITEBACK, Error, protocol_wanted, rings};
use crate::virtio::device::{Link, Queue, Start};
use crate::virtio::transport::FEATURE_VERSION_1;

/// Bytes of the configuration space that are read: up to the write-zeroes fields (section 5.2.4).
pub const CONFIG_BYTES: usize = 60;

/// How long a backend may take to say its first word.
const ANSWER_MAX: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const FEATURE_PROTOCOL: u64 = 1 << 30;
/// A driver's access to the configuration: 0 in the specification ("Virtio device config space"), where 1 is
/// migration. The crate's names are for other values.
const BY_DRIVER: VhostUserConfigFlags = VhostUserConfigFlags::empty();
/// Queues that a message can name.
const QUEUES_MAX: u64 = 256;

/// Header of a message (vhost-user, "Message header"): request, flags, size; 4 bytes each.
const HEADER_BYTES: usize = 12;
/// Flags: the version.
const FLAG_VERSION: u32 = 1;
/// Flags: this is a reply.
const FLAG_REPLY: u32 = 4;
/// Flags: a reply is asked for.
const FLAG_NEED_REPLY: u32 = 8;
/// `VHOST_USER_GET_FEATURES`.
const GET_FEATURES: u32 = 1;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// Bytes of a message of a backend at most; none that it may send here has any.
const BODY_BYTES_MAX: usize = 4096;

/// The socket of the connection that there is, for shutting it down from another thread.
pub type Handle = Arc<Mutex<Option<UnixStream>>>;

/// Ends whatever the disk's thread waits for from the backend.
pub fn shut_down(handle: &Handle) {
    if let Some(stream) = &*handle.lock().unwrap_or_else(PoisonError::into_inner) {
        // It fails if the other end has gone.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// What a backend has.
pub struct Offer {
    /// Virtio features, and those of vhost-user.
    pub features: u64,
    /// Queues.
    pub queues: u16,
    /// Its configuration space: [`CONFIG_BYTES`].
    pub config: Vec<u8>,
}

/// A connection that has been negotiated.
pub struct Connection {
    frontend: Frontend,
    stream: UnixStream,
    channel: Option<Channel>,
    protocol: VhostUserProtocolFeatures,
}

/// The region in which a backend keeps note of what is in flight.
pub type Inflight = (VhostUserInflight, File);

/// Adds what was tried to an error of the protocol.
fn tried<T>(what: &'static str, result: vhost::Result<T>) -> Result<T, Error> {
    result.map_err(|error| Error::Message { what, error })
}

impl Connection {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens or answers, the backend lacks something, or another order has come over `link` meanwhile.
    pub fn open(socket: &Path, link: &Link, handle: &Handle) -> Result<(Self, Offer), Error> {
        let mut stream = dial(socket)?;
        *handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        probe(&mut stream, link)?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, QUEUES_MAX);
        tried("SET_OWNER", frontend.set_owner())?;
        let features = tried("GET_FEATURES", frontend.get_features())?;
        for (feature, name) in
            [(FEATURE_PROTOCOL, "VHOST_USER_F_PROTOCOL_FEATURES"), (FEATURE_VERSION_1, "VIRTIO_F_VERSION_1")]
        {
            if features & feature == 0 {
                return Err(Error::Lacks(name));
            }
        }
        let has = tried("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())?;
        let protocol = has & protocol_wanted();
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(Error::Lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        tried("SET_PROTOCOL_FEATURES", frontend.set_protocol_features(protocol))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            tried("GET_QUEUE_NUM", frontend.get_queue_num())?.min(QUEUES_MAX) as u16
        } else {
            1
        };
        if queues == 0 {
            return Err(Error::Lacks("queues"));
        }
        let channel = if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            tried("SET_BACKEND_REQ_FD", frontend.set_backend_request_fd(&theirs))?;
            Some(Channel::new(ours)?)
        } else {
            None
        };
        let mut connection = Self { frontend, stream, channel, protocol };
        let config = connection.config()?;
        Ok((connection, Offer { features, queues, config }))
    }

    /// The configuration space.
    ///
    /// # Errors
    /// The message fails.
    pub fn config(&mut self) -> Result<Vec<u8>, Error> {
        let buffer = [0; CONFIG_BYTES];
        let config = self.frontend.get_config(0, CONFIG_BYTES as u32, BY_DRIVER, &buffer);
        Ok(tried("GET_CONFIG", config)?.1)
    }

    /// The driver has switched the write cache.
    ///
    /// # Errors
    /// The message fails.
    pub fn set_writeback(&mut self, byte: u8) -> Result<(), Error> {
        tried("SET_CONFIG", self.frontend.set_config(CONFIG_WRITEBACK as u32, BY_DRIVER, &[byte]))
    }

    /// Whether the backend keeps note of what is in flight.
    pub fn keeps_note(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Tells the backend what the driver has agreed on, and shares the guest's memory.
    ///
    /// # Errors
    /// A message fails.
    pub fn prepare(&mut self, features: u64, memory: &GuestMemoryMmap<()>) -> Result<(), Error> {
        tried("SET_FEATURES", self.frontend.set_features(features | FEATURE_PROTOCOL))?;
        let regions: Result<Vec<_>, _> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.map_err(|_| Error::Memory)?;
        tried("SET_MEM_TABLE", self.frontend.set_mem_table(&regions))?;
        Ok(())
    }

    /// A new region for what is in flight.
    ///
    /// # Errors
    /// The message fails.
    pub fn inflight(&mut self, start: &Start) -> Result<Inflight, Error> {
        let size = start.queues.iter().flatten().map(|queue| queue.size).max().unwrap_or(1);
        let wanted = VhostUserInflight::new(0, 0, start.queues.len() as u16, size);
        tried("GET_INFLIGHT_FD", self.frontend.get_inflight_fd(&wanted))
    }

    /// Hands the region to the backend; before the queues run.
    ///
    /// # Errors
    /// The message fails.
    pub fn set_inflight(&mut self, (description, file): &Inflight) -> Result<(), Error> {
        tried("SET_INFLIGHT_FD", self.frontend.set_inflight_fd(description, file.as_raw_fd()))
    }

    /// Starts a queue that goes on behind the requests that have been answered.
    ///
    /// # Errors
    /// A message fails.
    pub fn start(&mut self, index: usize, queue: &Queue, memory: &GuestMemoryMmap<()>) -> Result<(), Error> {
        let host = |address| {
            let host = memory.get_host_address(GuestAddress(address));
            host.map(|host| host as u64).map_err(|_| Error::Memory)
        };
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: host(queue.descriptors)?,
            used_ring_addr: host(queue.used)?,
            avail_ring_addr: host(queue.available)?,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        tried("SET_VRING_NUM", frontend.set_vring_num(index, queue.size))?;
        tried("SET_VRING_BASE", frontend.set_vring_base(index, rings::used(memory, queue)))?;
        tried("SET_VRING_ADDR", frontend.set_vring_addr(index, &addresses))?;
        tried("SET_VRING_CALL", frontend.set_vring_call(index, &queue.call))?;
        tried("SET_VRING_KICK", frontend.set_vring_kick(index, &queue.kick))?;
        tried("SET_VRING_ENABLE", frontend.set_vring_enable(index, true))
    }

    /// Gives a running queue another interrupt.
    ///
    /// # Errors
    /// The message fails.
    pub fn set_call(&mut self, index: usize, queue: &Queue) -> Result<(), Error> {
        tried("SET_VRING_CALL", self.frontend.set_vring_call(index, &queue.call))
    }

    /// Stops queues; returns when the backend has finished with them, and with the guest's memory.
    ///
    /// # Errors
    /// A message fails.
    pub fn stop(&mut self, start: &Start) -> Result<(), Error> {
        let running = || start.queues.iter().enumerate().filter(|(_, queue)| queue.is_some());
        for (index, _) in running() {
            tried("GET_VRING_BASE", self.frontend.get_vring_base(index))?;
        }
        for (index, _) in running() {
            tried("SET_VRING_ENABLE", self.frontend.set_vring_enable(index, false))?;
        }
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            tried("RESET_DEVICE", self.frontend.reset_device())?;
        }
        Ok(())
    }

    /// What to wait for: the connection, and the notices of the backend.
    pub fn watched(&self) -> (&UnixStream, Option<&UnixStream>) {
        (&self.stream, self.channel.as_ref().map(|channel| &channel.stream))
    }

    /// Reads the backend's notices; whether the configuration has changed.
    pub fn notices(&mut self) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        channel.read().unwrap_or_else(|error| {
            log::warn!("the backend's notices of changes have ended: {error}");
            self.channel = None;
            false
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The frontend has a descriptor of its own, but the other end is to see the end now.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Connects, without waiting for a listener whose queue of callers is full.
fn dial(path: &Path) -> Result<UnixStream, Error> {
    let refused = |error: rustix::io::Errno| Error::Connect(error.into());
    let address = SocketAddrUnix::new(path).map_err(refused)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(refused)?;
    connect(&fd, &address).map_err(refused)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Asks a first question by hand, since the answer may never come: a backend that serves somebody else takes
/// connections and leaves them alone.
fn probe(stream: &mut UnixStream, link: &Link) -> Result<(), Error> {
    if link.is_behind() {
        // The end may have been wanted before there was a socket to shut down.
        return Err(Error::Interrupted);
    }
    let mut message = [0; HEADER_BYTES];
    for (field, value) in message.chunks_exact_mut(4).zip([GET_FEATURES, FLAG_VERSION, 0]) {
        field.copy_from_slice(&value.to_ne_bytes());
    }
    stream.write_all(&message)?;
    let mut fds = [
        PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(borrow(link.wake_event()), PollFlags::IN),
    ];
    match poll(&mut fds, Some(&ANSWER_MAX)) {
        Ok(0) => return Err(Error::Silent),
        Ok(_) if fds[0].revents().is_empty() => return Err(Error::Interrupted),
        Ok(_) => {}
        Err(_) => return Err(Error::Interrupted),
    }
    let mut answer = [0; HEADER_BYTES + 8];
    stream.read_exact(&mut answer)?;
    let right = answer[..4] == GET_FEATURES.to_ne_bytes() && answer[8..12] == 8u32.to_ne_bytes();
    if right { Ok(()) } else { Err(Error::Lacks("an answer to GET_FEATURES")) }
}

/// What the backend has to say by itself (vhost-user, "Back-end message types").
struct Channel {
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Channel {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, unread: Vec::new() })
    }

    /// Reads what is there; whether a change of the configuration was told.
    fn read(&mut self) -> io::Result<bool> {
        let mut bytes = [0; BODY_BYTES_MAX];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.unread.extend(&bytes[..len]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        let mut changed = false;
        while let Some((header, rest)) = self.unread.split_first_chunk::<HEADER_BYTES>() {
            let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let (request, flags, len) = (field(0), field(4), field(8) as usize);
            if len > BODY_BYTES_MAX {
                return Err(io::Error::other(format!("a message of {len} bytes")));
            }
            if rest.len() < len {
                break;
            }
            self.unread.drain(..HEADER_BYTES + len);
            changed |= request == CONFIG_CHANGE;
            if flags & FLAG_NEED_REPLY != 0 {
                self.reply(request, request == CONFIG_CHANGE)?;
            }
        }
        Ok(changed)
    }

    fn reply(&mut self, request: u32, done: bool) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER_BYTES + 8);
        for field in [request, FLAG_VERSION | FLAG_REPLY, 8] {
            message.extend(field.to_ne_bytes());
        }
        message.extend(u64::from(!done).to_ne_bytes());
        self.stream.write_all(&message)
    }
}
