//! The rings of a split virtqueue (virtio 1.2, section 2.7).
//!
//! - The available ring's index is read with Acquire before its entries, the used ring's written
//!   with Release after its entries.
//! - Who asks to be notified and then looks again, and who publishes and then looks whether to
//!   notify, each has a SeqCst fence between the two: one of both sees the other (section 2.7.7.1
//!   and 2.7.10).
//! - Requests in flight never exceed the queue size; an index that says so breaks the ring.
//! - A ring that is [tracked](Ring::track) gives what its predecessor left in flight first.
#![allow(unsafe_code)]

use std::num::Wrapping;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use sapwood_blockdev::buffer::SharedBuf;
use thiserror::Error;

use crate::guest::GuestMap;
use crate::inflight::{InflightError, QueueRegion, Tracker, stored};
use crate::request::layout::DESCRIPTOR_BYTES;

/// Entries in a queue at most (section 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Flags (2) and index (2) before a ring's entries.
const RING_HEADER: usize = 4;
/// The other side's event index (2) after the entries.
const RING_TRAILER: usize = 2;
const INDEX_OFFSET: usize = 2;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` and `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFICATION: u16 = 1;

/// Why rings cannot be used, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// Not a power of two up to [`QUEUE_SIZE_MAX`].
    #[error("a queue of {0} entries")]
    Size(u32),
    /// A ring that is not in guest memory, not within one region, or not aligned.
    #[error("the {0} at {1:#x} is not in one region of memory, or not aligned")]
    Address(&'static str, u64),
    /// The driver claims to have made more requests available than the queue holds.
    #[error("the available index went from {from} to {to} in a queue of {size}")]
    Jump {
        /// What was seen of it.
        from: u16,
        /// What it is.
        to: u16,
        /// Entries in the queue.
        size: u16,
    },
    /// A head that is no descriptor cannot be tracked.
    #[error("head {0} is not in the table")]
    Head(u16),
}

/// Where the parts of a queue lie, in the frontend's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A split virtqueue in use.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    event_idx: bool,
    descriptors: SharedBuf,
    available: SharedBuf,
    used: SharedBuf,
    next_available: Wrapping<u16>,
    /// Requests known to be available from `next_available` on.
    known: u16,
    next_used: Wrapping<u16>,
    published: Wrapping<u16>,
    tracker: Option<Tracker>,
    /// What is to be done again, last first.
    again: Vec<u16>,
}

impl Ring {
    /// The rings at these addresses; `next_available` is where the driver's requests go on
    /// (SET_VRING_BASE). The used ring goes on where it stands.
    ///
    /// # Errors
    /// A size that cannot be, addresses that are not in memory.
    pub fn new(
        map: &GuestMap,
        addresses: RingAddresses,
        size: u32,
        next_available: u16,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        let size = u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX)
            .ok_or(RingError::Size(size))?;
        let part = |name, address, len, alignment| {
            map.ring(address, len)
                .filter(|window| window.address().addr().is_multiple_of(alignment))
                .ok_or(RingError::Address(name, address))
        };
        let n = usize::from(size);
        let descriptors = part("descriptor table", addresses.descriptors, n * DESCRIPTOR_BYTES, 16)?;
        let available =
            part("available ring", addresses.available, RING_HEADER + n * AVAIL_ENTRY + RING_TRAILER, 2)?;
        let used = part("used ring", addresses.used, RING_HEADER + n * USED_ENTRY + RING_TRAILER, 4)?;
        let next_used = Wrapping(u16::from_le(word(&used, INDEX_OFFSET).load(Ordering::Acquire)));
        let next_available = Wrapping(next_available);
        Ok(Self {
            size,
            event_idx,
            descriptors,
            available,
            used,
            next_available,
            known: 0,
            next_used,
            published: next_used,
            tracker: None,
            again: Vec::new(),
        })
    }

    /// Keeps account of what is in flight in a region, and takes over what is in it. Where the
    /// driver's requests go on is then known from the region: a frontend whose backend died can
    /// only guess (QEMU says the used index).
    ///
    /// # Errors
    /// Contents that make no sense.
    pub fn track(&mut self, region: QueueRegion) -> Result<(), InflightError> {
        let (tracker, left) = Tracker::new(region, self.size, self.next_used.0)?;
        if left.used_before {
            // There are at most as many as the queue has entries.
            self.next_available = self.next_used + Wrapping(left.again.len() as u16);
        }
        self.again = left.again;
        self.again.reverse();
        self.tracker = Some(tracker);
        Ok(())
    }

    /// Requests pushed and not published.
    pub fn unpublished(&self) -> usize {
        usize::from((self.next_used - self.published).0)
    }

    /// Entries in the queue.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    pub fn descriptors(&self) -> &SharedBuf {
        &self.descriptors
    }

    /// Index of the next request to take: what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.next_available.0
    }

    /// Takes the next available request: the head of its descriptor chain, not yet checked.
    ///
    /// # Errors
    /// An index that makes no sense: nothing more can be taken from this ring.
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.again.pop() {
            return Ok(Some(head));
        }
        if self.known == 0 {
            self.known = self.look()?;
            if self.known == 0 {
                return Ok(None);
            }
        }
        let slot = usize::from(self.next_available.0 % self.size);
        let mut head = [0; AVAIL_ENTRY];
        self.available.read_at(RING_HEADER + slot * AVAIL_ENTRY, &mut head);
        let head = u16::from_le_bytes(head);
        if let Some(tracker) = &mut self.tracker {
            if !tracker.holds(head) {
                return Err(RingError::Head(head));
            }
            tracker.take(head);
        }
        self.known -= 1;
        self.next_available += 1;
        Ok(Some(head))
    }

    /// How many requests are available.
    fn look(&self) -> Result<u16, RingError> {
        let to = u16::from_le(word(&self.available, INDEX_OFFSET).load(Ordering::Acquire));
        let count = (Wrapping(to) - self.next_available).0;
        if count > self.size {
            return Err(RingError::Jump { from: self.next_available.0, to, size: self.size });
        }
        Ok(count)
    }

    /// Enters a finished request into the used ring; the driver sees it after
    /// [`publish`](Self::publish).
    pub fn push(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used.0 % self.size);
        let (entry, offset) = (u64::from(head) | u64::from(len) << 32, RING_HEADER + slot * USED_ENTRY);
        self.used.write_at(offset, &entry.to_le_bytes());
        stored(&self.used, offset);
        self.next_used += 1;
        if let Some(tracker) = &mut self.tracker {
            tracker.push(head);
        }
    }

    /// Shows the driver what was pushed. Returns whether it wants to be notified of it.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        word(&self.used, INDEX_OFFSET).store(new.0.to_le(), Ordering::Release);
        stored(&self.used, INDEX_OFFSET);
        self.published = new;
        if let Some(tracker) = &mut self.tracker {
            tracker.published(new.0);
        }
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = RING_HEADER + usize::from(self.size) * AVAIL_ENTRY;
            let event = u16::from_le(word(&self.available, offset).load(Ordering::Relaxed));
            wants_event(Wrapping(event), new, old)
        } else {
            u16::from_le(word(&self.available, 0).load(Ordering::Relaxed)) & NO_NOTIFICATION == 0
        }
    }

    /// Tells the driver that kicks are not needed. With EVENT_IDX there is nothing to say: the
    /// event index stays behind.
    pub fn disable_kicks(&self) {
        if !self.event_idx {
            word(&self.used, 0).store(NO_NOTIFICATION.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks for a kick with the next request. Returns whether one has become available already.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn enable_kicks(&self) -> Result<bool, RingError> {
        if self.event_idx {
            let offset = RING_HEADER + usize::from(self.size) * USED_ENTRY;
            let event = self.next_available + Wrapping(self.known);
            word(&self.used, offset).store(event.0.to_le(), Ordering::Relaxed);
        } else {
            word(&self.used, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        Ok(self.look()? > 0)
    }
}

/// Whether moving from `old` to `new` passed the index after `event` (section 2.7.7.2).
fn wants_event(event: Wrapping<u16>, new: Wrapping<u16>, old: Wrapping<u16>) -> bool {
    new - event - Wrapping(1) < new - old
}

/// A 16-bit field of a ring.
fn word(window: &SharedBuf, offset: usize) -> &AtomicU16 {
    assert!(offset + 2 <= window.len() && offset.is_multiple_of(2));
    // SAFETY: inside the window, which stays mapped while it is borrowed, and aligned, because
    // the window is (checked in `Ring::new`). The field is shared with the guest and is only ever
    // accessed atomically here; an atomic is what may change under a reference.
    unsafe { AtomicU16::from_ptr(window.address().add(offset).cast()) }
}

#[cfg(test)]
mod tests;
