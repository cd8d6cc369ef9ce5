//! `cargo xtask bench --only depth`: what it costs that disks lie over one another. Stacks of layers beside
//! chains of qcow2 images with the same contents: how long a server takes until it listens, how much
//! memory it has after random reads, and how many of those it serves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::stack::{Maker, Stack, name};
use serde_json::{Value, json};

use super::case::Contestant;
use super::disks::{self, Disks};
use super::load::{Client, Load, Order};
use super::server::Server;
use crate::process;

/// Layers over the lowest image, which is full.
const DEPTHS: [usize; 5] = [1, 10, 100, 500, 1000];
/// Size of the disks.
const BYTES: u64 = 256 << 20;
/// Blocks of 4 KiB that each layer holds; a stack of empty ones is measured, too.
const BLOCKS_EACH: u64 = 16;
const BLOCK: u64 = 4096;
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
pub(super) const READS: Load = Load {
    writes: false,
    order: Order::Random,
    bytes: BLOCK as usize,
    depth: 32,
    flush_every: None,
    operations_max: u64::MAX,
};

/// Measures, prints, and returns all figures.
///
/// # Errors
/// A program failed, or a server answered with an error.
pub fn run(disks: &Disks, sapwood: &Path, turn: Duration) -> Result<Value> {
    println!(
        "{:<8} {:<8} {:<14} {:>12} {:>12} {:>12}",
        "depth", "blocks", "server", "ready, ms", "memory, MiB", "reads per s"
    );
    let mut figures = Vec::new();
    for blocks_each in [0, BLOCKS_EACH] {
        let folder = disks.folder().join(format!("depth-{blocks_each}"));
        fs::create_dir(&folder)?;
        make(&folder, sapwood, blocks_each)?;
        // Thousands of new files would be written out while servers are measured.
        process::output(&mut Command::new("sync"), COMMAND_LIMIT)?;
        for depth in DEPTHS {
            for contestant in [Contestant::SapwoodLayer, Contestant::Qcow2] {
                let disk = match contestant {
                    Contestant::SapwoodLayer => folder.join(name(depth)),
                    _ => folder.join(qcow2_name(depth)),
                };
                forget(&folder)?;
                let figure = measure(contestant, sapwood, &disk, &disks.socket(contestant), turn)?;
                println!(
                    "{depth:<8} {blocks_each:<8} {:<14} {:>12.0} {:>12.1} {:>12}",
                    contestant.name(),
                    figure.ready_ms,
                    figure.memory as f64 / 1048576.0,
                    figure.per_second.map_or("no answer".to_owned(), |n| format!("{n:.0}")),
                );
                figures.push(json!({
                    "depth": depth,
                    "blocks_each": blocks_each,
                    "server": contestant.name(),
                    "ready_ms": figure.ready_ms,
                    "memory_bytes": figure.memory,
                    "reads_per_second": figure.per_second,
                }));
            }
        }
        fs::remove_dir_all(&folder)?;
    }
    Ok(figures.into())
}

/// Has the page cache forget all files of a folder, which have been synced: a server that starts finds
/// what it needs on the disk.
fn forget(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let file = fs::File::open(entry?.path())?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

struct Figure {
    ready_ms: f64,
    /// In bytes, after the reads; before them if it ended.
    memory: u64,
    /// `None` when it ended, or answered none of them for half a minute.
    per_second: Option<f64>,
}

fn measure(
    contestant: Contestant,
    sapwood: &Path,
    disk: &Path,
    socket: &Path,
    turn: Duration,
) -> Result<Figure> {
    let begin = Instant::now();
    let server = Server::of_stack(contestant, sapwood, disk, socket)?;
    let ready_ms = begin.elapsed().as_secs_f64() * 1e3;
    let at_first = server.memory()?;
    let mut client = Client::connect(socket, &READS, BYTES)?;
    let begin = Instant::now();
    let driven = client.drive(&READS, turn);
    let per_second = driven.ok().map(|operations| operations as f64 / begin.elapsed().as_secs_f64());
    let memory = server.memory().unwrap_or(at_first);
    drop(client);
    match per_second {
        Some(_) => server.stop()?,
        // It may still be at it: dropped, it is killed.
        None => drop(server),
    }
    Ok(Figure { ready_ms, memory, per_second })
}

fn qcow2_name(number: usize) -> String {
    format!("{number}.qcow2")
}

/// Makes both stacks, with the same blocks in the images of the same number.
fn make(folder: &Path, sapwood: &Path, blocks_each: u64) -> Result<()> {
    let base = folder.join("base.raw");
    disks::fill(&base, BYTES)?;
    let mut stack = Stack::new(folder);
    let (layer, image) = (folder.join(name(0)), folder.join(qcow2_name(0)));
    run_in(folder, sapwood, &["convert", "-q", "-f", "raw", "-O", "layer"], &[&base, &layer])?;
    run_in(folder, Path::new("qemu-img"), &["convert", "-f", "raw", "-O", "qcow2"], &[&base, &image])?;
    fs::remove_file(&base)?;
    stack.adopt(fs::read(&layer)?, BYTES);
    let mut rng = Rng::new(1);
    for number in 1..=DEPTHS[DEPTHS.len() - 1] {
        let mut maker = Maker::new(number, BYTES, 1 << 20);
        let mut writes = Vec::new();
        for _ in 0..blocks_each {
            let block = rng.below(BYTES / BLOCK);
            maker.write(block, &[7]);
            writes.push(format!("write -q -P 7 {} {BLOCK}", block * BLOCK));
        }
        stack.push(maker.end(true));
        let (image, qemu_img) = (PathBuf::from(qcow2_name(number)), Path::new("qemu-img"));
        let size = BYTES.to_string();
        run_in(folder, qemu_img, &["create", "-q", "-f", "qcow2"], &[&image, Path::new(&size)])?;
        if !writes.is_empty() {
            let commands: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
            run_in(folder, Path::new("qemu-io"), &[&["-f", "qcow2"], &commands[..]].concat(), &[&image])?;
        }
        let below = qcow2_name(number - 1);
        let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &below];
        run_in(folder, qemu_img, &rebase, &[&image])?;
    }
    Ok(())
}

fn run_in(folder: &Path, program: &Path, arguments: &[&str], paths: &[&Path]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).args(paths).current_dir(folder);
    process::output(&mut command, COMMAND_LIMIT).with_context(|| format!("{command:?}")).map(drop)
}
