//! A sealed snapshot as a link: the last one of a chain, or all of it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sapwood_blockdev::buffer::Memory;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

use super::open::DECOMPRESSING_MAX;
use super::pool::{Permits, Pool};
use super::{Chain, Link, SealedPart, Stage, cache};
use crate::counts::Hits;
use crate::error::{ErrorKind, ImageError};
use crate::layer::Tuning;
use crate::sealed::{Packs, Root, Snapshot};

impl<E: Engine> Link<E> {
    /// A sealed snapshot, for the end of a chain.
    ///
    /// # Errors
    /// When there can be no such disk.
    pub(crate) fn sealed(packs: &Arc<Packs<E>>, root: Root) -> Result<Self, ImageError> {
        Ok(Self::Sealed(Snapshot::new(packs, root)?))
    }
}

impl<E: Engine> Chain<E> {
    /// A chain of a sealed snapshot alone. Nothing is read until it is needed.
    ///
    /// # Errors
    /// When there can be no such disk.
    pub fn open_sealed(packs: &Arc<Packs<E>>, root: Root) -> Result<Self, ImageError> {
        let link = Link::sealed(packs, root)?;
        Ok(Self {
            limits: vec![link.size()],
            links: vec![Arc::new(link)],
            stages: vec![Stage::Link(0)],
            // There are no layers whose files could be opened.
            pool: Arc::new(Pool::new(0, 0)),
            reopen: Box::new(|path| {
                Err(ImageError::new(path, ErrorKind::Base("it is no layer of this chain".to_owned())))
            }),
            paged_tuning: Tuning::default(),
            tables: Arc::new(cache::tables()),
            clusters: Arc::new(cache::clusters()),
            decompressing: Permits::new(DECOMPRESSING_MAX),
            complained: AtomicBool::new(false),
        })
    }

    /// The root of the sealed snapshot that is at the top, if there is one.
    pub(crate) fn sealed_root(&self) -> Option<Root> {
        match &*self.links[0] {
            Link::Sealed(snapshot) => Some(snapshot.root()),
            _ => None,
        }
    }

    /// Reads a part of a sealed snapshot into memory of the same length, of any alignment.
    pub(super) async fn read_sealed(
        &self,
        io: &Io<E>,
        part: SealedPart,
        memory: Memory,
        frames: &Hits,
    ) -> Result<(), DeviceError> {
        let Some(Link::Sealed(snapshot)) = self.links.get(part.link).map(|link| &**link) else {
            return Err(DeviceError::Corrupt);
        };
        let read = snapshot.read(io, part.start, memory, &self.decompressing, frames).await;
        read.map_err(|error| self.complain(&error))
    }

    /// Fills `memory` with a part of a sealed snapshot, if all of that is in memory: says whether it was.
    pub(crate) fn read_cached(&self, part: SealedPart, memory: &mut Memory, frames: &Hits) -> bool {
        match self.links.get(part.link).map(|link| &**link) {
            Some(Link::Sealed(snapshot)) => snapshot.read_cached(part.start, memory, frames),
            _ => false,
        }
    }
}
