//! What differs between two snapshots, to the block.
//!
//! Two sealed ones are compared by their trees, and no data is read. Otherwise blocks that may differ are found first: those
//! that the layers hold which only one of the two lies over, and, where both end in different sealed snapshots, what differs
//! between these. Then these blocks are compared. What somebody wrote again as it was, or wrote and took back, is no difference.
//!
//! Memory: a bit for each block of the stretches of 16 MiB in which anything may differ, 32 MiB for 1 TiB of them; and two
//! buffers of 1 MiB.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};
use sapwood_image::sealed::collect::Pin;
use sapwood_image::sealed::{Child, Content, FrozenSource, Root, Source, diff};
use sapwood_image::{Disk, ExtentKind};

use crate::attach::SnapshotReader;
use crate::catalog::rows::NodeState;
use crate::error::Result;
use crate::id::Id;
use crate::name::SnapshotName;
use crate::resolve::holder;
use crate::store::{Store, snapshot};
use crate::usage::Hold;

/// Blocks whose bits lie together.
const PAGE_BLOCKS: u64 = 4096;
/// Bytes of these bits.
const PAGE_BYTES: usize = PAGE_BLOCKS as usize / 8;
/// Blocks compared at a time.
const CHUNK_BLOCKS: u64 = 256;

/// What a comparison has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Size of the older disk in bytes; that of the other one, where there is none.
    pub from_size: u64,
    /// Size of the newer disk in bytes.
    pub to_size: u64,
    /// Stretches that differ.
    pub extents: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Blocks whose contents were compared.
    pub blocks_compared: u64,
}

/// A snapshot, from the top down.
struct Stack {
    size: u64,
    layers: Vec<Id>,
    /// What lies below the layers.
    end: Root,
    /// The least size of a disk on the way down: past it what one shows another one may hide.
    size_min: u64,
    _pin: Pin,
    _holds: Vec<Hold>,
}

/// One of two disks that are compared.
struct Side<E: Engine> {
    disk: Arc<Disk<E>>,
    size: u64,
    buffer: SharedBuf,
    bytes: Vec<u8>,
    _reader: Option<SnapshotReader>,
}

/// Blocks that may differ, by page.
#[derive(Default)]
struct Candidates(BTreeMap<u64, Box<[u8; PAGE_BYTES]>>);

/// Joins what differs to stretches.
struct Extents<'a, F> {
    changed: &'a mut F,
    open: Option<Range<u64>>,
    found: Diff,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Finds the blocks in which `to` differs from `from`, and gives the bytes of them to `changed`: in order, joined where they
    /// meet, cut where the longer disk ends. Without `from`, what is not zero. Where one disk is longer the other one counts as
    /// zeroes there.
    ///
    /// # Errors
    /// No such snapshot; what reading says.
    pub async fn diff(
        &self,
        io: &Io<E>,
        from: Option<&SnapshotName>,
        to: &SnapshotName,
        changed: &mut impl FnMut(Range<u64>),
    ) -> Result<Diff> {
        let new = self.stack(to)?;
        let old = match from {
            Some(from) => self.stack(from)?,
            None => self.zeroes(new.size),
        };
        let found = Diff { from_size: old.size, to_size: new.size, ..Diff::default() };
        let mut extents = Extents { changed, open: None, found };
        let packs = self.content.packs();
        if old.layers.is_empty() && new.layers.is_empty() {
            diff(packs, io, &old.end, &new.end, |blocks| extents.add(blocks)).await?;
            return Ok(extents.finish());
        }
        let mut candidates = Candidates::default();
        let end = extents.end();
        candidates.add(old.size_min.min(new.size_min) / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE));
        let known: BTreeSet<Id> = old.layers.iter().copied().collect();
        let common = new.layers.iter().copied().find(|layer| known.contains(layer));
        for layers in [&old.layers, &new.layers] {
            for layer in layers.iter().take_while(|layer| Some(**layer) != common) {
                self.add_layer(io, *layer, end, &mut candidates).await?;
            }
        }
        if common.is_none() {
            diff(packs, io, &old.end, &new.end, |blocks| candidates.add(blocks)).await?;
        }
        let mut sides = [self.side(io, from, old.size).await?, self.side(io, Some(to), new.size).await?];
        for (page, bits) in candidates.0 {
            compare(io, &mut sides, page, &bits, &mut extents).await?;
        }
        Ok(extents.finish())
    }

    /// What a snapshot is made of; it stays so.
    fn stack(&self, name: &SnapshotName) -> Result<Stack> {
        self.catalog.hold_still(|look| {
            let (id, row) = snapshot(look, name)?;
            let mut stack = self.zeroes(row.size);
            stack._holds.push(self.usage.pin(id));
            let mut next = Some(id);
            while let Some((id, row)) = holder(look, next)? {
                stack._holds.push(self.usage.pin(id));
                stack.size_min = stack.size_min.min(row.size);
                match row.state {
                    NodeState::Frozen { layer, .. } => {
                        stack._holds.push(self.usage.keep_layer(layer));
                        stack.layers.push(layer);
                    }
                    NodeState::Sealed(top) => {
                        stack.end = top.root(row.size);
                        stack._pin.add(&stack.end);
                        break;
                    }
                    NodeState::Bare => {}
                }
                next = row.parent;
            }
            Ok(stack)
        })
    }

    /// A disk that holds nothing.
    fn zeroes(&self, size: u64) -> Stack {
        let end = Root { size, tree: Child::ZERO };
        let pin = self.content.pins().pin(&[]);
        Stack { size, layers: Vec::new(), end, size_min: size, _pin: pin, _holds: Vec::new() }
    }

    /// Adds what a layer's map holds, whatever that is.
    async fn add_layer(&self, io: &Io<E>, id: Id, end: u64, candidates: &mut Candidates) -> Result<()> {
        let mut source = FrozenSource::open(&self.storage, io, &self.directory.layer(id)).await?;
        let (mut at, blocks) = (0, source.size().min(end).div_ceil(BLOCK_SIZE));
        while at < blocks {
            let run = source.next(at).await?;
            if run.content != Content::Same {
                candidates.add(at..at + run.count);
            }
            at += run.count;
        }
        Ok(())
    }

    async fn side(&self, io: &Io<E>, name: Option<&SnapshotName>, size: u64) -> Result<Side<E>> {
        let reader = name.map(|name| self.read_snapshot(name)).transpose()?;
        let disk = match &reader {
            Some(reader) => self.open_snapshot(io, reader).await?,
            None => Disk::open_sealed(self.content.packs(), Root { size, tree: Child::ZERO })?,
        };
        let len = CHUNK_BLOCKS as usize * BLOCK_BYTES;
        Ok(Side { disk, size, buffer: SharedBuf::heap(len), bytes: vec![0; len], _reader: reader })
    }
}

/// Compares those blocks of a page that may differ.
async fn compare<E: Engine, F: FnMut(Range<u64>)>(
    io: &Io<E>,
    sides: &mut [Side<E>; 2],
    page: u64,
    bits: &[u8; PAGE_BYTES],
    extents: &mut Extents<'_, F>,
) -> Result<()> {
    let first = page * PAGE_BLOCKS;
    let bits: Vec<bool> = bits.iter().flat_map(|byte| (0..8).map(move |n| byte >> n & 1 == 1)).collect();
    let mut data = sides[0].data(io, first..first + PAGE_BLOCKS).await?;
    data.extend(sides[1].data(io, first..first + PAGE_BLOCKS).await?);
    let mut at = 0;
    for run in bits.chunk_by(|a, b| a == b) {
        let blocks = at..at + run.len();
        at = blocks.end;
        if !run[0] {
            continue;
        }
        for start in blocks.clone().step_by(CHUNK_BLOCKS as usize) {
            let end = blocks.end.min(start + CHUNK_BLOCKS as usize);
            let chunk = first + start as u64..first + end as u64;
            // Else both are zero there.
            if data.iter().any(|data| data.start < chunk.end && chunk.start < data.end) {
                compare_chunk(io, sides, chunk, extents).await?;
            }
        }
    }
    Ok(())
}

async fn compare_chunk<E: Engine, F: FnMut(Range<u64>)>(
    io: &Io<E>,
    [old, new]: &mut [Side<E>; 2],
    chunk: Range<u64>,
    extents: &mut Extents<'_, F>,
) -> Result<()> {
    old.read(io, &chunk).await?;
    new.read(io, &chunk).await?;
    extents.found.blocks_compared += chunk.end - chunk.start;
    let blocks = old.bytes.chunks(BLOCK_BYTES).zip(new.bytes.chunks(BLOCK_BYTES));
    for (block, (old, new)) in chunk.zip(blocks) {
        if old != new {
            extents.add(block..block + 1);
        }
    }
    Ok(())
}

impl<E: Engine> Side<E> {
    /// The blocks that are not known to be zero.
    async fn data(&self, io: &Io<E>, blocks: Range<u64>) -> Result<Vec<Range<u64>>> {
        let bytes = blocks.start * BLOCK_SIZE..(blocks.end * BLOCK_SIZE).min(self.size);
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        let extents = self.disk.extents(io, bytes).await?;
        let data = extents.iter().filter(|e| !matches!(e.kind, ExtentKind::Zero | ExtentKind::Absent));
        let data = data.map(|e| e.start / BLOCK_SIZE..(e.start + e.len).div_ceil(BLOCK_SIZE));
        Ok(data.collect())
    }

    /// Reads blocks into `bytes`; past the end of the disk they are zero.
    async fn read(&mut self, io: &Io<E>, blocks: &Range<u64>) -> Result<()> {
        let start = blocks.start * BLOCK_SIZE;
        let inside = (blocks.end * BLOCK_SIZE).min(self.size).saturating_sub(start) as usize;
        self.bytes.fill(0);
        if inside == 0 {
            return Ok(());
        }
        let Disk::Sealed(chain) = &*self.disk else { unreachable!("a snapshot is opened so") };
        chain.read(io, start, &self.buffer.slice(0..inside)).await?;
        self.buffer.read_at(0, &mut self.bytes[..inside]);
        Ok(())
    }
}

impl Candidates {
    fn add(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let (page, first) = (at / PAGE_BLOCKS, at % PAGE_BLOCKS);
            let end = blocks.end.min((page + 1) * PAGE_BLOCKS);
            let bits = self.0.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            (first..first + end - at).for_each(|n| bits[(n / 8) as usize] |= 1 << (n % 8));
            at = end;
        }
    }
}

impl<F: FnMut(Range<u64>)> Extents<'_, F> {
    /// Where the longer disk ends, in bytes.
    fn end(&self) -> u64 {
        self.found.from_size.max(self.found.to_size)
    }

    fn add(&mut self, blocks: Range<u64>) {
        let bytes = blocks.start * BLOCK_SIZE..(blocks.end * BLOCK_SIZE).min(self.end());
        match &mut self.open {
            Some(open) if open.end == bytes.start => open.end = bytes.end,
            open => {
                let done = open.replace(bytes);
                self.give(done);
            }
        }
    }

    fn give(&mut self, done: Option<Range<u64>>) {
        if let Some(done) = done {
            self.found.extents += 1;
            self.found.bytes += done.end - done.start;
            (self.changed)(done);
        }
    }

    fn finish(mut self) -> Diff {
        let last = self.open.take();
        self.give(last);
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_joined_and_cut_at_the_end() {
        let mut ranges = Vec::new();
        let mut changed = |range| ranges.push(range);
        let found = Diff { from_size: 512, to_size: 9 * BLOCK_SIZE + 512, ..Diff::default() };
        let mut extents = Extents { changed: &mut changed, open: None, found };
        for blocks in [0..1, 1..3, 5..6, 9..10] {
            extents.add(blocks);
        }
        let found = extents.finish();
        assert_eq!((found.extents, found.bytes), (3, 4 * BLOCK_SIZE + 512));
        assert_eq!(ranges, [0..3 * 4096, 5 * 4096..6 * 4096, 9 * 4096..9 * 4096 + 512]);
    }

    #[test]
    fn candidates_go_over_pages() {
        let mut candidates = Candidates::default();
        candidates.add(4000..8193);
        let counts = candidates
            .0
            .iter()
            .map(|(page, bits)| (*page, bits.iter().map(|byte| byte.count_ones()).sum::<u32>()));
        assert_eq!(counts.collect::<Vec<_>>(), [(0, 96), (1, 4096), (2, 1)]);
    }
}
