//! A deterministic simulation of everything below an image: files, power, processes, threads.
//!
//! From the bottom up:
//! - [`rng`], [`trace`]: seeds and text;
//! - [`medium`], [`persist`], [`names`]: files and names, what of them is durable, what a power
//!   cut leaves;
//! - [`faults`]: operations that fail;
//! - [`world`], [`storage`], [`engine`]: the clock, processes and crashes behind the storage and
//!   engine seams of `sapwood-blockdev`;
//! - [`content`], [`register`], [`contract`]: what a disk promises its guest, and whether it
//!   keeps it.

pub mod content;
pub mod contract;
pub mod engine;
pub mod faults;
mod landing;
pub mod medium;
pub mod names;
pub mod persist;
pub mod register;
pub mod rng;
pub mod storage;
pub mod trace;
pub mod world;
