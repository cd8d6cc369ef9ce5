//! What the first blocks of a layer tell, without opening it: in a time that does not depend on its size.

use std::path::Path;

use super::recover::Head;
use super::{OpenLayer, Tuning};
use crate::error::ImageError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

/// What can be said of a layer at a glance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Guest-visible size in bytes; of a layer that was not closed properly, before its log is followed.
    pub size: u64,
    /// It was closed properly: there is no log to follow.
    pub is_clean: bool,
}

/// Looks at a layer that nobody writes. What it holds when it is clean is durable then: whoever closed it may have been killed
/// before that was.
///
/// # Errors
/// A layer that is in use, or not one; what the storage says.
pub async fn glance<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<Glance, ImageError> {
    let options = OpenLayer { read_only: true, tuning: Tuning::default() };
    let head: Head<E> = Head::read(storage, io, path, &options).await?;
    let synced = io.run(Op::Sync { file: head.file.clone() }).await.result;
    synced.map_err(|errno| ImageError::errno(path, "sync", errno))?;
    let slot = head.slot();
    // A damaged slot may have been that of a later session.
    let is_clean = slot.clean && !head.is_slot_damaged();
    Ok(Glance { size: slot.size, is_clean })
}
