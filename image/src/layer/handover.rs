//! A new layer takes over from one that is in use, while both are open.
//!
//! The new layer, the *upper* one, is made over the *lower* one, or was prepared by a store, and is opened over it;
//! the lower one goes on being written until the disk is switched (`image/src/volume/`). From then on the upper one asks the lower one itself for what it
//! does not hold, and the lower one's disk does not change any more. Order of what is left to do:
//!
//! 1. The lower layer is synced. Before that nothing of the upper one is reported as durable; when it
//!    fails, the upper one latches.
//! 2. The lower layer is closed as any layer is, while it is read.
//! 3. It is opened for reading and put on the chain below it, which is open ([`crate::below`]): so this costs the same at any depth.
//!    The upper one's base record then says by what it is recognised. Until then that says no more than its id, and that it was open. In a store the
//!    record says the same for ever: which snapshot lies below. What that is the store's resolver knows.
//!
//! After a crash the next opening of the upper layer for writing does what is left ([`close_base`],
//! [`Layer::record_closed_base`]); whoever only reads it reads the lower one as any layer that was not closed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::base::{Below, OpenBase, resolve, stored_path};
use super::base_record::{BaseIdentity, BaseRecord, BaseRef};
use super::create::make;
use super::device::Layer;
use super::gate::SpaceGate;
use super::in_store::ResolveBase;
use super::recover::Head;
use super::tuning::{Tuning, breaks};
use super::{BaseSpec, CreateLayer, OpenLayer};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use crate::site;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage};
use sapwood_blockdev::units::BLOCK_SIZE;

/// The next layer of a disk in use.
pub enum Successor<E: Engine> {
    /// It is yet to be made.
    New {
        /// Its file, which does not exist, or a block device that holds nothing.
        path: PathBuf,
        /// The path by which it names the layer that is in use now; a relative one starts at its own folder.
        base: PathBuf,
    },
    /// A store has made it, empty, of the size of the disk, and over the snapshot that is to be
    /// ([`create_in_store`](super::create_in_store)).
    Prepared {
        /// Its file.
        path: PathBuf,
        /// Knows, from the commit on, what that snapshot is: the layer that is in use now, or, after that was closed, anything
        /// that shows the same disk. It is asked after the switch, and perhaps not before the next snapshot.
        resolver: Arc<dyn ResolveBase<E>>,
    },
}

impl<E: Engine> Successor<E> {
    /// Who knows what lies below it, if that is a store's.
    pub(crate) fn resolver(&self) -> Option<Arc<dyn ResolveBase<E>>> {
        match self {
            Self::New { .. } => None,
            Self::Prepared { resolver, .. } => Some(Arc::clone(resolver)),
        }
    }
}

/// A handover that begins when the disk is switched. See the module's documentation.
pub(crate) struct Handover<E: Engine> {
    lower: Arc<Layer<E>>,
    upper: Arc<Layer<E>>,
    /// Of an upper layer in a store.
    resolver: Option<Arc<dyn ResolveBase<E>>>,
    /// How many of the steps have been done.
    done: AtomicU8,
}

const SYNCED: u8 = 1;
const CLOSED: u8 = 2;
const RECORDED: u8 = 3;

impl<E: Engine> Handover<E> {
    /// From `lower` to `upper`, whose syncs wait from here on.
    pub(crate) fn new(
        lower: Arc<Layer<E>>,
        upper: Arc<Layer<E>>,
        resolver: Option<Arc<dyn ResolveBase<E>>>,
    ) -> Self {
        let mut core = upper.core();
        core.write_cache = lower.core().write_cache;
        let gate = lower.core().reserve.gate();
        core.reserve.set_gate(gate);
        let held = !breaks!(core.tuning, FlushBeforeBaseSync);
        core.hold_syncs(held);
        drop(core);
        upper.inherit_counts(&lower);
        Self { lower, upper, resolver, done: AtomicU8::new(0) }
    }

    fn has_done(&self, step: u8) -> bool {
        self.done.load(Ordering::Acquire) >= step
    }

    fn note(&self, step: u8) {
        self.done.store(step, Ordering::Release);
    }

    /// Step 1 of the module's documentation, unless it has been done.
    ///
    /// # Errors
    /// What the storage says; the upper layer has latched then.
    pub(crate) async fn sync(&self, io: &Io<E>) -> Result<(), ImageError> {
        if self.has_done(SYNCED) {
            return Ok(());
        }
        let synced = self.lower.on_driver(io, async |driver| driver.flush().await).await;
        let mut core = self.upper.core();
        if synced.is_err() {
            core.latch(DeviceError::Latched);
        }
        core.hold_syncs(false);
        drop(core);
        synced?;
        self.note(SYNCED);
        Ok(())
    }

    /// Step 2, unless it has been done.
    ///
    /// # Errors
    /// What the storage says; the lower layer is then recovered when the upper one is opened.
    pub(crate) async fn close(&self, io: &Io<E>) -> Result<(), ImageError> {
        if self.has_done(CLOSED) {
            return Ok(());
        }
        self.lower.close(io).await?;
        self.note(CLOSED);
        Ok(())
    }

    /// Step 3, unless it has been done.
    ///
    /// # Errors
    /// The lower layer cannot be opened for reading, or was changed; what the storage says.
    pub(crate) async fn record<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
    ) -> Result<(), ImageError> {
        if self.has_done(RECORDED) {
            return Ok(());
        }
        // Others may read it from now on.
        crate::open::lock(&self.lower.file(), Lock::Shared)?;
        match &self.resolver {
            Some(resolver) => self.follow(storage, io, &**resolver).await?,
            None => self.name(storage, io).await?,
        }
        self.note(RECORDED);
        Ok(())
    }

    /// Lets the upper layer lie over the lower one by path, and name it as it is now.
    async fn name<S: Storage<File = E::File>>(&self, storage: &S, io: &Io<E>) -> Result<(), ImageError> {
        let upper = &self.upper;
        let record = upper.below().record.clone();
        let Some(base) = record.base else { return Ok(()) };
        let (spec, tuning) = (BaseSpec::new(&base.path, Format::Layer), upper.core().tuning);
        let (above, lower) = (Some(upper.header().layer_id), self.lower.below());
        let known = lower.chain.as_deref();
        let opened = Below::open_base(storage, io, upper.path(), &spec, above, &tuning, known);
        let (chain, named) = opened.await?;
        self.check_unchanged(&named.identity)?;
        upper.on_driver(io, async |driver| driver.switch_base(Some(chain), Some(named), false).await).await
    }

    /// Lets the upper layer lie over what the store says that its base is.
    async fn follow<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        resolver: &dyn ResolveBase<E>,
    ) -> Result<(), ImageError> {
        let upper = &self.upper;
        let (old, lower) = (upper.below(), self.lower.below());
        let known = lower.chain.as_deref();
        let (below, found) = upper.resolved_below(storage, io, &old.record, resolver, known).await?;
        match found {
            Some(BaseIdentity::Layer { id, .. }) if id != self.lower.header().layer_id => {
                let path = self.lower.path().display();
                let detail =
                    format!("the store says that its base is another layer than {path}, which it follows");
                return Err(ImageError::new(upper.path(), ErrorKind::Base(detail)));
            }
            Some(found @ BaseIdentity::Layer { .. }) => self.check_unchanged(&found)?,
            // It was sealed in the meantime.
            _ => {}
        }
        let is_same = upper.replace_below(&old, Arc::new(below));
        assert!(is_same, "nothing else changes it before this has been done");
        Ok(())
    }

    /// Refuses the lower layer, opened again, if it is not as this process has closed it.
    fn check_unchanged(&self, found: &BaseIdentity) -> Result<(), ImageError> {
        if *found == self.lower.identity() {
            return Ok(());
        }
        let path = self.lower.path().display();
        let detail = format!("its base {path} was changed by somebody else just now");
        Err(ImageError::new(self.upper.path(), ErrorKind::Base(detail)))
    }
}

impl<E: Engine> Layer<E> {
    /// How it was opened.
    pub(crate) fn tuning(&self) -> Tuning {
        self.core().tuning
    }

    /// Lets its file grow for guests' data only as far as `gate` does; a layer that takes over from it, too.
    pub fn set_space_gate(&self, gate: &Arc<SpaceGate>) {
        self.core().reserve.set_gate(Some(Arc::clone(gate)));
    }

    /// Whether it breaks a rule on purpose.
    #[cfg(feature = "mutations")]
    pub(crate) fn breaks(&self, mutation: super::Mutation) -> bool {
        self.core().tuning.mutation == Some(mutation)
    }

    /// Refuses to go on with a new layer over one that is only read, by order or since a failure.
    pub(crate) fn check_may_be_frozen(&self) -> Result<(), ImageError> {
        let refuse = |error| Err(ImageError::new(self.path(), error));
        match self.core().latched {
            _ if self.is_read_only() => refuse(DeviceError::ReadOnly),
            Some(_) => refuse(DeviceError::Latched),
            None => Ok(()),
        }
    }

    /// Makes a layer over this one, which is open and goes on being written, if that was not done, and opens it for
    /// writing. It is empty, and durable.
    ///
    /// # Errors
    /// As of [`create`](super::create()); the base's path does not lead to this layer; a layer that was prepared does
    /// not fit, or cannot be opened: it is left as it is.
    pub(crate) async fn successor<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        next: &Successor<E>,
    ) -> Result<Arc<Self>, ImageError> {
        match next {
            Successor::New { path, base } => self.new_successor(storage, io, path, base).await,
            Successor::Prepared { path, .. } => self.open_successor(storage, io, path, true).await,
        }
    }

    async fn new_successor<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        path: &Path,
        base: &Path,
    ) -> Result<Arc<Self>, ImageError> {
        let base = stored_path(path, base)?.to_owned();
        self.check_leads_here(storage, io, &resolve(path, &base)).await?;
        let size = self.core().size;
        let identity = BaseIdentity::OpenLayer { size, id: self.header().layer_id };
        let segment_size = self.header().segment_blocks * BLOCK_SIZE as u32;
        let options = CreateLayer { size: Some(size), segment_size, ..CreateLayer::default() };
        make(storage, io, path, &options, Some(BaseRef { path: base, identity })).await?;
        let opened = self.open_successor(storage, io, path, false).await;
        if opened.is_err() {
            // The first failure is the one to tell.
            site::remove_incomplete(storage, io, path).await.ok();
        }
        opened
    }

    async fn open_successor<S: Storage<File = E::File>>(
        self: &Arc<Self>,
        storage: &S,
        io: &Io<E>,
        path: &Path,
        in_store: bool,
    ) -> Result<Arc<Self>, ImageError> {
        let (size, tuning) = {
            let core = self.core();
            (core.size, core.tuning)
        };
        let options = &OpenLayer { read_only: false, tuning };
        let head = Head::read(storage, io, path, options).await?;
        let base = head.record.base.as_ref();
        let base_size =
            base.filter(|base| base.in_store().is_some() == in_store).map(|base| base.identity.size());
        let refuse = |text: String| Err(ImageError::new(path, ErrorKind::Base(text)));
        if (base_size, head.slot().size) != (Some(size), size) {
            return refuse(format!("it was not made to follow a disk of {size} bytes"));
        }
        let below = Below { record: head.record.clone(), chain: None, open: Some(Arc::clone(self)) };
        let (layer, interrupted) = Self::open_over(io, path, options, head, below, false).await?;
        if !layer.core().map.is_empty() {
            return refuse(
                "it holds something already: a layer that follows another one is empty".to_owned(),
            );
        }
        layer.begin_session(storage, io, interrupted).await?;
        Ok(layer)
    }

    /// Refuses a path that does not lead to this layer.
    async fn check_leads_here<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        path: &Path,
    ) -> Result<(), ImageError> {
        let file = storage.open(path, OpenOptions::READ).map_err(|error| ImageError::open(path, error))?;
        if Head::id_of(io, path, file).await? == self.header().layer_id {
            return Ok(());
        }
        let detail = format!("it is not {}, over which the new layer is to lie", self.path().display());
        Err(ImageError::new(path, ErrorKind::Base(detail)))
    }

    /// Records of a base, which was open when the layer was made over it and is closed now, by what it is
    /// recognised.
    pub(super) async fn record_closed_base(
        self: &Arc<Self>,
        io: &Io<E>,
        identity: BaseIdentity,
    ) -> Result<(), ImageError> {
        let below = self.below();
        let (Some(base), chain) = (below.record.base.clone(), below.chain.clone()) else { return Ok(()) };
        let named = BaseRef { identity, ..base };
        self.on_driver(io, async |driver| driver.switch_base(chain, Some(named), false).await).await
    }
}

/// Closes the base that the layer at `layer` names, which was still open when that was recorded, if it was
/// not closed. Says whether it is closed now, durably; where it cannot be, because others read it or it may
/// not be written, it is read as it is.
pub(super) async fn close_base<S: Storage<File = E::File>, E: Engine>(
    storage: &S,
    io: &Io<E>,
    layer: &Path,
    record: &BaseRecord,
    tuning: &Tuning,
) -> bool {
    let Some(base) = record.base.as_ref().filter(|_| !record.committing) else { return false };
    let path = resolve(layer, &base.path);
    let closed = Box::pin(close_at(storage, io, &path, base, *tuning)).await;
    closed.unwrap_or_else(|error| {
        log::info!("{}: its base stays as it is: {error}", layer.display());
        false
    })
}

async fn close_at<S: Storage<File = E::File>, E: Engine>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    base: &BaseRef,
    tuning: Tuning,
) -> Result<bool, ImageError> {
    let open = |read_only| {
        let options = OpenLayer { read_only, tuning };
        async move { Layer::<E>::open_with(storage, io, path, &options, OpenBase::Nothing, None).await }
    };
    let found = open(true).await?;
    let BaseIdentity::OpenLayer { id, .. } = &base.identity else { return Ok(false) };
    if found.header().layer_id != *id {
        return Ok(false);
    }
    let was_clean = found.core().was_clean;
    if was_clean {
        // What was written last may be in the host's cache only.
        let sync = io.run(Op::Sync { file: found.file() }).await;
        sync.result.map_err(|errno| ImageError::errno(path, "sync", errno))?;
        return Ok(true);
    }
    drop(found);
    open(false).await?.close(io).await?;
    Ok(true)
}
