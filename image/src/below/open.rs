//! Opening a chain.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::SECTOR_SIZE;

use super::{Below, DEPTH_MAX, Link, cache};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use crate::qcow2::image::Image;

/// What may be done when an image is opened for reading.
#[derive(Clone, Debug, Default)]
pub struct OpenBelow {
    /// Open the files that images name: backing files and external data files. Without it an image
    /// that names one is refused, because it may name any file that this process can read.
    pub allow_backing: bool,
    /// The format of backing files whose image does not state it. It is never guessed.
    pub backing_format: Option<Format>,
    /// Read this snapshot of the image at the top, by id or else by name, not the disk as it is now.
    pub snapshot: Option<String>,
}

/// What makes a chain recognisable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Every file of the chain from the top down, each image followed by its data file.
    pub files: Vec<FileIdentity>,
}

/// A backing file by name.
#[derive(Debug)]
pub(crate) struct BackingSpec {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
}

impl<E: Engine> Below<E> {
    /// Opens an image for reading, with all that lies below it; the files are shared with other
    /// readers.
    ///
    /// # Errors
    /// An image of the chain cannot be opened, is damaged or in use; it names a file that it may not;
    /// the chain is a loop or longer than [`DEPTH_MAX`]; there is no such snapshot.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        format: Format,
        options: &OpenBelow,
    ) -> Result<Self, ImageError> {
        let mut links: Vec<Link<E>> = Vec::new();
        let mut next = Some(BackingSpec { path: path.to_owned(), format });
        while let Some(BackingSpec { path: at, format }) = next.take() {
            check_chain(&links, path, &at)?;
            let top = links.is_empty();
            match format {
                Format::Raw => links.push(open_raw(storage, &at)?),
                Format::Qcow2 => {
                    let mut image = Image::open(storage, io, &at).await?;
                    image.open_data(storage, options.allow_backing)?;
                    next = image.backing(options)?;
                    if let Some(name) = options.snapshot.as_ref().filter(|_| top) {
                        image.use_snapshot(io, name).await?;
                    }
                    links.push(Link::Qcow2(Box::new(image)));
                }
                Format::Layer => {
                    let detail = "a layer cannot lie below a qcow2 image".to_owned();
                    return Err(ImageError::new(at, ErrorKind::Unsupported(detail)));
                }
            }
        }
        let (tables, clusters) = (cache::tables(), cache::clusters());
        Ok(Self { links, tables, clusters, complained: AtomicBool::new(false) })
    }
}

/// Refuses a chain that goes on at `next` for ever, or for too long.
fn check_chain<E: Engine>(links: &[Link<E>], top: &Path, next: &Path) -> Result<(), ImageError> {
    let refuse = |detail: String| Err(ImageError::new(top, ErrorKind::Base(detail)));
    if let Some(twice) = links.iter().find(|link| link.path() == next) {
        return refuse(format!("its chain of backing files is a loop: {} again", twice.path().display()));
    }
    if links.len() > DEPTH_MAX {
        return refuse(format!("its chain has more than {DEPTH_MAX} backing files"));
    }
    Ok(())
}

fn open_raw<S: Storage, E: Engine<File = S::File>>(storage: &S, path: &Path) -> Result<Link<E>, ImageError> {
    let (file, identity) = open_shared(storage, path)?;
    Ok(Link::Raw { file, identity, size: identity.size.next_multiple_of(SECTOR_SIZE) })
}

/// Opens a file for reading, sharing it with other readers, and tells what it is.
pub(crate) fn open_shared<S: Storage>(
    storage: &S,
    path: &Path,
) -> Result<(S::File, FileIdentity), ImageError> {
    let file = storage.open(path, OpenOptions::READ).map_err(|e| ImageError::io(path, "open", e))?;
    crate::open::lock(&file, Lock::Shared)?;
    let identity = file.identity().map_err(|e| ImageError::io(path, "identify", e))?;
    Ok((file, identity))
}
