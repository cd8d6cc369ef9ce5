//! What lies below a layer: nothing, a raw image or another layer, none of which ever changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::Layer;
use super::layout::{BaseIdentity, BaseRecord, LayerId};
use super::{OpenLayer, open_file};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::SECTOR_SIZE;

/// Bases below one another, at most: opening and reading go down the chain, some KiB of stack each.
const DEPTH_MAX: usize = 100;

/// An opened base.
pub(super) enum Base<E: Engine> {
    /// A raw image; `size` is what the guest sees of it, in bytes.
    Raw { file: E::File, size: u64 },
    /// A layer, opened for reading.
    Layer(Arc<Layer<E>>),
}

/// A path as stored, seen from the folder of the layer that names it.
pub(super) fn resolve(layer: &Path, stored: &str) -> PathBuf {
    layer.parent().unwrap_or(Path::new("")).join(stored)
}

/// Size of a raw image as a guest sees it: whole sectors, the last one padded with zeroes.
fn raw_size(bytes: u64) -> u64 {
    bytes.next_multiple_of(SECTOR_SIZE)
}

impl<E: Engine> Base<E> {
    /// Opens a base for reading and tells its identity. `above` are the layers over it, topmost
    /// first.
    pub(super) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        format: Format,
        above: &[LayerId],
    ) -> Result<(Self, BaseIdentity), ImageError> {
        if above.len() > DEPTH_MAX {
            return Err(ImageError::new(
                path,
                ErrorKind::Base(format!("more than {DEPTH_MAX} bases in a chain")),
            ));
        }
        match format {
            Format::Raw => {
                let file = open_file(storage, path, OpenOptions::READ, Lock::Shared)?;
                let identity = file.identity().map_err(|e| ImageError::io(path, "identify", e))?;
                let size = raw_size(identity.size);
                Ok((Self::Raw { file, size }, BaseIdentity::Raw { size, mtime_ns: identity.mtime_ns }))
            }
            Format::Layer => {
                let options = OpenLayer { read_only: true, ..OpenLayer::default() };
                let layer = Box::pin(Layer::open_below(storage, io, path, &options, above)).await?;
                let identity = layer.identity();
                Ok((Self::Layer(layer), identity))
            }
            Format::Qcow2 => {
                let detail = "a qcow2 image cannot lie below a layer yet".to_owned();
                Err(ImageError::new(path, ErrorKind::Unsupported(detail)))
            }
        }
    }

    /// Opens the base that `record` names and refuses it when it is not what it was.
    pub(super) async fn open_recorded<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        record: &BaseRecord,
        above: &[LayerId],
    ) -> Result<Self, ImageError> {
        let path = resolve(layer, &record.path);
        let (base, found) = Self::open(storage, io, &path, record.identity.format(), above)
            .await
            .map_err(|e| ImageError::new(layer, ErrorKind::Base(format!("its base cannot be used: {e}"))))?;
        match describe_change(&record.identity, &found) {
            None => Ok(base),
            Some(change) => Err(ImageError::new(
                layer,
                ErrorKind::Base(format!(
                    "its base {} has changed since this layer was made ({change}): what the layer does not hold \
                     itself would read wrong; bring the old base back",
                    path.display()
                )),
            )),
        }
    }
}

/// In which way a base is not what it was.
fn describe_change(was: &BaseIdentity, is: &BaseIdentity) -> Option<String> {
    if was == is {
        return None;
    }
    if was.size() != is.size() {
        return Some(format!("its size was {} and is {} bytes", was.size(), is.size()));
    }
    Some(match (was, is) {
        (BaseIdentity::Raw { .. }, BaseIdentity::Raw { .. }) => "it was modified".to_owned(),
        (BaseIdentity::Layer { id: a, .. }, BaseIdentity::Layer { id: b, .. }) if a != b => {
            "it is another layer".to_owned()
        }
        _ => "it was opened for writing".to_owned(),
    })
}
