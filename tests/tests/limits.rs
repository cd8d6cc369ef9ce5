//! Figures of limits, shares and reservations on real sockets, beside QEMU's throttle on the same file; timings, so that they are
//! printed and decide nothing: `cargo test --workspace --test limits -- --ignored --nocapture --test-threads=1`, on a quiet machine.
//! What may decide is tested with `sapwood limit` (`tools/sapwood/tests/cli/limits.rs`) and in virtual time (`qos/`).
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceQueue, Request};
use sapwood_blockdev::engine::{UringEngine, monotonic_now};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::{Disk, Format, OpenDisk};
use sapwood_qos::account::Accounted;
use sapwood_qos::arbiter::{Arbiter, Settings};
use sapwood_qos::governor::Governor;
use sapwood_qos::limited::Limited;

use sapwood_tests::frontend::{self, Frontend, Options};
use sapwood_tests::guest::{Backend, sapwood_program};
use sapwood_tests::pace::{Ends, Load};
use sapwood_tests::sim::rng::Rng;

const SPAN: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(6);
/// What comes before that is not looked at: a bucket may be full when a client begins.
const WARM: Duration = Duration::from_millis(500);
const WINDOW: Duration = Duration::from_millis(100);

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A raw disk of [`SPAN`] bytes, all written.
fn disk(folder: &Path) -> PathBuf {
    let path = folder.join("disk.raw");
    fs::write(&path, vec![0x11; SPAN as usize]).unwrap();
    fs::File::open(&path).unwrap().sync_all().unwrap();
    path
}

fn sapwood(folder: &Path, arguments: &[&str]) -> Backend {
    let socket = folder.join("socket");
    let mut words: Vec<String> = ["serve", "-f", "raw"].map(str::to_owned).to_vec();
    words.extend([text(&folder.join("disk.raw")), "--socket".to_owned(), text(&socket)]);
    words.extend(arguments.iter().map(|&word| word.to_owned()));
    Backend::start_program(&text(&sapwood_program().unwrap()), &words, &socket).unwrap()
}

fn qemu(folder: &Path, limits: &str) -> Backend {
    let socket = folder.join("socket");
    let words = [
        "--object".to_owned(),
        format!(r#"{{"qom-type":"throttle-group","id":"limits","limits":{{{limits}}}}}"#),
        "--blockdev".to_owned(),
        format!(
            "file,node-name=file,filename={},cache.direct=on,aio=io_uring",
            text(&folder.join("disk.raw"))
        ),
        "--blockdev".to_owned(),
        "throttle,node-name=disk,throttle-group=limits,file=file".to_owned(),
        "--export".to_owned(),
        format!(
            "vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            text(&socket)
        ),
    ];
    Backend::start_program("qemu-storage-daemon", &words, &socket).unwrap()
}

fn connect(socket: &Path, queues: usize) -> Frontend {
    Frontend::connect(socket, &Options { queues, ..Options::default() }).unwrap()
}

fn reads(depth: usize, bytes: usize) -> Load {
    Load { depth, bytes, write: false, span: SPAN, seed: 7, rest: Duration::ZERO }
}

/// By how much what ended differs from what may have, in percent: all, and the worst windows.
fn errors(ends: &Ends, per_second: f64) -> [f64; 3] {
    let percent =
        |count: u64, time: Duration| 100.0 * (count as f64 / (per_second * time.as_secs_f64()) - 1.0);
    let (least, most) = ends.windows(WINDOW, WARM, TIME);
    let whole = TIME - WARM;
    [percent(ends.between(WARM, TIME), whole), percent(least, WINDOW), percent(most, WINDOW)]
}

#[test]
#[ignore = "figures, on a quiet machine"]
fn limits_beside_qemu() {
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path());
    println!(
        "limit: server: requests ended, all and in the worst windows of 100 ms, by how much off in percent"
    );
    let iops = [1000_u64, 10_000, 50_000].map(|iops| ("iops-total", iops, 4096, iops as f64));
    let bps = [(10_u64, 4096), (10, 65_536), (100, 65_536), (500, 65_536)]
        .map(|(mb, bytes)| ("bps-total", mb * 1_000_000, bytes, mb as f64 * 1e6 / bytes as f64));
    for (name, value, bytes, per_second) in iops.into_iter().chain(bps) {
        for server in ["sapwood", "qemu-storage-daemon"] {
            let backend = match server {
                "sapwood" => sapwood(folder.path(), &["--set", &format!("{name}={value}")]),
                _ => qemu(folder.path(), &format!(r#""{name}":{value}"#)),
            };
            let mut frontend = connect(backend.socket(), 1);
            let ends = reads(32, bytes).run(&mut frontend.queues[0], TIME).unwrap();
            drop(frontend);
            backend.stop().unwrap();
            let [all, least, most] = errors(&ends, per_second);
            println!("{name}={value}, {bytes} bytes each: {server}: {all:+.2} {least:+.1} {most:+.1}");
        }
    }
}

/// Runs a command of sapwood.
fn order(arguments: &[&str]) {
    let output = process::Command::new(sapwood_program().unwrap()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A daemon with volumes that are written as far as is read, and a client of each.
struct Fleet {
    folder: tempfile::TempDir,
    _daemon: Backend,
    clients: Vec<Frontend>,
}

const VOLUME: u64 = 4 << 20;

impl Fleet {
    fn new(count: usize, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = text(&folder.path().join("store"));
        order(&["store", "init", "-q", &store]);
        let socket = folder.path().join("daemon.sock");
        let mut words = ["daemon", "--store", &store, "--socket", &text(&socket)].map(str::to_owned).to_vec();
        words.extend(options.iter().map(|&word| word.to_owned()));
        let daemon = Backend::start_program(&text(&sapwood_program().unwrap()), &words, &socket).unwrap();
        let clients = (0..count).map(|n| {
            let (name, at) = (format!("{store}:v{n}"), text(&folder.path().join(format!("{n}.sock"))));
            order(&["create", "-q", &name, "4M"]);
            order(&["attach", "-q", &name, "--socket", &at]);
            let mut client = connect(Path::new(&at), 1);
            let fill = Load { write: true, span: VOLUME, seed: n as u64, ..reads(4, 65_536) };
            fill.run(&mut client.queues[0], Duration::from_millis(100)).unwrap();
            client
        });
        let clients = clients.collect();
        Self { folder, _daemon: daemon, clients }
    }

    fn limit(&self, volume: usize, options: &[&str]) {
        let name = format!("{}:v{volume}", text(&self.folder.path().join("store")));
        order(&[&["limit", &name], options].concat());
    }

    /// Requests that ended for each client, all of which keep `depth` outstanding.
    fn run(&mut self, depth: usize, time: Duration) -> Vec<u64> {
        thread::scope(|scope| {
            let run = |client: &mut Frontend| {
                let load = Load { span: VOLUME, seed: 3, ..reads(depth, 4096) };
                load.run(&mut client.queues[0], time).unwrap().between(WARM, time)
            };
            let threads: Vec<_> =
                self.clients.iter_mut().map(|client| scope.spawn(move || run(client))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

/// 1 where all have the same, and 1/n where one has all.
fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = (shares.iter().sum::<f64>(), shares.iter().map(|share| share * share).sum::<f64>());
    sum * sum / (shares.len() as f64 * squares)
}

#[test]
#[ignore = "figures, on a quiet machine"]
fn shares_and_reservations() {
    for (count, weights) in [(4, &[100, 100, 200, 400][..]), (64, &[100, 100, 200, 400][..])] {
        let mut fleet = Fleet::new(count, &["--no-background"]);
        let weight = |n: usize| weights[n % weights.len()];
        for n in 0..count {
            fleet.limit(n, &["--weight", &weight(n).to_string()]);
        }
        let ended = fleet.run(32, TIME);
        let shares: Vec<f64> =
            ended.iter().enumerate().map(|(n, ended)| *ended as f64 / f64::from(weight(n))).collect();
        let mean = shares.iter().sum::<f64>() / count as f64;
        let worst = shares.iter().map(|share| (share / mean - 1.0).abs()).fold(0.0, f64::max);
        let all = ended.iter().sum::<u64>() as f64 / (TIME - WARM).as_secs_f64();
        println!(
            "{count} disks, weights 1:1:2:4: Jain {:.4}, worst share {:.1} % off, {all:.0} reads/s in all",
            jain(&shares),
            100.0 * worst
        );
        let reserved = (all / 8.0) as u64;
        fleet.limit(0, &["--weight", "1", "--reserve-iops", &reserved.to_string()]);
        let ended = fleet.run(32, TIME)[0] as f64 / (TIME - WARM).as_secs_f64();
        println!(
            "{count} disks, one of weight 1 has {reserved} reads/s reserved: it gets {ended:.0}, {:+.1} %",
            100.0 * (ended / reserved as f64 - 1.0)
        );
    }
}

/// On the host's disk, and in its memory, where it is only seen what the server does.
#[test]
#[ignore = "figures, on a quiet machine"]
fn a_reader_beside_a_limited_writer() {
    let folders =
        [("disk", tempfile::tempdir().unwrap()), ("memory", tempfile::tempdir_in("/dev/shm").unwrap())];
    let servers =
        folders.iter().flat_map(|folder| ["sapwood", "qemu-storage-daemon"].map(|server| (folder, server)));
    for ((place, folder), server) in servers {
        disk(folder.path());
        let backend = match server {
            "sapwood" => sapwood(folder.path(), &["--queues", "2", "--bps-write", "10M"]),
            _ => qemu(folder.path(), r#""bps-write":10485760"#),
        };
        let mut frontend = connect(backend.socket(), 2);
        let [writer, reader] = &mut frontend.queues[..] else { panic!("two queues") };
        let alone = reads(1, 4096).run(reader, TIME).unwrap();
        let beside = thread::scope(|scope| {
            let load = Load { write: true, ..reads(16, 65_536) };
            scope.spawn(move || load.run(writer, TIME).unwrap());
            reads(1, 4096).run(reader, TIME).unwrap()
        });
        drop(frontend);
        backend.stop().unwrap();
        let p99 = |ends: &Ends| ends.quantile(0.99).as_secs_f64() * 1e6;
        println!(
            "{place}: {server}: p99 of a reader alone {:.0} us, beside a writer that waits {:.0} us",
            p99(&alone),
            p99(&beside)
        );
    }
}

/// A volume whose snapshots are sealed.
struct Other {
    name: String,
    client: Frontend,
    rng: Rng,
}

impl Other {
    const SIZE: u64 = 256 << 20;

    fn new(fleet: &Fleet) -> Self {
        let name = format!("{}:other", text(&fleet.folder.path().join("store")));
        let socket = text(&fleet.folder.path().join("other.sock"));
        order(&["create", "-q", &name, &Self::SIZE.to_string()]);
        order(&["attach", "-q", &name, "--socket", &socket]);
        Self { name, client: connect(Path::new(&socket), 1), rng: Rng::new(5) }
    }

    /// Fills its first `len` bytes with what nobody has.
    fn change(&mut self, len: u64) {
        for offset in (0..len).step_by(65_536) {
            let data: Vec<u8> =
                (0..65_536 / 8).flat_map(|_| self.rng.below(u64::MAX).to_le_bytes()).collect();
            self.client.queues[0].run(frontend::Command::Write(offset, &data)).unwrap();
        }
    }

    fn snapshot(&self, number: usize) {
        order(&["snapshot", "-q", &format!("{}@{number}", self.name)]);
    }

    fn is_sealed(&self) -> bool {
        let tree =
            process::Command::new(sapwood_program().unwrap()).args(["tree", &self.name]).output().unwrap();
        assert!(tree.status.success());
        !String::from_utf8_lossy(&tree.stdout).contains("frozen")
    }
}

/// A guest that reads less than is reserved for it, in turns alone and while another volume's snapshot is sealed; and how fast that is.
#[test]
#[ignore = "figures, on a quiet machine"]
fn a_reader_beside_sealing() {
    const PHASE: Duration = Duration::from_secs(3);
    const MEASURED: u64 = 32 << 20;
    for options in [&["--reserve-iops", "2000"][..], &[]] {
        let mut fleet = Fleet::new(1, &[]);
        let mut other = Other::new(&fleet);
        if !options.is_empty() {
            fleet.limit(0, options);
        }
        let load = Load { span: VOLUME, rest: Duration::from_micros(500), ..reads(1, 4096) };
        let guest = &mut fleet.clients[0].queues[0];
        let [mut alone, mut beside] = [Ends::default(), Ends::default()];
        for round in 0..8 {
            other.change(Other::SIZE);
            alone.add(&load.run(guest, PHASE).unwrap());
            other.snapshot(round);
            beside.add(&load.run(guest, PHASE).unwrap());
            assert!(!other.is_sealed(), "it was sealed meanwhile");
            // A guest that is idle is not waited for.
            let is_sealed = || {
                (0..600).any(|_| {
                    thread::sleep(Duration::from_millis(100));
                    other.is_sealed()
                })
            };
            assert!(is_sealed(), "no end after a minute");
        }
        let p99 = |ends: &Ends| ends.quantile(0.99).as_secs_f64() * 1e6;
        other.change(MEASURED);
        other.snapshot(8);
        let halves = (1..120).find(|_| {
            load.run(guest, Duration::from_millis(500)).unwrap();
            other.is_sealed()
        });
        println!(
            "{options:?}: p99 of {:.0} reads/s: alone {:.0} us, beside sealing {:.0} us; {:.1} MB/s are sealed",
            alone.count() as f64 / (8.0 * PHASE.as_secs_f64()),
            p99(&alone),
            p99(&beside),
            MEASURED as f64 / 1e6 / (halves.expect("it is sealed") as f64 / 2.0)
        );
    }
}

/// CPU time of this thread for each of `count` random reads of 4 KiB, of which `depth` are outstanding, in nanoseconds.
fn cpu_of_a_read<D: BlockDevice<Engine = UringEngine>>(device: &Arc<D>, depth: usize, count: u64) -> f64 {
    let now = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let mut queue = device.queue(UringEngine::new().unwrap());
    let buffers: Vec<_> = (0..depth).map(|_| SharedBuf::heap(4096)).collect();
    let (mut rng, mut submitted, mut ended, mut done) = (Rng::new(3), 0, 0, Vec::new());
    let mut free: Vec<usize> = (0..depth).collect();
    let begin = now();
    while ended < count {
        while let Some(slot) = free.pop().filter(|_| submitted < count) {
            let offset = GuestOffset(rng.below(SPAN / 4096) * 4096);
            let command = Command::Read(buffers[slot].clone().into());
            queue.submit(Request { tag: slot as u64, offset, len: 4096, command });
            submitted += 1;
        }
        queue.poll(&mut done);
        if done.is_empty() {
            queue.wait(None);
        }
        for done in done.drain(..) {
            done.result.unwrap();
            free.push(done.tag as usize);
            ended += 1;
        }
    }
    let end = now();
    ((end.tv_sec - begin.tv_sec) * 1_000_000_000 + end.tv_nsec - begin.tv_nsec) as f64 / count as f64
}

/// What it costs that there could be limits, and that is counted, where there are none.
#[test]
#[ignore = "figures, on a quiet machine"]
fn cpu_without_limits() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path());
    let io = Io::new(UringEngine::new().unwrap());
    let options = OpenDisk { format: Some(Format::Raw), ..OpenDisk::default() };
    let inner = io.clone();
    let plain = block_on(&io, async move { Disk::open(&HostStorage, &inner, &path, options).await.unwrap() });
    let governor = Governor::new(32, monotonic_now());
    let limited = Limited::new(Arc::clone(&plain), &governor, Arbiter::ROOT, &Settings::default());
    let counted = Accounted::new(Arc::clone(&limited));
    for (depth, count) in [(1, 5_000), (4, 20_000), (32, 40_000)] {
        let mut rounds: Vec<[f64; 3]> = (0..21)
            .map(|_| {
                [
                    cpu_of_a_read(&plain, depth, count),
                    cpu_of_a_read(&limited, depth, count),
                    cpu_of_a_read(&counted, depth, count),
                ]
            })
            .collect();
        let mut median = |of: fn(&[f64; 3]) -> f64| {
            rounds.sort_by(|a, b| of(a).total_cmp(&of(b)));
            of(&rounds[rounds.len() / 2])
        };
        println!(
            "{depth} outstanding: {:.0} ns of CPU for a read; limits {:+.2} %, and counted {:+.2} %",
            median(|round| round[0]),
            100.0 * (median(|round| round[1] / round[0]) - 1.0),
            100.0 * (median(|round| round[2] / round[0]) - 1.0)
        );
    }
}
