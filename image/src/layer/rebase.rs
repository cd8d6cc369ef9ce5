//! Lets a layer lie over another base without changing what its disk holds.
//!
//! Order: every block that the layer does not hold and that the new base would show differently is
//! copied up; then the base is switched (see `switch`). Interrupted before the switch, the layer
//! holds more blocks of its own than it needs, over the old base.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use super::base::{Below, OpenBase, describe_change};
use super::base_record::{BaseRecord, BaseRef};
use super::device::Layer;
use super::driver::Driver;
use super::in_store::check_is_alone;
use super::tuning::Tuning;
use super::{BaseSpec, OpenLayer};
use crate::below::Chain;
use crate::error::{ErrorKind, ImageError};
use crate::extent::{Extent, ExtentKind};
use crate::side::{BATCH, CHUNK_LEN, WINDOW_LEN, cut, in_blocks};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Makes the layer at `path`, which nobody else uses, lie over `base`, or over nothing: then it holds
/// all of its disk itself. The disk reads as before, also when this is interrupted at any moment,
/// and doing it again finishes it. `progress` is called with the bytes of disk done and their number.
///
/// # Errors
/// When a base cannot be used or read, or what the storage says.
pub async fn rebase<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    base: Option<&BaseSpec>,
    tuning: Tuning,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ImageError> {
    let layer = Layer::open(storage, io, path, &OpenLayer { read_only: false, tuning }).await?;
    io.spawn(Arc::clone(&layer).maintain(io.clone()));
    let mut report = |done, all| {
        progress(done, all);
        ControlFlow::Continue(())
    };
    let rebased = layer.rebase(storage, io, base, &mut report).await;
    let closed = layer.close(io).await;
    rebased.and(closed)
}

/// Makes the layer at `path`, which nobody else uses, name `base` from now on without a look at the
/// old one. Says in which way the new one is not what was recorded of the old one; where it is, the
/// caller answers for it that the disk reads as it should.
///
/// # Errors
/// When the new base cannot be used, a commit that needs the old one is under way, or what the
/// storage says.
pub async fn repoint<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    base: Option<&BaseSpec>,
    tuning: Tuning,
) -> Result<Option<String>, ImageError> {
    let options = OpenLayer { read_only: false, tuning };
    let layer = Layer::<E>::open_with(storage, io, path, &options, OpenBase::Nothing, None).await?;
    let repointed = layer.repoint(storage, io, base).await;
    let closed = layer.close(io).await;
    repointed.and_then(|change| closed.map(|()| change))
}

impl<E: Engine> Layer<E> {
    /// As [`rebase`], of an open layer, beside its queues: a block that a guest writes meanwhile is the
    /// guest's. A layer without a base must have no requests in flight. Where `progress` breaks off, the
    /// layer stays over the old base.
    ///
    /// # Errors
    /// As [`rebase`].
    pub async fn rebase<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        base: Option<&BaseSpec>,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let old = self.below();
        check_is_alone(self.path(), &old.record)?;
        self.check_no_commit_failed(&old)?;
        let (chain, named) = self.open_new_base(storage, io, base).await?;
        // The record is not used before the switch, which makes another.
        let record = BaseRecord { base: named, ..old.record.clone() };
        let new = Below::over(record, chain);
        let size = self.core().size;
        let driver = Driver::new(Arc::clone(self), io.clone());
        let mut result = Ok(());
        for window in cut(0..size, WINDOW_LEN) {
            result = driver.copy_up_window(window.clone(), &old, &new).await;
            if result.is_ok() && progress(window.end, size).is_break() {
                result = Err(ImageError::new(self.path(), ErrorKind::Cancelled));
            }
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            let switched = driver.switch_base(new.chain, new.record.base, false).await;
            result = switched.map_err(|error| ImageError::new(self.path(), error));
        }
        driver.retire().await;
        result
    }

    /// As [`repoint`], of an open layer, beside its queues: what guests read changes where the bases
    /// differ. A layer without a base must have no requests in flight.
    ///
    /// # Errors
    /// As [`repoint`].
    pub async fn repoint<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        base: Option<&BaseSpec>,
    ) -> Result<Option<String>, ImageError> {
        let old = self.below();
        check_is_alone(self.path(), &old.record)?;
        self.check_no_commit_failed(&old)?;
        let (chain, named) = self.open_new_base(storage, io, base).await?;
        let change = match (&old.record.base, &named) {
            (Some(was), Some(is)) => {
                let files = chain.as_ref().map(|chain| chain.files()).unwrap_or_default();
                let paths: Vec<_> = files.into_iter().map(|(path, _)| path).collect();
                describe_change(&was.identity, &is.identity, &paths)
            }
            (None, Some(_)) => Some("it had no base".to_owned()),
            (Some(_), None) => Some("it has no base any more".to_owned()),
            (None, None) => None,
        };
        let committing = old.record.committing;
        if committing && named.is_none() {
            let detail = "it was being merged into its base: only together they are the disk";
            return Err(ImageError::new(self.path(), ErrorKind::Base(detail.to_owned())));
        }
        let driver = Driver::new(Arc::clone(self), io.clone());
        let switched = driver.switch_base(chain, named, committing).await;
        driver.retire().await;
        switched.map(|()| change).map_err(|error| ImageError::new(self.path(), error))
    }

    async fn open_new_base<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        base: Option<&BaseSpec>,
    ) -> Result<(Option<Arc<Chain<E>>>, Option<BaseRef>), ImageError> {
        let Some(spec) = base else { return Ok((None, None)) };
        let (above, tuning) = (self.header().layer_id, self.core().tuning);
        let opened = Below::open_base(storage, io, self.path(), spec, Some(above), &tuning, None);
        let (chain, named) = opened.await?;
        Ok((Some(chain), Some(named)))
    }
}

impl<E: Engine> Driver<E> {
    /// Copies up what `window` of the disk, in bytes, needs of `old` once it lies over `new`.
    async fn copy_up_window(
        &self,
        window: std::ops::Range<u64>,
        old: &Below<E>,
        new: &Below<E>,
    ) -> Result<(), ImageError> {
        let (mut extents, mut others) = (Vec::new(), Vec::new());
        old.extents(&self.io, window.clone(), &mut extents).await?;
        new.extents(&self.io, window.clone(), &mut others).await?;
        extents.append(&mut others);
        extents.retain(|extent| matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed));
        extents.sort_by_key(|extent| extent.start);
        // Where neither holds data both read as zeroes.
        let data = in_blocks(extents.iter().map(Extent::range), window.end.next_multiple_of(BLOCK_SIZE));
        let chunks: Vec<_> = data.into_iter().flat_map(|range| cut(range, CHUNK_LEN)).collect();
        for batch in chunks.chunks(BATCH) {
            let blocks = batch.iter().map(|c| c.start / BLOCK_SIZE..c.end.div_ceil(BLOCK_SIZE));
            let copies = join_all(blocks.map(|blocks| self.copy_up(blocks, old, new))).await;
            let copied: super::waiter::Result<Vec<()>> = copies.into_iter().collect();
            copied.map_err(|error| ImageError::new(self.layer.path(), error))?;
        }
        Ok(())
    }
}
