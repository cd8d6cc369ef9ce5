//! What lies below a layer: nothing, a raw image or another layer. None of them may change while
//! the layer counts on it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::base_record::{BASE_PATH_MAX, BaseIdentity, BaseRecord, BaseRef};
use super::device::Layer;
use super::layout::LayerId;
use super::{BaseSpec, OpenLayer, open_file};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Lock, OpenOptions, Storage, StorageFile};
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

/// What lies below a layer, as recorded and as opened.
pub(super) struct Below<E: Engine> {
    pub(super) record: BaseRecord,
    /// `None` also where the layer was opened without its base.
    pub(super) base: Option<Base<E>>,
}

/// What opening a layer does about its base.
#[derive(Clone, Copy)]
pub(super) enum OpenBase<'a> {
    /// It is opened, too. These layers lie above, topmost first.
    Chain(&'a [LayerId]),
    /// It is left alone: only what the layer itself holds may be read.
    Nothing,
}

/// A path as stored, seen from the folder of the layer that names it.
pub(super) fn resolve(layer: &Path, stored: &str) -> PathBuf {
    layer.parent().unwrap_or(Path::new("")).join(stored)
}

/// What a raw image's file says of itself. A guest sees whole sectors, the last one padded with zeroes.
pub(super) fn raw_identity(path: &Path, found: io::Result<FileIdentity>) -> Result<BaseIdentity, ImageError> {
    let FileIdentity { size, mtime_ns } = found.map_err(|e| ImageError::io(path, "identify", e))?;
    Ok(BaseIdentity::Raw { size: size.next_multiple_of(SECTOR_SIZE), mtime_ns })
}

impl<E: Engine> Clone for Base<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Raw { file, size } => Self::Raw { file: file.clone(), size: *size },
            Self::Layer(layer) => Self::Layer(Arc::clone(layer)),
        }
    }
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
                let identity = raw_identity(path, file.identity())?;
                Ok((Self::Raw { file, size: identity.size() }, identity))
            }
            Format::Layer => {
                let options = OpenLayer { read_only: true, ..OpenLayer::default() };
                let chain = OpenBase::Chain(above);
                let layer = Box::pin(Layer::open_with(storage, io, path, &options, chain)).await?;
                let identity = layer.identity();
                Ok((Self::Layer(layer), identity))
            }
            Format::Qcow2 => {
                let detail = "a qcow2 image cannot lie below a layer yet".to_owned();
                Err(ImageError::new(path, ErrorKind::Unsupported(detail)))
            }
        }
    }

    /// Opens a base that the layer at `layer` is to have, and says how to record it.
    pub(super) async fn open_named<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        spec: &BaseSpec,
        above: &[LayerId],
    ) -> Result<(Self, BaseRef), ImageError> {
        let stored =
            spec.path.to_str().filter(|p| !p.is_empty() && p.len() <= BASE_PATH_MAX).ok_or_else(|| {
                let detail = format_args!("the base's path must be UTF-8 of 1 to {BASE_PATH_MAX} bytes");
                ImageError::invalid(layer, detail)
            })?;
        let path = resolve(layer, stored);
        let (base, identity) = Self::open(storage, io, &path, spec.format, above).await?;
        if let BaseIdentity::Raw { mtime_ns: 0, .. } = identity {
            log::warn!(
                "{}: a block device has no modification time: only a change of its size will be noticed, so \
                 make sure that nothing writes it while layers are over it (blockdev --setro)",
                path.display()
            );
        }
        Ok((base, BaseRef { path: stored.to_owned(), identity }))
    }

    /// The file.
    pub(super) fn file(&self) -> E::File {
        match self {
            Self::Raw { file, .. } => file.clone(),
            Self::Layer(layer) => layer.file(),
        }
    }

    /// Size in bytes as a guest sees it.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Layer(layer) => layer.core().size,
        }
    }
}

impl<E: Engine> Below<E> {
    /// Opens what `record` names below the layer at `layer`, and refuses it when it is not what it
    /// was. `above` are the layers over this one, topmost first.
    pub(super) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        record: BaseRecord,
        above: &[LayerId],
    ) -> Result<Self, ImageError> {
        let refuse = |text| ImageError::new(layer, ErrorKind::Base(text));
        if above.contains(&record.layer_id) {
            return Err(refuse("its bases form a loop".to_owned()));
        }
        let Some(recorded) = &record.base else { return Ok(Self { record, base: None }) };
        let path = resolve(layer, &recorded.path);
        if record.committing {
            return Err(refuse(format!(
                "it was being merged into its base {}: finish that first (sapwood commit {})",
                path.display(),
                layer.display()
            )));
        }
        let chain = [above, &[record.layer_id]].concat();
        let format = recorded.identity.format();
        let (base, found) = Base::open(storage, io, &path, format, &chain).await.map_err(|error| {
            let moved = matches!(&error.kind, ErrorKind::Io { source, .. }
                if source.kind() == std::io::ErrorKind::NotFound && error.path == path);
            let hint =
                if moved { advice("if it was moved, say where to", layer, format) } else { String::new() };
            refuse(format!("its base cannot be used: {error}{hint}"))
        })?;
        match describe_change(&recorded.identity, &found) {
            None => Ok(Self { record, base: Some(base) }),
            Some(change) => Err(refuse(format!(
                "its base {} has changed since it was recorded ({change}): what the layer does not hold itself \
                 would read wrong; bring the old base back{}",
                path.display(),
                advice("if this one still holds the same, say so", layer, format)
            ))),
        }
    }
}

/// How a layer is made to take another base as it is.
fn advice(when: &str, layer: &Path, format: Format) -> String {
    format!("; {when}: sapwood rebase -u -b BASE -F {format} {}", layer.display())
}

/// In which way a base is not what it was.
pub(super) fn describe_change(was: &BaseIdentity, is: &BaseIdentity) -> Option<String> {
    let mut changes = Vec::new();
    if was.format() != is.format() {
        changes.push(format!("its format was {} and is {}", was.format(), is.format()));
    }
    if was.size() != is.size() {
        changes.push(format!("its size was {} and is {} bytes", was.size(), is.size()));
    }
    match (was, is) {
        (BaseIdentity::Raw { mtime_ns: a, .. }, BaseIdentity::Raw { mtime_ns: b, .. }) if a != b => {
            changes.push(format!("it was modified: last at {}, now at {}", date(*a), date(*b)));
        }
        (BaseIdentity::Layer { id: a, .. }, BaseIdentity::Layer { id: b, .. }) if a != b => {
            changes.push(format!("it is another layer: its id was {} and is {}", hex(a), hex(b)));
        }
        (BaseIdentity::Layer { generation: a, .. }, BaseIdentity::Layer { generation: b, .. }) if a != b => {
            changes.push(format!("it was opened for writing since: generation {a} became {b}"));
        }
        _ => {}
    }
    (!changes.is_empty()).then(|| changes.join(", "))
}

/// A moment in nanoseconds since 1970, in the form of RFC 3339.
fn date(ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(ns)) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{ns} ns after 1970"),
    }
}

/// A layer's id as it is shown.
pub(super) fn hex(id: &LayerId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
