//! `cargo xtask bench`: `sapwood serve` beside `qemu-storage-daemon`, on equivalent disks, by the
//! same client, in turns (A B A B), so that what the machine does meanwhile hits both.
//!
//! Quote ratios: they are taken between turns that lie next to each other, and the median counts.
//! What a server does in the background until its next turn is on its own account.

mod case;
mod curve;
mod depth;
mod disks;
mod load;
mod report;
mod server;
mod snapshots;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use self::case::{Case, Contestant, DiskState};
use self::disks::Disks;
use self::load::Client;
use self::report::{Report, Row, Turn};
use self::server::Server;
use crate::process;
use crate::workspace::Workspace;

/// Turns of each server in each case.
const ROUNDS: usize = 3;
/// After a turn that wrote: background work settles before the next server's turn.
const SETTLE: Duration = Duration::from_millis(100);

/// What `--only` calls the comparison of stacks, which is made only when it is asked for.
const DEPTH: &str = "depth";
/// The same of a volume with a thousand snapshots.
const SNAPSHOTS: &str = "snapshots";

/// Options of the bench.
#[derive(Args)]
pub struct Bench {
    /// How long each turn of a server takes at most, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// Run only the cases whose names begin so; may be given again. "map-cache" (parts of a large map in memory) and
    /// "depth" (stacks of up to 1,000 images) and "snapshots" (a volume with 1,000 of them) take some minutes and are run only when they
    /// are named
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Where the disks are made, for example /dev/shm; by default below target/
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Draw the curve of `map-cache` into a file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write all figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the bench; says whether it could.
///
/// # Errors
/// A program failed, or a server answered with an error.
pub fn run(workspace: &Workspace, options: &Bench) -> Result<bool> {
    ensure!(options.seconds > 0.0 && options.seconds <= 60.0, "a turn takes up to 60 seconds");
    let (long, only): (Vec<String>, _) = options
        .only
        .iter()
        .cloned()
        .partition(|name| [DEPTH, SNAPSHOTS, curve::NAME].contains(&name.as_str()));
    let cases = if long.is_empty() || !only.is_empty() { select(&only)? } else { Vec::new() };
    if let Some(missing) =
        ["qemu-storage-daemon", "qemu-img"].into_iter().find(|p| process::find(p).is_none())
    {
        println!("skipped: bench: {missing} is not there: run `cargo xtask setup`");
        return Ok(false);
    }
    let program = workspace.sapwood()?;
    let folder = options.folder.clone().unwrap_or_else(|| workspace.target.join("bench"));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let turn = Duration::from_secs_f64(options.seconds);
    println!("{}", environment(&folder));
    if long.iter().any(|name| name == curve::NAME) {
        curve::run(&folder, &program, turn, options.svg.as_deref()).context(curve::NAME)?;
    }
    let bench = Runner { disks: Disks::new(&folder, &program)?, program, turn };
    let mut report = Report::default();
    if long.iter().any(|name| name == DEPTH) {
        report.depth = depth::run(&bench.disks, &bench.program, bench.turn)?;
    }
    if long.iter().any(|name| name == SNAPSHOTS) {
        report.snapshots = snapshots::run(&bench.disks, &bench.program, bench.turn)?;
    }
    if !cases.is_empty() {
        report::print_head();
    }
    for case in &cases {
        let rows = bench.case(case).with_context(|| case.name)?;
        report.add(case, rows);
    }
    if let Some(path) = &options.json {
        fs::write(path, report.json(options.seconds))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(true)
}

fn select(only: &[String]) -> Result<Vec<Case>> {
    let all = case::all();
    for name in only {
        if !all.iter().any(|case| case.name.starts_with(name.as_str())) {
            let names: Vec<&str> =
                all.iter().map(|case| case.name).chain([curve::NAME, DEPTH, SNAPSHOTS]).collect();
            bail!("no case begins with {name}; there are: {}", names.join(", "));
        }
    }
    let wanted =
        |case: &Case| only.is_empty() || only.iter().any(|name| case.name.starts_with(name.as_str()));
    Ok(all.into_iter().filter(wanted).collect())
}

/// What the figures depend on, in one line.
fn environment(folder: &Path) -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("?").to_owned();
    let processors = thread::available_parallelism().map_or(0, usize::from);
    let mut find = std::process::Command::new("findmnt");
    find.args(["-n", "-o", "FSTYPE", "-T"]).arg(folder);
    let file_system = process::output(&mut find, Duration::from_secs(10)).unwrap_or_default();
    format!(
        "{processors} processors, load {load} before the start, disks on {} ({})",
        folder.display(),
        file_system.trim()
    )
}

struct Runner {
    disks: Disks,
    program: PathBuf,
    turn: Duration,
}

/// A contestant that stands ready.
struct Ready {
    client: Client,
    server: Server,
}

impl Runner {
    fn case(&self, case: &Case) -> Result<Vec<Row>> {
        match case.disk {
            DiskState::Written => self.in_turns(case),
            DiskState::OverBase => self.each_afresh(case),
        }
    }

    fn start(&self, case: &Case, contestant: Contestant, disk: &Path) -> Result<Ready> {
        let base = (case.disk == DiskState::OverBase).then(|| self.disks.base());
        let socket = self.disks.socket(contestant);
        let server = Server::start(contestant, &self.program, disk, base.as_deref(), &socket)?;
        let client = Client::connect(&socket, &case.load, self.disks.size(case.disk))?;
        Ok(Ready { client, server })
    }

    /// All servers stay, each on its written disk.
    fn in_turns(&self, case: &Case) -> Result<Vec<Row>> {
        let mut ready = Vec::new();
        for &contestant in case.contestants {
            let disk = self.disks.written(contestant)?;
            ready.push((contestant, self.start(case, contestant, &disk)?, Vec::<Turn>::new()));
        }
        let mut marks = vec![None; ready.len()];
        for _ in 0..ROUNDS {
            for ((_, ready, turns), mark) in ready.iter_mut().zip(&mut marks) {
                let cpu = ready.server.cpu()?;
                settle_account(turns, mark.replace(cpu), cpu);
                turns.push(self.turn(case, &mut ready.client)?);
            }
        }
        let mut rows = Vec::new();
        for ((contestant, ready, mut turns), mark) in ready.into_iter().zip(marks) {
            settle_account(&mut turns, mark, ready.server.cpu()?);
            drop(ready.client);
            ready.server.stop()?;
            rows.push(Row { contestant, turns });
        }
        Ok(rows)
    }

    /// A new disk and a new server for each turn.
    fn each_afresh(&self, case: &Case) -> Result<Vec<Row>> {
        let row = |&contestant: &Contestant| Row { contestant, turns: Vec::new() };
        let mut rows: Vec<Row> = case.contestants.iter().map(row).collect();
        for _ in 0..ROUNDS {
            for row in &mut rows {
                let disk = self.disks.fresh(row.contestant)?;
                let mut ready = self.start(case, row.contestant, &disk)?;
                let before = ready.server.cpu()?;
                let mut turn = self.turn(case, &mut ready.client)?;
                turn.cpu = ready.server.cpu()?.saturating_sub(before);
                drop(ready.client);
                ready.server.stop()?;
                turn.allocated = Some(disks::allocated(&disk)?);
                fs::remove_file(&disk)?;
                row.turns.push(turn);
            }
        }
        Ok(rows)
    }

    fn turn(&self, case: &Case, client: &mut Client) -> Result<Turn> {
        let begin = Instant::now();
        let operations = client.drive(&case.load, self.turn)?;
        let elapsed = begin.elapsed();
        ensure!(operations > 0, "nothing was done in {elapsed:?}");
        if case.load.writes {
            client.flush()?;
            thread::sleep(SETTLE);
        }
        Ok(Turn { operations, elapsed, cpu: Duration::ZERO, allocated: None })
    }
}

/// Charges the last turn with what its server has used since it began.
fn settle_account(turns: &mut [Turn], mark: Option<Duration>, now: Duration) {
    if let (Some(turn), Some(mark)) = (turns.last_mut(), mark) {
        turn.cpu = now.saturating_sub(mark);
    }
}
