//! Large layers on the host's files, made in seconds: see [`Synthetic`].

use std::path::Path;

use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::layer::synthesize;

pub use sapwood_image::layer::Synthetic;

/// Makes a layer at `path`, where no file is.
///
/// # Errors
/// What the host says.
pub fn make(path: &Path, what: &Synthetic) -> anyhow::Result<()> {
    let io = Io::new(BlockingEngine::new()?);
    let (path, what, inner) = (path.to_owned(), *what, io.clone());
    Ok(block_on(&io, async move { synthesize(&HostStorage, &inner, &path, &what).await })?)
}
