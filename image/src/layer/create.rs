//! Makes a layer.
//!
//! Order: slot and base record, then a sync, then the header, then a sync of file and folder. A file without a
//! header is no layer, so a crash on the way leaves nothing that could be mistaken for one. On a block
//! device all that would tell what it held before is erased first, durably (`image/src/site.rs`).

use std::path::{Path, PathBuf};

use super::base::Below;
use super::base_record::{BaseRecord, BaseRef, base_offset};
use super::header::Header;
use super::layout::{LayerId, PREAMBLE_BYTES, SEGMENT_BLOCKS_MAX, SEGMENT_BLOCKS_MIN};
use super::position::{Lane, LogPosition};
use super::slot::{Slot, slot_offset};
use super::traffic::Traffic;
use super::{CreateLayer, Tuning, check_size};
use crate::error::ImageError;
use crate::site;
use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Storage, StorageFile};
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset, SECTOR_SIZE};

/// Creates a layer at `path`, which is a file that does not exist or a block device; durable when
/// it returns.
///
/// # Errors
/// A missing or unusable base, an impossible size, an existing file, a device that is in use or
/// holds something, what the storage says. No file is left behind.
pub async fn create<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    options: &CreateLayer,
) -> Result<(), ImageError> {
    let base = match &options.base {
        Some(spec) => {
            Some(Below::<E>::open_base(storage, io, path, spec, None, &Tuning::default(), None).await?.1)
        }
        None => None,
    };
    make(storage, io, path, options, base).await
}

/// As [`create`], over a base that has been looked at: whatever `options` say of one is not.
pub(super) async fn make<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    options: &CreateLayer,
    base: Option<BaseRef>,
) -> Result<(), ImageError> {
    let size = options.size.or(base.as_ref().map(|base| base.identity.size()));
    let size = size
        .ok_or_else(|| ImageError::invalid(path, "a size is needed where there is no base"))?
        .checked_next_multiple_of(SECTOR_SIZE)
        .ok_or_else(|| ImageError::invalid(path, "the largest size is 64 TiB"))?;
    let what = (size, options.segment_size, options.overwrite);
    create_with(storage, io, path, what, None, base).await
}

/// Creates a layer of this size, size of segments, and leave to overwrite a device, over `base` as it is
/// recorded; by default its id is random.
pub(super) async fn create_with<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
    (size, segment_size, overwrite): (u64, u32, bool),
    id: Option<LayerId>,
    base: Option<BaseRef>,
) -> Result<(), ImageError> {
    let segment_blocks = segment_blocks(path, segment_size)?;
    check_size(path, size, segment_blocks)?;

    let mut random = [0; 24];
    storage.random(&mut random).map_err(|e| ImageError::io(path, "make random numbers for", e))?;
    let layer_id = id.unwrap_or_else(|| crate::bytes::array(&random, 0));
    let nonce = crate::bytes::get_u64(&random, 16);
    let header = Header { layer_id, segment_blocks };
    let record = BaseRecord { layer_id, sequence: 1, committing: false, base };
    let log = LogPosition::new(Lane { segment: 0, block: 0, next_segment: 1 }, 0, 0, nonce);
    let slot = Slot {
        layer_id,
        generation: 1,
        log,
        root: FileOffset(0),
        root_len: 0,
        size,
        base: record.sequence,
        clean: true,
        traffic: Traffic::default(),
    };

    let room = PREAMBLE_BYTES + DEVICE_SEGMENTS_MIN * u64::from(segment_size);
    let file = site::prepare(storage, io, path, room, overwrite).await?;
    let written = write(io, &file, path, &header, &slot, &record).await;
    if written.is_err() {
        // The first failure is the one to tell.
        let _ = site::abandon(io, &file).await;
    }
    written.map_err(|errno| ImageError::errno(path, "write", errno))
}

/// Segments that a block device must have room for: some for the log, some for data.
const DEVICE_SEGMENTS_MIN: u64 = 8;

fn segment_blocks(path: &Path, bytes: u32) -> Result<u32, ImageError> {
    let blocks = bytes / BLOCK_SIZE as u32;
    if !bytes.is_power_of_two() || !(SEGMENT_BLOCKS_MIN..=SEGMENT_BLOCKS_MAX).contains(&blocks) {
        return Err(ImageError::invalid(path, "a segment is a power of two from 64 KiB to 64 MiB"));
    }
    Ok(blocks)
}

async fn write<E: Engine>(
    io: &Io<E>,
    file: &E::File,
    path: &Path,
    header: &Header,
    slot: &Slot,
    record: &BaseRecord,
) -> Result<(), Errno> {
    if !file.is_device() {
        io.run(Op::Truncate { file: file.clone(), size: PREAMBLE_BYTES }).await.result?;
    }
    let put =
        |offset, bytes: Vec<u8>| io.run(Op::write(file.clone(), offset, AlignedBuf::from_slice(&bytes)));
    put(slot_offset(slot.generation), slot.encode()).await.result?;
    put(base_offset(record.sequence), record.encode()).await.result?;
    io.run(Op::Sync { file: file.clone() }).await.result?;
    put(FileOffset(0), header.encode()).await.result?;
    io.run(Op::Sync { file: file.clone() }).await.result?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    io.run(Op::SyncDirectory { path: PathBuf::from(folder) }).await.result.map(drop)
}
