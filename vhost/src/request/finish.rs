//! Requests that the device is working on, and how they end.

use sapwood_blockdev::device::{DeviceError, Done};
use slab::Slab;

use super::layout::Status;
use crate::guest::GuestMap;

/// Bits of a tag that number the parts of one request: the ranges of a discard.
const PART_BITS: u32 = 8;
const _: () = assert!(crate::config::RANGES_MAX < 1 << PART_BITS);

/// A request that the device is working on.
#[derive(Debug)]
pub struct Flight {
    /// The chain's first descriptor, by which the driver knows the request.
    pub head: u16,
    /// Guest address of the status byte.
    pub status: u64,
    /// Bytes of data that the device writes to guest memory if it succeeds.
    pub data_len: u32,
    /// Parts not yet done.
    pub parts: u32,
    /// The answer so far.
    pub answer: Status,
}

/// What goes into the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// Bytes written to guest memory.
    pub len: u32,
}

/// The requests in flight on one queue.
#[derive(Debug, Default)]
pub struct Flights(Slab<Flight>);

impl Flights {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a request; the tag is that of its first part, each further part's is one more.
    pub fn add(&mut self, flight: Flight) -> u64 {
        (self.0.insert(flight) as u64) << PART_BITS
    }

    /// Takes note of a finished part; when it was the last, writes the status.
    ///
    /// # Panics
    /// If the device reports what was not asked.
    pub fn done(&mut self, done: &Done, map: &GuestMap) -> Option<Used> {
        let key = (done.tag >> PART_BITS) as usize;
        let flight = &mut self.0[key];
        if let Err(error) = done.result {
            flight.answer = status_of(error);
        }
        flight.parts -= 1;
        if flight.parts > 0 {
            return None;
        }
        let flight = self.0.remove(key);
        Some(answer(flight.head, flight.status, flight.answer, flight.data_len, map))
    }
}

/// Writes the status of a request; `data_len` bytes of data were written if it succeeded.
pub fn answer(head: u16, at: u64, status: Status, data_len: u32, map: &GuestMap) -> Used {
    let data_len = if status == Status::Ok { data_len } else { 0 };
    // The byte was there when the request was parsed, and memory stays while requests are in flight.
    let written = map.write(at, &[status as u8]).map_or(0, |()| 1);
    Used { head, len: data_len + written }
}

fn status_of(error: DeviceError) -> Status {
    match error {
        DeviceError::Unsupported => Status::Unsupported,
        _ => Status::IoError,
    }
}
