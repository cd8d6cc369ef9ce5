//! Where a raw file has holes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::SECTOR_SIZE;

use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};

/// What the bytes `range` of `file` hold.
///
/// # Errors
/// When the file system cannot be asked.
pub(crate) fn extents<F: StorageFile>(file: &F, range: Range<u64>) -> Result<Vec<Extent>, ImageError> {
    let path: Arc<Path> = file.path().into();
    let mut extents = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            let file = Some(Arc::clone(&path));
            let extent = Extent { start, len: end - start, kind, depth: 0, offset: Some(start), file };
            Extent::push_to(&mut extents, extent);
        }
    };
    let mut at = range.start;
    while at < range.end {
        let data = file
            .next_data(at..range.end)
            .map_err(|e| ImageError::io(file.path(), "find the holes of", e))?
            .unwrap_or(range.end..range.end);
        // The file may end inside a sector, and the last sector holds data if its first part does.
        let end = data.end.next_multiple_of(SECTOR_SIZE).min(range.end);
        let start = data.start.clamp(at, end);
        add(at, start, ExtentKind::Zero);
        add(start, end, ExtentKind::Data);
        // Progress whatever the file says, which may change while it is asked.
        at = end.max(at + 1);
    }
    Ok(extents)
}
