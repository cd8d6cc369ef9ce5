//! Comparing what two disks hold.

use std::ops::Range;

use sapwood_blockdev::engine::Engine;

use crate::error::ImageError;
use crate::side::{BATCH, CHUNK_LEN, Side, WINDOW_LEN, buffers, cut, in_blocks};

/// The first byte in which two disks differ; `None` when they hold the same. What a shorter disk
/// lacks counts as zeroes. `progress` is called with the bytes of disk done so far.
///
/// # Errors
/// When a disk cannot be read.
pub fn compare<E: Engine>(
    a: &mut Side<E>,
    b: &mut Side<E>,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<u64>, ImageError> {
    let buffers = [buffers(), buffers()];
    let size = a.size().max(b.size());
    for window in cut(0..size, WINDOW_LEN) {
        let chunks = data_in_either(a, b, window.clone(), size)?;
        for batch in chunks.chunks(BATCH) {
            for (i, chunk) in batch.iter().enumerate() {
                a.read(chunk, &buffers[0][i]);
                b.read(chunk, &buffers[1][i]);
            }
            a.start();
            b.start();
            a.finish()?;
            b.finish()?;
            for (i, chunk) in batch.iter().enumerate() {
                let len = (chunk.end - chunk.start) as usize;
                let mut bytes = [vec![0; len], vec![0; len]];
                buffers[0][i].read_at(0, &mut bytes[0]);
                buffers[1][i].read_at(0, &mut bytes[1]);
                if bytes[0] != bytes[1] {
                    let same = bytes[0].iter().zip(&bytes[1]).take_while(|(x, y)| x == y).count();
                    return Ok(Some(chunk.start + same as u64));
                }
            }
        }
        progress(window.end);
    }
    Ok(None)
}

/// Chunks of `window` of which at least one side holds data.
fn data_in_either<E: Engine>(
    a: &mut Side<E>,
    b: &mut Side<E>,
    window: Range<u64>,
    size: u64,
) -> Result<Vec<Range<u64>>, ImageError> {
    let mut data = a.data_in(window.clone())?;
    data.extend(b.data_in(window)?);
    data.sort_by_key(|range| range.start);
    Ok(in_blocks(data.into_iter(), size).into_iter().flat_map(|range| cut(range, CHUNK_LEN)).collect())
}
