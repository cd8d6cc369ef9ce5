//! Disks: virtio block devices (section 5.2) whose requests a vhost-user backend serves (QEMU's vhost-user
//! specification). Guest memory is shared with the backend, and so are the descriptors of notifications and
//! interrupts; this process only sets up.
//!
//! - [`connection`]: one connection to a backend: negotiation, queues, the notice of a changed disk;
//! - [`rings`]: what can be seen of a queue in guest memory, for going on after a backend has gone;
//! - `worker`: the thread of a disk: does what the driver wants, and finds the backend again when it has gone.

pub mod connection;
pub mod rings;
mod worker;

use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::GuestMemoryMmap;

use crate::config::Disk;
use crate::virtio::device::{Device, Link, Worker};
use crate::virtio::transport::FEATURE_VERSION_1;
use connection::{Connection, Handle, Offer};

/// The virtio device type.
const KIND: u16 = 2;
/// PCI class: mass storage, other.
const CLASS: u32 = 0x01_8000;
/// Entries in a queue at most.
const QUEUE_SIZE_MAX: u16 = 256;

/// `VIRTIO_BLK_F_CONFIG_WCE`: the driver may write `writeback`.
const FEATURE_CONFIG_WCE: u64 = 1 << 11;
/// `VIRTIO_BLK_F_MQ`: several queues.
const FEATURE_MQ: u64 = 1 << 12;
/// Features that the guest is offered if the backend has them (sections 5.2.3 and 6): SIZE_MAX, SEG_MAX, GEOMETRY,
/// RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, SECURE_ERASE; INDIRECT_DESC, EVENT_IDX and
/// VERSION_1. Not those that concern the transport, which it would have to know of, nor legacy ones.
const FEATURES_PASSED_ON: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | FEATURE_CONFIG_WCE
    | FEATURE_MQ
    | 1 << 13
    | 1 << 14
    | 1 << 16
    | 1 << 28
    | 1 << 29
    | FEATURE_VERSION_1;

/// How long a backend may take until all is agreed on, at first.
const OPEN_MAX: Duration = Duration::from_secs(8);
/// Offset of `writeback` in the configuration space (section 5.2.4).
const CONFIG_WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const CONFIG_QUEUES: usize = 34;

/// Queues of a disk at most: KVM routes 4096 interrupts, which has to do for as many disks as the bus takes.
const QUEUES_MAX: u16 = 128;
const _: () = assert!(super::DISKS_MAX * (QUEUES_MAX as usize + 1) < 4096 - 100);

/// What is wrong with a backend. Each message says all: there is no source that would be said once more.
#[derive(Debug, Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot connect: {0}; a backend must listen there (`sapwood serve DISK --socket PATH` is one)")]
    Connect(io::Error),
    /// It takes the connection, and no more.
    #[error("the backend does not answer: it serves one machine at a time, and may be serving another")]
    Silent,
    /// This process wants something else meanwhile.
    #[error("connecting was interrupted")]
    Interrupted,
    /// It cannot do what is needed.
    #[error("the backend lacks {0}; it is no vhost-user-blk backend of use here")]
    Lacks(&'static str),
    /// It came again, but different.
    #[error("the backend has come back with {0}; start it with the same disk and options")]
    Different(&'static str),
    /// A message failed.
    #[error("{what}: {error}")]
    Message {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        error: vhost::Error,
    },
    /// Requests are lost.
    #[error(
        "the backend has gone while it had requests, and did not keep note of them (it lacks \
         VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD): the machine cannot go on"
    )]
    RequestsLost,
    /// Guest memory that cannot be shared.
    #[error("guest memory is not of a file")]
    Memory,
    /// The system refuses something.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Connects to a disk's backend and makes the device. `report` is told once, if requests are lost.
///
/// # Errors
/// A backend that does not answer or cannot serve this guest.
pub fn start(
    disk: &Disk,
    memory: &GuestMemoryMmap<()>,
    cpus: u8,
    report: impl Fn(Error) + Send + 'static,
) -> Result<(Device, Worker), Error> {
    let handle = Arc::new(Mutex::new(None));
    let link = Link::new(Vec::new())?;
    let (connection, offer) = open(disk, &link, &handle)?;
    let queues = offer.queues.min(cpus.max(1).into()).min(QUEUES_MAX);
    let features = offered(&offer, queues);
    link.write_all_config(config(&offer, queues));
    let device = Device {
        kind: KIND,
        class: CLASS,
        features,
        queues,
        queue_size_max: QUEUE_SIZE_MAX,
        writable: Some((CONFIG_WRITEBACK, FEATURE_CONFIG_WCE)),
        link: Arc::clone(&link),
    };
    let worker = worker::Disk::new(disk.socket.clone(), Arc::clone(&link), memory.clone(), &device, report);
    let interrupt = Arc::clone(&handle);
    let worker = Worker::spawn(
        "disk".into(),
        &link,
        move || connection::shut_down(&interrupt),
        move || worker.run(connection, handle),
    )?;
    Ok((device, worker))
}

/// The first connection, for which nobody waits but the user: a backend that falls silent in the middle of it is given up.
fn open(disk: &Disk, link: &Link, handle: &Handle) -> Result<(Connection, Offer), Error> {
    let (opened, late) = channel::<()>();
    let watched = Arc::clone(handle);
    let watch = thread::Builder::new().name("patience".into()).spawn(move || {
        let silent = late.recv_timeout(OPEN_MAX) == Err(RecvTimeoutError::Timeout);
        if silent {
            connection::shut_down(&watched);
        }
        silent
    })?;
    let result = Connection::open(&disk.socket, link, handle);
    drop(opened);
    match (watch.join(), result) {
        (Ok(true), Err(_)) => Err(Error::Silent),
        (_, result) => result,
    }
}

/// What the guest is offered.
fn offered(offer: &Offer, queues: u16) -> u64 {
    let without = if queues == 1 { FEATURE_MQ } else { 0 };
    offer.features & FEATURES_PASSED_ON & !without
}

/// What the guest reads: the backend's, with as many queues as there are.
fn config(offer: &Offer, queues: u16) -> Vec<u8> {
    let mut config = offer.config.clone();
    config[CONFIG_QUEUES..CONFIG_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
    config
}

/// The capacity in a configuration space, in sectors.
fn capacity(config: &[u8]) -> u64 {
    config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The protocol features that are used where a backend has them.
fn protocol_wanted() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
}
