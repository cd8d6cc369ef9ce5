//! What a chain holds, without reading the data.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;

use super::{Chain, Held, Link};
use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::Mapping;
use crate::raw;

impl<E: Engine> Chain<E> {
    /// What `range` of the disk holds, in order and without gaps. Cut off at the disk's end.
    ///
    /// # Errors
    /// A file cannot be read or asked where its holes are, or is damaged.
    pub async fn extents(&self, io: &Io<E>, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
        let mut extents = Vec::new();
        self.extents_below(io, range, 0, &mut extents).await?;
        Ok(extents)
    }

    /// As [`Chain::extents`], for a chain whose top lies `above` files down; appends to `extents`.
    pub(crate) async fn extents_below(
        &self,
        io: &Io<E>,
        range: Range<u64>,
        above: u32,
        extents: &mut Vec<Extent>,
    ) -> Result<(), ImageError> {
        let mut held = Held::default();
        let end = range.end.min(self.size());
        let mut at = range.start;
        // The path of the link that answered last.
        let mut last: Option<(usize, Arc<Path>)> = None;
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
            let depth = above + found.link as u32;
            let (kind, offset) = match found.mapping {
                Mapping::Unallocated => (ExtentKind::Absent, None),
                Mapping::Zero => (ExtentKind::Zero, None),
                Mapping::Data(offset) => (ExtentKind::Data, Some(offset)),
                Mapping::Compressed { .. } | Mapping::Sealed => (ExtentKind::Compressed, None),
            };
            let file = (kind != ExtentKind::Absent).then(|| match &last {
                Some((link, path)) if *link == found.link => Arc::clone(path),
                _ => {
                    let path: Arc<Path> = self.data_path(found.link).into();
                    last = Some((found.link, Arc::clone(&path)));
                    path
                }
            });
            let next = Extent { start: at, len: found.len, kind, depth, offset, file };
            at += found.len;
            match &*self.links[found.link] {
                Link::Raw { file, .. } if kind == ExtentKind::Data => {
                    for extent in raw::map::extents(file, next.range())? {
                        Extent::push_to(extents, Extent { depth, ..extent });
                    }
                }
                _ => Extent::push_to(extents, next),
            }
        }
        Ok(())
    }

    /// The path of the file in which a link has its data.
    fn data_path(&self, link: usize) -> &Path {
        match &*self.links[link] {
            Link::Qcow2(image) => image.data().0.path(),
            link => link.path(),
        }
    }
}
