//! What lies below a layer in a store is opened again, as the store's resolver says it is now.
//!
//! Snapshots are sealed while layers lie over them. An open layer goes on with the files that were there when
//! it was opened, until it is told to look again. Reads that are under way end on the old chain, whoever they
//! belong to: they hold all of it, and with it what keeps its files where they are.

use std::sync::Arc;

use super::base::Below;
use super::base_record::{BaseIdentity, BaseRecord};
use super::device::Layer;
use super::in_store::ResolveBase;
use crate::below::Chain;
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

impl<E: Engine> Layer<E> {
    /// Opens what lies below it again, as the resolver says it is now, and reads that from now on: the same disk, of
    /// which parts may have been sealed meanwhile. Nothing is recorded. A layer without a base has nothing to open.
    ///
    /// # Errors
    /// The base is a file, not a snapshot of a store, or the layer below is still open for writing; what the resolver says,
    /// or the base cannot be opened: then the layer reads what it read before.
    pub async fn reopen_base<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        resolver: &Arc<dyn ResolveBase<E>>,
    ) -> Result<(), ImageError> {
        loop {
            let old = self.below();
            let Some(base) = &old.record.base else { return Ok(()) };
            if base.in_store().is_none() {
                let detail = "its base is a file, which no store knows: it stays as it was opened".to_owned();
                return Err(ImageError::new(self.path(), ErrorKind::Base(detail)));
            }
            if old.open.is_some() {
                let detail = "a snapshot of it is taken: wait for the end of that".to_owned();
                return Err(ImageError::new(self.path(), ErrorKind::Unfinished(detail)));
            }
            let (new, _) = self.resolved_below(storage, io, &old.record, &**resolver, None).await?;
            // Whatever lies below by now, if it is not what was looked at, is newer than what was found.
            if self.replace_below(&old, Arc::new(new)) {
                return Ok(());
            }
        }
    }

    /// What `record` names, as the resolver says it is now; and by what that is recognised. `known` is what lies below that, if
    /// it is open.
    pub(super) async fn resolved_below<S: Storage<File = E::File>>(
        &self,
        storage: &S,
        io: &Io<E>,
        record: &BaseRecord,
        resolver: &dyn ResolveBase<E>,
        known: Option<&Chain<E>>,
    ) -> Result<(Below<E>, Option<BaseIdentity>), ImageError> {
        let tuning = self.core().tuning;
        Below::open_found(storage, io, self.path(), record.clone(), &tuning, Some(resolver), known).await
    }
}
