//! Reading what was planned, where bytes cannot go straight from a file to the reader's memory.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::FileOffset;

use super::cache::Cluster;
use super::{Chain, Compressed, Held, Link, Piece, Source};
use crate::counts::Hits;
use crate::error::ImageError;
use crate::qcow2::compress::decompress;
use crate::side::cut;

/// Bytes bounced at a time.
const BOUNCE_LEN: u64 = 1 << 20;

impl<E: Engine> Chain<E> {
    /// As [`Chain::plan`], bringing what is missing; of a chain without layers, whose files are all
    /// open.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged.
    pub async fn plan_all(
        &self,
        io: &Io<E>,
        range: Range<u64>,
        pieces: &mut Vec<Piece<E::File>>,
    ) -> Result<(), DeviceError> {
        let mut held = Held::default();
        loop {
            let at = pieces.last().map_or(range.start, |piece| piece.range.end);
            match self.plan(at..range.end, &held, pieces) {
                Ok(()) => return Ok(()),
                Err(stop) => self.load(io, stop, &mut held).await?,
            }
        }
    }

    /// Reads from byte `start` of the disk, which must not end before `memory` does, into shared memory
    /// of any alignment, and counts in `frames`. What is planned is read before anything else is opened.
    pub(crate) async fn read(
        &self,
        io: &Io<E>,
        start: u64,
        memory: &Memory,
        frames: &Hits,
    ) -> Result<(), DeviceError> {
        let (mut held, mut pieces, mut at) = (Held::default(), Vec::new(), start);
        let end = start + memory.len() as u64;
        while at < end {
            let stop = self.plan(at..end, &held, &mut pieces).err();
            let reads = pieces.drain(..).map(|Piece { range, source }| {
                at = range.end;
                let (from, len) = ((range.start - start) as usize, (range.end - range.start) as usize);
                self.read_bounded(io, source, memory.share(from, len), frames)
            });
            let reads: Vec<_> = reads.collect();
            join_all(reads).await.into_iter().collect::<Result<(), _>>()?;
            if let Some(stop) = stop {
                self.load(io, stop, &mut held).await?;
            }
        }
        Ok(())
    }

    /// As [`Chain::read_counted`], with a bound for what is decompressed at a time.
    async fn read_bounded(
        &self,
        io: &Io<E>,
        source: Source<E::File>,
        memory: Memory,
        frames: &Hits,
    ) -> Result<(), DeviceError> {
        let _permit = match source {
            Source::Compressed(_) => Some(self.decompressing.take().await),
            _ => None,
        };
        self.read_counted(io, source, memory, frames).await
    }

    /// Reads a piece into memory of the same length, of any alignment.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged.
    pub async fn read_piece(
        &self,
        io: &Io<E>,
        source: Source<E::File>,
        memory: Memory,
    ) -> Result<(), DeviceError> {
        self.read_counted(io, source, memory, &Hits::default()).await
    }

    /// As [`Chain::read_piece`], and counts in `frames`.
    pub(super) async fn read_counted(
        &self,
        io: &Io<E>,
        source: Source<E::File>,
        mut memory: Memory,
        frames: &Hits,
    ) -> Result<(), DeviceError> {
        match source {
            Source::Zero => memory.zero_at(0, memory.len()),
            Source::File { file, offset, may_end } => read_file(io, file, offset, may_end, memory).await?,
            Source::Compressed(part) => {
                let cluster = self.cluster(io, part).await?;
                let bytes = cluster.get(part.skip..part.skip + memory.len());
                memory.write_at(0, bytes.ok_or(DeviceError::Corrupt)?);
            }
            Source::Sealed(part) => self.read_sealed(io, part, memory, frames).await?,
        }
        Ok(())
    }

    /// Bytes that decompressing a part takes while it is under way.
    pub(crate) fn cost(&self, part: Compressed) -> usize {
        match self.links.get(part.link).map(|link| &**link) {
            Some(Link::Qcow2(image)) => part.len as usize + 2 * image.cluster_size() as usize,
            _ => 0,
        }
    }

    /// The cluster that holds a part.
    async fn cluster(&self, io: &Io<E>, part: Compressed) -> Result<Cluster, DeviceError> {
        let Some(Link::Qcow2(image)) = self.links.get(part.link).map(|link| &**link) else {
            return Err(DeviceError::Corrupt);
        };
        if part.offset >= image.identity.size {
            let detail = "it lies outside of the file";
            let error = ImageError::corrupt(image.path(), "compressed cluster", part.offset, detail);
            return Err(self.complain(&error));
        }
        let key = (self.height(part.link), part.offset);
        let brought = self.clusters.get_or_insert_async(&key, async {
            let (bytes, range) = read_aligned(io, &image.file, part.offset, part.len as usize, true).await?;
            let cluster = decompress(image.compression(), &bytes[range], image.cluster_size() as usize);
            cluster.map(Arc::from).map_err(|detail| {
                self.complain(&ImageError::corrupt(image.path(), "compressed cluster", part.offset, detail))
            })
        });
        brought.await
    }
}

/// Reads a file into memory, directly where that can be.
pub(crate) async fn read_file<E: Engine>(
    io: &Io<E>,
    file: E::File,
    offset: FileOffset,
    may_end: bool,
    mut memory: Memory,
) -> Result<(), DeviceError> {
    if reaches(&file, offset, &memory) {
        let wanted = memory.len();
        let outcome = io.run(Op::read(file, offset, memory)).await;
        return match outcome.result {
            Ok(read) if read < wanted && !may_end => Err(DeviceError::Corrupt),
            _ => outcome.zero_filled().map(drop).map_err(DeviceError::from),
        };
    }
    for piece in cut(offset.0..offset.0 + memory.len() as u64, BOUNCE_LEN) {
        let len = (piece.end - piece.start) as usize;
        let (bytes, range) = read_aligned(io, &file, piece.start, len, may_end).await?;
        memory.write_at((piece.start - offset.0) as usize, &bytes[range]);
    }
    Ok(())
}

/// Whether a file can be read from `offset` straight into `memory`.
pub(crate) fn reaches<F: StorageFile>(file: &F, offset: FileOffset, memory: &Memory) -> bool {
    let alignment = file.alignment();
    (offset.0 | memory.len() as u64).is_multiple_of(alignment.offset as u64)
        && memory.is_aligned(alignment.memory)
}

/// Reads `len` bytes of a file, aligned as the file needs it: the bytes, and where among them those
/// are that were asked for. What lies past the end of the file is zero, where it may end there.
pub(crate) async fn read_aligned<E: Engine>(
    io: &Io<E>,
    file: &E::File,
    offset: u64,
    len: usize,
    may_end: bool,
) -> Result<(AlignedBuf, Range<usize>), DeviceError> {
    let alignment = file.alignment().offset as u64;
    let start = offset / alignment * alignment;
    let end = (offset + len as u64).next_multiple_of(alignment);
    let buf = AlignedBuf::zeroed((end - start) as usize);
    let outcome = io.run(Op::read(file.clone(), FileOffset(start), buf)).await;
    let skip = (offset - start) as usize;
    if !may_end && outcome.result.is_ok_and(|read| read < skip + len) {
        return Err(DeviceError::Corrupt);
    }
    Ok((outcome.zero_filled()?.into_buf(), skip..skip + len))
}
