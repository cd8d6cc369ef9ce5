//! Reads what an open layer always keeps in memory: the root of the map and the usage of segments.
//!
//! Usage nodes are read in the order in which they lie in the file, several with one read where
//! they are close, and several reads at once: after long use they lie scattered.

use std::path::Path;

use futures_util::future::join_all;

use super::layout::{Damage, size_max};
use super::map::Map;
use super::node::{NodeRef, USAGE_NODE_BYTES, decode_root, decode_usage};
use super::segments::Segments;
use super::slot::Slot;
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Most bytes of a root.
const ROOT_BYTES_MAX: u64 = 1 << 20;
/// Usage nodes read at once.
const WINDOW_NODES: usize = 32;
/// What lies between two of them is read with them up to so many bytes.
const GAP_BYTES: u64 = 8 << 10;
/// Reads in flight at once.
const READS_MAX: usize = 32;
/// Most bytes of other nodes read at once.
const SPAN_BYTES: u64 = 1 << 20;
/// Bytes between two of these that are read rather than left out.
const SPAN_GAP_BYTES: u64 = 64 << 10;

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
        if len > ROOT_BYTES_MAX || !segments.holds(root, len as usize) {
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
        let stored = |(group, node): (u32, NodeRef)| node.stored().map(|(offset, len)| (offset, len, group));
        let mut nodes: Vec<_> = (0..).zip(usage).filter_map(stored).collect();
        nodes.sort_unstable();
        if let Some((_, len, group)) = nodes.iter().find(|(_, len, _)| *len != USAGE_NODE_BYTES) {
            let detail = format!("usage node {group} is said to have {len} bytes");
            return Err(ImageError::corrupt(self.path, "root.usage", slot.root.0, detail));
        }
        let near = |a: &(u64, _, _), b: &(u64, _, _)| b.0 <= a.0 + USAGE_NODE_BYTES as u64 + GAP_BYTES;
        let windows: Vec<_> = nodes.chunk_by(near).flat_map(|near| near.chunks(WINDOW_NODES)).collect();
        for batch in windows.chunks(READS_MAX) {
            let end = |window: &[(u64, usize, u32)]| window[window.len() - 1].0 + USAGE_NODE_BYTES as u64;
            let reads = batch.iter().map(|window| self.read_span(window[0].0, end(window)));
            for (window, bytes) in batch.iter().zip(join_all(reads).await) {
                let (bytes, start) = (bytes?, window[0].0 / BLOCK_SIZE * BLOCK_SIZE);
                for &(offset, len, group) in *window {
                    let at = (offset - start) as usize;
                    self.take_usage(group, offset, &bytes[at..at + len], segments)?;
                }
            }
        }
        Ok(())
    }

    /// Takes a usage node that lies at `offset`.
    fn take_usage(
        &self,
        group: u32,
        offset: u64,
        bytes: &[u8],
        segments: &mut Segments,
    ) -> Result<(), ImageError> {
        let table =
            decode_usage(bytes, group, segments.bytes()).map_err(|damage| self.error(offset, damage))?;
        let node = NodeRef::new(offset, bytes.len());
        if !segments.load_usage(group, node, &table) {
            let detail = "it speaks of segments behind the end of the file";
            return Err(ImageError::corrupt(self.path, "usage.live", offset, detail));
        }
        Ok(())
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
                let near = from <= reached + SPAN_GAP_BYTES && to <= start + SPAN_BYTES;
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
