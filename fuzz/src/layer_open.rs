//! A whole layer: opened, read, checked, written, cleaned, closed, over files in memory.
//!
//! Beyond what holds for every target: a layer that `check` finds no fault with can be opened for
//! writing, takes writes, loses nothing of what it held, and is faultless afterwards.

use std::path::Path;

use sapwood_blockdev::device::Command;
use sapwood_image::ErrorKind;
use sapwood_tests::damage::lab::{Bench, check};
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::damage::specimen;

use crate::{bounded, pack};

/// Memory for a run whatever its input, in bytes: the largest segment twice, and buffers.
const MEMORY_BASE: usize = 192 << 20;
/// Memory for each byte of the file. A run of 16 bytes in a record may need a branch (16 KiB) and
/// a leaf (2 KiB) of its own in memory.
const MEMORY_PER_BYTE: usize = 1200;
/// Operations on files for each run, whatever its input; and for each block of the file.
const OPERATIONS_BASE: u64 = 20_000;
const OPERATIONS_PER_BLOCK: u64 = 100;
/// Bytes read from the start of each stretch of data.
const SAMPLE: u64 = 16 << 10;
/// Stretches of data that are looked at.
const SAMPLES: usize = 64;

/// One run.
pub fn run(data: &[u8]) {
    let Some(file) = pack::unpack(data) else { return };
    let storage = MemoryStorage::new(OPERATIONS_BASE + file.len() as u64 / 4096 * OPERATIONS_PER_BLOCK);
    storage.install(&specimen::path(), &file);
    storage.install(Path::new("base"), &specimen::base());
    bounded(MEMORY_BASE + file.len() * MEMORY_PER_BYTE, || examine(&storage, data[1]));
}

fn examine(storage: &MemoryStorage, how: u8) {
    let path = specimen::path();
    let found = check(storage, &path).map(|report| report.errors);
    let faultless = matches!(&found, Ok(errors) if errors.is_empty());
    let held = match Bench::open(storage, &path, true) {
        Ok(mut bench) => sample(&mut bench),
        Err(error) => {
            assert!(!faultless, "{error}, of which check says nothing");
            assert!(error.path == path, "{error}");
            return;
        }
    };
    let mut bench = match Bench::open(storage, &path, false) {
        Ok(bench) => bench,
        Err(error) => {
            let full = matches!(error.kind, ErrorKind::Device(_));
            return assert!(!faultless || full, "{error}, though a reader can open it");
        }
    };
    let written = use_it(&mut bench, how);
    if bench.close().is_err() || !faultless || written.is_none() {
        return;
    }
    let left = check(storage, &path).expect("it was just closed");
    assert_eq!((left.errors, left.warnings), (vec![], vec![]), "after a clean end");
    let mut bench = Bench::open(storage, &path, true).expect("it was just closed");
    for (at, bytes) in written.into_iter().flatten().chain(held) {
        assert!(bench.read(at, bytes.len()).as_ref() == Ok(&bytes), "what was at {at} is lost");
    }
}

type Contents = Vec<(u64, Vec<u8>)>;

/// What some stretches of the disk hold; nothing of what cannot be read.
fn sample(bench: &mut Bench<MemoryStorage>) -> Contents {
    let size = bench.size();
    bench.layer.info();
    let mut starts: Vec<(u64, u64)> = Vec::new();
    // Not the first part of the disk, where `use_it` writes.
    if let Ok(extents) = bench.extents(WRITTEN_END..size) {
        starts.extend(extents.iter().take(SAMPLES).map(|e| (e.start, e.len.min(SAMPLE))));
    }
    let mut contents = Contents::new();
    for (start, len) in starts {
        let (start, len) = (start.next_multiple_of(512), len / 512 * 512);
        if len > 0 && start + len <= size.saturating_sub(SHRUNK) {
            contents.extend(bench.read(start, len as usize).ok().map(|bytes| (start, bytes)));
        }
    }
    contents
}

/// Where the part of the disk ends that `use_it` writes, in bytes.
const WRITTEN_END: u64 = 256 << 10;
/// Bytes by which `use_it` makes the disk smaller.
const SHRUNK: u64 = 8192;

/// Does a little of everything; returns what was written last, or nothing if something failed.
fn use_it(bench: &mut Bench<MemoryStorage>, how: u8) -> Option<Contents> {
    let size = bench.size();
    if size < WRITTEN_END + SHRUNK {
        return None;
    }
    let written = [(4096, vec![0xa5; 12288]), (40_960 + 512, vec![0x5a; 1024]), (131_072, vec![7; 65536])];
    for (at, bytes) in &written {
        bench.write(*at, bytes).ok()?;
    }
    bench.command(90_112, 16384, Command::WriteZeroes).ok()?;
    bench.command(0, 0, Command::Flush).ok()?;
    bench.command(98_304, 8192, Command::Discard).ok()?;
    if how & 1 != 0 {
        bench.checkpoint().ok()?;
    }
    if how & 2 != 0 {
        for _ in 0..usize::from(how >> 4) {
            bench.clean().ok()?;
            bench.checkpoint().ok()?;
        }
    }
    if how & 4 != 0 {
        bench.resize((size - SHRUNK).next_multiple_of(512)).ok()?;
    }
    Some(written.to_vec())
}
