//! Archives: a sealed disk in one file, whole or as an increment over another one.
//!
//! An archive is a header, packs, a directory that says where they lie, and a trailer with the top of the tree. A place's
//! number of a pack is its number in the directory, from 1 on. An increment has the hashes of what is as in its base,
//! and no places for them.
//!
//! It is read like a store's disk, from [`Archive::packs`] and [`Archive::root`]; it is imported by sealing
//! [`Archive::source`]. Whatever is in the file, what comes out is the disk that its header names, or an error.

mod directory;
mod export;
mod header;
#[cfg(test)]
mod tests;

pub use export::{Export, Exported, export};
pub use header::{ArchiveInfo, DESCRIPTION_BYTES_MAX, NAME_BYTES_MAX};

use std::path::Path;
use std::sync::Arc;

use self::directory::{ArchiveTrailer, decode_pages};
use super::hash::root_hash;
use super::packs::{Packs, Root};
use super::source::TreeSource;
use crate::below::read_aligned;
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// An open archive.
pub struct Archive<E: Engine> {
    info: ArchiveInfo,
    root: Root,
    packs: Arc<Packs<E>>,
}

impl<E: Engine> Archive<E> {
    /// Opens an archive for reading: its header, directory and trailer are read and checked.
    ///
    /// # Errors
    /// When it cannot be read, or is no whole archive.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
    ) -> Result<Self, ImageError> {
        let corrupt = |field, at, why: &dyn std::fmt::Display| ImageError::corrupt(path, field, at, why);
        let file = storage.open(path, OpenOptions::READ).map_err(|e| ImageError::open(path, e))?;
        let len = file.size().map_err(|e| ImageError::io(path, "measure", e))?;
        if len < 2 * BLOCK_SIZE || !len.is_multiple_of(BLOCK_SIZE) {
            return Err(corrupt("archive", 0, &"it is too short, or was cut off"));
        }
        let block = read(io, &file, 0, BLOCK_BYTES).await?;
        let (info, id) = header::decode(&block).map_err(|why| corrupt("archive header", 0, &why))?;
        let at = len - BLOCK_SIZE;
        let block = read(io, &file, at, BLOCK_BYTES).await?;
        let trailer =
            ArchiveTrailer::decode(&block, &id, at).map_err(|why| corrupt("archive trailer", at, &why))?;
        if root_hash(info.size, &trailer.tree.hash) != info.root {
            return Err(corrupt("archive trailer", at, &"its tree is not that of the header's disk"));
        }
        let pages = read(io, &file, trailer.directory_at, (at - trailer.directory_at) as usize).await?;
        let sections = decode_pages(&id, &pages, trailer.sections, trailer.directory_at)
            .map_err(|why| corrupt("archive directory", trailer.directory_at, &why))?;
        let name = path.to_owned();
        let packs = Packs::new(path, move |number| {
            let section = (number as usize).checked_sub(1).and_then(|index| sections.get(index));
            let missing = || ImageError::corrupt(&name, "place", 0, format!("there is no pack {number}"));
            Ok((file.clone(), section.ok_or_else(missing)?.clone()))
        });
        Ok(Self { root: Root { size: info.size, tree: trailer.tree }, info, packs })
    }

    /// What it says of itself.
    pub fn info(&self) -> &ArchiveInfo {
        &self.info
    }

    /// The disk; of an increment only what differs from its base can be read.
    pub fn root(&self) -> Root {
        self.root
    }

    /// Its packs.
    pub fn packs(&self) -> &Arc<Packs<E>> {
        &self.packs
    }

    /// The disk, to be sealed over `base`, which an increment needs.
    ///
    /// # Errors
    /// When it is an increment over another disk.
    pub fn source(
        &self,
        io: &Io<E>,
        base: Option<(&Arc<Packs<E>>, Root)>,
    ) -> Result<TreeSource<E>, ImageError> {
        if let Some(wanted) = self.info.base
            && base.is_none_or(|(_, base)| base.hash() != wanted)
        {
            let detail = format!("it is an increment over {wanted}, which must be there first");
            return Err(ImageError::new(self.packs.path(), ErrorKind::Base(detail)));
        }
        let source = TreeSource::new(&self.packs, io, self.root, base);
        Ok(if self.info.base.is_some() { source.reading_places() } else { source })
    }
}

async fn read<E: Engine>(io: &Io<E>, file: &E::File, at: u64, len: usize) -> Result<Vec<u8>, ImageError> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let read = read_aligned(io, file, at, len, false).await;
    let (bytes, range) = read.map_err(|error| ImageError::new(file.path(), error))?;
    Ok(bytes[range].to_vec())
}
