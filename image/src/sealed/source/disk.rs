//! A disk of any format, as its guest sees it.
//!
//! What will be read next is being read while the caller works on what it has: two segments, in buffers that it gives
//! back. Requests go on by themselves as far as the kernel can take them, and whenever the source is asked something.

use std::collections::VecDeque;
use std::ops::Range;

use super::spare::{Spare, bytes_of};
use super::{Content, Source, SourceBytes, SourceRun};
use crate::error::ImageError;
use crate::side::{CHUNK_LEN, Side, WINDOW_LEN, cut};
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Requests in flight, at most: data in small pieces is read in turns.
const DEPTH: u64 = 64;

/// A disk that is read through a queue, over a reactor of its own.
pub struct DiskSource<E: Engine> {
    side: Side<E>,
    /// How far the disk was asked what it holds, in bytes, and what of that holds data.
    asked: Range<u64>,
    data: VecDeque<Range<u64>>,
    /// What is being read, in order.
    reading: VecDeque<Reading>,
    outstanding: u64,
    spare: Spare,
}

/// Ranges that are being read into one buffer.
struct Reading {
    ranges: Vec<Range<u64>>,
    buffer: SharedBuf,
    len: usize,
    /// Tags of its requests, and how many of them have not ended.
    tags: Range<u64>,
    left: u64,
    failed: Option<DeviceError>,
}

impl<E: Engine> DiskSource<E> {
    /// A disk, opened for reading.
    pub fn new(side: Side<E>) -> Self {
        Self {
            side,
            asked: 0..0,
            data: VecDeque::new(),
            reading: VecDeque::new(),
            outstanding: 0,
            spare: Spare::default(),
        }
    }

    /// The disk again.
    pub fn into_side(mut self) -> Side<E> {
        self.drop_readings();
        self.side
    }

    /// Begins to read.
    fn begin(&mut self, ranges: &[Range<u64>]) {
        let bytes = ranges.iter().map(|range| (range.end - range.start) * BLOCK_SIZE).sum::<u64>() as usize;
        let buffer = self.spare.take(bytes);
        let first = self.side.submitted() + 1;
        self.reading.push_back(Reading {
            ranges: ranges.to_vec(),
            buffer: buffer.clone(),
            len: bytes,
            tags: first..first,
            left: 0,
            failed: None,
        });
        let mut at = 0;
        let in_bytes = ranges.iter().map(|range| range.start * BLOCK_SIZE..range.end * BLOCK_SIZE);
        for chunk in in_bytes.flat_map(|range| cut(range, CHUNK_LEN)) {
            let len = (chunk.end - chunk.start) as usize;
            self.side.read(&chunk, &buffer.slice(at..at + len));
            at += len;
            self.count(self.side.submitted());
            while self.outstanding >= DEPTH {
                self.side.start();
                self.wait();
            }
        }
        self.side.start();
    }

    /// Counts what was submitted last among the requests of the last reading.
    fn count(&mut self, submitted: u64) {
        let last = self.reading.back_mut().expect("one was begun");
        let new = submitted + 1 - last.tags.end;
        last.tags.end += new;
        last.left += new;
        self.outstanding += new;
    }

    /// Takes what has ended; waits for something when nothing has.
    fn wait(&mut self) {
        let mut ended = 0;
        loop {
            for done in self.side.reap() {
                ended += 1;
                let Some(reading) = self.reading.iter_mut().find(|reading| reading.tags.contains(&done.tag))
                else {
                    continue;
                };
                reading.left -= 1;
                if let Err(error) = done.result {
                    reading.failed.get_or_insert(error);
                }
            }
            if ended > 0 {
                self.outstanding -= ended;
                return;
            }
            self.side.wait();
        }
    }

    /// Waits for what was begun first.
    fn finish_first(&mut self) -> Option<Reading> {
        while self.reading.front()?.left > 0 {
            self.wait();
        }
        self.reading.pop_front()
    }

    /// Waits for all that was begun, and forgets it.
    fn drop_readings(&mut self) {
        while let Some(reading) = self.finish_first() {
            self.spare.keep(reading.buffer.into_buf().ok());
        }
    }
}

impl<E: Engine> Source for DiskSource<E> {
    const AHEAD: usize = 2;

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

    async fn read(&mut self, ranges: &[Range<u64>]) -> Result<SourceBytes, ImageError> {
        if self.reading.front().is_none_or(|reading| reading.ranges != ranges) {
            self.drop_readings();
            self.begin(ranges);
        }
        let Reading { buffer, len, failed, .. } = self.finish_first().expect("it was begun");
        if let Some(error) = failed {
            return Err(ImageError::new(self.side.path(), error));
        }
        Ok(bytes_of(buffer, len))
    }

    fn announce(&mut self, ranges: &[Range<u64>]) {
        self.begin(ranges);
    }

    fn take_back(&mut self, bytes: SourceBytes) {
        self.spare.keep(bytes.into_buffer());
    }
}
