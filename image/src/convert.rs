//! Copying one disk to another, sparsely.

use std::ops::Range;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::Command;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_BYTES;

use crate::error::ImageError;
use crate::side::{BATCH, CHUNK_LEN, Side, WINDOW_LEN, buffers, cut};

/// What the target held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing but zeroes: zeroes are not written.
    Zero,
    /// Anything: zeroes are written too, as such.
    Used,
}

/// Makes `target` read as `source` does, flushed, and calls `progress` with the bytes of disk done
/// so far. Holes are not read; blocks of zeroes are not written as data. A target that is larger
/// reads as zeroes past the end of the source.
///
/// # Errors
/// When the target is smaller, or a request failed.
pub fn copy<E: Engine>(
    source: &mut Side<E>,
    target: &mut Side<E>,
    before: Target,
    progress: &mut dyn FnMut(u64),
) -> Result<(), ImageError> {
    if target.size() < source.size() {
        let detail = format_args!("too small: {} bytes for a disk of {}", target.size(), source.size());
        return Err(ImageError::invalid(target.path(), detail));
    }
    let bytes = vec![0; CHUNK_LEN as usize];
    let mut copier = Copier { source, target, before, read: Batch::new(), written: Batch::new(), bytes };
    let size = copier.target.size();
    for window in cut(0..size, WINDOW_LEN) {
        copier.window(window.clone())?;
        progress(window.end);
    }
    // One round writes what the last one read, one more takes nothing up and leaves nothing.
    copier.round()?;
    copier.round()?;
    copier.target.submit(0..0, Command::Flush);
    copier.target.finish()
}

struct Copier<'a, E: Engine> {
    source: &'a mut Side<E>,
    target: &'a mut Side<E>,
    before: Target,
    /// Being read.
    read: Batch,
    /// Read before, being written.
    written: Batch,
    /// A copy of one chunk, to look at.
    bytes: Vec<u8>,
}

/// Chunks in buffers of their own.
struct Batch {
    buffers: Vec<SharedBuf>,
    chunks: Vec<Range<u64>>,
}

impl Batch {
    fn new() -> Self {
        Self { buffers: buffers(), chunks: Vec::with_capacity(BATCH) }
    }
}

impl<E: Engine> Copier<'_, E> {
    fn window(&mut self, window: Range<u64>) -> Result<(), ImageError> {
        let mut at = window.start;
        for data in self.source.data_in(window.clone())? {
            self.zeroes(at..data.start);
            at = data.end;
            for chunk in cut(data, CHUNK_LEN) {
                self.read.chunks.push(chunk);
                if self.read.chunks.len() == BATCH {
                    self.round()?;
                }
            }
        }
        self.zeroes(at..window.end);
        Ok(())
    }

    fn zeroes(&mut self, range: Range<u64>) {
        if self.before == Target::Used && !range.is_empty() {
            self.target.submit(range, Command::WriteZeroes);
        }
    }

    /// Reads the batch that is gathered while the one that was read before is written.
    fn round(&mut self) -> Result<(), ImageError> {
        for (chunk, buffer) in self.read.chunks.iter().zip(&self.read.buffers) {
            self.source.read(chunk, buffer);
        }
        for (chunk, buffer) in self.written.chunks.iter().zip(&self.written.buffers) {
            let bytes = &mut self.bytes[..(chunk.end - chunk.start) as usize];
            buffer.read_at(0, bytes);
            write_sparsely(self.target, self.before, chunk.start, bytes, buffer);
        }
        self.source.start();
        self.target.start();
        self.source.finish()?;
        self.target.finish()?;
        std::mem::swap(&mut self.read, &mut self.written);
        self.read.chunks.clear();
        Ok(())
    }
}

/// Submits writes for the blocks of `buffer` that are not zero; `bytes` is a copy of it to look at.
fn write_sparsely<E: Engine>(
    target: &mut Side<E>,
    before: Target,
    start: u64,
    bytes: &[u8],
    buffer: &SharedBuf,
) {
    let mut at = 0;
    let blocks = bytes.chunks(BLOCK_BYTES).collect::<Vec<_>>();
    for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let end = at + run.iter().map(|block| block.len()).sum::<usize>();
        let range = start + at as u64..start + end as u64;
        if !is_zero(run[0]) {
            target.submit(range, Command::Write(buffer.slice(at..end).into()));
        } else if before == Target::Used {
            target.submit(range, Command::WriteZeroes);
        }
        at = end;
    }
}

fn is_zero(block: &[u8]) -> bool {
    // One comparison of memory with itself, shifted by one byte: as fast as memcmp.
    block.first().is_none_or(|first| *first == 0) && block[1..] == block[..block.len() - 1]
}
