//! Fuzz targets: one small module for each, whose `run` takes the fuzzer's bytes.
//!
//! Asserted for all of them: no panic, no endless work, and no more memory than the bytes are
//! worth. The targets are functions so that their corpus also runs as an ordinary test
//! (`tests/corpus.rs`), which also makes the seeds.

pub mod canary;
pub mod layer_header;
pub mod layer_node;
pub mod layer_open;
pub mod layer_record;
pub mod pack;
pub mod virtio_request;

use sapwood_tests::damage::meter::{Meter, metered};

#[global_allocator]
static METER: Meter = Meter;

/// Memory for one run whatever its input, in bytes: the largest segment twice, and buffers.
const MEMORY_BASE: usize = 192 << 20;
/// Memory for each byte of the file. A run of 16 bytes in a record may need a branch (16 KiB) and
/// a leaf (2 KiB) of its own in memory.
const MEMORY_PER_BYTE: usize = 1200;

/// Runs `f` over a file or memory of `len` bytes, within its allowance of memory.
fn bounded<T>(len: usize, f: impl FnOnce() -> T) -> T {
    metered(MEMORY_BASE + len * MEMORY_PER_BYTE, f).0
}
