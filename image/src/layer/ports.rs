//! Whom to tell: the mailboxes of queues, and who is woken when.

use std::task::Waker;

use super::core::Core;
use super::log::FlightState;
use super::waiter::{Result, Waiter};

/// Data that may wait for a record, in bytes: more is left with the guest.
const PENDING_BYTES_MAX: usize = 64 << 20;

/// A queue's mailbox.
pub(super) struct Port {
    /// Ended parts and flushes of requests: the request's key, and how it ended.
    inbox: Vec<(usize, Result)>,
    /// It holds writes back until less waits for the log.
    held: bool,
    waker: Waker,
    /// It looks into its inbox again before it may sleep: no need to wake it.
    attentive: bool,
}

impl Core {
    /// Adds a queue that is woken by `waker`.
    pub(super) fn add_port(&mut self, waker: Waker) -> usize {
        self.ports_added += 1;
        let port = Port { inbox: Vec::new(), held: false, attentive: false, waker };
        self.ports.insert(self.ports_added, port);
        self.ports_added
    }

    /// Removes a queue; how its outstanding requests end is no longer told.
    pub(super) fn close_port(&mut self, port: usize) {
        self.ports.remove(&port);
    }

    /// A queue is being polled: it need not be woken until it has found its inbox empty.
    pub(super) fn attend(&mut self, port: usize) {
        self.ports.get_mut(&port).into_iter().for_each(|port| port.attentive = true);
    }

    /// Swaps a queue's messages for `empty`.
    pub(super) fn swap_inbox(&mut self, port: usize, empty: &mut Vec<(usize, Result)>) {
        if let Some(port) = self.ports.get_mut(&port) {
            std::mem::swap(&mut port.inbox, empty);
            port.attentive &= !empty.is_empty();
        }
    }

    /// Whether a queue's writes should wait until less waits for the log. Then the queue is woken
    /// when it may try again.
    pub(super) fn hold(&mut self, port: usize) -> bool {
        let congested = self.log.pending_bytes > PENDING_BYTES_MAX;
        if let Some(port) = self.ports.get_mut(&port) {
            port.held = congested;
        }
        congested
    }

    /// Wakes the queues that hold writes back, once they need not.
    pub(super) fn release_held(&mut self) {
        if self.log.pending_bytes <= PENDING_BYTES_MAX {
            for port in self.ports.values_mut().filter(|port| port.held) {
                port.held = false;
                port.waker.wake_by_ref();
            }
        }
    }

    /// Whether there is work that [`next_job`](Self::next_job) would hand out to some queue: then
    /// one of those who wait for it is woken.
    pub(super) fn nudge(&self) {
        let failed = self.log.flights.iter().find(|f| matches!(f.state, FlightState::Failed(_)));
        let waiter = failed
            .and_then(|flight| flight.waiters.first().map(|(waiter, _)| waiter))
            .or_else(|| self.log.pending.front().map(|part| &part.waiter))
            .or_else(|| self.sync.waiting.first());
        match waiter {
            Some(Waiter::Request { port, .. }) => {
                self.ports.get(port).into_iter().for_each(|port| port.waker.wake_by_ref());
            }
            Some(Waiter::Ticket(ticket)) => ticket.nudge(),
            None => {}
        }
    }

    /// Tells a waiter how its part, or its flush, has ended.
    pub(super) fn end(&mut self, waiter: Waiter, result: Result, place: u32) {
        match waiter {
            Waiter::Request { port, key } => {
                if let Some(port) = self.ports.get_mut(&port) {
                    port.inbox.push((key, result));
                    if !port.attentive {
                        port.waker.wake_by_ref();
                    }
                }
            }
            Waiter::Ticket(ticket) => ticket.end(result, place),
        }
    }
}
