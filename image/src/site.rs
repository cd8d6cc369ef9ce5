//! Where a new image goes: a file that does not exist yet, or a block device.
//!
//! A device has held other things. It is claimed, so that nobody mounts or writes it; looked at, so
//! that nothing is overwritten by a slip; and then everything that would tell what it held is erased
//! and synced before the first byte of the new image is written. So no crash leaves the old image's
//! parts beside the new one's.

use std::ops::Range;
use std::path::Path;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

use crate::error::ImageError;
use crate::open::lock;
use crate::signature::{self, END_BYTES, START_BYTES};

/// Whether `path` is a block device that can be opened for reading.
pub(crate) fn is_device<S: Storage>(storage: &S, path: &Path) -> bool {
    storage.open(path, OpenOptions::READ).is_ok_and(|file| file.is_device())
}

/// Makes the file `path`, or takes and erases the block device of that name, of at least `room`
/// bytes. A device on which something is recognised is refused unless it is to be `overwritten`.
///
/// # Errors
/// An existing file, a device that is in use, too small or not empty, what the storage says.
pub(crate) async fn prepare<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    room: u64,
    overwritten: bool,
) -> Result<S::File, ImageError> {
    if !is_device(storage, path) {
        let made = storage.open(path, OpenOptions::CREATE);
        return made.map_err(|e| ImageError::io(path, "create", e));
    }
    let file = storage.open(path, OpenOptions::WRITE).map_err(|e| ImageError::open(path, e))?;
    lock(&file, Lock::Exclusive)?;
    let size = file.size().map_err(|e| ImageError::io(path, "measure", e))?;
    if size < room {
        let detail = format_args!(
            "too small: the device has {size} bytes, and with segments of this size a layer needs {room} (-o \
             segment_size=64K needs the least)"
        );
        return Err(ImageError::invalid(path, detail));
    }
    let [start, end] = marked(size);
    let bytes = async |range| read(io, &file, range).await.map_err(|e| ImageError::errno(path, "read", e));
    if !overwritten && let Some(found) = signature::find(&bytes(start).await?, &bytes(end).await?, size) {
        let detail = format_args!(
            "the device holds {found}: if nobody needs that any more, pass --force to overwrite it"
        );
        return Err(ImageError::invalid(path, detail));
    }
    erase(io, &file, size).await.map_err(|e| ImageError::errno(path, "erase", e))?;
    Ok(file)
}

/// Takes back what [`prepare`] and others made of `file`: removes it, or makes sure that the device
/// holds no image.
pub(crate) async fn abandon<E: Engine>(io: &Io<E>, file: &E::File) -> Result<(), Errno> {
    if file.is_device() {
        return zero(io, file, 0..BLOCK_SIZE).await;
    }
    io.run(Op::Unlink { path: file.path().to_owned() }).await.result.map(drop)
}

/// Removes an image that the caller has made and could not complete: the file, or what makes a
/// device's contents one. The caller may still have it open.
///
/// # Errors
/// When it cannot be opened or the storage fails.
pub async fn remove_incomplete<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<(), ImageError> {
    let opened = storage.open(path, OpenOptions::WRITE.unclaimed());
    let file = opened.map_err(|e| ImageError::open(path, e))?;
    abandon(io, &file).await.map_err(|e| ImageError::errno(path, "remove", e))
}

/// The ranges of a device that are looked at and erased: its first bytes and its last.
fn marked(size: u64) -> [Range<u64>; 2] {
    let start = START_BYTES.min(size);
    [0..start, (size.saturating_sub(END_BYTES) / BLOCK_SIZE * BLOCK_SIZE).max(start)..size]
}

/// Erases what tells the contents of a device, durably, and gives the rest of its space back.
async fn erase<E: Engine>(io: &Io<E>, file: &E::File, size: u64) -> Result<(), Errno> {
    let [start, end] = marked(size);
    let between = start.end..end.start;
    zero(io, file, start).await?;
    zero(io, file, end).await?;
    if between.is_empty() {
        return Ok(());
    }
    let (offset, len) = (FileOffset(between.start), between.end - between.start);
    match io.run(Op::Discard { file: file.clone(), offset, len }).await.result {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            file.note_no_space_back();
            Ok(())
        }
        ended => ended.map(drop),
    }
}

/// Writes zeroes and syncs.
async fn zero<E: Engine>(io: &Io<E>, file: &E::File, range: Range<u64>) -> Result<(), Errno> {
    let zeroes = AlignedBuf::zeroed((range.end - range.start) as usize);
    io.run(Op::write(file.clone(), FileOffset(range.start), zeroes)).await.result?;
    io.run(Op::Sync { file: file.clone() }).await.result.map(drop)
}

async fn read<E: Engine>(io: &Io<E>, file: &E::File, range: Range<u64>) -> Result<AlignedBuf, Errno> {
    let buf = AlignedBuf::zeroed((range.end - range.start) as usize);
    Ok(io.run(Op::read(file.clone(), FileOffset(range.start), buf)).await.zero_filled()?.into_buf())
}
