//! Making raw images.

use std::path::Path;

use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_blockdev::units::FileOffset;

use super::device::disk_size;
use crate::error::ImageError;
use crate::site;

/// A raw image to be made.
#[derive(Clone, Copy, Debug)]
pub struct CreateRaw {
    /// Size in bytes; rounded up to a sector.
    pub size: u64,
    /// Whether to reserve all of its space at once, rather than as it is written.
    pub allocate: bool,
}

/// Makes a raw image of zeroes; durable when this returns, absent when it fails.
///
/// # Errors
/// When the file exists, or the file system refuses it.
pub async fn create<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    options: CreateRaw,
) -> Result<(), ImageError> {
    if site::is_device(storage, path) {
        let detail = "a block device is a raw disk as it is: there is nothing to make; convert -n fills one";
        return Err(ImageError::invalid(path, detail));
    }
    let file = storage.open(path, OpenOptions::CREATE).map_err(|e| ImageError::io(path, "create", e))?;
    let size = disk_size(options.size);
    let mut steps = vec![("set the size", Op::Truncate { file: file.clone(), size })];
    if options.allocate && size > 0 {
        let offset = FileOffset(0);
        steps.push(("allocate the space", Op::Allocate { file: file.clone(), offset, len: size }));
    }
    steps.push(("sync", Op::Sync { file }));
    steps.push(("sync the folder", Op::SyncDirectory { path: folder_of(path).to_owned() }));
    for (action, op) in steps {
        if let Err(errno) = io.run(op).await.result {
            // The first failure is the one to tell; what is left behind says the rest.
            let _ = io.run(Op::Unlink { path: path.to_owned() }).await;
            return Err(ImageError::errno(path, action, errno));
        }
    }
    Ok(())
}

/// The folder that holds `path`.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
