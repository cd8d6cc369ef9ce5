//! qcow2 images, versions 2 and 3: read, never written.
//!
//! `docs/qcow2.md` says what is read and what is refused. From the bottom up: `header`, `table` and
//! `snapshot` decode stored bytes (docs/interop/qcow2.rst of QEMU is their source); `compress`
//! decodes clusters; `image` is one open file and finds where its bytes are, and [`crate::below`]
//! makes a disk for guests of it and all that lies below it; `info` and `check` look at one image alone.
//!
//! Invariants:
//! - Nothing of an image is trusted: tables are read page by page through a cache of a fixed size,
//!   so that no field of a header decides how much memory is taken.
//! - Another file is opened because an image names it only when the caller allowed that.

mod bytes;
mod check;
pub(crate) mod compress;
#[cfg(feature = "fuzzing")]
pub mod doors;
mod header;
pub(crate) mod image;
mod info;
mod snapshot;
mod table;

use std::fmt;
use std::path::Path;

use crate::error::{ErrorKind, ImageError};

pub use check::{CheckReport, check};
pub use header::MAGIC;
pub use info::{BackingInfo, Qcow2Info, info};
pub use snapshot::Snapshot;
pub(crate) use table::Mapping;

/// How the compressed clusters of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// What is wrong with stored bytes, before it is known which file they are from.
#[derive(Debug)]
pub(crate) enum Flaw {
    /// They make no sense.
    Corrupt {
        /// The field or structure, by the name of the specification.
        field: &'static str,
        /// Its offset in the file.
        offset: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// They ask for what is not there.
    Unsupported(String),
}

impl Flaw {
    fn corrupt(field: &'static str, offset: u64, detail: impl Into<String>) -> Self {
        Self::Corrupt { field, offset, detail: detail.into() }
    }

    fn unsupported(detail: String) -> Self {
        Self::Unsupported(detail)
    }

    /// The error about a file.
    pub(crate) fn of(self, path: &Path) -> ImageError {
        match self {
            Self::Corrupt { field, offset, detail } => ImageError::corrupt(path, field, offset, detail),
            Self::Unsupported(detail) => ImageError::new(path, ErrorKind::Unsupported(detail)),
        }
    }
}
