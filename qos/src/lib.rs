//! Who may do how much, and who did how much: limits of disks and groups of disks, and their accounts.
//!
//! Nothing here does I/O or waits. Time is passed in, or is that of an engine, so that all of it is tested in virtual time.
//!
//! - [`limits`]: requests and bytes each second, with bursts, in the manner of QEMU's throttle options;
//! - [`names`]: these, and the settings of shares, by name;
//! - [`arbiter`]: who is next, by reservations and weights, in the manner of mClock;
//! - `bucket`: the token bucket below it;
//! - [`account`]: what guests did with a disk, and how long that took;
//! - [`governor`]: one arbiter for the threads of a process;
//! - [`limited`]: a disk whose requests wait for it;
//! - [`background`]: an engine whose reads and writes do, for work that no guest waits for;
//! - `turnstile`: what waits in a thread.
#![forbid(unsafe_code)]

pub mod account;
pub mod arbiter;
pub mod background;
mod bucket;
pub mod governor;
pub mod limited;
pub mod limits;
pub mod names;
mod pulse;
#[cfg(test)]
mod random;
mod turnstile;
