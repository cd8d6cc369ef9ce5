//! A snapshot of a disk in use: its layer is frozen, and the disk goes on with a new one over it.
//!
//! Order: the new layer is made over the one in use, durably, or was made by a store; then the commit, after which the new layer is
//! the disk for whoever opens it; then the switch; then what `image/src/layer/handover.rs` says, which takes
//! as long as it takes beside the guests. A crash before the commit leaves the old layer, and a new one that
//! nobody needs; after it the new layer, still empty or not, over the old one.

use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use super::{Next, Volume};
use crate::error::ImageError;
use crate::layer::ResolveBase;
use crate::layer::handover::Successor;
use crate::layer::tuning::breaks;

impl<E: Engine> Volume<E> {
    /// Freezes the current layer, as the disk is at one moment, and goes on with `next`. The pause
    /// for guests does not depend on the size of the disk. When it returns, the old layer is durable and
    /// closed, and the new one names it as its base by what it is recognised; in a store it lies over what the store's
    /// resolver says.
    ///
    /// `commit` makes the new layer the disk, durably: whoever opens the disk afterwards opens that. It is
    /// called once, before the switch; when it fails, the disk must be what it was. To be awaited to its end:
    /// flushes of guests wait for it.
    ///
    /// # Errors
    /// What the storage or `commit` says, or that another snapshot is under way. Before the switch, the disk
    /// goes on as it was; a new layer that `commit` has seen may be left behind. After it, the disk goes on
    /// with the new layer, and what is left to do is done by the next snapshot or the next opening.
    pub async fn snapshot<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        next: &Successor<E>,
        commit: impl AsyncFnOnce() -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let _alone = self.alone()?;
        // At most one layer below is open for writing.
        self.finish_handover(storage, io).await?;
        let layer = self.layer();
        layer.check_may_be_frozen()?;
        let upper = layer.successor(storage, io, next).await?;
        let upper = Next { layer: upper, resolver: next.resolver() };
        let early = breaks!(layer.tuning(), SwitchBeforeCommit);
        if early {
            self.switch(upper.clone()).await;
        }
        commit().await?;
        if !early {
            self.switch(upper).await;
        }
        // The volume holds it as long as it is needed.
        drop(layer);
        self.finish_handover(storage, io).await
    }

    /// Opens what lies below the disk again, which is in a store, as the resolver says it is now
    /// ([`reopen_base`](crate::layer::Layer::reopen_base) of the layer); before that, does what is left of the last snapshot.
    ///
    /// # Errors
    /// As of [`reopen_base`](crate::layer::Layer::reopen_base) of a layer, and while a snapshot is taken: then to be tried again, or what was sealed stays
    /// where it was as long as the disk is open. The disk goes on as it was.
    pub async fn reopen_base<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        resolver: &Arc<dyn ResolveBase<E>>,
    ) -> Result<(), ImageError> {
        let _alone = self.alone()?;
        self.finish_handover(storage, io).await?;
        self.layer().reopen_base(storage, io, resolver).await
    }

    /// Does what is left of the last snapshot.
    async fn finish_handover<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
    ) -> Result<(), ImageError> {
        let handover = self.state().handover.clone();
        let Some(handover) = handover else { return Ok(()) };
        handover.sync(io).await?;
        handover.close(io).await?;
        handover.record(storage, io).await?;
        self.state().handover = None;
        Ok(())
    }
}
