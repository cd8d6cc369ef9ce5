//! The client's memory that the server reads and writes.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{VirtioBlkQueue, iovec};

use super::{Options, Pending};

/// Memory of one request: its number in the arena.
#[derive(Clone, Debug)]
pub(super) struct Slot(usize);

/// Shared memory divided into slots.
pub(super) struct Arena {
    file: File,
    memory: MmapRaw,
    stride: usize,
    misalignment: usize,
    free: Vec<Slot>,
}

// SAFETY (of iovecs made here): addresses lie in the arena's mapping, which lives as long as the
// queue that they are given to.

impl Arena {
    pub(super) fn new(options: &Options) -> io::Result<Self> {
        let file = File::from(memfd_create("frontend", MemfdFlags::CLOEXEC)?);
        let stride = (options.misalignment + options.slot_bytes).next_multiple_of(4096);
        file.set_len((stride * options.slots.max(1)) as u64)?;
        let memory = MmapRaw::map_raw(&file)?;
        let free = (0..options.slots).map(Slot).collect();
        Ok(Self { file, memory, stride, misalignment: options.misalignment, free })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn address(&self) -> usize {
        self.memory.as_ptr().addr()
    }

    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    pub(super) fn take(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    pub(super) fn give(&mut self, slot: Slot) {
        self.free.push(slot);
    }

    /// The slot's memory, after checking that it holds `len` bytes.
    fn start(&self, slot: &Slot, len: usize) -> *mut u8 {
        assert!(self.misalignment + len <= self.stride && (slot.0 + 1) * self.stride <= self.memory.len());
        self.memory.as_mut_ptr().wrapping_add(slot.0 * self.stride + self.misalignment)
    }

    /// Copies data into a slot that no request uses.
    pub(super) fn fill(&self, slot: &Slot, data: &[u8]) {
        // SAFETY: the range lies in the mapping (checked in `start`), nothing borrows it.
        unsafe { self.start(slot, data.len()).copy_from_nonoverlapping(data.as_ptr(), data.len()) }
    }

    /// What a finished request has left in its slot.
    pub(super) fn data(&self, slot: &Slot, len: usize) -> &[u8] {
        // SAFETY: the range lies in the mapping (checked in `start`); the request is finished, so
        // a server that keeps the rules writes no more, and this side writes through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start(slot, len), len) }
    }

    pub(super) fn segments(&self, slot: &Slot, len: usize, most: usize) -> Vec<iovec> {
        let start = self.start(slot, len);
        let cut = |at: usize| iovec { iov_base: start.wrapping_add(at).cast(), iov_len: most.min(len - at) };
        (0..len).step_by(most).map(cut).collect()
    }

    pub(super) fn read(
        &self,
        queue: &mut VirtioBlkQueue<'static, Pending>,
        offset: u64,
        segments: &[iovec],
        pending: Pending,
    ) -> io::Result<()> {
        // SAFETY: the segments lie in the arena, in a slot that belongs to this request alone.
        unsafe { queue.readv(offset, segments.as_ptr(), segments.len(), pending) }
    }

    pub(super) fn write(
        &self,
        queue: &mut VirtioBlkQueue<'static, Pending>,
        offset: u64,
        segments: &[iovec],
        pending: Pending,
    ) -> io::Result<()> {
        // SAFETY: as in `read`.
        unsafe { queue.writev(offset, segments.as_ptr(), segments.len(), pending) }
    }
}
