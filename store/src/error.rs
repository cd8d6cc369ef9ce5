//! Errors of a store: every one names the volume, snapshot or file, and says what to do.

use std::fmt;
use std::path::Path;

use sapwood_blockdev::Errno;
use sapwood_image::{ErrorKind, ImageError};

/// What went wrong with a store.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {kind}")]
pub struct StoreError {
    /// The volume or snapshot by name, or the file.
    pub subject: String,
    /// What about it.
    pub kind: StoreErrorKind,
}

/// The result of anything that is done with a store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The kinds of trouble, as a caller can tell them apart.
#[derive(Debug, thiserror::Error)]
pub enum StoreErrorKind {
    /// An operation on a file failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, as in "cannot open".
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Stored bytes make no sense.
    #[error("{0}")]
    Corrupt(String),
    /// The store uses something that this program does not know.
    #[error("{0}")]
    Unsupported(String),
    /// Another process has the store open.
    #[error("in use by {holder}: let that process do it, or stop it first")]
    Locked {
        /// Who, as far as the system tells.
        holder: String,
    },
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    Exists(String),
    /// A wrong argument.
    #[error("{0}")]
    Invalid(String),
    /// The volume is attached, or something else is being done with it.
    #[error("{0}")]
    InUse(String),
    /// It would throw away what no snapshot holds.
    #[error("{0}")]
    Unsaved(String),
    /// It is protected.
    #[error("{0}")]
    Protected(String),
    /// It has snapshots.
    #[error("{0}")]
    HasSnapshots(String),
    /// The store has no room for it, by its quota or its reserve.
    #[error("{0}")]
    Full(String),
    /// About a layer.
    #[error("{0}")]
    Image(ErrorKind),
}

impl StoreErrorKind {
    /// Its name, for programs; those that images have, too, are called the same.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::Corrupt(_) => "corrupt",
            Self::Unsupported(_) => "unsupported",
            Self::Locked { .. } => "locked",
            Self::NotFound(_) => "not-found",
            Self::Exists(_) => "exists",
            Self::Invalid(_) => "invalid",
            Self::InUse(_) => "in-use",
            Self::Unsaved(_) => "unsaved",
            Self::Protected(_) => "protected",
            Self::HasSnapshots(_) => "has-snapshots",
            Self::Full(_) => "full",
            Self::Image(kind) => kind.name(),
        }
    }
}

impl From<ImageError> for StoreError {
    fn from(error: ImageError) -> Self {
        let subject = error.path.display().to_string();
        let kind = match error.kind {
            ErrorKind::Io { action, source } => StoreErrorKind::Io { action, source },
            ErrorKind::Locked { holder } => StoreErrorKind::Locked { holder },
            other => StoreErrorKind::Image(other),
        };
        Self { subject, kind }
    }
}

impl StoreError {
    /// An error about something.
    pub fn new(subject: impl fmt::Display, kind: StoreErrorKind) -> Self {
        Self { subject: subject.to_string(), kind }
    }

    pub(crate) fn io(path: &Path, action: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::new(path.display(), StoreErrorKind::Io { action, source: source.into() })
    }

    pub(crate) fn errno(path: &Path, action: &'static str, errno: Errno) -> Self {
        Self::io(path, action, errno)
    }

    /// The same, for those who know of images only.
    pub(crate) fn into_image(self, path: &Path) -> ImageError {
        match self.kind {
            StoreErrorKind::Io { action, source } => ImageError::io(path, action, source),
            StoreErrorKind::Image(kind) => ImageError::new(path, kind),
            kind => ImageError::invalid(path, kind),
        }
    }

    pub(crate) fn invalid(subject: impl fmt::Display, text: impl fmt::Display) -> Self {
        Self::new(subject, StoreErrorKind::Invalid(text.to_string()))
    }

    pub(crate) fn not_found(subject: impl fmt::Display, what: &str) -> Self {
        Self::new(subject, StoreErrorKind::NotFound(format!("there is no such {what} in the store")))
    }

    /// What the catalog's database said.
    pub(crate) fn database(path: &Path, action: &'static str, error: impl Into<redb::Error>) -> Self {
        let kind = match error.into() {
            redb::Error::Io(source) => StoreErrorKind::Io { action, source },
            redb::Error::Corrupted(text) => StoreErrorKind::Corrupt(format!(
                "the catalog is damaged ({text}): bring back a copy of the store from a backup"
            )),
            redb::Error::UpgradeRequired(version) => StoreErrorKind::Unsupported(format!(
                "the catalog is in redb's file format {version}, which this program does not read: the program \
                 that wrote it has to bring it up to date"
            )),
            redb::Error::PreviousIo => {
                let text = "an earlier operation on the catalog failed: close the store and open it again";
                StoreErrorKind::Io { action, source: std::io::Error::other(text) }
            }
            other => StoreErrorKind::Io { action, source: std::io::Error::other(other.to_string()) },
        };
        Self::new(path.display(), kind)
    }
}
