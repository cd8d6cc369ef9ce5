//! Checkpoints: the map as of one sequence number, made durable and named by a slot.
//!
//! Order: leaves, branches, usage, root and end are appended to the log like anything else; a sync; the
//! slot that is not the newest; a sync; then segments that neither slot needs are let go. Where space is wanted the
//! checkpoint is repeated at once: an end, a sync, the other slot for the same map, a sync. Then
//! neither slot needs what it found empty.

use std::future::poll_fn;
use std::task::Poll;

use super::core::{Core, Root};
use super::driver::Driver;
use super::layout::LayerId;
use super::leaf::Leaf;
use super::log::Part;
use super::map::Frozen;
use super::node::{NODE_ALIGNMENT, NodeRef, encode_leaf, encode_root, encode_usage};
use super::position::LogPosition;
use super::record::Run;
use super::slot::{Slot, slot_offset};
use super::traffic::Traffic;
use super::tuning::breaks;
use super::waiter::Result;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE};

/// Nodes appended before waiting for them: bounds what a checkpoint puts before a guest's write.
const STORE_NODES: usize = 128;

/// A checkpoint under way.
struct Running {
    frozen: Frozen,
    position: LogPosition,
    /// What was written up to there.
    traffic: Traffic,
    /// Guest-visible size as of `position`.
    size: u64,
    generation: u64,
    root: Root,
    /// Segments that it neither refers to nor replays.
    dead: Vec<u32>,
}

impl<E: Engine> Driver<E> {
    /// Makes a checkpoint. With a `nonce`, later records carry it. `clean` says so in the slot if
    /// nothing is left to replay.
    pub(super) async fn checkpoint(&self, nonce: Option<u64>, clean: bool) -> Result {
        poll_fn(|cx| {
            let mut core = self.layer.core();
            if !core.checkpointing {
                core.checkpointing = true;
                return Poll::Ready(());
            }
            core.maintenance_wakers.push(cx.waker().clone());
            drop(core);
            self.pump();
            Poll::Pending
        })
        .await;
        let mut running = self.layer.core().freeze();
        let written = self.write_checkpoint(&mut running, nonce, clean).await;
        let mut core = self.layer.core();
        core.thaw(&running.frozen, written.is_err());
        core.checkpointing = false;
        core.checkpointed_at = self.io.now();
        core.wake_maintenance();
        written
    }

    async fn write_checkpoint(&self, running: &mut Running, nonce: Option<u64>, clean: bool) -> Result {
        self.write_nodes(running).await?;
        let nonce = nonce.unwrap_or(self.layer.core().log.head.nonce);
        let end = Run::CheckpointEnd { generation: running.generation, nonce };
        self.append(|waiter| vec![Part::index_only(end, waiter.clone())]).await?;
        let tuning = self.layer.core().tuning;
        if !breaks!(tuning, SlotBeforeSync) {
            self.flush().await?;
        }
        let mut slot = self.layer.core().slot(running, self.layer.header().layer_id, clean);
        self.commit(&slot, &running.dead).await?;
        if !clean && self.layer.core().is_freeing_wanted() {
            slot.generation += 1;
            let end = Run::CheckpointEnd { generation: slot.generation, nonce };
            self.append(|waiter| vec![Part::index_only(end, waiter.clone())]).await?;
            self.flush().await?;
            self.commit(&slot, &running.dead).await?;
        }
        Ok(())
    }

    /// Makes a checkpoint, all of which is durable, the newest one.
    async fn commit(&self, slot: &Slot, dead: &[u32]) -> Result {
        self.write_slot(slot).await.inspect_err(|&error| self.layer.core().latch(error))?;
        self.layer.core().checkpoint_done(slot, dead);
        Ok(())
    }

    /// Writes a slot and makes it durable. A failure leaves open which checkpoint is the newest.
    async fn write_slot(&self, slot: &Slot) -> Result {
        let bytes = AlignedBuf::from_slice(&slot.encode());
        let write = Op::write(self.layer.file(), slot_offset(slot.generation), bytes);
        self.io.run(write).await.result?;
        let tuning = self.layer.core().tuning;
        if breaks!(tuning, SlotNotSynced) {
            return Ok(());
        }
        self.sync_file().await
    }

    /// Writes leaves, then branches, then the root: each level names the places of the one below.
    async fn write_nodes(&self, running: &mut Running) -> Result {
        for leaves in running.frozen.leaves.chunks(STORE_NODES) {
            let encode = |(index, leaf): &(u32, Leaf)| (*index, encode_leaf(*index, &leaf.to_table()));
            for (leaf, node) in self.store(leaves.iter().map(encode).collect()).await? {
                let core = &mut *self.layer.core();
                core.map.place_leaf(leaf, node);
                core.segments.place_leaf(node);
            }
        }
        for branches in running.frozen.branches.chunks(STORE_NODES) {
            let encoded = {
                let map = &mut self.layer.core().map;
                branches.iter().map(|&index| (index, map.encode_branch(index))).collect()
            };
            for (branch, node) in self.store(encoded).await? {
                let core = &mut *self.layer.core();
                core.map.place_branch(branch, node);
                core.segments.take_node(node);
            }
        }
        let usage = {
            let core = self.layer.core();
            core.segments.frozen_usage(breaks!(core.tuning, UsageAsOfNow))
        };
        for usage in usage.chunks(STORE_NODES) {
            let encoded = usage.iter().map(|(index, table)| (*index, encode_usage(*index, table)));
            for (group, node) in self.store(encoded.collect()).await? {
                self.layer.core().segments.place_usage(group, node);
            }
        }
        self.write_root(running).await
    }

    /// The root is written when something changed, and lies in consecutive blocks.
    async fn write_root(&self, running: &mut Running) -> Result {
        if !running.frozen.root_changed {
            return Ok(());
        }
        let root = {
            let core = self.layer.core();
            let (branches, usage) = (core.map.root_refs(), core.segments.usage_refs());
            if branches.is_empty() && usage.is_empty() {
                return Ok(());
            }
            encode_root(branches, &usage)
        };
        let blocks = root.len().div_ceil(BLOCK_BYTES);
        let mut buf = AlignedBuf::zeroed(blocks * BLOCK_BYTES);
        buf[..root.len()].copy_from_slice(&root);
        let run = Run::Nodes { count: blocks as u32 };
        let places = self.append(|waiter| vec![Part::data(run, buf, waiter.clone())]).await?;
        let mut core = self.layer.core();
        core.set_root(Root { offset: Core::file_offset(places[0]), len: root.len() as u32 });
        running.root = core.root;
        Ok(())
    }

    /// Appends nodes, packed, and returns where each one went.
    async fn store(&self, nodes: Vec<(u32, Vec<u8>)>) -> Result<Vec<(u32, NodeRef)>> {
        let chunk_bytes = self.layer.part_blocks_max() as usize * BLOCK_BYTES;
        let mut chunks: Vec<Vec<u8>> = Vec::new();
        let mut placed = Vec::with_capacity(nodes.len());
        for (index, node) in nodes {
            let fits = |chunk: &&mut Vec<u8>| chunk.len() + node.len() <= chunk_bytes;
            if chunks.last_mut().filter(fits).is_none() {
                chunks.push(Vec::new());
            }
            let number = chunks.len() - 1;
            let chunk = &mut chunks[number];
            placed.push((index, number, chunk.len(), node.len()));
            chunk.extend(node);
            chunk.resize(chunk.len().next_multiple_of(NODE_ALIGNMENT), 0);
        }
        let part = |chunk: Vec<u8>, waiter: &_| {
            let blocks = chunk.len().div_ceil(BLOCK_BYTES);
            let mut buf = AlignedBuf::zeroed(blocks * BLOCK_BYTES);
            buf[..chunk.len()].copy_from_slice(&chunk);
            Part::data(Run::Nodes { count: blocks as u32 }, buf, Clone::clone(waiter))
        };
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let places =
            self.append(|waiter| chunks.into_iter().map(|chunk| part(chunk, waiter)).collect()).await?;
        let node = |(index, chunk, at, len): (u32, usize, usize, usize)| {
            (index, NodeRef::new(u64::from(places[chunk]) * BLOCK_SIZE + at as u64, len))
        };
        Ok(placed.into_iter().map(node).collect())
    }
}

impl Core {
    fn freeze(&mut self) -> Running {
        let mut frozen = self.map.freeze(&mut self.segments);
        frozen.root_changed |= self.segments.freeze_usage();
        self.segments.forget_emptied();
        if frozen.root_changed {
            self.set_root(Root::default());
        }
        let position = self.log.published;
        let dead = self.segments.dead(position.sequence);
        #[cfg(feature = "mutations")]
        let frozen = self.breach_freeze(frozen);
        self.log.bytes_since_checkpoint = 0;
        Running {
            frozen,
            position,
            traffic: self.log.traffic,
            size: self.size,
            generation: self.generation + 1,
            root: self.root,
            dead,
        }
    }

    /// Takes note of where the root is now.
    fn set_root(&mut self, root: Root) {
        let old = std::mem::replace(&mut self.root, root);
        if old.len > 0 {
            self.segments.release_node_bytes(old.offset.0, old.len as usize);
        }
        if root.len > 0 {
            self.segments.take_node_bytes(root.offset.0, root.len as usize);
        }
    }

    /// The slot for a checkpoint whose nodes are durable.
    fn slot(&self, running: &Running, layer_id: LayerId, clean: bool) -> Slot {
        let log = self.checkpoint_position(running.position);
        Slot {
            layer_id,
            generation: running.generation,
            log,
            root: running.root.offset,
            root_len: running.root.len,
            size: running.size,
            base: self.base_sequence,
            clean: clean && log == self.log.head,
            traffic: if log == running.position { running.traffic } else { self.log.traffic },
        }
    }

    /// The slot is durable.
    fn checkpoint_done(&mut self, slot: &Slot, dead: &[u32]) {
        self.generation = slot.generation;
        self.slot_bases = [slot.base, self.slot_bases[0]];
        self.checkpoint_sequence = slot.log.sequence;
        self.segments.retire(dead, breaks!(self.tuning, ReuseAfterOneSlot));
        if breaks!(self.tuning, ReuseWithoutEpochs) {
            self.segments.forget_readers();
        }
    }

    /// Ends a checkpoint; one that failed leaves everything to the next.
    fn thaw(&mut self, frozen: &Frozen, failed: bool) {
        self.map.thaw(frozen, failed);
        self.segments.thaw_usage(failed);
        self.release_held();
    }
}
