//! What there is to say about an image.

use std::path::{Path, PathBuf};

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Alignment, OpenOptions, Storage, StorageFile};

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
    /// Bytes that the file occupies on its file system; of a layer on a block device, those that it
    /// uses.
    pub actual_size: u64,
    /// Whether it lies on a block device.
    pub is_device: bool,
    /// Whether it is read and written past the host's page cache.
    pub is_direct: bool,
    /// Whether the storage takes unused space back, if it says so.
    pub gives_space_back: Option<bool>,
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
    let mut actual_size = file.allocated().map_err(|e| ImageError::io(path, "measure", e))?;
    let (is_device, gives_space_back) = (file.is_device(), file.gives_space_back());
    let is_direct = file.alignment() != Alignment::NONE;
    drop(file);
    let said = DiskInfo {
        path: path.to_owned(),
        format,
        virtual_size: 0,
        actual_size,
        is_device,
        is_direct,
        gives_space_back,
        layer: None,
        qcow2: None,
    };
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
    if let Some(layer) = layer.as_ref().filter(|_| is_device) {
        actual_size = layer.used_bytes;
    }
    let virtual_size = disk.geometry().size;
    disk.close(io).await?;
    Ok(DiskInfo { virtual_size, actual_size, layer, ..said })
}
