//! The table by which the size and the level of frames are chosen: unique blocks in the order of import, several to a
//! frame, each frame compressed by itself and stored as it is where that gains too little.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use sapwood_tests::corpus::{self, BLOCK_BYTES, IMAGES};
use zstd::bulk::{Compressor, Decompressor};

use super::measure::Unique;

/// Blocks in a frame.
const SIZES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const LEVELS: [i32; 5] = [1, 3, 6, 9, 12];
/// Unique blocks that lie together in the sample.
const STRETCH: usize = 512;
const WORKERS: usize = 2;
/// What a record has beside its payload, and what it is padded to.
const HEADER_BYTES: usize = 16;
const ALIGNMENT: usize = 32;
/// A frame is stored as it is where less than one part in so many is gained.
const GAIN_PART: usize = 32;
/// Bytes of nodes, hashes and indexes for each unique block, as the format of nodes and footers has it.
const METADATA_BYTES: u64 = 90;

/// One row of the table.
#[derive(Clone, Copy)]
struct Row {
    blocks: usize,
    level: i32,
    stored: u64,
    /// Processor time.
    compress_seconds: f64,
    /// Of one compressed frame.
    decompress_seconds: f64,
}

/// Prints the table over one of `sample` stretches of `uniques`.
///
/// # Errors
/// An image cannot be read.
pub fn run(corpus: &Path, uniques: &[Unique], nonzero: u64, sample: usize) -> Result<()> {
    let bytes = read(corpus, uniques, sample)?;
    println!("\nFrames of {} MiB, one stretch of 2 MiB in {sample}:\n", bytes.len() >> 20);
    println!("| frame, KiB | level | stored | total, 1/ | compress, MB/s | read 4 KiB, µs |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    for row in rows(&bytes)? {
        let share = row.stored as f64 / bytes.len() as f64;
        let unique = uniques.len() as f64;
        let total = unique * (share * BLOCK_BYTES as f64 + METADATA_BYTES as f64);
        println!(
            "| {} | {} | {share:.4} | {:.2} | {:.0} | {:.1} |",
            row.blocks * BLOCK_BYTES / 1024,
            row.level,
            nonzero as f64 * BLOCK_BYTES as f64 / total,
            bytes.len() as f64 / 1e6 / row.compress_seconds,
            row.decompress_seconds * 1e6,
        );
    }
    Ok(())
}

fn read(corpus: &Path, uniques: &[Unique], sample: usize) -> Result<Vec<u8>> {
    let open = |name: &str| {
        let image = corpus::image(corpus, name);
        File::open(&image).with_context(|| format!("opening {}", image.display()))
    };
    let files = IMAGES.iter().map(|name| open(name)).collect::<Result<Vec<File>>>()?;
    let chosen: Vec<Unique> = uniques.chunks_exact(STRETCH).step_by(sample).flatten().copied().collect();
    let mut bytes = vec![0; chosen.len() * BLOCK_BYTES];
    for (unique, to) in chosen.iter().zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
        let at = u64::from(unique.block) * BLOCK_BYTES as u64;
        files[unique.image as usize].read_exact_at(to, at).context("reading an image of the corpus")?;
    }
    Ok(bytes)
}

fn rows(bytes: &[u8]) -> Result<Vec<Row>> {
    let all = SIZES.iter().flat_map(|blocks| LEVELS.map(|level| (*blocks, level)));
    let left = Mutex::new(all.collect::<Vec<_>>());
    let next = || left.lock().expect("no holder panics").pop();
    let work = || -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        while let Some((blocks, level)) = next() {
            rows.push(row(bytes, blocks, level)?);
        }
        Ok(rows)
    };
    let done = thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| worker.join().expect("a worker does not panic");
        workers.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    let mut rows: Vec<Row> = done.into_iter().flatten().collect();
    rows.sort_by_key(|row| (row.blocks, row.level));
    Ok(rows)
}

fn row(bytes: &[u8], blocks: usize, level: i32) -> Result<Row> {
    let mut compressor = Compressor::new(level)?;
    let (mut frames, mut stored) = (Vec::new(), 0);
    let begin = processor_seconds();
    for raw in bytes.chunks(blocks * BLOCK_BYTES) {
        let compressed = compressor.compress(raw)?;
        let gains = compressed.len() + raw.len() / GAIN_PART <= raw.len();
        let payload = if gains { compressed.len() } else { raw.len() };
        stored += (HEADER_BYTES + payload).next_multiple_of(ALIGNMENT) as u64;
        if gains {
            frames.push(compressed);
        }
    }
    let compress_seconds = processor_seconds() - begin;
    let mut decompressor = Decompressor::new()?;
    let mut buffer = vec![0; blocks * BLOCK_BYTES];
    let begin = processor_seconds();
    for frame in &frames {
        decompressor.decompress_to_buffer(frame, &mut buffer)?;
    }
    let decompress_seconds = (processor_seconds() - begin) / frames.len().max(1) as f64;
    Ok(Row { blocks, level, stored, compress_seconds, decompress_seconds })
}

/// What this thread has used: other work on the machine does not count.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
