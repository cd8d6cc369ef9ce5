//! What the readers of partition tables and file systems see of the disk: a part of it, read-only, through a small
//! cache and a budget.
//!
//! The budget is what ends a loop that a hostile disk leads another crate into: every round of it reads.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::rc::Rc;

use ext4_view::Ext4Read;

/// A disk, as the kernel is looked for on it.
pub trait DiskReader {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from the bytes at `offset`. Within the size; `offset` is a multiple of [`CHUNK`], and `buf` is that
    /// long, or ends with the disk.
    ///
    /// # Errors
    /// The disk cannot be read there.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// Bytes that are read at once.
pub const CHUNK: usize = 128 << 10;
/// Chunks that are kept: 2 MiB.
const CHUNKS_MAX: usize = 16;
/// Reads by the crates above. A gigabyte in an initrd of the smallest blocks is a million.
const READS_MAX: u64 = 4 << 20;
/// Bytes from the disk, read-ahead included.
const BYTES_MAX: u64 = 8 << 30;

/// The disk, with what has been read of it lately.
struct Shared {
    disk: Box<dyn DiskReader>,
    /// The latest used comes last.
    chunks: Vec<(u64, Vec<u8>)>,
    reads_left: u64,
    bytes_left: u64,
}

impl Shared {
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let over = || io::Error::other("the disk leads in circles: too much was read from it");
        self.reads_left = self.reads_left.checked_sub(1).ok_or_else(over)?;
        let (mut at, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let start = at - at % CHUNK as u64;
            let chunk = self.chunk(start)?;
            let from = chunk.get((at - start) as usize..).unwrap_or_default();
            let len = from.len().min(buf.len());
            if len == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = buf.split_at_mut(len);
            now.copy_from_slice(&from[..len]);
            (at, buf) = (at + len as u64, later);
        }
        Ok(())
    }

    fn chunk(&mut self, start: u64) -> io::Result<&[u8]> {
        if let Some(index) = self.chunks.iter().position(|chunk| chunk.0 == start) {
            let found = self.chunks.remove(index);
            self.chunks.push(found);
        } else {
            let len = self.disk.size().saturating_sub(start).min(CHUNK as u64);
            let over = || io::Error::other("the disk leads in circles: too many bytes were read from it");
            self.bytes_left = self.bytes_left.checked_sub(len).ok_or_else(over)?;
            let mut bytes = vec![0; len as usize];
            self.disk.read_at(start, &mut bytes)?;
            if self.chunks.len() == CHUNKS_MAX {
                self.chunks.remove(0);
            }
            self.chunks.push((start, bytes));
        }
        Ok(&self.chunks.last().expect("it was pushed").1)
    }
}

/// A part of the disk; clones share the cache and the budget.
#[derive(Clone)]
pub struct View {
    shared: Rc<RefCell<Shared>>,
    start: u64,
    len: u64,
    position: u64,
}

impl View {
    /// The whole disk.
    pub fn new(disk: Box<dyn DiskReader>) -> Self {
        let len = disk.size();
        let shared = Shared { disk, chunks: Vec::new(), reads_left: READS_MAX, bytes_left: BYTES_MAX };
        Self { shared: Rc::new(RefCell::new(shared)), start: 0, len, position: 0 }
    }

    /// `len` bytes from `start` of this one, if it has them.
    pub fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        if len == 0 || end > self.len {
            return None;
        }
        Some(Self { shared: Rc::clone(&self.shared), start: self.start + start, len, position: 0 })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The range is not inside, the disk cannot be read, or the budget is used up.
    pub fn fill(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        if end.is_none() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.shared.borrow_mut().read(self.start + offset, buf)
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({}, {})", self.start, self.len)
    }
}

impl Ext4Read for View {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.fill(start_byte, dst)?)
    }
}

impl Read for View {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.len.saturating_sub(self.position).min(buf.len() as u64) as usize;
        self.fill(self.position, &mut buf[..len])?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for View {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// The crates want to be able to write; they never do here.
impl Write for View {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
