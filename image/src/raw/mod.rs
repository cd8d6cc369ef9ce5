//! Raw images: the bytes of the disk, as they are, in a file or on a block device.
//!
//! Invariants:
//! - The disk's size is the file's, rounded up to a sector (as QEMU does); the missing bytes of an
//!   odd last sector read as zeroes, and a write to it completes the file.
//! - A writer holds the file exclusively, a reader shares it.
//! - Two outstanding writes to neighbouring sectors never lose each other, whatever the storage
//!   must be aligned to: where that is more than a sector, writes hold the ranges they touch
//!   (`ranges`), and cut edges are read, changed and written while held.
//! - After a failed sync nothing is written and nothing is promised any more (the kernel may have
//!   dropped what it had accepted): the device latches until it is reopened.

mod create;
mod device;
pub(crate) mod map;
mod queue;
mod ranges;
mod slow;

pub use create::{CreateRaw, create};
pub use device::RawDevice;
pub(crate) use device::check_growth;
pub use queue::RawQueue;
