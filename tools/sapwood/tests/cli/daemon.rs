//! The daemon of a store: volumes that guests use, and its end.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::{self, Child};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::model::{Model, Run};

use crate::harness::{Place, SAPWOOD};
use crate::serve::ready;
use crate::store::{about, place};

const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 4096;

/// A running daemon; killed when the test is over.
pub struct Daemon(Child);

impl Daemon {
    /// Starts a daemon and waits until it says that it is ready.
    pub fn start(place: &Place, arguments: &str) -> (Self, String) {
        Self::start_with(place, arguments, &[])
    }

    fn start_with(place: &Place, arguments: &str, variables: &[(&str, &str)]) -> (Self, String) {
        let mut command = place.command(SAPWOOD, &format!("daemon {arguments}"));
        command.envs(variables.iter().copied());
        Self::begin(command)
    }

    fn begin(command: process::Command) -> (Self, String) {
        let (child, line) = ready(command);
        (Self(child), line)
    }

    /// Asks it to end, which it must do cleanly; its log.
    #[track_caller]
    pub fn stops(self) -> String {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("it runs");
        self.ends(0)
    }

    /// Waits for its end, with this exit code; its log.
    #[track_caller]
    fn ends(mut self, code: i32) -> String {
        let mut notes = String::new();
        self.0.stderr.take().expect("piped").read_to_string(&mut notes).expect("text");
        let status = self.0.wait().expect("it ends");
        assert_eq!(status.code(), Some(code), "{notes}");
        notes
    }

    /// Ends it without giving it a chance.
    pub fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Connects to the socket of a volume.
pub fn connect(place: &Place, socket: &str) -> Frontend {
    let options = Options { queues: 1, ..Options::default() };
    Frontend::connect(&place.path(socket), &options).expect("the daemon takes it")
}

/// All that a guest reads at a socket.
pub fn contents(place: &Place, socket: &str, size: u64) -> Vec<u8> {
    let mut frontend = connect(place, socket);
    let step: usize = 64 << 10;
    (0..size).step_by(step).flat_map(|at| frontend.run(Command::Read(at, step)).expect("it reads")).collect()
}

/// Attaches a volume or snapshot at a socket, and compares it with a model.
fn agrees(place: &Place, name: &str, model: &Model) {
    about(place, &format!("attach {name} --socket other")).text();
    let mut frontend = connect(place, "other");
    model.clone().verify(&mut frontend).unwrap_or_else(|error| panic!("{name}: {error}"));
    drop(frontend);
    about(place, &format!("detach {name}")).text();
}

#[test]
fn it_ends_itself_when_the_catalog_cannot_be_written() {
    let place = place();
    about(&place, "create :web 8M").text();
    // Writes beyond the limit are errors then, and no signals.
    let mut command = place.command("sh", "-c");
    command.arg(r#"trap '' XFSZ; exec "$0" daemon --store vms --no-background"#).arg(SAPWOOD);
    let (daemon, _) = Daemon::begin(command);
    about(&place, "attach :web").text();
    let mut frontend = connect(&place, "vms/sockets/web.sock");
    frontend.run(Command::Read(0, 4096)).expect("it reads");
    let limit = Rlimit { current: Some(4096), ..getrlimit(Resource::Fsize) };
    prlimit(Some(Pid::from_child(&daemon.0)), Resource::Fsize, limit).expect("it runs");
    about(&place, "describe :web lost").fails(1, &[]);
    let log = daemon.ends(1);
    assert!(log.contains("a change of the catalog failed, and may have been made or not"), "{log}");
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    about(&place, "describe :web found").text();
    assert!(about(&place, "show :web").text().contains("description: found"));
    daemon.stops();
    about(&place, "store check vms").text();
}

#[test]
fn a_guest_goes_on_through_snapshots_clones_and_a_resize() {
    let place = place();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    let attached = about(&place, "attach :web").text();
    assert!(attached.ends_with("vms/sockets/web.sock with 1 queue\n"), "{attached}");
    let mut frontend = connect(&place, "vms/sockets/web.sock");
    let mut model = Model::zeroes(SIZE);
    model.discards_zero = true;
    let mut taken = Vec::new();
    for n in 0..5 {
        model.run(&mut frontend, &Run { seed: n, ..Run::default() }).unwrap();
        about(&place, &format!("snapshot :web@{n}")).text();
        taken.push(model.clone());
    }
    model.run(&mut frontend, &Run { seed: 9, ..Run::default() }).unwrap();
    for (n, model) in taken.iter().enumerate() {
        agrees(&place, &format!(":web@{n}"), model);
    }
    about(&place, "clone :web@2 copy").text();
    agrees(&place, ":copy", &taken[2]);
    about(&place, "delete :web@1 :web@2").text();
    agrees(&place, ":copy", &taken[2]);
    for line in ["switch --discard :web @0", "rollback --discard :web", "delete --with-snapshots :web"] {
        about(&place, line).fails(1, &["web: the volume is attached"]);
    }
    about(&place, "rename :web www").text();
    assert_eq!(frontend.size().unwrap(), SIZE);
    about(&place, "resize :www 16M").text();
    assert_eq!(frontend.size().unwrap(), 2 * SIZE, "the guest sees it");
    about(&place, "resize :www 8M --shrink").text();
    model.verify(&mut frontend).unwrap();
    drop(frontend);
    about(&place, "detach :www").text();
    about(&place, "rollback :www").fails(1, &["in no snapshot"]);
    about(&place, "rollback --discard :www").text();
    agrees(&place, ":www", &taken[4]);
    about(&place, "switch :www @0").text();
    agrees(&place, ":www", &taken[0]);
    daemon.stops();
    assert!(!place.exists("vms/sockets/web.sock") && !place.exists("vms/daemon.sock"), "nothing is left");
}

/// Writes blocks one after the other, each when the one before was reported: number `n` into block `n` of a ring.
fn write_in_order(frontend: &mut Frontend, blocks: u64, go_on: impl Fn() -> bool) -> u64 {
    let mut n: u64 = 0;
    while go_on() {
        n += 1;
        let data = n.to_le_bytes().repeat(BLOCK as usize / 8);
        frontend.run(Command::Write(n % blocks * BLOCK, &data)).unwrap();
    }
    n
}

#[test]
fn a_snapshot_under_load_is_one_moment() {
    let place = place();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    about(&place, "attach :web --socket socket").text();
    let mut frontend = connect(&place, "socket");
    let blocks = 64;
    let written = thread::scope(|scope| {
        let commands = scope.spawn(|| {
            for n in 0..10 {
                about(&place, &format!("snapshot :web@{n}")).text();
            }
        });
        write_in_order(&mut frontend, blocks, || !commands.is_finished())
    });
    assert!(written > 100, "{written}: it was under load");
    let mut before = 0;
    for n in 0..10 {
        about(&place, &format!("attach :web@{n} --socket other")).text();
        let data = contents(&place, "other", blocks * BLOCK);
        about(&place, &format!("detach :web@{n}")).text();
        let numbers: Vec<u64> = data
            .chunks(BLOCK as usize)
            .map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()))
            .collect();
        let last = *numbers.iter().max().unwrap();
        assert!(last >= before, "snapshot {n} is not older than the one before");
        before = last;
        // All that was reported before the last one, and nothing later.
        for (block, &number) in numbers.iter().enumerate() {
            let newest = (0..=last).rev().find(|number| number % blocks == block as u64).unwrap_or(0);
            assert_eq!(number, newest, "snapshot {n}, block {block} of {last}");
        }
    }
    daemon.stops();
}

#[test]
fn what_was_flushed_survives_a_killed_daemon() {
    let place = place();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    about(&place, "attach :web --socket socket").text();
    let mut frontend = connect(&place, "socket");
    let mut model = Model::zeroes(SIZE);
    model.discards_zero = true;
    model.run(&mut frontend, &Run { seed: 1, ..Run::default() }).unwrap();
    about(&place, "snapshot :web@one").text();
    let one = model.clone();
    model.run(&mut frontend, &Run { seed: 2, ..Run::default() }).unwrap();
    daemon.kill();
    drop(frontend);
    assert!(place.exists("vms/daemon.sock") && place.exists("socket"), "killed");
    // Nobody answers, so the command opens the store itself.
    assert!(about(&place, "list vms").text().contains("web"));
    let (daemon, _) = Daemon::start(&place, "--store vms");
    agrees(&place, ":web@one", &one);
    let mut frontend = connect(&place, "socket");
    // All was reported and nothing was in flight: a kill loses nothing.
    model.verify(&mut frontend).unwrap();
    drop(frontend);
    about(&place, "detach :web").text();
    daemon.stops();
    about(&place, "rollback --discard :web").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    agrees(&place, ":web", &one);
    daemon.stops();
}

#[test]
fn a_new_size_survives_a_killed_daemon() {
    let place = place();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    about(&place, "attach :web --socket socket").text();
    about(&place, "resize :web +4M").text();
    about(&place, "resize :web +4M").text();
    about(&place, "resize :web -- -1M").fails(1, &["web", "--shrink"]);
    about(&place, "resize :web --shrink -- -17M").fails(1, &["16777216 bytes"]);
    daemon.kill();
    let listed = about(&place, "list --output=json vms").json();
    assert_eq!(listed[0]["virtual-size"], 16 << 20);
    let said = about(&place, "resize :web --shrink -- -15M").text();
    assert!(said.ends_with("from 16 MiB (16777216 bytes) to 1 MiB (1048576 bytes)\n"), "{said}");
}

#[test]
fn a_second_volume_does_not_get_a_socket_that_is_in_use() {
    let place = place();
    about(&place, "create :a 1M").text();
    about(&place, "create :b 1M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    about(&place, "attach :a --socket socket").text();
    about(&place, "attach :b --socket socket").fails(1, &["socket", "another process serves this socket"]);
    about(&place, "attach :b --socket disk.raw").fails(1, &["disk.raw", "not a socket"]);
    let long = format!("attach :b --socket {}", "x".repeat(120));
    about(&place, &long).fails(1, &["at most 107 bytes", "--socket"]);
    about(&place, "attach :b --socket none/socket").fails(1, &["none/socket", "No such file"]);
    about(&place, "attach :b --queues 0").fails(64, &["0"]);
    // It is free after all that.
    about(&place, "attach :b").text();
    about(&place, "attach :b").fails(1, &["b: the volume is attached"]);
    daemon.stops();
}

#[test]
fn the_daemon_is_private_and_found_wherever_it_listens() {
    let place = place();
    let mode = |name: &str| place.path(name).metadata().unwrap().permissions().mode() & 0o077;
    let (daemon, _) = Daemon::start(&place, "--store vms");
    assert_eq!((mode("vms/daemon.sock"), mode("vms/sockets")), (0, 0), "nobody else may connect");
    daemon.kill();
    // A socket that was left where a link is to be, and a link where a socket is to be.
    let (daemon, line) = Daemon::start(&place, "--store vms --socket control --sockets run");
    assert!(line.ends_with("at control\n"), "{line}");
    about(&place, "create :web 1M").text();
    about(&place, "attach :web").text();
    assert!(place.exists("run/web.sock"));
    daemon.kill();
    assert!(place.path("vms/daemon.sock").is_symlink(), "left");
    let (daemon, _) = Daemon::start(&place, "--store vms");
    assert!(about(&place, "list vms").text().contains("web"));
    about(&place, "attach :web").text();
    daemon.stops();
    std::fs::write(place.path("file"), "a file").unwrap();
    place.sapwood("daemon --store vms --socket file").fails(1, &["file", "not a socket"]);
    assert_eq!(place.bytes("file"), b"a file");
}

#[test]
fn a_store_with_a_long_path_needs_sockets_elsewhere() {
    let place = Place::new();
    let store = "s".repeat(120);
    place.sapwood(&format!("store init -q {store}")).text();
    place.sapwood(&format!("daemon --store {store}")).fails(1, &["at most 107 bytes"]);
    let (daemon, _) = Daemon::start(&place, &format!("--store {store} --socket control --sockets run"));
    place.sapwood(&format!("create {store}:web 1M")).text();
    place.sapwood(&format!("attach {store}:web --socket socket")).text();
    assert!(contents(&place, "socket", 1 << 20).iter().all(|byte| *byte == 0));
    daemon.stops();
}

#[test]
fn whoever_attaches_a_snapshot_second_is_told() {
    let place = place();
    about(&place, "create :web 1M").text();
    about(&place, "snapshot :web@s").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    for _ in 0..10 {
        let codes: Vec<i32> = thread::scope(|scope| {
            let attach = |n: usize| about(&place, &format!("attach :web@s --socket socket-{n}")).code;
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || attach(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1, "{codes:?}");
        about(&place, "detach :web@s").text();
    }
    daemon.stops();
}

#[test]
fn whoever_supervises_the_daemon_is_told() {
    let place = place();
    let socket = UnixDatagram::bind(place.path("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let path = place.path("notify").display().to_string();
    let (daemon, _) = Daemon::start_with(&place, "--store vms", &[("NOTIFY_SOCKET", &path)]);
    let told = || {
        let mut text = [0; 64];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    assert_eq!(told(), "READY=1");
    daemon.stops();
    assert_eq!(told(), "STOPPING=1");
}

#[test]
fn snapshots_are_sealed_by_themselves_while_guests_go_on() {
    let place = place();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    about(&place, "attach :web --socket socket").text();
    let mut frontend = connect(&place, "socket");
    let mut model = Model::zeroes(SIZE);
    model.discards_zero = true;
    let mut taken = Vec::new();
    for n in 0..3 {
        model.run(&mut frontend, &Run { seed: n, ..Run::default() }).unwrap();
        about(&place, &format!("snapshot :web@{n}")).text();
        taken.push(model.clone());
    }
    let layers = || std::fs::read_dir(place.path("vms/layers")).unwrap().count();
    let state = |n: usize| about(&place, &format!("show --output=json :web@{n}")).json()["state"].clone();
    for seed in 3.. {
        model.run(&mut frontend, &Run { seed, operations: 200, ..Run::default() }).unwrap();
        // The files go after the last one is sealed.
        if (0..3).all(|n| state(n) == "sealed") && layers() == 1 {
            break;
        }
        assert!(seed < 2000, "it does not happen");
    }
    model.verify(&mut frontend).unwrap();
    for (n, model) in taken.iter().enumerate() {
        agrees(&place, &format!(":web@{n}"), model);
    }
    let notes = daemon.stops();
    assert!(notes.contains("web@2 is sealed"), "{notes}");
}
