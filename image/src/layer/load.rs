//! Reads a stored map.
//!
//! The nodes of one level are read in the order in which they lie in the file, several with one
//! read where they are close, because a map is many small nodes.

use std::path::Path;

use super::layout::{Damage, FIRST_SEGMENT_BLOCK, size_max};
use super::map::Map;
use super::node::{BRANCH_LEAVES, NodeKind, NodeRef, decode_leaf, decode_refs};
use super::segments::Segments;
use super::slot::Slot;
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Most bytes read at once.
const WINDOW_BYTES: u64 = 1 << 20;

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

    /// Reads the map that `slot` names, and counts what it refers to.
    pub(super) async fn load_map(&self, slot: &Slot, segments: &mut Segments) -> Result<Map, ImageError> {
        let mut map = Map::default();
        if slot.root_len == 0 {
            return Ok(map);
        }
        let (root, len) = (slot.root.0, u64::from(slot.root_len));
        if len > WINDOW_BYTES || !segments.holds(root, len as usize) {
            return Err(ImageError::corrupt(self.path, "slot.root", root, "it does not lie in a segment"));
        }
        let bytes = self.read_span(root, root + len).await?;
        let skip = (root % BLOCK_SIZE) as usize;
        let bytes = &bytes[skip..skip + len as usize];
        let refs = decode_refs(bytes, NodeKind::Root, 0, |o, n| segments.holds(o, n))
            .map_err(|damage| self.error(root, damage))?;
        if (refs.len() as u64) << 30 > size_max(segments.segment_blocks()) {
            let detail = "more branches than a disk of this layer can have";
            return Err(ImageError::corrupt(self.path, "root.count", root, detail));
        }
        segments.take_node_bytes(root, len as usize);

        let mut branches = Vec::new();
        for (index, node) in refs.into_iter().enumerate() {
            map.load_branch(index, node, segments);
            branches.extend(node.stored().map(|_| (index as u32, node)));
        }
        let mut leaves = Vec::new();
        self.read_nodes(branches, |branch, node, bytes| {
            let (offset, _) = node.stored().unwrap_or_default();
            let refs = decode_refs(bytes, NodeKind::Branch, branch, |o, n| segments.holds(o, n))
                .map_err(|damage| self.error(offset, damage))?;
            for (i, node) in refs.into_iter().enumerate() {
                let leaf = branch * BRANCH_LEAVES as u32 + i as u32;
                match node.stored() {
                    Some(_) => leaves.push((leaf, node)),
                    None => map.load_leaf(leaf, node, None, segments),
                }
            }
            Ok(())
        })
        .await?;
        let place_end = FIRST_SEGMENT_BLOCK + segments.count() * segments.segment_blocks();
        self.read_nodes(leaves, |leaf, node, bytes| {
            let (offset, _) = node.stored().unwrap_or_default();
            let table = decode_leaf(bytes, leaf, place_end).map_err(|damage| self.error(offset, damage))?;
            map.load_leaf(leaf, node, Some(table), segments);
            Ok(())
        })
        .await?;
        match segments.overfull() {
            None => Ok(map),
            Some(segment) => {
                let offset = segments.offset(segment).0;
                Err(ImageError::corrupt(self.path, "map", offset, "several entries name one block here"))
            }
        }
    }

    /// Reads stored nodes and hands each to `f` with its index and reference.
    async fn read_nodes(
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
            let count = rest.iter().take_while(|(_, node)| span(*node).1 <= start + WINDOW_BYTES).count();
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

    /// Reads the blocks that hold the bytes `start..end`.
    async fn read_span(&self, start: u64, end: u64) -> Result<AlignedBuf, ImageError> {
        let first = start / BLOCK_SIZE * BLOCK_SIZE;
        self.read(first, end.next_multiple_of(BLOCK_SIZE) - first).await
    }
}
