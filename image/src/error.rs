//! Errors of images: every one names the file, and for bad bytes the field and the offset.

use std::fmt;
use std::path::{Path, PathBuf};

use sapwood_blockdev::Errno;
use sapwood_blockdev::device::DeviceError;

/// What went wrong with an image.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct ImageError {
    /// The file.
    pub path: PathBuf,
    /// What about it.
    pub kind: ErrorKind,
}

/// The kinds of trouble, as a caller can tell them apart.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// An operation on the file failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, as in "cannot open".
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Stored bytes make no sense.
    #[error("{field} at offset {offset:#x} is damaged: {detail}")]
    Corrupt {
        /// The field or structure, by its name in the format's document.
        field: &'static str,
        /// Its byte offset in the file.
        offset: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// The image uses something this program does not know or must not touch.
    #[error("{0}")]
    Unsupported(String),
    /// Somebody else uses the image.
    #[error("in use by {holder}: stop it first, or open the image read-only where that is enough")]
    Locked {
        /// Who, as far as the system tells.
        holder: String,
    },
    /// The base is missing or not what it was.
    #[error("{0}")]
    Base(String),
    /// A commit of the layer was interrupted, and must be finished first.
    #[error("{0}")]
    Unfinished(String),
    /// A wrong argument.
    #[error("{0}")]
    Invalid(String),
    /// Somebody asked for it to stop.
    #[error("cancelled")]
    Cancelled,
    /// The device below reported a failure.
    #[error("{0}")]
    Device(#[from] DeviceError),
}

impl ErrorKind {
    /// Its name, for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::Corrupt { .. } => "corrupt",
            Self::Unsupported(_) => "unsupported",
            Self::Locked { .. } => "locked",
            Self::Base(_) => "base",
            Self::Unfinished(_) => "unfinished",
            Self::Invalid(_) => "invalid",
            Self::Cancelled => "cancelled",
            Self::Device(_) => "device",
        }
    }
}

impl ImageError {
    /// An error about `path`.
    pub fn new(path: impl AsRef<Path>, kind: impl Into<ErrorKind>) -> Self {
        Self { path: path.as_ref().to_owned(), kind: kind.into() }
    }

    /// A failed system call.
    pub fn io(path: impl AsRef<Path>, action: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::new(path, ErrorKind::Io { action, source: source.into() })
    }

    /// A file that could not be opened.
    pub fn open(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::ResourceBusy => {
                Self::new(path, ErrorKind::Locked { holder: source.to_string() })
            }
            _ => Self::io(path, "open", source),
        }
    }

    /// A failed operation of an engine.
    pub fn errno(path: impl AsRef<Path>, action: &'static str, errno: Errno) -> Self {
        Self::io(path, action, errno)
    }

    /// Bytes that make no sense.
    pub fn corrupt(
        path: impl AsRef<Path>,
        field: &'static str,
        offset: u64,
        detail: impl fmt::Display,
    ) -> Self {
        Self::new(path, ErrorKind::Corrupt { field, offset, detail: detail.to_string() })
    }

    /// A wrong argument.
    pub fn invalid(path: impl AsRef<Path>, detail: impl fmt::Display) -> Self {
        Self::new(path, ErrorKind::Invalid(detail.to_string()))
    }
}
