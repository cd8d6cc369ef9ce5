//! Making disks of any format.

use std::path::Path;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use crate::error::ImageError;
use crate::format::Format;
use crate::layer::{self, CreateLayer};
use crate::raw::{self, CreateRaw};

/// A disk to be made.
#[derive(Clone, Debug)]
pub enum CreateDisk {
    /// A raw image.
    Raw(CreateRaw),
    /// A layer.
    Layer(CreateLayer),
}

impl CreateDisk {
    /// An empty disk of `size` bytes over nothing; `None` for formats that are only read.
    pub fn empty(format: Format, size: u64) -> Option<Self> {
        match format {
            Format::Raw => Some(Self::Raw(CreateRaw { size, allocate: false })),
            Format::Layer => Some(Self::Layer(CreateLayer { size: Some(size), ..CreateLayer::default() })),
            Format::Qcow2 | Format::Sealed => None,
        }
    }
}

/// Makes a disk that does not exist yet; durable when this returns.
///
/// # Errors
/// When the file exists, the file system refuses it, or the base cannot be used.
pub async fn create<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    disk: CreateDisk,
) -> Result<(), ImageError> {
    match disk {
        CreateDisk::Raw(options) => raw::create(storage, io, path, options).await,
        CreateDisk::Layer(options) => layer::create(storage, io, path, &options).await,
    }
}
