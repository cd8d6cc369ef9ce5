//! A snapshot of an attached volume: the store's part and the disk's, in their order.

use std::cell::RefCell;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::volume::{Successor, Volume};
use sapwood_image::{ErrorKind, ImageError};
use sapwood_store::{Attachment, Id, StoreErrorKind};

use super::service::HostStore;
use crate::control::wire::Failure;
use crate::host::HostEngine;

/// Takes a snapshot of a volume while its guest writes.
pub async fn snapshot_volume(
    store: &HostStore,
    io: &Io<HostEngine>,
    attachment: &mut Attachment,
    volume: &Volume<HostEngine>,
    snapshot: &str,
) -> Result<Id, Failure> {
    let prepared = store.prepare(io, attachment, snapshot, volume.geometry().size).await?;
    let next = Successor::Prepared { path: prepared.path.clone(), resolver: store.resolver() };
    let refused = RefCell::new(None);
    let mut is_committed = false;
    let commit = async || match store.commit(attachment, &prepared) {
        Ok(_) => {
            is_committed = true;
            Ok(())
        }
        Err(error) => {
            *refused.borrow_mut() = Some(error);
            Err(ImageError::new(&prepared.path, ErrorKind::Cancelled))
        }
    };
    let taken = volume.snapshot(&HostStorage, io, &next, commit).await;
    let id = prepared.snapshot;
    if !is_committed {
        let refused = refused.into_inner();
        // Where the storage failed nobody knows whether the catalog names the layer: opening the store finds out.
        if !refused.as_ref().is_some_and(|error| matches!(error.kind, StoreErrorKind::Io { .. })) {
            store.abandon(io, prepared).await?;
        }
        return Err(refused.map_or_else(|| taken.err().map_or_else(unknown, Failure::from), Failure::from));
    }
    // What is left of closing the old layer is done by the next snapshot, or when the store is opened.
    taken?;
    store.settled(id)?;
    Ok(id)
}

fn unknown() -> Failure {
    Failure::new("failed", "the snapshot was not taken")
}
