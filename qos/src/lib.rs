//! Who may do how much: limits of disks and groups of disks.
//!
//! Nothing here does I/O, waits or looks at a clock: time is passed in, so that all of it is tested in virtual time.
//!
//! - [`limits`]: requests and bytes each second, with bursts, in the manner of QEMU's throttle options;
//! - [`arbiter`]: who is next, by reservations and weights, in the manner of mClock;
//! - `bucket`: the token bucket below it.
#![forbid(unsafe_code)]

pub mod arbiter;
mod bucket;
pub mod limits;
#[cfg(test)]
mod random;
