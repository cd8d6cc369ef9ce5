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
use crate::sealed::Hash;

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
    /// By what a sealed snapshot is known.
    pub root: Option<Hash>,
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
    if format == Format::Qcow2 {
        // Not opened as a disk: what it names stays closed.
        let found = qcow2::info(storage, io, path).await?;
        let said = of_file(storage, path, format)?;
        return Ok(DiskInfo { virtual_size: found.size, qcow2: Some(found), ..said });
    }
    let options = OpenDisk { format: Some(format), read_only: true, ..OpenDisk::default() };
    let disk = Disk::open(storage, io, path, options).await?;
    let said = info_of(storage, path, &disk);
    disk.close(io).await?;
    said
}

/// Describes a disk that is open, from `path`; of a qcow2 image only what all formats have.
///
/// # Errors
/// When the file cannot be asked.
pub fn info_of<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    path: &Path,
    disk: &Disk<E>,
) -> Result<DiskInfo, ImageError> {
    let said = match disk {
        Disk::Sealed(chain) => of_sealed(path, chain.root_hash()),
        _ => of_file(storage, path, disk.format())?,
    };
    let layer = match disk {
        Disk::Raw(_) | Disk::Qcow2(_) | Disk::Sealed(_) => None,
        Disk::Layer(layer) => Some(layer.info()),
    };
    let actual_size = match &layer {
        Some(layer) if said.is_device => layer.used_bytes,
        _ => said.actual_size,
    };
    Ok(DiskInfo { virtual_size: disk.geometry().size, actual_size, layer, ..said })
}

/// What there is to say about the file alone.
fn of_file<S: Storage>(storage: &S, path: &Path, format: Format) -> Result<DiskInfo, ImageError> {
    let file = storage.open(path, OpenOptions::READ).map_err(|e| ImageError::io(path, "open", e))?;
    Ok(DiskInfo {
        path: path.to_owned(),
        format,
        virtual_size: 0,
        actual_size: file.allocated().map_err(|e| ImageError::io(path, "measure", e))?,
        is_device: file.is_device(),
        is_direct: file.alignment() != Alignment::NONE,
        gives_space_back: file.gives_space_back(),
        layer: None,
        qcow2: None,
        root: None,
    })
}

/// What there is to say about a sealed snapshot: it shares its packs, so no bytes are its own.
fn of_sealed(path: &Path, root: Option<Hash>) -> DiskInfo {
    DiskInfo {
        path: path.to_owned(),
        format: Format::Sealed,
        virtual_size: 0,
        actual_size: 0,
        is_device: false,
        is_direct: false,
        gives_space_back: None,
        layer: None,
        qcow2: None,
        root,
    }
}
