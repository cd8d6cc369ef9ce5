//! A deterministic simulation of everything below an image: files, power, processes, threads.
//!
//! From the bottom up:
//! - [`rng`], [`trace`]: seeds and text;
//! - [`medium`], [`persist`], [`names`]: files and names, what of them is durable, what a power
//!   cut leaves;
//! - [`faults`]: operations that fail;
//! - [`world`], [`storage`], [`engine`]: the clock, processes and crashes behind the storage and
//!   engine seams of `sapwood-blockdev`;
//! - [`turns`]: threads that go on one at a time;
//! - [`crash`]: kills and power cuts, also in the middle of code that blocks;
//! - [`content`], [`register`], [`contract`], [`cut`]: what a disk promises its guest, and whether it
//!   keeps it;
//! - [`subject`]: what is tested; [`layer`]: layers; [`live`]: layers of which
//!   snapshots are taken; [`stored`]: the same in a store; [`toy`]: a small disk that tests the simulator itself;
//! - [`store`]: directories of volumes;
//! - [`plan`], [`session`], [`history`], [`explore`]: histories, how they run, and what is
//!   reported of those that fail.

pub mod content;
pub mod contract;
pub mod crash;
pub mod cut;
mod drive;
pub mod engine;
pub mod explore;
pub mod faults;
pub mod history;
mod landing;
pub mod layer;
pub mod live;
pub mod medium;
pub mod names;
pub mod persist;
pub mod plan;
mod recovery;
pub mod register;
pub mod rng;
pub mod session;
mod snapshots;
pub mod storage;
pub mod store;
pub mod stored;
pub mod subject;
pub mod toy;
pub mod trace;
pub mod turns;
pub mod world;
