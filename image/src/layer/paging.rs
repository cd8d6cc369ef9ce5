//! Brings nodes of the map into memory.
//!
//! A node is read without the lock. Meanwhile an epoch keeps its segment from being used again, and
//! others who want the same node wait for it. What was read is taken only if the map still names
//! that very place: a checkpoint may have stored the node elsewhere since.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};

use super::core::Core;
use super::device::Layer;
use super::layout::FIRST_SEGMENT_BLOCK;
use super::leaf::Leaf;
use super::load::Reader;
use super::map::{Node, NodeKey, leaves_of};
use super::node::{BRANCH_LEAVES, NodeRef, decode_branch, decode_leaf};
use crate::error::{ErrorKind, ImageError};
use sapwood_blockdev::Errno;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

/// Leaves read ahead of a sequential access: 64 MiB of disk.
const AHEAD_LEAVES: u32 = 32;
/// Nodes that lie within so many bytes are read ahead with one read: all of them where they lie together.
const AHEAD_BYTES: u64 = 128 << 10;
/// Sequential accesses that are told apart at once.
const STREAMS: usize = 8;

/// Nodes being read, and who waits for them.
pub(super) type Loading = BTreeMap<NodeKey, Vec<Waker>>;

/// The leaves that sequential accesses would miss next. Whether a leaf's neighbour is in memory says little:
/// of random reads with half the map in the cache it would be one in two.
pub(super) struct Streams {
    expected: [u32; STREAMS],
    oldest: usize,
}

impl Default for Streams {
    fn default() -> Self {
        Self { expected: [u32::MAX; STREAMS], oldest: 0 }
    }
}

impl Streams {
    /// Takes note of a leaf that was missed; the leaves to read ahead if it was expected.
    fn missed(&mut self, leaf: u32) -> Range<u32> {
        let branch_end = (leaf / BRANCH_LEAVES as u32 + 1) * BRANCH_LEAVES as u32;
        if let Some(expected) = self.expected.iter_mut().find(|expected| **expected == leaf) {
            *expected = branch_end.min(leaf + 1 + AHEAD_LEAVES);
            return leaf + 1..*expected;
        }
        self.expected[self.oldest] = leaf + 1;
        self.oldest = (self.oldest + 1) % STREAMS;
        leaf + 1..leaf + 1
    }
}

/// Leaves kept in memory while this exists.
pub(crate) struct Pins<E: Engine> {
    layer: Arc<Layer<E>>,
    leaves: Range<u32>,
}

impl<E: Engine> Drop for Pins<E> {
    fn drop(&mut self) {
        let mut core = self.layer.core();
        self.leaves.clone().for_each(|leaf| core.map.unpin(leaf));
    }
}

/// A branch held in memory while this exists.
struct Held<'a, E: Engine> {
    layer: &'a Layer<E>,
    branch: u32,
}

impl<E: Engine> Drop for Held<'_, E> {
    fn drop(&mut self) {
        self.layer.core().map.release_branch(self.branch);
    }
}

/// A node being read by this task. It does not keep the layer: without that, nobody waits for the node.
struct Claim<E: Engine> {
    layer: Weak<Layer<E>>,
    key: NodeKey,
    from: NodeRef,
    epoch: u64,
}

impl<E: Engine> Drop for Claim<E> {
    fn drop(&mut self) {
        let Some(layer) = self.layer.upgrade() else { return };
        let mut core = layer.core();
        core.segments.leave(self.epoch);
        core.loading.remove(&self.key).into_iter().flatten().for_each(Waker::wake);
    }
}

/// What comes next for somebody who wants a node.
enum Step<E: Engine> {
    /// It is there.
    Done,
    /// Another task reads it.
    Wait(NodeKey),
    /// Read it.
    Read(Claim<E>),
}

impl Core {
    /// Registers for the end of another task's read; ready when there is none.
    fn poll_loading(&mut self, key: NodeKey, waker: &Waker) -> Poll<()> {
        match self.loading.get_mut(&key) {
            Some(waiting) => {
                waiting.push(waker.clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl<E: Engine> Layer<E> {
    /// Keeps the leaves of `blocks` in memory.
    ///
    /// # Errors
    /// When a node cannot be read or is damaged.
    pub(crate) async fn pin(
        self: &Arc<Self>,
        io: &Io<E>,
        blocks: &Range<u64>,
    ) -> Result<Pins<E>, ImageError> {
        let wanted = leaves_of(blocks);
        let mut pins = Pins { layer: Arc::clone(self), leaves: wanted.start..wanted.start };
        for leaf in wanted {
            self.pin_leaf(io, leaf).await?;
            pins.leaves.end = leaf + 1;
        }
        Ok(pins)
    }

    async fn pin_leaf(self: &Arc<Self>, io: &Io<E>, leaf: u32) -> Result<(), ImageError> {
        // The branch, once it was loaded for the leaf.
        let mut _held = None;
        loop {
            let claim = match self.step(|core| core.map.pin(leaf)) {
                Step::Done => return Ok(()),
                Step::Wait(key) => {
                    poll_fn(|cx| self.core().poll_loading(key, cx.waker())).await;
                    continue;
                }
                Step::Read(claim) => claim,
            };
            if matches!(claim.key, NodeKey::Leaf(_)) {
                let ahead = self.core().streams.missed(leaf);
                self.read_ahead(io, ahead);
            }
            let node = self.read_node(io, claim.key, claim.from).await?;
            let taken = self.core().map.insert_pinned(claim.key, claim.from, node);
            match claim.key {
                NodeKey::Leaf(_) if taken => return Ok(()),
                NodeKey::Branch(branch) if taken => _held = Some(Held { layer: self, branch }),
                _ => {}
            }
        }
    }

    /// Makes a branch known, so that its references can be asked for, and calls `f` with it held.
    pub(super) async fn with_branch<R>(
        self: &Arc<Self>,
        io: &Io<E>,
        branch: u32,
        f: impl FnOnce(&mut Core) -> R,
    ) -> Result<R, ImageError> {
        loop {
            let claim = match self.step(|core| core.map.hold_branch(branch)) {
                Step::Done => {
                    let held = Held { layer: self, branch };
                    let result = f(&mut self.core());
                    drop(held);
                    return Ok(result);
                }
                Step::Wait(key) => {
                    poll_fn(|cx| self.core().poll_loading(key, cx.waker())).await;
                    continue;
                }
                Step::Read(claim) => claim,
            };
            let node = self.read_node(io, claim.key, claim.from).await?;
            if self.core().map.insert_pinned(claim.key, claim.from, node) {
                let held = Held { layer: self, branch };
                let result = f(&mut self.core());
                drop(held);
                return Ok(result);
            }
        }
    }

    /// Tries `f`, and claims the node that is missing.
    fn step(self: &Arc<Self>, f: impl FnOnce(&mut Core) -> Result<(), NodeKey>) -> Step<E> {
        let mut core = self.core();
        let Err(key) = f(&mut core) else { return Step::Done };
        self.claim(&mut core, key).map_or(Step::Wait(key), Step::Read)
    }

    /// Claims a node that is missing, unless somebody reads it already.
    fn claim(self: &Arc<Self>, core: &mut Core, key: NodeKey) -> Option<Claim<E>> {
        if core.loading.contains_key(&key) {
            return None;
        }
        let from = core.map.source(key)?;
        core.loading.insert(key, Vec::new());
        Some(Claim { layer: Arc::downgrade(self), key, from, epoch: core.segments.enter() })
    }

    /// Reads a node.
    async fn read_node(&self, io: &Io<E>, key: NodeKey, from: NodeRef) -> Result<Node, ImageError> {
        let file = self.file();
        let reader = Reader { io, file: &file, path: self.path() };
        let (offset, len) = from.stored().unwrap_or_default();
        let bytes = reader.read_bytes(offset, offset + len as u64).await?;
        self.core().node_reads += 1;
        self.decode(&reader, key, offset, &bytes)
    }

    pub(super) fn decode(
        &self,
        reader: &Reader<'_, E>,
        key: NodeKey,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Node, ImageError> {
        let core = self.core();
        match key {
            NodeKey::Branch(branch) => {
                let refs = decode_branch(bytes, branch, |at, len| core.segments.holds(at, len))
                    .map_err(|damage| reader.error(offset, damage))?;
                Ok(Node::Branch(Arc::new(refs)))
            }
            NodeKey::Leaf(leaf) => {
                let end = FIRST_SEGMENT_BLOCK + core.segments.count() * core.segments.segment_blocks();
                let table = decode_leaf(bytes, leaf, end).map_err(|damage| reader.error(offset, damage))?;
                let bad =
                    table.iter().filter_map(|entry| entry.place()).find(|&place| !core.can_be_mapped(place));
                match bad {
                    None => Ok(Node::Leaf(Leaf::new(table))),
                    Some(place) => Err(ImageError::corrupt(
                        self.path(),
                        "leaf.place",
                        offset,
                        format!("it refers to block {place:#x}, which the log has not written"),
                    )),
                }
            }
        }
    }

    /// Reads leaves of one branch, in the background, as far as they are stored: several with one read
    /// where they lie together. That ends with the first read after which nobody uses the layer any more.
    fn read_ahead(self: &Arc<Self>, io: &Io<E>, ahead: Range<u32>) {
        // Claimed at once: whoever wants them next waits for them.
        let mut rest: Vec<Claim<E>> = {
            let mut core = self.core();
            ahead.filter_map(|leaf| self.claim(&mut core, NodeKey::Leaf(leaf))).collect()
        };
        rest.sort_by_key(|claim| claim.from.0);
        let (layer, reactor) = (Arc::downgrade(self), io.clone());
        io.spawn(async move {
            while !rest.is_empty() {
                let start = rest[0].from.stored().unwrap_or_default().0;
                let near = |claim: &Claim<E>| {
                    claim.from.stored().is_some_and(|(at, len)| at + len as u64 <= start + AHEAD_BYTES)
                };
                let after = rest.split_off(rest.iter().take_while(|claim| near(claim)).count().max(1));
                // What cannot be read ahead is read, and complained about, when it is needed.
                let _ = Self::read_group(&layer, &reactor, start, rest).await;
                rest = after;
            }
        });
    }

    /// Reads nodes that lie together from `start`; none when one cannot be read, or nobody uses the layer any more.
    async fn read_group(layer: &Weak<Self>, io: &Io<E>, start: u64, claims: Vec<Claim<E>>) -> Option<()> {
        // Not kept during the read, which may be the last that keeps the file's lock.
        let open = layer.upgrade()?;
        let (file, path) = (open.file(), open.path().to_owned());
        drop(open);
        let reader = Reader { io, file: &file, path: &path };
        let span = |claim: &Claim<E>| claim.from.stored().unwrap_or_default();
        let end = claims.iter().map(|c| span(c).0 + span(c).1 as u64).max().unwrap_or(start);
        let bytes = reader.read_bytes(start, end).await.ok()?;
        let layer = layer.upgrade()?;
        layer.core().node_reads += 1;
        for claim in claims {
            let (offset, len) = span(&claim);
            let at = (offset - start) as usize;
            let node = layer.decode(&reader, claim.key, offset, &bytes[at..at + len]).ok()?;
            layer.core().map.insert(claim.key, claim.from, node);
        }
        Some(())
    }
}

impl Core {
    /// Whether a stored leaf may refer to a place: one that the log has written, in a segment that is
    /// in use.
    pub(super) fn can_be_mapped(&self, place: u32) -> bool {
        self.segments.is_filled(place)
            || self.log.head.lanes().any(|(_, lane)| {
                let start = self.segments.first_block(lane.segment);
                (start..start + lane.block).contains(&place)
            })
    }
}

/// How an error that names a file ends a request.
pub(crate) fn device_error(error: &ImageError) -> DeviceError {
    match &error.kind {
        ErrorKind::Io { source, .. } => DeviceError::Io(Errno::from_io_error(source).unwrap_or(Errno::IO)),
        ErrorKind::Device(error) => *error,
        _ => DeviceError::Corrupt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{CreateLayer, OpenLayer, create};
    use sapwood_blockdev::buffer::SharedBuf;
    use sapwood_blockdev::device::{Command, run};
    use sapwood_blockdev::engine::BlockingEngine;
    use sapwood_blockdev::io::block_on;
    use sapwood_blockdev::storage::HostStorage;
    use sapwood_blockdev::units::GuestOffset;

    #[test]
    fn what_is_read_ahead_does_not_keep_a_layer() {
        let folder = tempfile::tempdir().unwrap();
        let (path, io) = (folder.path().join("disk"), Io::new(BlockingEngine::new().unwrap()));
        let open = async |io: &Io<BlockingEngine>, path: &std::path::Path| {
            Layer::open(&HostStorage, io, path, &OpenLayer::default()).await.unwrap()
        };
        let (of_task, to_make) = (io.clone(), path.clone());
        let layer = block_on(&io, async move {
            let options = CreateLayer { size: Some(1 << 30), ..CreateLayer::default() };
            create(&HostStorage, &of_task, &to_make, &options).await.unwrap();
            open(&of_task, &to_make).await
        });
        let mut queue = layer.queue_on(io.clone());
        for leaf in 0..4 {
            let write = Command::Write(SharedBuf::heap(4096).into());
            run(&mut queue, GuestOffset(leaf << 21), 4096, write).unwrap();
        }
        drop(queue);
        let of_task = io.clone();
        let layer = block_on(&io, async move {
            layer.close(&of_task).await.unwrap();
            drop(layer);
            let layer = open(&of_task, &path).await;
            layer.with_branch(&of_task, 0, |_| ()).await.unwrap();
            layer
        });
        layer.read_ahead(&io, 0..4);
        assert_eq!(layer.core().loading.len(), 4);
        assert_eq!(Arc::strong_count(&layer), 1);
        drop(layer);
        io.poll(&mut Vec::new());
        assert_eq!(io.tasks(), 0, "it ends");
    }
}
