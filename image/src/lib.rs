//! Image formats: raw and the Sapwood layer.
//!
//! This crate knows formats and no virtio; it holds no `unsafe` code. All I/O goes through the
//! engine seam of `sapwood-blockdev`.
#![forbid(unsafe_code)]

pub mod error;

pub use error::{ErrorKind, ImageError};
