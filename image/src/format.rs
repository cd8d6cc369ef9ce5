//! The names of the formats.

use std::fmt;
use std::str::FromStr;

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk, as they are.
    Raw,
    /// The Sapwood layer: a log and a map, over a base or nothing.
    Layer,
    /// QEMU's qcow2, versions 2 and 3: for reading only.
    Qcow2,
    /// A snapshot in packs. It has no file of its own: whoever holds the packs opens it.
    Sealed,
}

impl Format {
    /// Every format of a file, as it can be named.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Layer, Self::Qcow2];

    /// The name, on the command line and inside layers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Layer => "layer",
            Self::Qcow2 => "qcow2",
            Self::Sealed => "sealed",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no format's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format '{0}': the formats are raw, layer and qcow2")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}
