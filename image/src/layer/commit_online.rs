//! Merges a layer into its base while guests go on.
//!
//! Order: as offline (see `commit`), the layer says first that a commit is under way, and the base is
//! closed, durably, before anything else counts on it. Then a base record names the base as it is now,
//! without the mark: the layer still holds all that it held. Only after that it lets go of what the base
//! shows as well (see `shed`). So the layer over the base is the disk at any moment, and what guests write
//! meanwhile stays in the layer.
//!
//! Guests read the base as it was when it was opened until the record is switched. What they read of it
//! the layer does not hold, and only what the layer holds is written into the base; and the base uses
//! nothing again that it used then.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::base::{Below, resolve};
use super::base_record::{BaseIdentity, BaseRef};
use super::commit::{Committed, Lower};
use super::device::Layer;
use super::driver::Driver;
use super::in_store::check_is_alone;
use super::tuning::breaks;
use super::{BaseSpec, OpenLayer};
use crate::below::{Chain, Opened};
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::{Engine, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, Storage, StorageFile};

/// Pause between looks for reads that began before the base was switched.
const READERS_PAUSE: Time = Time::from_millis(1);

/// A commit under way.
struct Online<'a, S: Storage, E: Engine<File = S::File>> {
    driver: Driver<E>,
    storage: &'a S,
    below: Arc<Below<E>>,
    /// The base as guests read it.
    base: Opened<E>,
    named: &'a BaseRef,
    path: &'a Path,
}

impl<E: Engine> Layer<E> {
    /// As [`commit`](super::commit()), of an open layer, beside its queues; nobody else may use the base,
    /// and the size must not change. The layer stays over the base and holds what guests wrote
    /// meanwhile, and what the cleaner was at. Where `progress` breaks off, the base holds a part of the
    /// layer, and the disk reads as before.
    ///
    /// # Errors
    /// As [`commit`](super::commit()).
    pub async fn commit_online<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Committed, ImageError> {
        let below = self.below();
        let (Some(named), Some(chain)) = (below.record.base.clone(), below.chain.clone()) else {
            return Err(ImageError::invalid(self.path(), "it has no base that it could be merged into"));
        };
        check_is_alone(self.path(), &below.record)?;
        self.check_is_written(&named)?;
        self.check_no_commit_failed(&below)?;
        let path = resolve(self.path(), &named.path);
        // What would fail for ever must not be begun.
        chain.check_growth(self.core().size)?;
        let base = chain.hold_top(io).await?;
        let driver = Driver::new(Arc::clone(self), io.clone());
        let online = Online { driver: driver.clone(), storage, below, base, named: &named, path: &path };
        let result = online.run(progress).await;
        driver.retire().await;
        result.map(|written| Committed { base: path, written })
    }

    /// Refuses to change what lies below after a commit beside guests that could not be ended: the base is
    /// read as it was before, and what was done to it since may not be durable.
    pub(super) fn check_no_commit_failed(&self, below: &Below<E>) -> Result<(), ImageError> {
        if !below.record.committing || below.chain.is_none() {
            return Ok(());
        }
        let path = self.path().display();
        let detail = format!("an earlier commit failed: stop its server, and run sapwood commit {path}");
        Err(ImageError::new(self.path(), ErrorKind::Unfinished(detail)))
    }
}

impl<S: Storage, E: Engine<File = S::File>> Online<'_, S, E> {
    /// The bytes of data written into the base.
    async fn run(&self, progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>) -> Result<u64, ImageError> {
        let layer = &self.driver.layer;
        let (size, tuning) = {
            let core = layer.core();
            (core.size, core.tuning)
        };
        self.switch(self.below.chain.clone(), self.named.identity.clone(), true).await?;
        let lower = match self.open_lower().await {
            Ok(lower) => lower,
            Err(error) => return self.withdraw().await.and(Err(error)),
        };
        // Each byte is looked at twice.
        let mut report = |done, _| progress(done, 2 * size);
        let copied = match lower.grow(&self.driver.io, size).await {
            Ok(()) => self.driver.merge_into(&lower, self.path, &mut report).await,
            Err(error) => Err(error),
        };
        if breaks!(tuning, ShedBeforeBaseSync) {
            self.shed(&self.below, size, progress).await?;
        }
        self.finish(lower).await?;
        self.outlast_readers().await;
        let written = copied?;
        self.shed(&layer.below(), size, progress).await?;
        Ok(written)
    }

    async fn shed(
        &self,
        below: &Below<E>,
        size: u64,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let mut report = |done| progress(size + done, 2 * size);
        let shed = self.driver.shed(below, &mut report).await;
        shed.map_err(|error| ImageError::new(self.driver.layer.path(), error))
    }

    async fn switch(
        &self,
        chain: Option<Arc<Chain<E>>>,
        identity: BaseIdentity,
        committing: bool,
    ) -> Result<(), ImageError> {
        let named = BaseRef { path: self.named.path.clone(), identity };
        let switched = self.driver.switch_base(chain, Some(named), committing).await;
        switched.map_err(|error| ImageError::new(self.driver.layer.path(), error))
    }

    /// Opens the base for writing, in place of the guests' lock on it. Nothing that it uses now is used
    /// again before it is closed: what guests still have to read of its map lies there.
    async fn open_lower(&self) -> Result<Lower<E>, ImageError> {
        let (io, path, format) = (&self.driver.io, self.path, self.named.identity.format());
        self.base.file().unlock().map_err(|error| ImageError::io(path, "unlock", error))?;
        let options = OpenLayer { read_only: false, tuning: self.driver.layer.core().tuning };
        let lower = Lower::open(self.storage, io, path, format, &options).await?;
        lower.keep_places();
        if lower.is_what_was(&self.named.identity)? {
            return Ok(lower);
        }
        lower.close(io).await?;
        let detail = format!("its base {} was changed by somebody else just now", path.display());
        Err(ImageError::new(self.driver.layer.path(), ErrorKind::Base(detail)))
    }

    /// The base could not be opened for writing: takes the mark off again if it is what it was.
    async fn withdraw(&self) -> Result<(), ImageError> {
        self.lock_again()?;
        let layer = &self.driver.layer;
        let (record, tuning) = (self.below.record.clone(), layer.core().tuning);
        match Below::open(self.storage, &self.driver.io, layer.path(), record, &tuning, None).await {
            Ok(Below { chain, .. }) => self.switch(chain, self.named.identity.clone(), false).await,
            _ => Ok(()),
        }
    }

    /// Guests read the base: nobody may write it.
    fn lock_again(&self) -> Result<(), ImageError> {
        crate::open::lock(&self.base.file(), Lock::Shared)
    }

    /// Closes the base, durably, and lets the layer lie over it as it is then.
    async fn finish(&self, lower: Lower<E>) -> Result<(), ImageError> {
        let (layer, io) = (&self.driver.layer, &self.driver.io);
        let tuning = layer.core().tuning;
        let closed = if breaks!(tuning, UnmarkBeforeBaseSync) { Ok(()) } else { lower.close(io).await };
        let left = lower.identity();
        // With its lock.
        drop(lower);
        self.lock_again()?;
        closed?;
        let above = Some(layer.header().layer_id);
        let spec = BaseSpec::new(&self.named.path, self.named.identity.format());
        let (chain, BaseRef { identity: found, .. }) =
            Below::open_base(self.storage, io, layer.path(), &spec, above, &tuning, None).await?;
        if found != left? {
            let detail = format!("its base {} was changed by somebody else", self.path.display());
            return Err(ImageError::new(layer.path(), ErrorKind::Base(detail)));
        }
        self.switch(Some(chain), found, false).await
    }

    /// Waits for the end of the reads that began before the base was switched: the next commit may use
    /// again what they read.
    async fn outlast_readers(&self) {
        let io = &self.driver.io;
        let ended = self.driver.layer.core().segments.end_epoch();
        while !self.driver.layer.core().segments.has_outlasted(ended) {
            io.sleep_until(io.now() + READERS_PAUSE).await;
        }
    }
}
