//! Who may do how much: limits of disks and groups of disks.
//!
//! Time is passed in, so that it is tested in virtual time:
//!
//! - [`limits`]: requests and bytes each second, with bursts, in the manner of QEMU's throttle options;
//! - [`names`]: these, and the settings of shares, by name;
//! - [`arbiter`]: who is next, by reservations and weights, in the manner of mClock;
//! - `bucket`: the token bucket below it;
//! - [`governor`]: one arbiter for the threads of a process;
//! - [`limited`]: a disk whose requests wait for it.
#![forbid(unsafe_code)]

pub mod arbiter;
mod bucket;
pub mod governor;
pub mod limited;
pub mod limits;
pub mod names;
#[cfg(test)]
mod random;
