//! How far a queue has come, as guest memory shows it (virtio 1.2, sections 2.7.6 and 2.7.8).

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::device::{Queue, Start};

/// Offset of the index in both rings.
const INDEX: u64 = 2;

/// The index of a ring at an address. A ring that the transport has let pass lies in memory.
fn index(memory: &GuestMemoryMmap<()>, ring: u64) -> u16 {
    memory.load(GuestAddress(ring.saturating_add(INDEX)), Ordering::Acquire).map_or(0, u16::from_le)
}

/// Requests that have been answered, modulo 2^16.
pub fn used(memory: &GuestMemoryMmap<()>, queue: &Queue) -> u16 {
    index(memory, queue.used)
}

/// Whether every request of every queue has been answered.
pub fn all_answered(memory: &GuestMemoryMmap<()>, start: &Start) -> bool {
    start.queues.iter().flatten().all(|queue| used(memory, queue) == index(memory, queue.available))
}
