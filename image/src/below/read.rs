//! Reading what was planned, where bytes cannot go straight from a file to the reader's memory.

use std::ops::Range;
use std::sync::Arc;

use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::FileOffset;

use super::cache::Cluster;
use super::{Below, Compressed, Held, Link, Piece, Source};
use crate::error::ImageError;
use crate::qcow2::compress::decompress;
use crate::side::cut;

/// Bytes bounced at a time.
const BOUNCE_LEN: u64 = 1 << 20;

impl<E: Engine> Below<E> {
    /// As [`Below::plan`], bringing what is missing.
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

    /// Reads a piece into memory of the same length, of any alignment.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged.
    pub async fn read_piece(
        &self,
        io: &Io<E>,
        source: Source<E::File>,
        mut memory: Memory,
    ) -> Result<(), DeviceError> {
        match source {
            Source::Zero => memory.zero_at(0, memory.len()),
            Source::File { file, offset } => bounce(io, file, offset, &mut memory).await?,
            Source::Compressed(part) => {
                let cluster = self.cluster(io, part).await?;
                let bytes = cluster.get(part.skip..part.skip + memory.len());
                memory.write_at(0, bytes.ok_or(DeviceError::Corrupt)?);
            }
        }
        Ok(())
    }

    /// Bytes that decompressing a part takes while it is under way.
    pub(crate) fn cost(&self, part: Compressed) -> usize {
        match self.links.get(part.link) {
            Some(Link::Qcow2(image)) => part.len as usize + 2 * image.cluster_size() as usize,
            _ => 0,
        }
    }

    /// The cluster that holds a part.
    async fn cluster(&self, io: &Io<E>, part: Compressed) -> Result<Cluster, DeviceError> {
        let Some(Link::Qcow2(image)) = self.links.get(part.link) else { return Err(DeviceError::Corrupt) };
        if part.offset >= image.identity.size {
            let detail = "it lies outside of the file";
            let error = ImageError::corrupt(image.path(), "compressed cluster", part.offset, detail);
            return Err(self.complain(&error));
        }
        let key = (part.link, part.offset);
        let brought = self.clusters.get_or_insert_async(&key, async {
            let (bytes, range) = read_aligned(io, &image.file, part.offset, part.len as usize).await?;
            let cluster = decompress(image.compression(), &bytes[range], image.cluster_size() as usize);
            cluster.map(Arc::from).map_err(|detail| {
                self.complain(&ImageError::corrupt(image.path(), "compressed cluster", part.offset, detail))
            })
        });
        brought.await
    }
}

/// Reads into memory that the kernel cannot fill directly.
async fn bounce<E: Engine>(
    io: &Io<E>,
    file: E::File,
    offset: FileOffset,
    memory: &mut Memory,
) -> Result<(), DeviceError> {
    for piece in cut(offset.0..offset.0 + memory.len() as u64, BOUNCE_LEN) {
        let (bytes, range) = read_aligned(io, &file, piece.start, (piece.end - piece.start) as usize).await?;
        memory.write_at((piece.start - offset.0) as usize, &bytes[range]);
    }
    Ok(())
}

/// Reads `len` bytes of a file, aligned as the file needs it: the bytes, and where among them those
/// are that were asked for. What lies past the end of the file is zero.
async fn read_aligned<E: Engine>(
    io: &Io<E>,
    file: &E::File,
    offset: u64,
    len: usize,
) -> Result<(AlignedBuf, Range<usize>), DeviceError> {
    let alignment = file.alignment().offset as u64;
    let start = offset / alignment * alignment;
    let end = (offset + len as u64).next_multiple_of(alignment);
    let buf = AlignedBuf::zeroed((end - start) as usize);
    let memory = io.run(Op::read(file.clone(), FileOffset(start), buf)).await.zero_filled()?;
    let skip = (offset - start) as usize;
    Ok((memory.into_buf(), skip..skip + len))
}
