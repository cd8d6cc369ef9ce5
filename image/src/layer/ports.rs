//! The queues of a layer: what they are told, and when they must be woken.

use std::collections::BTreeMap;
use std::task::Waker;

use super::waiter::Result;

/// A queue's mailbox.
struct Port {
    /// Ended parts and flushes of requests: the request's key, and how it ended.
    inbox: Vec<(usize, Result)>,
    /// It holds writes back until less waits for the log.
    held: bool,
    /// It looks into its inbox again before it may sleep: no need to wake it.
    attentive: bool,
    waker: Waker,
}

/// Queues by number; a number is never used again.
#[derive(Default)]
pub(super) struct Ports {
    list: BTreeMap<usize, Port>,
    added: usize,
}

impl Ports {
    /// Adds a queue that is woken by `waker`.
    pub(super) fn add(&mut self, waker: Waker) -> usize {
        self.added += 1;
        let port = Port { inbox: Vec::new(), held: false, attentive: false, waker };
        self.list.insert(self.added, port);
        self.added
    }

    /// Removes a queue; how its outstanding requests end is no longer told.
    pub(super) fn close(&mut self, port: usize) {
        self.list.remove(&port);
    }

    /// A queue is being polled: it need not be told that there is something in its inbox until it
    /// has found it empty.
    pub(super) fn attend(&mut self, port: usize) {
        self.list.get_mut(&port).into_iter().for_each(|port| port.attentive = true);
    }

    /// Swaps a queue's messages for `empty`.
    pub(super) fn swap_inbox(&mut self, port: usize, empty: &mut Vec<(usize, Result)>) {
        if let Some(port) = self.list.get_mut(&port) {
            std::mem::swap(&mut port.inbox, empty);
            port.attentive &= !empty.is_empty();
        }
    }

    /// Puts a message into a queue's inbox.
    pub(super) fn tell(&mut self, port: usize, key: usize, result: Result) {
        if let Some(port) = self.list.get_mut(&port) {
            port.inbox.push((key, result));
            if !port.attentive {
                port.waker.wake_by_ref();
            }
        }
    }

    /// Wakes a queue, whatever it does: there is work for it.
    pub(super) fn wake(&self, port: usize) {
        self.list.get(&port).into_iter().for_each(|port| port.waker.wake_by_ref());
    }

    /// Notes whether a queue holds writes back.
    pub(super) fn set_held(&mut self, port: usize, held: bool) {
        self.list.get_mut(&port).into_iter().for_each(|port| port.held = held);
    }

    /// Wakes the queues that hold writes back.
    pub(super) fn release_held(&mut self) {
        for port in self.list.values_mut().filter(|port| port.held) {
            port.held = false;
            port.waker.wake_by_ref();
        }
    }
}
