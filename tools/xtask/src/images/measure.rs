//! What arithmetic says of the corpus: how much of it is not zero, how much of that is there once, and what `qemu-img`
//! makes of it.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sapwood_image::sealed::Hash;
use sapwood_tests::corpus::{self, AGED, BLOCK_BYTES, IMAGES};

use super::frames;
use crate::process;

const CONVERT_LIMIT: Duration = Duration::from_secs(900);

/// A block that no earlier one equals.
#[derive(Clone, Copy)]
pub struct Unique {
    /// Index of the image in [`IMAGES`].
    pub image: u32,
    /// Number of the block in it.
    pub block: u32,
}

/// Blocks of one or more images.
#[derive(Clone, Copy, Default)]
struct Count {
    nonzero: u64,
    unique: u64,
}

/// Prints the figures of the corpus, and the table of frames over one of `sample` stretches.
///
/// # Errors
/// An image cannot be read, or `qemu-img` fails.
pub fn run(corpus: &Path, sample: usize) -> Result<()> {
    println!(
        "\n| image | not zero, MiB | unique when imported, MiB | shared |\n| --- | ---: | ---: | ---: |"
    );
    let (mut seen, mut uniques, mut total) = (HashSet::new(), Vec::new(), Count::default());
    for (i, name) in IMAGES.into_iter().enumerate() {
        let hashes = corpus::hashes(&corpus::image(corpus, name))?;
        let count = take_in(&hashes, &mut seen, |block| uniques.push(Unique { image: i as u32, block }));
        print_count(name, count);
        total = Count { nonzero: total.nonzero + count.nonzero, unique: total.unique + count.unique };
    }
    print_count("all six", total);
    let aged = corpus::hashes(&corpus::image(corpus, AGED))?;
    print_count(AGED, take_in(&aged, &mut seen, |_| {}));
    frames::run(corpus, &uniques, total.nonzero, sample)?;
    run_qemu(corpus, total.nonzero)
}

/// Counts the blocks of an image and adds them to those `seen`; each that is new is named to `found`.
fn take_in(hashes: &[Hash], seen: &mut HashSet<Hash>, mut found: impl FnMut(u32)) -> Count {
    let mut count = Count::default();
    for (block, hash) in hashes.iter().enumerate() {
        if hash.is_zero() {
            continue;
        }
        count.nonzero += 1;
        if seen.insert(*hash) {
            count.unique += 1;
            found(block as u32);
        }
    }
    count
}

fn print_count(name: &str, count: Count) {
    let mib = |blocks: u64| (blocks * BLOCK_BYTES as u64) as f64 / f64::from(1 << 20);
    let shared = 100.0 * (count.nonzero - count.unique) as f64 / count.nonzero.max(1) as f64;
    println!("| {name} | {:.1} | {:.1} | {shared:.1} % |", mib(count.nonzero), mib(count.unique));
}

/// Converts each image to a compressed qcow2 and prints what all take.
fn run_qemu(corpus: &Path, nonzero: u64) -> Result<()> {
    let folder = tempfile::tempdir_in(corpus)?;
    let (mut allocated, mut elapsed) = (0, Duration::ZERO);
    for name in IMAGES {
        let to = folder.path().join("image.qcow2");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"]);
        convert.arg(corpus::image(corpus, name)).arg(&to);
        let begin = Instant::now();
        process::output(&mut convert, CONVERT_LIMIT)?;
        elapsed += begin.elapsed();
        let metadata = fs::metadata(&to).with_context(|| format!("looking at {}", to.display()))?;
        allocated += metadata.blocks() * 512;
        fs::remove_file(&to)?;
    }
    let bytes = nonzero * BLOCK_BYTES as u64;
    let (mib, seconds) = (f64::from(1 << 20), elapsed.as_secs_f64());
    println!(
        "\nqemu-img, compressed qcow2 with zstd, sum of six: {:.1} MiB, 1/{:.2} of what is not zero, in {seconds:.1} s \
         ({:.0} MiB/s of what is not zero)",
        allocated as f64 / mib,
        bytes as f64 / allocated as f64,
        bytes as f64 / mib / seconds
    );
    Ok(())
}
