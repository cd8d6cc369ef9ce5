//! What lies below a layer: nothing, or a chain of images ([`crate::below`]) that begins with its base.
//! None of them may change while the layer counts on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::BaseSpec;
use super::base_record::{BASE_PATH_MAX, BaseIdentity, BaseRecord, BaseRef, Qcow2Identity, SNAPSHOT_MAX};
use super::device::Layer;
use super::in_store::ResolveBase;
use super::layout::{LayerId, SIZE_MAX};
use super::tuning::Tuning;
use crate::below::{Chain, NextLink};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Storage};

/// What lies below a layer, as recorded and as opened.
pub(crate) struct Below<E: Engine> {
    pub(crate) record: BaseRecord,
    /// `None` also where the layer was opened without its base.
    pub(crate) chain: Option<Arc<Chain<E>>>,
    /// The base while it is still open for writing, in this process: then it is asked instead of a chain.
    /// Its disk does not change any more.
    pub(crate) open: Option<Arc<Layer<E>>>,
}

/// What opening a layer does about its base.
#[derive(Clone, Copy)]
pub(crate) enum OpenBase {
    /// It is opened, too.
    Opened,
    /// It is left alone: only what the layer itself holds may be read.
    Nothing,
    /// It is opened, unless only a store knows what it is: for those who describe the layer.
    UnlessInStore,
}

/// A path as stored, seen from the folder of the layer that names it.
pub(super) fn resolve(layer: &Path, stored: &str) -> PathBuf {
    layer.parent().unwrap_or(Path::new("")).join(stored)
}

/// What a layer says of its base, to whoever opens that.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    /// The layer's path and id.
    pub(crate) layer: PathBuf,
    pub(crate) id: LayerId,
    pub(crate) base: BaseRef,
}

impl Named {
    /// What the layer at `layer` names in its base record, if it may be opened.
    pub(crate) fn of(layer: &Path, record: &BaseRecord) -> Result<Option<Self>, ImageError> {
        let Some(base) = record.base.clone() else { return Ok(None) };
        let named = Self { layer: layer.to_owned(), id: record.layer_id, base };
        if record.committing {
            let detail = format!(
                "it was being merged into its base {}: finish that first (sapwood commit {})",
                named.path().display(),
                layer.display()
            );
            return Err(ImageError::new(layer, ErrorKind::Unfinished(detail)));
        }
        Ok(Some(named))
    }

    /// Where the base is; of a snapshot of a store, the folder of the layer.
    pub(crate) fn path(&self) -> PathBuf {
        resolve(&self.layer, &self.base.path)
    }

    pub(crate) fn format(&self) -> Format {
        self.base.identity.format()
    }

    /// What the files of a qcow2 chain were.
    pub(crate) fn qcow2(&self) -> Option<&Qcow2Identity> {
        match &self.base.identity {
            BaseIdentity::Qcow2(qcow2) => Some(qcow2),
            _ => None,
        }
    }

    pub(crate) fn refuse(&self, text: String) -> ImageError {
        ImageError::new(&self.layer, ErrorKind::Base(text))
    }

    /// What it means that the base, or something below it, cannot be opened.
    pub(crate) fn unusable(&self, error: &ImageError) -> ImageError {
        let moved = self.base.in_store().is_none()
            && matches!(&error.kind, ErrorKind::Io { source, .. }
            if source.kind() == std::io::ErrorKind::NotFound && error.path == self.path());
        let hint = if moved { self.advice("if it was moved, say where to") } else { String::new() };
        self.refuse(format!("its base cannot be used: {error}{hint}"))
    }

    /// Refuses a base that is not what it was.
    pub(crate) fn check(&self, found: &BaseIdentity, files: &[PathBuf]) -> Result<(), ImageError> {
        describe_change(&self.base.identity, found, files).map_or(Ok(()), |change| Err(self.changed(&change)))
    }

    /// The same of a snapshot of a store, which is the layer `id`.
    pub(crate) fn check_frozen(&self, found: &BaseIdentity, id: LayerId) -> Result<(), ImageError> {
        let generation = match found {
            BaseIdentity::Layer { generation, .. } => *generation,
            _ => 0,
        };
        // Of these a snapshot's number of checkpoints may change: when it is closed at last, for example.
        let was = BaseIdentity::Layer { size: self.base.identity.size(), id, generation };
        describe_change(&was, found, &[]).map_or(Ok(()), |change| Err(self.changed(&change)))
    }

    /// The same of a snapshot of a store, which is sealed and has so many bytes.
    pub(crate) fn check_sealed(&self, size: u64) -> Result<(), ImageError> {
        let was = self.base.identity.size();
        let change = format!("its size was {was} and is {size} bytes");
        if was == size { Ok(()) } else { Err(self.changed(&change)) }
    }

    /// The error about a base that has changed.
    pub(crate) fn changed(&self, change: &str) -> ImageError {
        if let Some(base) = self.base.in_store() {
            return self.refuse(format!(
                "its base, {base}, is not what the catalog says ({change}): bring the old file back"
            ));
        }
        self.refuse(format!(
            "its base {} has changed since it was recorded ({change}): what the layer does not hold itself would \
             read wrong; bring the old base back{}",
            self.path().display(),
            self.advice("if this one still holds the same, say so")
        ))
    }

    /// How the layer is made to take another base as it is.
    fn advice(&self, when: &str) -> String {
        let format = self.format();
        format!("; {when}: sapwood rebase -u -b BASE -F {format} {}", self.layer.display())
    }
}

impl<E: Engine> Below<E> {
    /// Opens what `record` names below the layer at `layer`, and refuses it when it is not what it
    /// was.
    pub(super) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        record: BaseRecord,
        tuning: &Tuning,
        resolver: Option<&dyn ResolveBase<E>>,
    ) -> Result<Self, ImageError> {
        Ok(Self::open_found(storage, io, layer, record, tuning, resolver, None).await?.0)
    }

    /// As [`Below::open`]; by what the base is recognised now is the answer, too. `known` is what lies below the base, if
    /// that is open.
    pub(super) async fn open_found<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        record: BaseRecord,
        tuning: &Tuning,
        resolver: Option<&dyn ResolveBase<E>>,
        known: Option<&Chain<E>>,
    ) -> Result<(Self, Option<BaseIdentity>), ImageError> {
        let Some(named) = Named::of(layer, &record)? else { return Ok((Self::over(record, None), None)) };
        let first = NextLink::named(named, resolver)?;
        let (chain, found) = Chain::open_below(storage, io, first, None, tuning, resolver, known).await?;
        Ok((Self::over(record, Some(Arc::new(chain))), Some(found)))
    }

    /// What lies below a layer whose base is not open for writing.
    pub(super) fn over(record: BaseRecord, chain: Option<Arc<Chain<E>>>) -> Self {
        Self { record, chain, open: None }
    }

    /// Images below that are open, and memory that the indexes over layers among them take, in bytes.
    pub(super) fn depth(&self) -> (usize, usize) {
        match (&self.open, &self.chain) {
            (Some(layer), _) => {
                let (depth, index_bytes) = layer.below().depth();
                (depth + 1, index_bytes)
            }
            (None, Some(chain)) => (chain.depth(), chain.index_bytes()),
            (None, None) => (0, 0),
        }
    }

    /// Opens a base that the layer at `layer` is to have, and says how to record it. `above` is that
    /// layer's id, if it has one yet; `known` is what lies below the base, if that is open.
    pub(super) async fn open_base<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        layer: &Path,
        spec: &BaseSpec,
        above: Option<LayerId>,
        tuning: &Tuning,
        known: Option<&Chain<E>>,
    ) -> Result<(Arc<Chain<E>>, BaseRef), ImageError> {
        let stored = stored_path(layer, &spec.path)?;
        let path = resolve(layer, stored);
        check_options(&path, spec)?;
        let first = NextLink {
            path: path.clone(),
            format: spec.format,
            options: spec.options.clone(),
            named: None,
            resolved: None,
        };
        let (chain, identity) = Chain::open_below(storage, io, first, above, tuning, None, known).await?;
        if identity.size() > SIZE_MAX {
            return Err(ImageError::invalid(path, "a base has at most 64 TiB"));
        }
        if chain.files().iter().any(|(_, file)| file.mtime_ns == 0) {
            log::warn!(
                "{}: a block device has no modification time: only a change of its size will be noticed, so \
                 make sure that nothing writes it while layers are over it (blockdev --setro)",
                path.display()
            );
        }
        Ok((Arc::new(chain), BaseRef { path: stored.to_owned(), identity }))
    }
}

/// The path of a base as a base record has room for it.
pub(super) fn stored_path<'a>(layer: &Path, path: &'a Path) -> Result<&'a str, ImageError> {
    path.to_str().filter(|p| !p.is_empty() && p.len() <= BASE_PATH_MAX).ok_or_else(|| {
        let detail = format_args!("the base's path must be UTF-8 of 1 to {BASE_PATH_MAX} bytes");
        ImageError::invalid(layer, detail)
    })
}

/// Refuses what a base record has no room for.
fn check_options(path: &Path, spec: &BaseSpec) -> Result<(), ImageError> {
    if spec.format != Format::Qcow2 && spec.options.snapshot.is_some() {
        let detail = "only qcow2 images have snapshots inside".to_owned();
        return Err(ImageError::new(path, ErrorKind::Unsupported(detail)));
    }
    if spec.options.snapshot.as_ref().is_some_and(|name| name.is_empty() || name.len() > SNAPSHOT_MAX) {
        let detail = format_args!("the snapshot's name must have 1 to {SNAPSHOT_MAX} bytes");
        return Err(ImageError::invalid(path, detail));
    }
    if matches!(spec.options.backing_format, Some(Format::Layer | Format::Sealed)) {
        return Err(ImageError::invalid(path, "only raw and qcow2 can lie below qcow2"));
    }
    Ok(())
}

/// In which way a base is not what it was. `files` are the paths of what was found.
pub(super) fn describe_change(was: &BaseIdentity, is: &BaseIdentity, files: &[PathBuf]) -> Option<String> {
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
        (
            BaseIdentity::Layer { id: a, .. } | BaseIdentity::OpenLayer { id: a, .. },
            BaseIdentity::Layer { id: b, .. },
        ) if a != b => {
            changes.push(format!("it is another layer: its id was {} and is {}", hex(a), hex(b)));
        }
        (BaseIdentity::Layer { generation: a, .. }, BaseIdentity::Layer { generation: b, .. }) if a != b => {
            changes.push(format!("it was opened for writing since: generation {a} became {b}"));
        }
        (BaseIdentity::Qcow2(a), BaseIdentity::Qcow2(b)) => changes.extend(describe_qcow2(a, b, files)),
        _ => {}
    }
    (!changes.is_empty()).then(|| changes.join(", "))
}

fn describe_qcow2(was: &Qcow2Identity, is: &Qcow2Identity, files: &[PathBuf]) -> Option<String> {
    let file = describe_files(was, &is.listed, files);
    file.or_else(|| {
        let counts = format!("its chain had {} files and has {}", was.count, is.count);
        (was.count != is.count).then_some(counts)
    })
    .or_else(|| (was.sum != is.sum).then(|| "a file deep in its chain was modified".to_owned()))
    .or_else(|| {
        let (a, b) = (&was.snapshot, &is.snapshot);
        let name = |snapshot: &Option<String>| snapshot.clone().unwrap_or_else(|| "none".to_owned());
        (a != b).then(|| format!("its snapshot was {} and is {}", name(a), name(b)))
    })
}

/// The first of the `found` files of a qcow2 chain, from the top, that is not what it was.
pub(crate) fn describe_files(
    was: &Qcow2Identity,
    found: &[FileIdentity],
    paths: &[PathBuf],
) -> Option<String> {
    let changed = was.listed.iter().zip(found).position(|(was, is)| was != is)?;
    let (was, is) = (was.listed[changed], found[changed]);
    let path = paths.get(changed).map_or_else(|| "a file".to_owned(), |path| path.display().to_string());
    Some(match was.size == is.size {
        true => format!("{path} was modified: last at {}, now at {}", date(was.mtime_ns), date(is.mtime_ns)),
        false => format!("{path} had {} bytes and has {}", was.size, is.size),
    })
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
