//! What a chain holds, without reading the data.

use std::ops::Range;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;

use super::{Below, Held, Link};
use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::Mapping;
use crate::raw;

impl<E: Engine> Below<E> {
    /// What `range` of the disk holds, in order and without gaps. Cut off at the disk's end.
    ///
    /// # Errors
    /// A file cannot be read or asked where its holes are, or is damaged.
    pub async fn extents(&self, io: &Io<E>, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        let (mut extents, mut held) = (Vec::new(), Held::default());
        let end = range.end.min(self.size());
        let mut at = range.start;
        while at < end {
            let found = match self.find(at, end, &held) {
                Ok(found) => found,
                Err(super::Stop::Damage(error)) => return Err(error),
                Err(stop) => {
                    let loaded = self.load(io, stop, &mut held).await;
                    loaded.map_err(|error| ImageError::new(self.path(), error))?;
                    continue;
                }
            };
            let depth = found.link as u32;
            let (kind, offset) = match found.mapping {
                Mapping::Unallocated => (ExtentKind::Absent, None),
                Mapping::Zero => (ExtentKind::Zero, None),
                Mapping::Data(offset) => (ExtentKind::Data, Some(offset)),
                Mapping::Compressed { .. } => (ExtentKind::Compressed, None),
            };
            let file = match kind {
                ExtentKind::Absent => None,
                _ => self.data_of(found.link).map(|(file, _)| file.path().into()),
            };
            let next = Extent { start: at, len: found.len, kind, depth, offset, file };
            at += found.len;
            match self.links.get(found.link) {
                Some(Link::Raw { file, .. }) if kind == ExtentKind::Data => {
                    for extent in raw::map::extents(file, next.range())? {
                        Extent::push_to(&mut extents, Extent { depth, ..extent });
                    }
                }
                _ => Extent::push_to(&mut extents, next),
            }
        }
        Ok(extents)
    }
}
