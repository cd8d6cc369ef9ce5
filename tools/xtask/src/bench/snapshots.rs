//! `cargo xtask bench --only snapshots`: a volume of a store after a thousand snapshots, beside a clone of the first one: how long a
//! server takes until it listens, how much memory it has after random reads, and how many of those it serves, before and after the
//! snapshots are sealed.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sapwood_tests::guest::Daemon;
use serde_json::{Value, json};

use super::depth::READS;
use super::disks::{self, Disks};
use super::load::{Client, Load};
use super::server::Server;
use crate::process;

const SNAPSHOTS: usize = 1000;
/// Size of the disk.
const BYTES: u64 = 256 << 20;
/// Blocks of 4 KiB that are written between two snapshots.
const BLOCKS_EACH: u64 = 16;
/// Turns of each, one after the other.
const TURNS: usize = 5;
const COMMAND_LIMIT: Duration = Duration::from_secs(600);
const WRITES: Load = Load { writes: true, depth: 16, operations_max: BLOCKS_EACH, ..READS };

/// Measures, prints, and returns all figures.
///
/// # Errors
/// A program failed, or a server answered with an error.
pub fn run(disks: &Disks, sapwood: &Path, turn: Duration) -> Result<Value> {
    let (store, image) = (disks.folder().join("snapshots"), disks.folder().join("full.raw"));
    disks::fill(&image, BYTES)?;
    Daemon::init(sapwood, &store)?;
    take_snapshots(sapwood, &store, &image)?;
    fs::remove_file(&image)?;
    println!(
        "{:<10} {:>8} {:>12} {:>12}  reads per s, in turns with depth 0",
        "snapshots", "of it", "ready, ms", "memory, MiB"
    );
    let mut figures = Vec::new();
    for state in ["frozen", "sealed"] {
        if state == "sealed" {
            let mut seal = Command::new(sapwood);
            process::output(seal.args(["store", "seal", "-q"]).arg(&store), COMMAND_LIMIT)?;
        }
        figures.extend(compare(sapwood, &store, state, turn)?);
    }
    fs::remove_dir_all(&store)?;
    Ok(figures.into())
}

/// Imports the image, and takes snapshots of a clone of it that is written between them.
fn take_snapshots(sapwood: &Path, store: &Path, image: &Path) -> Result<()> {
    let daemon = Daemon::start_with(sapwood, store, &["--no-background"])?;
    daemon.sapwood(&["import", "-q", "-f", "raw", &image.display().to_string(), "image@full"])?;
    daemon.sapwood(&["clone", "image@full", "shallow", "deep"])?;
    let disk = daemon.attach("deep", 1)?;
    let mut client = Client::connect(&disk.socket, &WRITES, BYTES)?;
    let begin = Instant::now();
    for number in 0..SNAPSHOTS {
        ensure!(client.drive(&WRITES, COMMAND_LIMIT)? == BLOCKS_EACH, "all blocks are written");
        daemon.sapwood(&["snapshot", "-q", &format!("deep@s{number}")])?;
    }
    println!("{SNAPSHOTS} live snapshots in {:.1} s", begin.elapsed().as_secs_f64());
    drop(client);
    daemon.stop()
}

/// Serves both volumes, and reads from them in turns.
fn compare(sapwood: &Path, store: &Path, state: &str, turn: Duration) -> Result<Vec<Value>> {
    let sockets = tempfile::tempdir()?;
    let mut rates = [Vec::new(), Vec::new()];
    let mut facts = [(0.0, 0), (0.0, 0)];
    for _ in 0..TURNS {
        for (which, volume) in ["shallow", "deep"].into_iter().enumerate() {
            let socket = sockets.path().join(volume);
            let begin = Instant::now();
            let server = Server::of_volume(sapwood, store, volume, &socket)?;
            let ready_ms = begin.elapsed().as_secs_f64() * 1e3;
            let mut client = Client::connect(&socket, &READS, BYTES)?;
            client.drive(&READS, turn / 4)?;
            let begin = Instant::now();
            let operations = client.drive(&READS, turn)?;
            rates[which].push(operations as f64 / begin.elapsed().as_secs_f64());
            facts[which] = (ready_ms, server.memory()?);
            drop(client);
            server.stop()?;
        }
    }
    let mut figures = Vec::new();
    for (which, depth) in [0, SNAPSHOTS].into_iter().enumerate() {
        let (ready_ms, memory) = facts[which];
        let shown: Vec<String> = rates[which].iter().map(|rate| format!("{rate:.0}")).collect();
        println!(
            "{depth:<10} {state:>8} {ready_ms:>12.0} {:>12.1}  {}",
            memory as f64 / 1048576.0,
            shown.join(", ")
        );
        figures.push(json!({
            "snapshots": depth,
            "state": state,
            "ready_ms": ready_ms,
            "memory_bytes": memory,
            "reads_per_second": rates[which],
        }));
    }
    Ok(figures)
}
