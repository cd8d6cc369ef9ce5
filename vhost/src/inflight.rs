//! Which requests are in flight, in memory that outlives this process (vhost-user, "Inflight I/O
//! tracking", split virtqueues).
//!
//! The backend makes the memory, the frontend keeps it and gives it to the backend's successor,
//! which does again what was taken and not published. Each queue has a region of its own in it:
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..8 | features | 0 |
//! | 8..10 | version | 1; 0 until the region is in use |
//! | 10..12 | descriptors | entries in the table below |
//! | 12..14 | last batch | head of the list of requests pushed last |
//! | 14..16 | used index | the used ring's index up to which the table is right |
//! | 16.. | table | an entry of 16 bytes for each descriptor that may be a chain's head |
//!
//! An entry: in flight (1), padding (5), next of the list (2), counter (8).
//!
//! What holds whichever instruction this process dies at:
//!
//! 1. A request's counter is stored before it is marked, and it is marked before the device gets
//!    it. What was popped and not marked has had no effect; it is popped again, because the
//!    available ring goes on at the used index plus the number of marks: requests are marked in
//!    the order of the available ring, and unmarked in the numbers in which the used index moves.
//! 2. A request is in the list before the used index says that it is done, and its mark goes only
//!    after that. Between the two the region's used index is behind the ring's, by as many as
//!    have to be unmarked: the first ones of the list, however many of them are unmarked already.
//! 3. The region's used index follows when all of them are. Then the list means nothing: what is
//!    pushed and not published is still marked, and done again.
//!
//! So order is all. A process that is killed has performed the instructions before some point and
//! none after it, and the kernel has finished with it before a successor can see the frontend
//! again; the compiler must not exchange the stores. A store with Release stays behind everything
//! before it, so *every* store here, and that of the used index, is one. (For the two that are
//! exchanged between the ring and the region that is needed in both directions: the mark's removal
//! is itself Release and so stays behind the store of the index.) On x86 they are plain moves.
//!
//! Doing a request again is right: the driver does not know that it was done, so it keeps its
//! buffers as they are and nothing that it orders after it has been sent. Reads, writes, discards,
//! zeroes and GET_ID give what they gave. A flush that is done again covers no less: what was
//! reported before it is in the file.
//!
//! The memory is the frontend's as much as ours: everything read is checked, wrong contents stop
//! the queue and cost no more than a look at each entry. A file that the backend made is sealed
//! against truncation; one that came from elsewhere may be truncated, and then this process dies
//! as it does when guest memory goes.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::Wrapping;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use sapwood_blockdev::buffer::SharedBuf;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;

use crate::guest::{RegionError, map_file};
use crate::queue::QUEUE_SIZE_MAX;

const VERSION_OFFSET: usize = 8;
const DESCRIPTORS_OFFSET: usize = 10;
const LAST_BATCH_OFFSET: usize = 12;
const USED_INDEX_OFFSET: usize = 14;
const HEADER_BYTES: usize = 16;

const ENTRY_BYTES: usize = 16;
const ENTRY_NEXT: usize = 6;
const ENTRY_COUNTER: usize = 8;

/// The version of the format.
const VERSION: u16 = 1;

/// Regions begin at multiples of this, so that queues share no cache line.
const REGION_ALIGNMENT: usize = 64;

/// Why a region cannot be used.
#[derive(Debug, Error)]
pub enum InflightError {
    /// No queues, or more than the device has, or a queue that cannot be.
    #[error("a region for {queues} queues of {size} entries")]
    Shape {
        /// Queues.
        queues: u16,
        /// Entries in each.
        size: u16,
    },
    /// Not a regular file, or memory at an odd place, or too little of it.
    #[error("{len} bytes at offset {offset} of a file are no region")]
    Memory {
        /// Bytes to map.
        len: u64,
        /// Where they begin.
        offset: u64,
    },
    /// The region is of another version.
    #[error("version {0}")]
    Version(u16),
    /// The region is for queues of another size.
    #[error("a region of {region} descriptors for a queue of {ring}")]
    Descriptors {
        /// What the region says.
        region: u16,
        /// Entries in the ring.
        ring: u16,
    },
    /// The used ring and the region cannot both be right.
    #[error("the region's used index is {region}, the ring's {ring}")]
    UsedIndex {
        /// The region's.
        region: u16,
        /// The ring's.
        ring: u16,
    },
    /// The list of what was pushed last leaves the table.
    #[error("descriptor {0} in the last batch")]
    LastBatch(u16),
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] RegionError),
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// The regions of all queues of a device.
#[derive(Clone, Debug)]
pub struct Inflight {
    window: SharedBuf,
    queues: u16,
    size: u16,
}

fn region_bytes(size: u16) -> usize {
    (HEADER_BYTES + usize::from(size) * ENTRY_BYTES).next_multiple_of(REGION_ALIGNMENT)
}

fn checked_bytes(queues: u16, size: u16, queues_max: usize) -> Result<usize, InflightError> {
    let possible = (1..=queues_max).contains(&usize::from(queues)) && (1..=QUEUE_SIZE_MAX).contains(&size);
    if possible {
        Ok(usize::from(queues) * region_bytes(size))
    } else {
        Err(InflightError::Shape { queues, size })
    }
}

impl Inflight {
    /// Makes the memory for so many queues of that size, in which nothing is in flight, and
    /// describes it (GET_INFLIGHT_FD). The file cannot be truncated.
    ///
    /// # Errors
    /// No or more than `queues_max` queues, a size that cannot be, what the system says.
    pub fn create(
        queues: u16,
        size: u16,
        queues_max: usize,
    ) -> Result<(Self, VhostUserInflight, File), InflightError> {
        let len = checked_bytes(queues, size, queues_max)? as u64;
        let file = memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let file = File::from(file.map_err(io::Error::from)?);
        ftruncate(&file, len).map_err(io::Error::from)?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
        let message = VhostUserInflight::new(len, 0, queues, size);
        Ok((Self::map(&message, &file, queues_max)?, message, file))
    }

    /// Maps memory that a frontend has kept (SET_INFLIGHT_FD). What is in it is looked at when a
    /// queue begins with it.
    ///
    /// # Errors
    /// A message that makes no sense, a file that is none or too short, what the system says.
    pub fn map(message: &VhostUserInflight, file: &File, queues_max: usize) -> Result<Self, InflightError> {
        let &VhostUserInflight { mmap_size, mmap_offset, num_queues: queues, queue_size: size } = message;
        let len = checked_bytes(queues, size, queues_max)?;
        let stat = fstat(file).map_err(io::Error::from)?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let aligned = mmap_offset.is_multiple_of(REGION_ALIGNMENT as u64);
        if !regular || !aligned || mmap_size < len as u64 {
            return Err(InflightError::Memory { len: mmap_size, offset: mmap_offset });
        }
        Ok(Self { window: map_file(file, mmap_offset, len as u64)?, queues, size })
    }

    /// The region of a queue; `None` if there is none for it.
    pub fn queue(&self, index: usize) -> Option<QueueRegion> {
        let (bytes, own) = (region_bytes(self.size), index < usize::from(self.queues));
        own.then(|| QueueRegion {
            window: self.window.slice(index * bytes..(index + 1) * bytes),
            size: self.size,
        })
    }
}

/// The region of one queue, not looked at yet.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    window: SharedBuf,
    /// Entries in the table.
    size: u16,
}

impl QueueRegion {
    /// Memory of this process, for a queue of `size` (for tests).
    pub fn heap(size: u16) -> Self {
        Self { window: SharedBuf::heap(region_bytes(size)), size }
    }
}

/// What was in flight when a region's last user ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Heads of the requests to do again, in the order in which they were taken.
    pub again: Vec<u16>,
    /// Whether the region was in use before: then the available ring goes on after these.
    pub used_before: bool,
}

/// A queue's region in use.
#[derive(Debug)]
pub(crate) struct Tracker {
    window: SharedBuf,
    /// Heads that can be marked: entries in the ring.
    size: u16,
    counter: Wrapping<u64>,
    last: u16,
    /// Pushed and not published. Never more than the ring has entries.
    batch: Vec<u16>,
}

impl Tracker {
    /// Takes over a region for a ring of `size` entries whose used index is `used`.
    ///
    /// # Errors
    /// Contents that make no sense.
    pub(crate) fn new(region: QueueRegion, size: u16, used: u16) -> Result<(Self, Left), InflightError> {
        let QueueRegion { window, size: descriptors } = region;
        let batch = Vec::with_capacity(size.into());
        let mut tracker = Self { window, size, counter: Wrapping(0), last: 0, batch };
        if size > descriptors {
            return Err(InflightError::Descriptors { region: descriptors, ring: size });
        }
        let left = match tracker.get_half(VERSION_OFFSET) {
            0 => tracker.begin(descriptors, used),
            VERSION => tracker.recover(descriptors, used)?,
            other => return Err(InflightError::Version(other)),
        };
        Ok((tracker, left))
    }

    /// Nothing is in flight. The version is last: until then the region is not in use.
    fn begin(&mut self, descriptors: u16, used: u16) -> Left {
        for head in 0..descriptors {
            self.set_mark(head, false);
        }
        self.set_half(DESCRIPTORS_OFFSET, descriptors);
        self.set_half(LAST_BATCH_OFFSET, 0);
        self.set_half(USED_INDEX_OFFSET, used);
        self.set_half(VERSION_OFFSET, VERSION);
        Left::default()
    }

    /// Finishes what the last publication left undone, and finds what is in flight. It may be cut
    /// anywhere and begun again.
    fn recover(&mut self, descriptors: u16, used: u16) -> Result<Left, InflightError> {
        let in_region = self.get_half(DESCRIPTORS_OFFSET);
        if in_region != descriptors {
            return Err(InflightError::Descriptors { region: in_region, ring: self.size });
        }
        self.last = self.get_half(LAST_BATCH_OFFSET);
        let region = self.get_half(USED_INDEX_OFFSET);
        let published = (Wrapping(used) - Wrapping(region)).0;
        let mut left: Vec<(u64, u16)> = self.marked().collect();
        if published > self.size && !left.is_empty() {
            return Err(InflightError::UsedIndex { region, ring: used });
        }
        // When nothing is marked the ring may have been set up anew.
        if published > 0 && !left.is_empty() {
            self.finish_batch(published)?;
            left = self.marked().collect();
        }
        self.set_half(USED_INDEX_OFFSET, used);
        left.sort_unstable();
        self.counter = left.last().map_or(Wrapping(0), |(counter, _)| Wrapping(*counter) + Wrapping(1));
        Ok(Left { again: left.into_iter().map(|(_, head)| head).collect(), used_before: true })
    }

    /// Unmarks the first `published` requests of the list.
    fn finish_batch(&self, published: u16) -> Result<(), InflightError> {
        let mut head = self.last;
        for _ in 0..published {
            if head >= self.size {
                return Err(InflightError::LastBatch(head));
            }
            self.set_mark(head, false);
            head = self.get_half(Self::entry(head) + ENTRY_NEXT);
        }
        Ok(())
    }

    fn marked(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        (0..self.size).filter(|head| self.mark(*head).load(Ordering::Acquire) == 1).map(|head| {
            (u64::from_le(self.long(Self::entry(head) + ENTRY_COUNTER).load(Ordering::Acquire)), head)
        })
    }

    /// Whether a head can be marked.
    pub(crate) fn holds(&self, head: u16) -> bool {
        head < self.size
    }

    /// A request was taken.
    pub(crate) fn take(&mut self, head: u16) {
        let counter = Self::entry(head) + ENTRY_COUNTER;
        self.long(counter).store(self.counter.0.to_le(), Ordering::Release);
        stored(&self.window, counter);
        self.counter += 1;
        self.set_mark(head, true);
    }

    /// A request is done; the driver does not know it yet.
    pub(crate) fn push(&mut self, head: u16) {
        self.set_half(Self::entry(head) + ENTRY_NEXT, self.last);
        self.set_half(LAST_BATCH_OFFSET, head);
        self.last = head;
        self.batch.push(head);
    }

    /// The ring's used index was set to `used`: what was pushed is no longer in flight.
    pub(crate) fn published(&mut self, used: u16) {
        for head in &self.batch {
            self.set_mark(*head, false);
        }
        self.batch.clear();
        self.set_half(USED_INDEX_OFFSET, used);
    }

    fn entry(head: u16) -> usize {
        HEADER_BYTES + usize::from(head) * ENTRY_BYTES
    }

    fn set_mark(&self, head: u16, in_flight: bool) {
        self.mark(head).store(in_flight.into(), Ordering::Release);
        stored(&self.window, Self::entry(head));
    }

    fn get_half(&self, offset: usize) -> u16 {
        u16::from_le(self.half(offset).load(Ordering::Acquire))
    }

    fn set_half(&self, offset: usize, value: u16) {
        self.half(offset).store(value.to_le(), Ordering::Release);
        stored(&self.window, offset);
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        let offset = Self::entry(head);
        assert!(offset < self.window.len());
        // SAFETY: inside the window, which stays mapped while it is borrowed. The byte is shared
        // with the frontend and only ever accessed atomically.
        unsafe { AtomicU8::from_ptr(self.window.address().add(offset)) }
    }

    fn half(&self, offset: usize) -> &AtomicU16 {
        let at = self.window.address().wrapping_add(offset);
        assert!(offset + 2 <= self.window.len() && at.addr().is_multiple_of(2));
        // SAFETY: as in `mark`, and aligned.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }

    fn long(&self, offset: usize) -> &AtomicU64 {
        let at = self.window.address().wrapping_add(offset);
        assert!(offset + 8 <= self.window.len() && at.addr().is_multiple_of(8));
        // SAFETY: as in `mark`, and aligned.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }
}

/// A store to shared memory has been performed: tests cut here, or take the store back.
#[cfg(test)]
pub(crate) use crash::stored;
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn stored(_window: &SharedBuf, _offset: usize) {}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
