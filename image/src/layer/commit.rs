//! Merges a layer into its base.
//!
//! Order: a base record that says that a commit is under way; then the base is opened for writing
//! and takes what the layer holds; it is closed, durably; then the layer is emptied, and a base
//! record names the base as it is now. While the mark stands the base may be anything between the
//! old and the new one, and only together with the layer it is the disk: nobody may write it, and
//! doing the same again finishes it.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::join_all;

use super::base::{Below, OpenBase, describe_change, resolve};
use super::base_record::{BaseIdentity, BaseRef};
use super::device::Layer;
use super::driver::Driver;
use super::extents::MapRun;
use super::node::Entry;
use super::tuning::{Tuning, breaks};
use super::waiter::Result as DeviceResult;
use super::{BaseSpec, OpenLayer};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use crate::raw::RawDevice;
use crate::side::{BATCH, CHUNK_LEN, WINDOW_LEN, cut};
use crate::site;
use sapwood_blockdev::device::{BlockDevice, Command, Request};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_SIZE, GuestOffset};

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The base, which now reads as the layer did.
    pub base: PathBuf,
    /// Bytes of data written into it.
    pub written: u64,
}

/// Merges the layer at `path` into its base, which then reads as the layer did; nobody may use
/// either. A base that is smaller grows; one that is larger keeps its size and what lies past the
/// layer's end. With `delete` the layer is removed at the end, otherwise it stays, empty, over
/// the same base. Interrupted at any moment, doing it again finishes it. `progress` is called with
/// the bytes of disk done and their number.
///
/// # Errors
/// A layer without a base, a base that is not what it was or cannot be written, or what the storage
/// says.
pub async fn commit<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    delete: bool,
    tuning: Tuning,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Committed, ImageError> {
    let options = OpenLayer { read_only: false, tuning };
    let layer = Layer::<E>::open_with(storage, io, path, &options, OpenBase::Nothing, None).await?;
    let result = layer.commit(storage, io, &options, delete, progress).await;
    if delete && result.is_ok() {
        return remove::<E>(io, &layer.file(), path).await.and(result);
    }
    let closed = layer.close(io).await;
    result.and_then(|committed| closed.map(|()| committed))
}

/// Removes a layer: the file, or what makes a device's contents one.
async fn remove<E: Engine>(io: &Io<E>, file: &E::File, path: &Path) -> Result<(), ImageError> {
    site::abandon(io, file).await.map_err(|errno| ImageError::errno(path, "remove", errno))?;
    if file.is_device() {
        return Ok(());
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let sync = Op::SyncDirectory { path: folder.to_owned() };
    io.run(sync).await.result.map(drop).map_err(|errno| ImageError::errno(folder, "sync", errno))
}

/// A base opened for writing.
pub(super) enum Lower<E: Engine> {
    Raw(Arc<RawDevice<E>>),
    Layer(Driver<E>),
}

impl<E: Engine> Lower<E> {
    /// Opens a base.
    pub(super) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        format: Format,
        options: &OpenLayer,
    ) -> Result<Self, ImageError> {
        match format {
            Format::Raw => Ok(Self::Raw(RawDevice::open(storage, path, false)?)),
            Format::Layer => {
                let layer = Layer::open(storage, io, path, options).await?;
                Ok(Self::Layer(Driver::new(layer, io.clone())))
            }
            Format::Qcow2 | Format::Sealed => {
                Err(ImageError::new(path, sapwood_blockdev::device::DeviceError::ReadOnly))
            }
        }
    }

    /// Has a layer do its background work.
    fn maintain(&self, io: &Io<E>) {
        if let Self::Layer(driver) = self {
            io.spawn(Arc::clone(&driver.layer).maintain(io.clone()));
        }
    }

    /// Has a layer, which was just opened and is not maintained, use nothing again that it uses now,
    /// until it is closed: somebody reads it as it is now.
    pub(super) fn keep_places(&self) {
        if let Self::Layer(driver) = self {
            // An epoch that is never left.
            driver.layer.core().segments.enter();
        }
    }

    /// Whether the base, which was just opened, was `before` what was recorded.
    pub(super) fn is_what_was(&self, before: &BaseIdentity) -> Result<bool, ImageError> {
        Ok(match (self, before, self.identity()?) {
            (Self::Raw(_), before, found) => *before == found,
            (
                Self::Layer(driver),
                BaseIdentity::Layer { id, generation, .. },
                BaseIdentity::Layer { id: same, .. },
            ) => {
                let core = driver.layer.core();
                *id == same && *generation == core.found_generation && core.was_clean
            }
            _ => false,
        })
    }

    /// What tells the base, as it is now, from others.
    pub(super) fn identity(&self) -> Result<BaseIdentity, ImageError> {
        match self {
            Self::Raw(raw) => {
                let FileIdentity { mtime_ns, .. } =
                    raw.identity().map_err(|e| ImageError::io(raw.path(), "identify", e))?;
                Ok(BaseIdentity::Raw { size: raw.geometry().size, mtime_ns })
            }
            Self::Layer(driver) => Ok(driver.layer.identity()),
        }
    }

    /// Makes the base at least `size` bytes large.
    pub(super) async fn grow(&self, io: &Io<E>, size: u64) -> Result<(), ImageError> {
        match self {
            Self::Raw(raw) if raw.geometry().size < size => raw.resize(io, size).await,
            Self::Layer(driver) if driver.layer.geometry().size < size => driver.layer.resize(io, size).await,
            _ => Ok(()),
        }
    }

    async fn perform(&self, io: &Io<E>, range: Range<u64>, command: Command) -> DeviceResult {
        let (offset, len) = (GuestOffset(range.start), range.end - range.start);
        let request = Request { tag: 0, offset, len, command };
        match self {
            Self::Raw(raw) => raw.perform(io, request).await,
            Self::Layer(driver) => driver.merge(request).await,
        }
    }

    /// Makes a checkpoint of a layer when it is time for one. Nobody else does.
    async fn checkpoint_if_due(&self) -> DeviceResult {
        match self {
            Self::Layer(driver) if driver.layer.core().is_checkpoint_due() => {
                driver.checkpoint(None, false).await
            }
            _ => Ok(()),
        }
    }

    /// Makes everything durable and closes it.
    pub(super) async fn close(&self, io: &Io<E>) -> Result<(), ImageError> {
        match self {
            Self::Raw(raw) => raw.close(io).await,
            Self::Layer(driver) => {
                driver.retire().await;
                driver.layer.close(io).await
            }
        }
    }
}

impl<E: Engine> Layer<E> {
    async fn commit<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        options: &OpenLayer,
        delete: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Committed, ImageError> {
        let below = self.below();
        let Some(base) = &below.record.base else {
            return Err(ImageError::invalid(self.path(), "it has no base that it could be merged into"));
        };
        self.check_is_written(base)?;
        let base_path = resolve(self.path(), &base.path);
        let driver = Driver::new(Arc::clone(self), io.clone());
        let result = async {
            let lower = driver.open_lower(storage, &below, base, &base_path, options).await?;
            let mut report = |done, all| {
                progress(done, all);
                ControlFlow::Continue(())
            };
            let merged = driver.merge_into(&lower, &base_path, &mut report).await;
            let closed = lower.close(io).await;
            // With its lock.
            drop(lower);
            let written = merged?;
            closed?;
            if !delete {
                driver.empty_over(storage, base).await?;
            }
            Ok(written)
        }
        .await;
        driver.retire().await;
        result.map(|written| Committed { base: base_path, written })
    }

    /// Refuses bases of formats that are only read.
    pub(super) fn check_is_written(&self, base: &BaseRef) -> Result<(), ImageError> {
        if base.identity.format() == Format::Qcow2 {
            let detail = format!(
                "its base {} is a qcow2 image, which is read and never written: make a new image with sapwood \
                 convert, or let the layer hold all of its disk with sapwood flatten",
                resolve(self.path(), &base.path).display()
            );
            return Err(ImageError::new(self.path(), ErrorKind::Unsupported(detail)));
        }
        Ok(())
    }

    /// Refuses to go on with another layer than the commit was begun with. Whatever else tells a base
    /// from another has changed since then.
    async fn check_same_layer<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        base: &BaseRef,
        path: &Path,
    ) -> Result<(), ImageError> {
        let spec = BaseSpec::new(&base.path, base.identity.format());
        let (above, tuning) = (self.header().layer_id, self.core().tuning);
        let opened = Below::<E>::open_base(storage, io, self.path(), &spec, Some(above), &tuning, None);
        let found = opened.await?.1.identity;
        match (&base.identity, &found) {
            (
                BaseIdentity::Layer { id: a, .. } | BaseIdentity::OpenLayer { id: a, .. },
                BaseIdentity::Layer { id: b, .. },
            ) if a != b => {
                let change = describe_change(&base.identity, &found, &[]).unwrap_or_default();
                let detail =
                    format!("{} is not the base that it was being merged into: {change}", path.display());
                Err(ImageError::new(self.path(), ErrorKind::Base(detail)))
            }
            _ => Ok(()),
        }
    }
}

impl<E: Engine> Driver<E> {
    /// Marks the layer as being merged, and opens its base for writing and makes it large enough.
    async fn open_lower<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        below: &Below<E>,
        base: &BaseRef,
        base_path: &Path,
        options: &OpenLayer,
    ) -> Result<Lower<E>, ImageError> {
        let layer = &self.layer;
        let size = layer.geometry().size;
        let open = async || {
            let lower = Lower::open(storage, &self.io, base_path, base.identity.format(), options).await?;
            lower.maintain(&self.io);
            match lower.grow(&self.io, size).await {
                Ok(()) => Ok(lower),
                Err(error) => {
                    lower.close(&self.io).await.ok();
                    Err(error)
                }
            }
        };
        if below.record.committing {
            layer.check_same_layer(storage, &self.io, base, base_path).await?;
            return open().await;
        }
        // Checked as for any use of the layer.
        let opened = self.open_below(storage, below, options).await?;
        if let Some(chain) = &opened.chain {
            // What would fail for ever must not be begun.
            chain.check_growth(size)?;
        }
        drop(opened);
        let mark = async |committing| {
            let marked = self.switch_base(None, Some(base.clone()), committing).await;
            marked.map_err(|error| ImageError::new(layer.path(), error))
        };
        if !breaks!(options.tuning, CommitWithoutMark) {
            mark(true).await?;
        }
        let lower = open().await;
        if lower.is_err() {
            let found = self.open_below(storage, below, options).await;
            // Nothing of the base was changed, so the layer is what it was.
            if found.is_ok() {
                mark(false).await?;
            }
        }
        lower
    }

    /// Opens what lies below the layer, to see whether it is what it was.
    async fn open_below<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        below: &Below<E>,
        options: &OpenLayer,
    ) -> Result<Below<E>, ImageError> {
        let record = below.record.clone();
        Below::open(storage, &self.io, self.layer.path(), record, &options.tuning, None).await
    }

    /// Writes what the layer holds into its base. The bytes of data written.
    pub(super) async fn merge_into(
        &self,
        lower: &Lower<E>,
        lower_path: &Path,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<u64, ImageError> {
        let size = self.layer.geometry().size;
        let mut written = 0;
        for window in cut(0..size, WINDOW_LEN) {
            for batch in self.held_in(window.clone()).await?.chunks(BATCH) {
                let moves =
                    batch.iter().map(|(range, is_data)| self.move_down(lower, range.clone(), *is_data));
                let moved: DeviceResult<Vec<u64>> = join_all(moves).await.into_iter().collect();
                written += moved.map_err(|e| ImageError::new(lower_path, e))?.iter().sum::<u64>();
                lower.checkpoint_if_due().await.map_err(|e| ImageError::new(lower_path, e))?;
            }
            if progress(window.end, size).is_break() {
                return Err(ImageError::new(self.layer.path(), ErrorKind::Cancelled));
            }
        }
        Ok(written)
    }

    /// The stretches of `window`, in bytes, that the layer itself says something about, and whether
    /// that is data.
    async fn held_in(&self, window: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, ImageError> {
        let mut held = Vec::new();
        let blocks = window.start / BLOCK_SIZE..window.end.div_ceil(BLOCK_SIZE);
        for MapRun { start, count, entry } in self.layer.runs(&self.io, blocks).await? {
            let range = start * BLOCK_SIZE..((start + count) * BLOCK_SIZE).min(window.end);
            match entry {
                Entry::ABSENT => {}
                Entry::ZERO => held.push((range, false)),
                _ => held.extend(cut(range, CHUNK_LEN).map(|chunk| (chunk, true))),
            }
        }
        Ok(held)
    }

    async fn move_down(&self, lower: &Lower<E>, range: Range<u64>, is_data: bool) -> DeviceResult<u64> {
        if !is_data {
            return lower.perform(&self.io, range, Command::WriteZeroes).await.map(|()| 0);
        }
        let bytes = self.read(range.clone()).await?;
        let len = bytes.len() as u64;
        lower.perform(&self.io, range, Command::Write(bytes.into())).await.map(|()| len)
    }

    /// Empties the layer and lets it lie over its base as that is now.
    async fn empty_over<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        base: &BaseRef,
    ) -> Result<(), ImageError> {
        let layer = &self.layer;
        let spec = BaseSpec::new(&base.path, base.identity.format());
        let (above, tuning) = (layer.header().layer_id, layer.core().tuning);
        let opened = Below::open_base(storage, &self.io, layer.path(), &spec, Some(above), &tuning, None);
        let (chain, named) = opened.await?;
        let blocks = 0..layer.geometry().size.div_ceil(BLOCK_SIZE);
        let emptied = self.set_uniform(blocks, Entry::ABSENT).await;
        let switched = match emptied {
            Ok(()) => self.switch_base(Some(chain), Some(named), false).await,
            Err(error) => Err(error),
        };
        switched.map_err(|error| ImageError::new(layer.path(), error))
    }
}
