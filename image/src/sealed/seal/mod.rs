//! Sealing: from a disk to packs and a root.
//!
//! Segments of the disk are read in order by the calling thread, hashed by workers, and joined in order again: what is
//! zero, in the base, or stored already is not stored; the rest gathers into frames, which workers compress and which
//! are appended in the order in which they began. A segment enters the tree when all its blocks have places.
//!
//! While workers are busy, the disk is read ahead, where its source can do that, and packs are written. What comes out
//! depends neither on who is faster nor on how many workers there are.
//!
//! Memory: twice as many segments of 4 MiB as there are workers (one without), 2 that are read ahead (of a disk only) and
//! 4 buffers for the next ones (of a disk or a layer), 128 frames and those of one segment more, 16 segments that wait for places (60 KiB each),
//! the nodes of the base over these, and for each of two packs 1 MiB that gathers and 3 MiB that are being written or were;
//! with the dedup index, which is the caller's.
//!
//! Whoever stops early gets the root of a whole disk: sealed up to a block, and as the base after it. Going on is
//! sealing over that root from that block.

mod frames;
mod gather;
mod join;
mod stats;
#[cfg(test)]
mod tests;

pub use stats::{SealStats, Step, Watch};

use std::path::Path;
use std::sync::Arc;

pub(super) use self::gather::Gatherer;
pub(super) use self::join::{Line, Means};
use super::cursor::Cursor;
use super::known::Dedup;
use super::output::Output;
use super::packs::{Packs, Root};
use super::record::FRAME_BLOCKS_MAX;
use super::source::Source;
use super::workers::Workers;
use super::writer::{PACK_BYTES, Written};
use crate::error::ImageError;
use crate::layer::SIZE_MAX;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::SECTOR_SIZE;

/// Blocks read, hashed and looked up together: 4 MiB of disk.
pub const SEGMENT_BLOCKS: u64 = super::dedup::SEGMENT_BLOCKS as u64;
/// Blocks in a frame.
pub const FRAME_BLOCKS: usize = 16;
/// How hard frames are compressed (see [`Coder::new`](super::Coder::new)).
pub const LEVEL: i32 = 3;

/// Frames being compressed, or waiting for that, at most.
const FRAMES_MAX: usize = 128;
/// Segments that wait for places, at most.
const JOINED_MAX: usize = 16;

/// What sealing works with.
pub struct Sealing<'a, E: Engine, S, D> {
    /// Where packs are made.
    pub storage: &'a S,
    /// The calling thread's reactor.
    pub io: &'a Io<E>,
    /// The folder of the new packs.
    pub directory: &'a Path,
    /// The packs that are there: of the base, and of what `dedup` finds.
    pub packs: &'a Arc<Packs<E>>,
    /// What is stored already.
    pub dedup: &'a mut D,
    /// Who hashes and compresses.
    pub workers: &'a Workers,
    /// What lies below the source: a disk of any size.
    pub base: Option<Root>,
    /// Blocks in a frame, from 1 to [`FRAME_BLOCKS_MAX`].
    pub frame_blocks: usize,
    /// Bytes of records after which a pack is finished: [`PACK_BYTES`], or less.
    pub pack_bytes: u64,
    /// The first block that is asked of the source; what lies before it is as in the base.
    pub start: u64,
}

/// What sealing gave.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The disk.
    pub root: Root,
    /// The new packs, whole and synced. Their names are durable when their folder has been synced.
    pub packs: Vec<Written>,
    /// Counts.
    pub stats: SealStats,
    /// Where it was stopped: from this block on the disk is still as the base.
    pub next: Option<u64>,
}

/// Seals a disk. `numbers` says the number of each new pack; `watch` is asked before each segment.
///
/// When it fails, or is cancelled, it removes what it had made: nobody knows of it.
///
/// # Errors
/// A disk of more than 64 TiB, before anything of it is read; what reading the source or the base, or writing packs says; a disk that is not what the source said it would be;
/// [`Cancelled`](crate::ErrorKind::Cancelled).
///
/// # Panics
/// When `frame_blocks` or `pack_bytes` is out of bounds.
pub async fn seal<E, S, D>(
    sealing: Sealing<'_, E, S, D>,
    source: &mut impl Source,
    numbers: impl FnMut() -> Result<u32, ImageError>,
    watch: &mut impl Watch,
) -> Result<Sealed, ImageError>
where
    E: Engine,
    S: Storage<File = E::File>,
    D: Dedup<E>,
{
    assert!((1..=FRAME_BLOCKS_MAX).contains(&sealing.frame_blocks), "bounds of a frame");
    assert!((1..=PACK_BYTES).contains(&sealing.pack_bytes), "bounds of a pack");
    let size = source.size();
    // Trees reach further, but nobody could open what is larger.
    if !size.is_multiple_of(SECTOR_SIZE) || size > SIZE_MAX {
        let detail = format_args!(
            "a disk of {size} bytes cannot be sealed: it must be a multiple of {SECTOR_SIZE}, and at most {SIZE_MAX}"
        );
        return Err(ImageError::invalid(sealing.directory, detail));
    }
    let Sealing { storage, io, directory, packs, dedup, workers, base, frame_blocks, pack_bytes, start } =
        sealing;
    let mut output = Output::new(storage, io, directory.to_owned(), pack_bytes, numbers);
    let mut gatherer = Gatherer::new(source, packs, io, base, start);
    let base = base.map(|base| Cursor::new(Arc::clone(packs), io, base));
    let means = Means { io, packs, dedup, workers, output: &mut output, base, frame_blocks };
    let run = match Line::new(means, size).run(&mut gatherer, watch).await {
        Ok((root, stats)) => output.finish().await.map(|packs| (root, stats, packs)),
        Err(error) => Err(error),
    };
    match run {
        Ok((root, stats, packs)) => Ok(Sealed { root, packs, stats, next: gatherer.stopped }),
        Err(error) => {
            output.abandon().await;
            Err(error)
        }
    }
}
