//! One side of a copy or comparison: a disk, a queue on it, and requests in batches.
//!
//! A tool that works on two disks submits a batch to each side, lets both start, and then waits
//! for one after the other: the work overlaps without threads, and buffers are bounded.

use std::cell::Cell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::{BLOCK_SIZE, GuestOffset};

use crate::error::ImageError;
use crate::extent::{Extent, ExtentKind};
use crate::open::{Disk, DiskQueue, OpenDisk};

/// Bytes of the largest request.
pub(crate) const CHUNK_LEN: u64 = 1 << 20;

/// Requests in a batch.
pub(crate) const BATCH: usize = 8;

/// Bytes of disk whose extents are asked for at a time: bounds the list.
pub(crate) const WINDOW_LEN: u64 = 64 << 20;

/// A disk with one queue, used from one thread.
pub struct Side<E: Engine> {
    path: PathBuf,
    disk: Arc<Disk<E>>,
    io: Io<E>,
    queue: DiskQueue<E>,
    submitted: u64,
    done: Vec<Done>,
}

impl<E: Engine> Side<E> {
    /// Opens a disk and makes a queue on it over `io`, which nothing else uses; a writable disk is
    /// maintained there too.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: Io<E>,
        path: &Path,
        options: OpenDisk,
    ) -> Result<Self, ImageError> {
        let read_only = options.read_only;
        let opened = {
            let (storage, io, path) = (storage.clone(), io.clone(), path.to_owned());
            async move { Disk::open(&storage, &io, &path, options).await }
        };
        let disk = block_on(&io, opened)?;
        if !read_only {
            io.spawn(Arc::clone(&disk).maintain(io.clone()));
        }
        let queue = disk.queue_on(io.clone());
        Ok(Self { path: path.to_owned(), disk, io, queue, submitted: 0, done: Vec::new() })
    }

    /// A disk that is open already, and that errors call `path`; what it has to do in the background, somebody else does.
    pub fn over(disk: &Arc<Disk<E>>, path: &Path, io: Io<E>) -> Self {
        let queue = disk.queue_on(io.clone());
        Self { path: path.to_owned(), disk: Arc::clone(disk), io, queue, submitted: 0, done: Vec::new() }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.disk.geometry().size
    }

    /// Changes the size of the disk, durably.
    ///
    /// # Errors
    /// As [`Disk::resize`].
    pub fn resize(&self, size: u64) -> Result<(), ImageError> {
        let (disk, io) = (Arc::clone(&self.disk), self.io.clone());
        block_on(&self.io, async move { disk.resize(&io, size).await })
    }

    /// Makes everything durable and closes the disk.
    ///
    /// # Errors
    /// When an outstanding request, or closing, failed.
    pub fn close(mut self) -> Result<(), ImageError> {
        self.finish()?;
        let Self { disk, io, queue, .. } = self;
        drop(queue);
        block_on(&io.clone(), async move { disk.close(&io).await })
    }

    /// Submits a request.
    pub(crate) fn submit(&mut self, range: Range<u64>, command: Command) {
        self.submitted += 1;
        let (offset, len) = (GuestOffset(range.start), range.end - range.start);
        self.queue.submit(Request { tag: self.submitted, offset, len, command });
    }

    /// Submits a read of `range` into the start of `buffer`; what lies past the end of the disk
    /// becomes zero.
    pub(crate) fn read(&mut self, range: &Range<u64>, buffer: &SharedBuf) {
        let len = (range.end - range.start) as usize;
        let end = range.end.min(self.size()).max(range.start);
        let inside = (end - range.start) as usize;
        buffer.zero_at(inside, len - inside);
        if inside > 0 {
            self.submit(range.start..end, Command::Read(buffer.slice(0..inside).into()));
        }
    }

    /// Starts what was submitted.
    pub(crate) fn start(&mut self) {
        self.queue.poll(&mut self.done);
    }

    /// How many requests have been submitted: the tag of the last one.
    pub(crate) fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Moves what can be moved, and takes what has ended.
    pub(crate) fn reap(&mut self) -> std::vec::Drain<'_, Done> {
        self.queue.poll(&mut self.done);
        self.done.drain(..)
    }

    /// Waits until [`reap`](Self::reap) may bring something.
    pub(crate) fn wait(&mut self) {
        self.queue.wait(None);
    }

    /// Waits for everything submitted.
    pub(crate) fn finish(&mut self) -> Result<(), ImageError> {
        sapwood_blockdev::device::drain(&mut self.queue, &mut self.done);
        let results: Result<Vec<()>, _> = self.done.drain(..).map(|done| done.result).collect();
        results.map(drop).map_err(|error| ImageError::new(&self.path, error))
    }

    /// The parts of `window` that hold data, in whole blocks, in order and apart. Requests may be outstanding.
    pub(crate) fn data_in(&mut self, window: Range<u64>) -> Result<Vec<Range<u64>>, ImageError> {
        let (disk, io) = (Arc::clone(&self.disk), self.io.clone());
        let answer = Rc::new(Cell::new(None));
        let slot = Rc::clone(&answer);
        self.io.spawn(async move { slot.set(Some(disk.extents(&io, window).await)) });
        let extents = loop {
            self.queue.poll(&mut self.done);
            match answer.take() {
                Some(extents) => break extents?,
                None => self.queue.wait(None),
            }
        };
        let holds_data = |e: &&Extent| matches!(e.kind, ExtentKind::Data | ExtentKind::Compressed);
        Ok(in_blocks(extents.iter().filter(holds_data).map(Extent::range), self.size()))
    }
}

/// Ranges in order of their starts, grown to whole blocks (within `size` bytes) and joined where they meet.
pub(crate) fn in_blocks(ranges: impl Iterator<Item = Range<u64>>, size: u64) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = range.start / BLOCK_SIZE * BLOCK_SIZE;
        let end = range.end.next_multiple_of(BLOCK_SIZE).min(size);
        match joined.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => joined.push(start..end),
        }
    }
    joined
}

/// Cuts a range into pieces of at most `len` bytes, at multiples of `len`.
pub(crate) fn cut(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((start / len + 1) * len);
        let piece = start..end;
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The buffers of a batch.
pub(crate) fn buffers() -> Vec<SharedBuf> {
    (0..BATCH).map(|_| SharedBuf::heap(CHUNK_LEN as usize)).collect()
}
