//! Who waits for a record or a sync.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use sapwood_blockdev::device::DeviceError;

/// Outcome of a wait.
pub(super) type Result<T = ()> = std::result::Result<T, DeviceError>;

/// Somebody to be told how a part of a record, or a sync, ended.
#[derive(Clone, Debug)]
pub(super) enum Waiter {
    /// A guest request: queue and key of the request in it.
    Request { port: usize, key: usize },
    /// A task.
    Ticket(Arc<Ticket>),
}

impl Waiter {
    /// Whether both are told of the same request, or task.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Request { port, key }, Self::Request { port: other_port, key: other_key }) => {
                (port, key) == (other_port, other_key)
            }
            (Self::Ticket(ticket), Self::Ticket(other)) => Arc::ptr_eq(ticket, other),
            _ => false,
        }
    }
}

/// What a task holds to learn how the parts that it appended ended.
#[derive(Debug, Default)]
pub(super) struct Ticket(Mutex<TicketState>);

#[derive(Debug, Default)]
struct TicketState {
    /// Parts appended and not yet ended.
    remaining: usize,
    failed: Option<DeviceError>,
    /// Where the data blocks of the parts landed, a place for each part in the order of ending.
    places: Vec<u32>,
    waker: Option<Waker>,
}

impl Ticket {
    fn state(&self) -> MutexGuard<'_, TicketState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more part to wait for.
    pub(super) fn add(&self) {
        self.state().remaining += 1;
    }

    /// A part has ended; its first data block, if any, is at `place`.
    pub(super) fn end(&self, result: Result, place: u32) {
        let mut state = self.state();
        state.remaining -= 1;
        match result {
            Ok(()) => state.places.push(place),
            Err(error) => state.failed = Some(error),
        }
        if state.remaining == 0
            && let Some(waker) = state.waker.take()
        {
            waker.wake();
        }
    }

    /// Makes the waiting task look again.
    pub(super) fn nudge(&self) {
        if let Some(waker) = self.state().waker.take() {
            waker.wake();
        }
    }

    /// Ready when every part has ended: the places, in the order in which the parts were appended
    /// (parts end in that order), or the last error.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Vec<u32>>> {
        let mut state = self.state();
        if state.remaining > 0 {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(match state.failed {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut state.places)),
        })
    }
}
