//! Image formats: raw, the Sapwood layer, and qcow2 for reading.
//!
//! This crate knows formats and no virtio; it holds no `unsafe` code. All I/O goes through the
//! engine seam of `sapwood-blockdev`.
#![forbid(unsafe_code)]

pub mod below;
mod bytes;
pub mod compare;
pub mod convert;
pub mod counts;
pub mod create;
pub mod error;
pub mod extent;
mod findings;
pub mod format;
pub mod info;
pub mod layer;
pub mod open;
pub mod probe;
pub mod qcow2;
pub mod raw;
pub mod sealed;
pub mod side;
mod signature;
mod site;
pub mod volume;

pub use below::OpenBelow;
pub use counts::Counts;
pub use create::{CreateDisk, create};
pub use error::{ErrorKind, ImageError};
pub use extent::{Extent, ExtentKind};
pub use format::Format;
pub use open::{Disk, DiskQueue, OpenDisk};
pub use side::Side;
pub use site::remove_incomplete;
pub use volume::Volume;
