//! Messages from the backend to the frontend (vhost-user, "Back-end message types").
//!
//! The `vhost` crate takes the channel's descriptor from the message that brings it and offers no
//! way to send the one message a disk has, the notice of a changed configuration. So the
//! descriptor is copied while the message is still in the socket: peeking at ancillary data
//! duplicates it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// The flags' version bits; no reply is asked for.
const VERSION: u32 = 1;

/// If the next message brings a channel: a copy of its descriptor.
pub(super) fn peek(stream: &UnixStream) -> Option<OwnedFd> {
    let mut code = [0; 4];
    let seen = recv(stream, &mut code[..], RecvFlags::PEEK).ok()?.1;
    if seen < code.len() || u32::from_ne_bytes(code) != SET_BACKEND_REQ_FD {
        return None;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    recvmsg(stream, &mut [IoSliceMut::new(&mut code)], &mut control, flags).ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

/// Sends the notice, without waiting for a frontend that does not read.
pub(super) fn send_config_changed(channel: &OwnedFd) -> Result<(), Errno> {
    let mut message = [0; 12];
    message[..4].copy_from_slice(&CONFIG_CHANGE.to_ne_bytes());
    message[4..8].copy_from_slice(&VERSION.to_ne_bytes());
    let sent = send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    if sent == message.len() { Ok(()) } else { Err(Errno::IO) }
}
