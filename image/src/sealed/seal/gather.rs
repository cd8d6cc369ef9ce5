//! The disk, segment by segment.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::SEGMENT_BLOCKS;
use crate::error::ImageError;
use crate::sealed::cursor::Cursor;
use crate::sealed::packs::{Packs, Root};
use crate::sealed::source::{Content, Source, SourceBytes, SourceRun};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// What a stretch of the disk holds.
pub(super) struct Gathered {
    /// Its first block.
    pub(super) start: u64,
    /// What it holds, in order. Data lies within one segment; whatever needs no reading may go on after it.
    pub(super) runs: Vec<SourceRun>,
    /// The data, one block after the other.
    pub(super) bytes: SourceBytes,
}

/// A stretch that has not been read.
struct Planned {
    start: u64,
    runs: Vec<SourceRun>,
    /// What is read of it, and the bytes that follow: of a block that is known already.
    ranges: Vec<Range<u64>>,
    last: Vec<u8>,
}

impl Gathered {
    /// Blocks in it.
    pub(super) fn blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }
}

/// Reads a source in order.
pub(in crate::sealed) struct Gatherer<'a, E: Engine, Src> {
    source: &'a mut Src,
    packs: &'a Arc<Packs<E>>,
    io: &'a Io<E>,
    base: Option<Root>,
    size: u64,
    /// Blocks that are as in the base, whatever the source says.
    start: u64,
    /// The block up to which is planned.
    at: u64,
    planned: VecDeque<Planned>,
    /// The source is not asked any more; the block from which on.
    pub(in crate::sealed) stopped: Option<u64>,
}

impl<'a, E: Engine, Src: Source> Gatherer<'a, E, Src> {
    pub(in crate::sealed) fn new(
        source: &'a mut Src,
        packs: &'a Arc<Packs<E>>,
        io: &'a Io<E>,
        base: Option<Root>,
        start: u64,
    ) -> Self {
        let size = source.size();
        Self { source, packs, io, base, size, start, at: 0, planned: VecDeque::new(), stopped: None }
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE)
    }

    /// Stops asking the source: the rest of the disk is as the base.
    pub(super) fn stop(&mut self) {
        if self.stopped.is_none() && !self.is_done() {
            if let Some(first) = self.planned.front() {
                self.at = first.start;
                self.planned.clear();
            }
            self.stopped = Some(self.at.max(self.start));
        }
    }

    /// Refuses a disk that is not what the source said it would be.
    pub(super) fn check(&self, root: &Root) -> Result<(), ImageError> {
        match self.source.expected() {
            Some(hash) if self.stopped.is_none() && hash != root.hash() => {
                let why = format!("the disk is {}, and {hash} was stated", root.hash());
                Err(ImageError::corrupt(self.packs.path(), "root hash", 0, why))
            }
            _ => Ok(()),
        }
    }

    /// Whether the whole disk was gathered.
    pub(super) fn is_done(&self) -> bool {
        self.planned.is_empty() && self.at >= self.blocks()
    }

    /// The next stretch, before the end of the disk.
    pub(super) async fn next(&mut self) -> Result<Gathered, ImageError> {
        while self.planned.len() <= Src::AHEAD && self.at < self.blocks() {
            let planned = self.plan().await?;
            if !planned.ranges.is_empty() {
                self.source.announce(&planned.ranges);
            }
            self.planned.push_back(planned);
        }
        let Planned { start, runs, ranges, last } = self.planned.pop_front().expect("it is not done");
        let mut bytes = match ranges.is_empty() {
            true => SourceBytes::from(Vec::new()),
            false => self.source.read(&ranges).await?,
        };
        let read: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert_eq!(bytes.len() as u64, read * BLOCK_SIZE, "a source reads what it was asked for");
        if ranges.last().is_some_and(|range| range.end == self.blocks()) {
            zero_past_the_end(&mut bytes, self.size);
        }
        Ok(Gathered { start, runs, bytes: bytes.and(&last) })
    }

    /// Takes back the bytes of a stretch.
    pub(super) fn take_back(&mut self, bytes: SourceBytes) {
        self.source.take_back(bytes);
    }

    /// Asks what the stretch after those that are planned holds.
    async fn plan(&mut self) -> Result<Planned, ImageError> {
        let (start, blocks) = (self.at, self.blocks());
        let end = blocks.min((start / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS);
        let (mut runs, mut ranges, mut last) = (Vec::new(), Vec::<Range<u64>>::new(), Vec::new());
        while self.at < end {
            let mut run = self.run().await?;
            if self.is_cut_block(&run) {
                last = self.cut_block().await?;
                run.content = Content::Data;
            } else if run.content == Content::Data {
                run.count = run.count.min(end - self.at);
                match ranges.last_mut().filter(|last| last.end == self.at) {
                    Some(last) => last.end += run.count,
                    None => ranges.push(self.at..self.at + run.count),
                }
            }
            self.at += run.count;
            match runs.last_mut().filter(|last: &&mut SourceRun| last.content == run.content) {
                Some(last) => last.count += run.count,
                None => runs.push(run),
            }
        }
        Ok(Planned { start, runs, ranges, last })
    }

    /// What comes next.
    async fn run(&mut self) -> Result<SourceRun, ImageError> {
        let blocks = self.blocks();
        let mut run = if self.at < self.start {
            SourceRun { content: Content::Same, count: self.start.min(blocks) - self.at }
        } else if self.stopped.is_some() {
            SourceRun { content: Content::Same, count: blocks - self.at }
        } else {
            self.source.next(self.at).await?
        };
        assert!(run.count > 0 && run.count <= blocks - self.at, "a source keeps within its disk");
        if run.content == Content::Same && run.count > 1 && self.cuts_base() {
            run.count -= u64::from(self.at + run.count == blocks);
        }
        Ok(run)
    }

    /// Whether the disk ends within a block in which the base goes on.
    fn cuts_base(&self) -> bool {
        !self.size.is_multiple_of(BLOCK_SIZE) && self.base.is_some_and(|base| base.size > self.size)
    }

    fn is_cut_block(&self, run: &SourceRun) -> bool {
        run.content == Content::Same && self.at + run.count == self.blocks() && self.cuts_base()
    }

    /// The last block: what the base holds there, and zeroes past the end of the disk.
    async fn cut_block(&mut self) -> Result<Vec<u8>, ImageError> {
        let base = self.base.expect("it is cut");
        let mut cursor = Cursor::new(Arc::clone(self.packs), self.io, base);
        let child = cursor.child(0, self.at).await?.expect("blocks lie below every top");
        if child.hash.is_zero() {
            return Ok(vec![0; BLOCK_BYTES]);
        }
        let found = self.packs.block(self.io, &child.hash, child.place).await?;
        let mut bytes = found.bytes().to_vec();
        zero_past_the_end(&mut bytes, self.size);
        Ok(bytes)
    }
}

/// Zeroes what the last block holds past the end of a disk of `size` bytes.
fn zero_past_the_end(bytes: &mut [u8], size: u64) {
    let past = (size.next_multiple_of(BLOCK_SIZE) - size) as usize;
    let len = bytes.len();
    bytes[len - past..].fill(0);
}
