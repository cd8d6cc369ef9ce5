//! A disk of any format, as its guest sees it.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Content, Source, SourceRun};
use crate::error::ImageError;
use crate::side::{CHUNK_LEN, Side, WINDOW_LEN, cut};
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Requests in flight, at most.
const DEPTH: usize = 64;

/// A disk that is read through a queue, over a reactor of its own.
pub struct DiskSource<E: Engine> {
    side: Side<E>,
    /// How far the disk was asked what it holds, in bytes, and what of that holds data.
    asked: Range<u64>,
    data: VecDeque<Range<u64>>,
}

impl<E: Engine> DiskSource<E> {
    /// A disk, opened for reading.
    pub fn new(side: Side<E>) -> Self {
        Self { side, asked: 0..0, data: VecDeque::new() }
    }

    /// The disk again.
    pub fn into_side(self) -> Side<E> {
        self.side
    }
}

impl<E: Engine> Source for DiskSource<E> {
    fn size(&self) -> u64 {
        self.side.size()
    }

    async fn next(&mut self, at: u64) -> Result<SourceRun, ImageError> {
        let (at, size) = (at * BLOCK_SIZE, self.size());
        if !self.asked.contains(&at) {
            self.asked = at..(at + WINDOW_LEN).min(size);
            self.data = self.side.data_in(self.asked.clone())?.into();
        }
        while self.data.front().is_some_and(|data| data.end <= at) {
            self.data.pop_front();
        }
        let (content, end) = match self.data.front() {
            Some(data) if data.start <= at => (Content::Data, data.end),
            Some(data) => (Content::Zero, data.start),
            None => (Content::Zero, self.asked.end),
        };
        let end = end.min(self.asked.end);
        Ok(SourceRun { content, count: (end - at).div_ceil(BLOCK_SIZE) })
    }

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<Vec<u8>, ImageError> {
        let bytes: u64 = ranges.iter().map(|range| (range.end - range.start) * BLOCK_SIZE).sum();
        let buffer = SharedBuf::heap(bytes as usize);
        let mut at = 0;
        let in_bytes = ranges.iter().map(|range| range.start * BLOCK_SIZE..range.end * BLOCK_SIZE);
        for (i, chunk) in in_bytes.flat_map(|range| cut(range, CHUNK_LEN)).enumerate() {
            let len = (chunk.end - chunk.start) as usize;
            self.side.read(&chunk, &buffer.slice(at..at + len));
            at += len;
            if i % DEPTH == DEPTH - 1 {
                self.side.finish()?;
            }
        }
        self.side.finish()?;
        let mut copy = vec![0; at];
        buffer.read_at(0, &mut copy);
        Ok(copy)
    }
}
