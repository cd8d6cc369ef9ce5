//! A vhost-user-blk server for anything that is a [`BlockDevice`](sapwood_blockdev::device::BlockDevice).
//!
//! This crate knows virtio and no image format. References are to virtio 1.2 and to QEMU's
//! vhost-user specification. From the bottom up:
//!
//! - [`features`], [`config`]: what is offered, what was accepted, the configuration space;
//! - [`guest`]: the guest's memory, mapped from the frontend's file descriptors;
//! - [`queue`]: a split virtqueue's rings, with EVENT_IDX both ways;
//! - [`inflight`]: what is in flight, in memory that a killed backend's successor gets;
//! - [`request`]: from a descriptor chain to a checked request and back to a status byte;
//! - `notify`, `spin`: kick and call descriptors, polling before sleeping;
//! - `worker`: one thread with one engine, one device queue and one virtqueue;
//! - `backend`: the vhost-user messages of one session;
//! - [`server`]: the socket, one session after the other, and the orderly end.
//!
//! Trust: the guest and the frontend are hostile. Everything read from shared memory is copied
//! once and checked before use; a bad request fails alone, a bad ring stops its queue, a bad
//! message ends the session. Nothing they do makes this crate panic, spin or read outside the
//! memory they shared. (One thing is theirs to break: a frontend that truncates a file it shared
//! takes the mapped pages away and the process dies of SIGBUS.)

mod backend;
pub mod config;
pub mod features;
pub mod guest;
pub mod inflight;
mod notify;
pub mod queue;
pub mod request;
pub mod server;
mod spin;
mod worker;

pub use server::{Options, Server, ServerError, SocketFile};
