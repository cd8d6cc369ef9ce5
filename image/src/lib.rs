//! Image formats: raw and the Sapwood layer.
//!
//! This crate knows formats and no virtio; it holds no `unsafe` code. All I/O goes through the
//! engine seam of `sapwood-blockdev`.
#![forbid(unsafe_code)]

pub mod error;
pub mod extent;
pub mod format;

pub use error::{ErrorKind, ImageError};
pub use extent::{Extent, ExtentKind};
pub use format::Format;
