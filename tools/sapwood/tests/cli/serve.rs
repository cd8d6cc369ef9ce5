//! `sapwood serve`: ready, in use, told to stop.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{self, Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::synthetic::{self, Synthetic};

use crate::harness::{Place, SAPWOOD};

/// Starts a program that goes on, and waits for the line that says that it is ready.
pub fn ready(mut command: process::Command) -> (Child, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    if line.is_empty() {
        let output = child.wait_with_output().expect("it ends");
        panic!("not ready: {}", String::from_utf8_lossy(&output.stderr));
    }
    (child, line)
}

/// A running server; killed when the test is over.
pub struct Server(Child);

impl Server {
    /// Starts a server and waits until it says that it is ready.
    pub fn start(place: &Place, arguments: &str) -> (Self, String) {
        Self::start_at(place, arguments, "socket")
    }

    /// The same at another socket.
    pub fn start_at(place: &Place, arguments: &str, socket: &str) -> (Self, String) {
        let (child, line) = ready(place.command(SAPWOOD, &format!("serve {arguments} --socket {socket}")));
        (Self(child), line)
    }

    /// Memory that it has now, in bytes.
    fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Asks it to end, which it must do cleanly.
    #[track_caller]
    pub fn stops(self) {
        self.stops_on(Signal::TERM);
    }

    #[track_caller]
    fn stops_on(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("it runs");
        let status = self.0.wait().expect("it ends");
        let mut notes = String::new();
        self.0.stderr.take().expect("piped").read_to_string(&mut notes).expect("text");
        assert_eq!(status.code(), Some(0), "{notes}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn it_is_ready_when_it_says_so_and_private() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let (server, line) = Server::start(&place, "-f raw disk.raw --queues 2");
    assert_eq!(line, "Serving disk.raw (raw, 8 MiB) at socket with 2 queues\n");
    UnixStream::connect(place.path("socket")).unwrap();
    let mode = place.path("socket").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700 & mode, "nobody else may connect: {mode:o}");
    drop(server);
}

#[test]
fn a_signal_ends_it_with_everything_durable() {
    for signal in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        place.sapwood("create disk.layer 1G").text();
        let (server, _) = Server::start(&place, "disk.layer");
        let _frontend = UnixStream::connect(place.path("socket")).unwrap();
        server.stops_on(signal);
        assert!(!place.exists("socket"));
        let info = place.sapwood("info --output=json disk.layer").json();
        assert_eq!(info["dirty-flag"], false);
        place.sapwood("check disk.layer").text();
    }
}

/// A map of 69 MiB, read at random with a cache of 8 MiB.
#[test]
fn memory_stays_within_the_map_cache() {
    let place = Place::new();
    let what = Synthetic { size: 4 << 40, mapped: 64 << 30, records: false };
    synthetic::make(&place.path("disk.layer"), &what).unwrap();
    let info = place.sapwood("info --output=json disk.layer").json();
    let map_bytes = info["format-specific"]["data"]["map-bytes"].as_u64().unwrap();
    assert!((65 << 20..72 << 20).contains(&map_bytes), "{map_bytes}");
    let (server, _) = Server::start(&place, "disk.layer --map-cache 8M");
    let before = server.resident_bytes();
    let mut frontend = Frontend::connect(&place.path("socket"), &Options::default()).unwrap();
    let mut rng = Rng::new(1);
    for _ in 0..20_000 {
        let block = rng.below(what.mapped / 4096);
        let data = frontend.run(Command::Read(block * 4096, 4096)).unwrap();
        assert!(data == what.contents(block), "block {block}");
    }
    let grown = server.resident_bytes().saturating_sub(before);
    drop(frontend);
    server.stops();
    println!("{before} bytes of memory at first, then {grown} more");
    // Fourteen times that was read. Beside the cache there are the buffers of a queue, and what the
    // system's allocator keeps.
    assert!((4 << 20..16 << 20).contains(&grown), "{grown} bytes with a cache of 8 MiB");
}

#[test]
fn a_served_disk_is_in_use() {
    let place = Place::new();
    place.sapwood("create disk.layer 1G").text();
    let (server, _) = Server::start(&place, "disk.layer");
    for line in ["serve disk.layer --socket other", "resize disk.layer 2G", "convert disk.layer out.raw"] {
        place.sapwood(line).fails(1, &["disk.layer", "in use by process", "serve"]);
    }
    place.sapwood("create other.layer 1G").text();
    place.sapwood("serve other.layer --socket socket").fails(1, &["socket", "another process"]);
    assert_eq!(place.sapwood("info --output=json other.layer").json()["dirty-flag"], false, "closed");
    drop(server);
    // Killed: the socket stays, and the disk is free.
    assert!(place.exists("socket"));
    let (server, _) = Server::start(&place, "disk.layer");
    server.stops();
}

#[test]
fn readers_share_a_disk() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let (_server, line) = Server::start(&place, "--readonly -f raw disk.raw");
    assert!(line.contains("read-only"), "{line}");
    place.sapwood("convert -f raw disk.raw copy.raw").text();
    place.sapwood("resize -f raw disk.raw 9M").fails(1, &["in use"]);
}

#[test]
fn the_disk_must_be_named_rightly() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    std::fs::write(place.path("socket"), "a file").unwrap();
    place.sapwood("serve -f raw disk.raw --socket socket").fails(1, &["not a socket"]);
    assert_eq!(std::fs::read(place.path("socket")).unwrap(), b"a file");
    place.sapwood("serve -f layer disk.raw --socket other").fails(1, &["disk.raw"]);
}
