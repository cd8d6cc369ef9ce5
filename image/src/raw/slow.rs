//! The slow path: requests that do not meet the alignment of the storage, and ranges to zero.

use std::ops::Range;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::{AlignedBuf, Memory};
use sapwood_blockdev::device::{Command, DeviceError, Request};
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_SIZE, BlockSpan, FileOffset};

use super::device::RawDevice;
use crate::side::cut;

/// Bytes bounced or zeroed at a time.
const PIECE_LEN: u64 = 1 << 20;

/// Whether the storage can move these bytes from or to this memory as they are.
pub(super) fn is_direct<E: Engine>(device: &RawDevice<E>, offset: u64, memory: &Memory) -> bool {
    let mask = device.alignment.offset as u64 - 1;
    (offset | memory.len() as u64) & mask == 0 && memory.is_aligned(device.alignment.memory)
}

/// Carries out a request. Its range is held by the caller if it changes anything.
pub(super) async fn perform<E: Engine>(
    device: &RawDevice<E>,
    io: &Io<E>,
    request: Request,
) -> Result<(), DeviceError> {
    let range = request.offset.0..request.offset.0 + request.len;
    match request.command {
        Command::Read(memory) => return Ok(read(device, io, range.start, memory).await?),
        Command::Write(memory) => write(device, io, range.start, &memory).await?,
        Command::WriteZeroes => zero(device, io, range).await?,
        Command::Discard => {
            let whole = BlockSpan::of(request.offset, request.len).whole;
            discard(device, io, whole.start * BLOCK_SIZE..whole.end * BLOCK_SIZE).await?;
        }
        Command::Flush => unreachable!("a flush is a single operation"),
    }
    if device.write_cache() {
        return Ok(());
    }
    let synced = io.run(Op::Sync { file: device.file.clone() }).await.result;
    device.after_sync(synced.map(drop).map_err(Errno::into))
}

async fn read<E: Engine>(
    device: &RawDevice<E>,
    io: &Io<E>,
    start: u64,
    mut memory: Memory,
) -> Result<(), Errno> {
    for piece in cut(start..start + memory.len() as u64, PIECE_LEN) {
        let around = around(device, &piece);
        let bytes = read_aligned(device, io, around.clone()).await?;
        let skip = (piece.start - around.start) as usize;
        let len = (piece.end - piece.start) as usize;
        memory.write_at((piece.start - start) as usize, &bytes[skip..skip + len]);
    }
    Ok(())
}

async fn write<E: Engine>(
    device: &RawDevice<E>,
    io: &Io<E>,
    start: u64,
    memory: &Memory,
) -> Result<(), Errno> {
    for piece in cut(start..start + memory.len() as u64, PIECE_LEN) {
        let at = (piece.start - start) as usize;
        write_piece(device, io, piece, |bytes| memory.read_at(at, bytes)).await?;
    }
    Ok(())
}

/// Gives the range's space back where the storage can: as zeroes if possible, else as it comes. To
/// write zeroes instead would take up space that a guest means to free.
async fn discard<E: Engine>(device: &RawDevice<E>, io: &Io<E>, range: Range<u64>) -> Result<(), Errno> {
    if range.is_empty() {
        return Ok(());
    }
    let (offset, len) = (FileOffset(range.start), range.end - range.start);
    if device.can_punch() {
        match io.run(Op::Punch { file: device.file.clone(), offset, len }).await.result {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => device.set_cannot_punch(),
            ended => return ended.map(drop),
        }
    }
    match io.run(Op::Discard { file: device.file.clone(), offset, len }).await.result {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
            device.file.note_no_space_back();
            Ok(())
        }
        ended => ended.map(drop),
    }
}

/// Makes the range read as zeroes, giving its space back where the storage can.
async fn zero<E: Engine>(device: &RawDevice<E>, io: &Io<E>, range: Range<u64>) -> Result<(), Errno> {
    let unit = device.alignment.offset as u64;
    let inner = range.start.next_multiple_of(unit)..range.end / unit * unit;
    if inner.is_empty() || !device.can_punch() {
        return write_zeroes(device, io, range).await;
    }
    let (offset, len) = (FileOffset(inner.start), inner.end - inner.start);
    match io.run(Op::Punch { file: device.file.clone(), offset, len }).await.result {
        Ok(_) => {
            write_zeroes(device, io, range.start..inner.start).await?;
            write_zeroes(device, io, inner.end..range.end).await
        }
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
            device.set_cannot_punch();
            write_zeroes(device, io, range).await
        }
        Err(errno) => Err(errno),
    }
}

async fn write_zeroes<E: Engine>(device: &RawDevice<E>, io: &Io<E>, range: Range<u64>) -> Result<(), Errno> {
    for piece in cut(range, PIECE_LEN) {
        write_piece(device, io, piece, |bytes| bytes.fill(0)).await?;
    }
    Ok(())
}

/// Writes a piece that `fill` provides, keeping what lies around it up to the next boundaries.
async fn write_piece<E: Engine>(
    device: &RawDevice<E>,
    io: &Io<E>,
    piece: Range<u64>,
    fill: impl FnOnce(&mut [u8]),
) -> Result<(), Errno> {
    let unit = device.alignment.offset as u64;
    let around = around(device, &piece);
    let mut bytes = AlignedBuf::zeroed((around.end - around.start) as usize);
    let last = around.end - unit;
    let head = (around.start < piece.start).then_some(around.start);
    let tail = (piece.end < around.end && head != Some(last)).then_some(last);
    for edge in head.into_iter().chain(tail) {
        let at = (edge - around.start) as usize;
        let old = read_aligned(device, io, edge..edge + unit).await?;
        bytes[at..at + old.len()].copy_from_slice(&old);
    }
    let skip = (piece.start - around.start) as usize;
    fill(&mut bytes[skip..skip + (piece.end - piece.start) as usize]);
    let write = Op::write(device.file.clone(), FileOffset(around.start), bytes);
    io.run(write).await.result.map(drop)
}

async fn read_aligned<E: Engine>(
    device: &RawDevice<E>,
    io: &Io<E>,
    range: Range<u64>,
) -> Result<AlignedBuf, Errno> {
    let bytes = AlignedBuf::zeroed((range.end - range.start) as usize);
    let read = Op::read(device.file.clone(), FileOffset(range.start), bytes);
    Ok(io.run(read).await.zero_filled()?.into_buf())
}

/// The smallest range around `piece` that the storage can move.
fn around<E: Engine>(device: &RawDevice<E>, piece: &Range<u64>) -> Range<u64> {
    let unit = device.alignment.offset as u64;
    piece.start / unit * unit..piece.end.next_multiple_of(unit)
}
