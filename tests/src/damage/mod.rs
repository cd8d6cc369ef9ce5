//! Damaged and hostile layer files.
//!
//! This module knows the layer format a second time, from its description and not from the
//! program's constants: a reader that is tested with the constants it was written with proves
//! nothing. From the bottom up:
//!
//! - [`format`](mod@format): where the fields are; [`walk`]: records and map nodes of an image;
//! - [`seal`]: makes checksums, and the log's chain, right again after a change;
//! - [`specimen`]: small layers with known contents; [`corrupt`]: damage by name; [`mutate`]:
//!   damage by seed;
//! - [`lab`], [`memory`], [`meter`]: layers made and driven on host files or in memory, with the
//!   operations and the memory they take counted and bounded.

pub mod corrupt;
pub mod format;
pub mod lab;
pub mod memory;
pub mod meter;
pub mod mutate;
pub mod seal;
pub mod specimen;
pub mod walk;
