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
pub mod qcow2_open;
pub mod virtio_request;

use sapwood_tests::damage::meter::{Meter, metered};

#[global_allocator]
static METER: Meter = Meter;

/// Memory in bytes for a run on one structure.
const MEMORY: usize = 1 << 20;

/// Runs `f` within an allowance of memory in bytes.
fn bounded<T>(memory: usize, f: impl FnOnce() -> T) -> T {
    metered(memory, f).0
}
