//! A qcow2 disk with a queue.

use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceError, DeviceQueue, Request, drain, run};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::below::{ChainDisk, ChainQueue};
use sapwood_image::{Extent, Format, ImageError, OpenBelow};

use crate::damage::lab::{Lab, wait};
use crate::sim::rng::Rng;

/// Sectors of the longest random request.
const SECTORS_MAX: u64 = 600;

/// An open image with a queue.
pub struct Reader<L: Lab> {
    lab: L,
    /// The disk.
    pub disk: Arc<ChainDisk<L::Engine>>,
    queue: ChainQueue<L::Engine>,
}

/// Backing files may be opened.
pub fn trusting() -> OpenBelow {
    OpenBelow { allow_backing: true, ..OpenBelow::default() }
}

impl<L: Lab> Reader<L> {
    /// Opens an image.
    ///
    /// # Errors
    /// Those of [`ChainDisk::open`].
    pub fn open(lab: &L, path: &Path, options: &OpenBelow) -> Result<Self, ImageError> {
        let (path, options) = (path.to_owned(), options.clone());
        let disk = wait(lab, async move |storage, io| {
            ChainDisk::open(&storage, &io, &path, Format::Qcow2, &options).await
        })?;
        let queue = disk.queue_on(Io::new(lab.engine()));
        Ok(Self { lab: lab.clone(), disk, queue })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.disk.geometry().size
    }

    /// Performs one request.
    ///
    /// # Errors
    /// What the device reports.
    pub fn command(&mut self, offset: u64, len: u64, command: Command) -> Result<(), DeviceError> {
        run(&mut self.queue, GuestOffset(offset), len, command)
    }

    /// Reads a range.
    ///
    /// # Errors
    /// What the device reports.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let buf = SharedBuf::heap(len);
        // Whatever is not written would show.
        buf.write_at(0, &vec![0xee; len]);
        self.command(offset, len as u64, Command::Read(buf.clone().into()))?;
        let mut bytes = vec![0; len];
        buf.read_at(0, &mut bytes);
        Ok(bytes)
    }

    /// Reads a sector at each of many places, all submitted at once; what was reported.
    pub fn read_sectors(&mut self, offsets: impl Iterator<Item = u64>) -> Vec<Result<(), DeviceError>> {
        for (tag, offset) in offsets.enumerate() {
            let command = Command::Read(SharedBuf::heap(512).into());
            self.queue.submit(Request { tag: tag as u64, offset: GuestOffset(offset), len: 512, command });
        }
        let mut done = Vec::new();
        drain(&mut self.queue, &mut done);
        done.into_iter().map(|done| done.result).collect()
    }

    /// What the disk holds.
    ///
    /// # Errors
    /// Those of [`Qcow2::extents`].
    pub fn extents(&self) -> Result<Vec<Extent>, ImageError> {
        let (disk, size) = (Arc::clone(&self.disk), self.size());
        wait(&self.lab, async move |_, io| disk.extents(&io, 0..size).await)
    }

    /// Compares the whole disk with `expected`.
    ///
    /// # Panics
    /// When it is not that.
    pub fn expect(&mut self, what: &str, expected: &[u8]) {
        assert_eq!(self.size(), expected.len() as u64, "{what}: size");
        for start in (0..expected.len()).step_by(1 << 20) {
            let end = expected.len().min(start + (1 << 20));
            let bytes = self.read(start as u64, end - start).unwrap_or_else(|e| panic!("{what}: {e}"));
            same(what, start, &bytes, &expected[start..end]);
        }
    }

    /// See [`expect_at_random`].
    ///
    /// # Panics
    /// When the disk does not hold `expected`.
    pub fn expect_at_random(&mut self, what: &str, expected: &[u8], rng: &mut Rng, rounds: usize) {
        expect_at_random(&mut self.queue, what, expected, rng, rounds);
    }
}

/// Compares random requests, several at a time and half of them into memory that is not aligned.
///
/// # Panics
/// When the disk does not hold `expected`.
pub fn expect_at_random(
    queue: &mut impl DeviceQueue,
    what: &str,
    expected: &[u8],
    rng: &mut Rng,
    rounds: usize,
) {
    let sectors = expected.len() as u64 / 512;
    for _ in 0..rounds {
        let mut reads = Vec::new();
        for tag in 0..16 {
            let start = rng.below(sectors);
            let len = rng.between(1, SECTORS_MAX.min(sectors - start)) * 512;
            let skip = if rng.percent(50) { 0 } else { rng.between(1, 511) as usize };
            let buf = SharedBuf::heap(len as usize + skip).slice(skip..len as usize + skip);
            let (offset, command) = (GuestOffset(start * 512), Command::Read(buf.clone().into()));
            queue.submit(Request { tag, offset, len, command });
            reads.push((start as usize * 512, buf));
        }
        let mut done = Vec::new();
        drain(queue, &mut done);
        assert_eq!(done.len(), reads.len(), "{what}");
        done.iter().for_each(|done| assert_eq!(done.result, Ok(()), "{what}"));
        for (start, buf) in reads {
            let mut bytes = vec![0; buf.len()];
            buf.read_at(0, &mut bytes);
            same(what, start, &bytes, &expected[start..start + bytes.len()]);
        }
    }
}

fn same(what: &str, start: usize, bytes: &[u8], expected: &[u8]) {
    if bytes != expected {
        let at = bytes.iter().zip(expected).take_while(|(a, b)| a == b).count();
        panic!("{what}: byte {} is {:#x}, not {:#x}", start + at, bytes[at], expected[at]);
    }
}
