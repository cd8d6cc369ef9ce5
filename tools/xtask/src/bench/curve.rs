//! `cargo xtask bench --only map-cache`: random reads of 1 TiB with less and less memory for the map.
//!
//! What is read are holes, so that a request costs what its look-up costs: no disk could show a cliff
//! better. The peer is qcow2, whose map (its L2 tables) is an eighth of ours, because it maps clusters of
//! 64 KiB; each gets the same share of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sapwood_tests::synthetic::{self, Synthetic};
use tempfile::TempDir;

use super::load::{Client, Load, Order};
use super::report::median;
use super::server::Server;
use super::svg::{self, Line};
use crate::process;

/// For `--only`; it is not run unless it is named.
pub const NAME: &str = "map-cache";

const MAPPED: u64 = 1 << 40;
/// Blocks of a leaf of our map, and of a part of an L2 table that the peer reads at once.
const LEAF_BLOCKS: u64 = 512;
const SLICE_BLOCKS: u64 = 8192;
/// Bytes that are read for them: a leaf of 2064 bytes lies in one block of the file or, in 257 of 512 cases,
/// in two.
const LEAF_READ: f64 = 4096.0 * (1.0 + 257.0 / 512.0);
const SLICE_READ: f64 = 4096.0;
/// Memory of a whole map: dense leaves and branches with what the cache takes for each, and L2 tables.
const OURS_BYTES: u64 = MAPPED / (2 << 20) * (2048 + 128) + MAPPED / (1 << 30) * (4096 + 128) + (1 << 20);
const PEERS_BYTES: u64 = MAPPED / (64 << 10) * 8;
/// Caches: these parts of the map.
const SHARES: [u64; 7] = [64, 32, 16, 8, 4, 2, 1];
const ROUNDS: usize = 3;
const WARM_LIMIT: Duration = Duration::from_secs(60);
const MAKE_LIMIT: Duration = Duration::from_secs(120);

const fn load(order: Order) -> Load {
    Load { writes: false, order, bytes: 4096, depth: 32, flush_every: None, operations_max: u64::MAX }
}

const LOADS: [(&str, Load); 2] = [("uniform", load(Order::Random)), ("80:20", load(Order::Skewed))];

/// A server with its client, and what was measured.
struct Side {
    server: Server,
    client: Client,
    /// For each load: requests a second, and bytes of the map read for each.
    turns: [Vec<(f64, f64)>; 2],
}

impl Side {
    /// Fills the cache, which has room for one part in `share` of the map, with the first part.
    fn new(server: Server, socket: &Path, leaf_blocks: u64, share: u64) -> Result<Self> {
        let client = Client::connect(socket, &LOADS[0].1, MAPPED)?;
        let mut side = Self { server, client, turns: Default::default() };
        let pass = load(Order::Strided(leaf_blocks));
        let operations_max = MAPPED / 4096 / leaf_blocks / share;
        side.client.drive(&Load { operations_max, ..pass }, WARM_LIMIT)?;
        Ok(side)
    }

    fn turn(&mut self, which: usize, time: Duration) -> Result<()> {
        let (before, begin) = (self.server.read_bytes()?, Instant::now());
        let requests = self.client.drive(&LOADS[which].1, time)? as f64;
        let bytes = (self.server.read_bytes()? - before) as f64;
        self.turns[which].push((requests / begin.elapsed().as_secs_f64(), bytes / requests));
        Ok(())
    }

    fn medians(&self, which: usize) -> (f64, f64) {
        let of = |f: fn(&(f64, f64)) -> f64| median(self.turns[which].iter().map(f).collect());
        (of(|turn| turn.0), of(|turn| turn.1))
    }
}

/// What one size of the cache has shown: for each load, ours and the peer's requests a second, and nodes
/// read for each.
struct Point {
    share: u64,
    figures: [[(f64, f64); 2]; 2],
}

/// Measures, prints a table and draws it.
///
/// # Errors
/// A program fails, or a server answers with an error.
pub fn run(folder: &Path, sapwood: &Path, turn: Duration, drawing: Option<&Path>) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("curve-").tempdir_in(folder)?;
    let (layer, qcow2) = make(&folder)?;
    println!(
        "{:>5} {:<8} {:>22} {:>22} {:>15} {:>21}",
        "cache",
        "reads",
        "sapwood: MiB, reads/s",
        "qemu: MiB, reads/s",
        "sapwood / qemu",
        "nodes read for each"
    );
    let mut points = Vec::new();
    for share in SHARES {
        let point = measure(&folder, sapwood, &layer, &qcow2, share, turn)?;
        for ((name, _), [ours, peer]) in LOADS.iter().zip(point.figures) {
            println!(
                "{:>5} {name:<8} {:>11.1} {:>10.0} {:>11.1} {:>10.0} {:>15.2} {:>10.2} {:>10.2}",
                format!("1/{share}"),
                (OURS_BYTES / share) as f64 / f64::from(1 << 20),
                ours.0,
                (PEERS_BYTES / share) as f64 / f64::from(1 << 20),
                peer.0,
                ours.0 / peer.0,
                ours.1,
                peer.1,
            );
        }
        points.push(point);
    }
    if let Some(path) = drawing {
        fs::write(path, draw(&points)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn make(folder: &TempDir) -> Result<(PathBuf, PathBuf)> {
    let (layer, qcow2) = (folder.path().join("disk.layer"), folder.path().join("disk.qcow2"));
    synthetic::make(&layer, &Synthetic { size: 4 * MAPPED, mapped: MAPPED, records: false })?;
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]);
    process::output(create.arg(&qcow2).arg(MAPPED.to_string()), MAKE_LIMIT)?;
    Ok((layer, qcow2))
}

fn measure(
    folder: &TempDir,
    sapwood: &Path,
    layer: &Path,
    qcow2: &Path,
    share: u64,
    time: Duration,
) -> Result<Point> {
    let sockets = [folder.path().join("sapwood.sock"), folder.path().join("qemu.sock")];
    let ours = Server::start_layer(sapwood, layer, &sockets[0], OURS_BYTES / share)?;
    let peer = Server::start_qcow2(qcow2, &sockets[1], PEERS_BYTES / share)?;
    let mut sides = [
        Side::new(ours, &sockets[0], LEAF_BLOCKS, share)?,
        Side::new(peer, &sockets[1], SLICE_BLOCKS, share)?,
    ];
    for which in 0..LOADS.len() {
        // The first round warms the cache.
        for round in 0..=ROUNDS {
            for side in &mut sides {
                side.turn(which, time)?;
                if round == 0 {
                    side.turns[which].clear();
                }
            }
        }
    }
    let rates = [0, 1].map(|which| [sides[0].medians(which), sides[1].medians(which)]);
    let [ours, peer] = sides;
    drop((ours.client, peer.client));
    ours.server.stop()?;
    peer.server.stop()?;
    let nodes = |[ours, peer]: [(f64, f64); 2]| [(ours.0, ours.1 / LEAF_READ), (peer.0, peer.1 / SLICE_READ)];
    Ok(Point { share, figures: rates.map(nodes) })
}

fn draw(points: &[Point]) -> String {
    let series = |load: usize, side: usize| -> Vec<f64> {
        let full = points.last().map_or(1.0, |point| point.figures[load][side].0);
        points.iter().map(|point| point.figures[load][side].0 / full).collect()
    };
    let labels: Vec<String> = points.iter().map(|point| format!("1/{}", point.share)).collect();
    let line = |name, color, dashed, load, side| Line { name, color, dashed, values: series(load, side) };
    svg::chart(
        "Random 4 KiB reads of 1 TiB, depth 32: requests a second, relative to a cache for the whole map",
        "part of the map that the cache has room for",
        &labels,
        &[
            line("sapwood, uniform", "#1a7f37", false, 0, 0),
            line("sapwood, 80:20", "#1a7f37", true, 1, 0),
            line("qemu qcow2, uniform", "#0969da", false, 0, 1),
            line("qemu qcow2, 80:20", "#0969da", true, 1, 1),
        ],
    )
}
