//! Engines that move bytes, and the `BlockDevice` seam above the image formats.
//!
//! This crate knows no image format and no virtio. From the bottom up:
//!
//! - [`units`]: newtypes for sectors, blocks and offsets;
//! - [`buffer`]: the memory that operations lend to the kernel;
//! - [`storage`]: opening, locking and identifying host files;
//! - [`engine`]: the seam through which every byte reaches a disk, and its engines;
//! - [`io`]: one thread's reactor: retries, short transfers, futures over an engine;
//! - [`device`]: the trait that image formats implement and that servers drive;
//! - [`thread`]: how the host's scheduler treats a thread.

pub mod buffer;
pub mod device;
pub mod engine;
pub mod io;
pub mod storage;
pub mod thread;
pub mod units;

pub use rustix::io::Errno;
