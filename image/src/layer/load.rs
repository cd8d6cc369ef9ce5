//! Reads what an open layer always keeps in memory: the root of the map and the usage of segments.
//!
//! Usage nodes are read in the order in which they lie in the file, several with one read where
//! they are close.

use std::path::Path;

use super::layout::{Damage, size_max};
use super::map::Map;
use super::node::{NodeRef, decode_root, decode_usage};
use super::segments::Segments;
use super::slot::Slot;
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Most bytes read at once.
const WINDOW_BYTES: u64 = 1 << 20;
/// Bytes between two nodes that are read rather than left out.
const GAP_BYTES: u64 = 64 << 10;

/// A file being read before the layer is open.
pub(super) struct Reader<'a, E: Engine> {
    pub(super) io: &'a Io<E>,
    pub(super) file: &'a E::File,
    pub(super) path: &'a Path,
}

impl<E: Engine> Reader<'_, E> {
    /// Reads blocks; what lies beyond the end of the file reads as zeroes.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<AlignedBuf, ImageError> {
        debug_assert!((offset | len).is_multiple_of(BLOCK_SIZE));
        let buf = AlignedBuf::zeroed(len as usize);
        let outcome = self.io.run(Op::read(self.file.clone(), FileOffset(offset), buf)).await;
        match outcome.zero_filled() {
            Ok(memory) => Ok(memory.into_buf()),
            Err(errno) => Err(ImageError::errno(self.path, "read", errno)),
        }
    }

    /// Turns damage of a structure at `offset` into an error.
    pub(super) fn error(&self, offset: u64, damage: Damage) -> ImageError {
        if damage.unsupported {
            return ImageError::new(self.path, ErrorKind::Unsupported(damage.detail));
        }
        ImageError::corrupt(self.path, damage.field, offset + damage.at as u64, damage.detail)
    }

    /// Reads what `slot` says of the map and of the segments: the root, and the usage nodes. The rest
    /// of the map is read when it is needed.
    pub(super) async fn load_root(
        &self,
        slot: &Slot,
        segments: &mut Segments,
        cache_bytes: u64,
    ) -> Result<Map, ImageError> {
        if slot.root_len == 0 {
            return Ok(Map::new(Vec::new(), cache_bytes));
        }
        let (root, len) = (slot.root.0, u64::from(slot.root_len));
        if len > WINDOW_BYTES || !segments.holds(root, len as usize) {
            return Err(ImageError::corrupt(self.path, "slot.root", root, "it does not lie in a segment"));
        }
        let bytes = self.read_bytes(root, root + len).await?;
        let (branches, usage) =
            decode_root(&bytes, |o, n| segments.holds(o, n)).map_err(|damage| self.error(root, damage))?;
        if (branches.len() as u64) << 30 > size_max(segments.segment_blocks()) {
            let detail = "more branches than a disk of this layer can have";
            return Err(ImageError::corrupt(self.path, "root.branches", root, detail));
        }
        segments.take_node_bytes(root, len as usize);
        branches.iter().for_each(|&node| segments.take_node(node));
        self.load_usage(slot, usage, segments).await?;
        Ok(Map::new(branches, cache_bytes))
    }

    async fn load_usage(
        &self,
        slot: &Slot,
        usage: Vec<NodeRef>,
        segments: &mut Segments,
    ) -> Result<(), ImageError> {
        let stored = (0..).zip(usage).filter(|(_, node)| node.stored().is_some()).collect();
        let bytes_max = segments.bytes();
        self.read_nodes(stored, |group, node, bytes| {
            let (offset, _) = node.stored().unwrap_or_default();
            let table = decode_usage(bytes, group, bytes_max).map_err(|damage| self.error(offset, damage))?;
            match segments.load_usage(group, node, &table, slot.log.sequence) {
                true => Ok(()),
                false => {
                    let detail = "it speaks of segments behind the end of the file";
                    Err(ImageError::corrupt(self.path, "usage.live", offset, detail))
                }
            }
        })
        .await
    }

    /// Reads stored nodes and hands each to `f` with its index and reference.
    pub(super) async fn read_nodes(
        &self,
        mut nodes: Vec<(u32, NodeRef)>,
        mut f: impl FnMut(u32, NodeRef, &[u8]) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        nodes.sort_unstable_by_key(|(_, node)| node.0);
        let span = |node: NodeRef| {
            let (offset, len) = node.stored().expect("stored nodes only");
            (offset, offset + len as u64)
        };
        let mut rest = &nodes[..];
        while let Some(&(_, first)) = rest.first() {
            let start = span(first).0 / BLOCK_SIZE * BLOCK_SIZE;
            let mut reached = start;
            let is_near = |(_, node): &&(u32, NodeRef)| {
                let (from, to) = span(*node);
                let near = from <= reached + GAP_BYTES && to <= start + WINDOW_BYTES;
                reached = reached.max(to);
                near
            };
            let count = rest.iter().take_while(is_near).count();
            let (window, others) = rest.split_at(count.max(1));
            let end = window.iter().map(|(_, node)| span(*node).1).max().unwrap_or(start);
            let bytes = self.read_span(start, end).await?;
            for &(index, node) in window {
                let (from, to) = span(node);
                f(index, node, &bytes[(from - start) as usize..(to - start) as usize])?;
            }
            rest = others;
        }
        Ok(())
    }

    /// Reads the bytes `start..end`.
    pub(super) async fn read_bytes(&self, start: u64, end: u64) -> Result<Vec<u8>, ImageError> {
        let skip = (start % BLOCK_SIZE) as usize;
        let bytes = self.read_span(start, end).await?;
        Ok(bytes[skip..skip + (end - start) as usize].to_vec())
    }

    /// Reads the blocks that hold the bytes `start..end`.
    async fn read_span(&self, start: u64, end: u64) -> Result<AlignedBuf, ImageError> {
        let first = start / BLOCK_SIZE * BLOCK_SIZE;
        self.read(first, end.next_multiple_of(BLOCK_SIZE) - first).await
    }
}
