//! What there is to say about an image.

use std::path::{Path, PathBuf};

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};

use crate::error::ImageError;
use crate::format::Format;
use crate::layer::LayerInfo;
use crate::open::{Disk, OpenDisk};
use crate::probe::{Guess, probe};
use crate::qcow2::{self, Qcow2Info};

/// Facts about an image.
pub struct DiskInfo {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file occupies on its file system.
    pub actual_size: u64,
    /// More about a layer.
    pub layer: Option<LayerInfo>,
    /// More about a qcow2 image.
    pub qcow2: Option<Qcow2Info>,
}

/// Describes an image. Unlike everything else this takes a file that looks like nothing for raw,
/// because nothing in it is followed or believed.
///
/// # Errors
/// When the file cannot be opened or is damaged.
pub async fn info<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    format: Option<Format>,
) -> Result<DiskInfo, ImageError> {
    let format = match format {
        Some(format) => format,
        None => match probe(storage, io, path).await? {
            Guess::Unknown => Format::Raw,
            guess => guess.format(path)?,
        },
    };
    let file = storage.open(path, OpenOptions::READ).map_err(|e| ImageError::io(path, "open", e))?;
    let actual_size = file.allocated().map_err(|e| ImageError::io(path, "measure", e))?;
    drop(file);
    let said =
        DiskInfo { path: path.to_owned(), format, virtual_size: 0, actual_size, layer: None, qcow2: None };
    if format == Format::Qcow2 {
        // Not opened as a disk: what it names stays closed.
        let found = qcow2::info(storage, io, path).await?;
        return Ok(DiskInfo { virtual_size: found.size, qcow2: Some(found), ..said });
    }
    let options = OpenDisk { format: Some(format), read_only: true, ..OpenDisk::default() };
    let disk = Disk::open(storage, io, path, options).await?;
    let layer = match &*disk {
        Disk::Raw(_) | Disk::Qcow2(_) => None,
        Disk::Layer(layer) => Some(layer.info()),
    };
    let virtual_size = disk.geometry().size;
    disk.close(io).await?;
    Ok(DiskInfo { virtual_size, layer, ..said })
}
