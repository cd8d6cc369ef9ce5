//! What there is to say about one image, without what lies below it.

use std::path::{Path, PathBuf};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use super::image::Image;
use super::{Compression, Snapshot};
use crate::error::ImageError;

/// Facts about an image.
#[derive(Clone, Debug)]
pub struct Qcow2Info {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// How compressed clusters are compressed, if there are any.
    pub compression: Compression,
    /// Whether clusters consist of 32 subclusters.
    pub extended_l2: bool,
    /// Width of a reference count in bits.
    pub refcount_bits: u32,
    /// Reference counts are brought up to date late.
    pub lazy_refcounts: bool,
    /// It was not closed properly: reference counts may be wrong, which harms no reader.
    pub dirty: bool,
    /// Marked as damaged by a program that wrote it.
    pub corrupt: bool,
    /// The backing file.
    pub backing: Option<BackingInfo>,
    /// The external data file, as the image names it.
    pub data_file: Option<String>,
    /// The external data file can be read as a raw image.
    pub data_file_raw: bool,
    /// Snapshots inside the image.
    pub snapshots: Vec<Snapshot>,
}

/// A backing file, as an image describes it.
#[derive(Clone, Debug)]
pub struct BackingInfo {
    /// Its name as stored.
    pub name: String,
    /// The same as seen from here.
    pub path: PathBuf,
    /// Its format, if stated.
    pub format: Option<String>,
}

/// Describes an image. Nothing that it names is opened.
///
/// # Errors
/// When it cannot be opened, or its header or snapshot table is damaged.
pub async fn info<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<Qcow2Info, ImageError> {
    let image: Image<E> = Image::open(storage, io, path).await?;
    let snapshots = image.snapshots(io).await?.into_iter().map(|(snapshot, _)| snapshot).collect();
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let header = &image.header;
    let backing = header.backing_name.as_ref().map(|name| BackingInfo {
        name: text(name),
        path: image.beside(name),
        format: header.backing_format.clone(),
    });
    Ok(Qcow2Info {
        size: header.size,
        version: header.version,
        cluster_size: image.cluster_size(),
        compression: header.compression,
        extended_l2: header.shape.extended,
        refcount_bits: header.refcount_bits,
        lazy_refcounts: header.lazy_refcounts,
        dirty: header.dirty,
        corrupt: header.corrupt,
        backing,
        data_file: header.data_file.as_ref().map(text),
        data_file_raw: header.data_file_raw,
        snapshots,
    })
}
