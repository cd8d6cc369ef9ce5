//! Counts of what guests do: those of a server are those of its client, in JSON and on the page for Prometheus.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command as Process, Stdio};

use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::sim::rng::Rng;
use serde_json::Value;

use crate::control::ask_at;
use crate::daemon::{Daemon, connect};
use crate::harness::Place;
use crate::serve::Server;
use crate::store::{about, place};

const SIZE: u64 = 8 << 20;
const BLOCK: usize = 4096;
const KINDS: [&str; 5] = ["read", "write", "flush", "discard", "write-zeroes"];

/// What a client did: operations and bytes by kind.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counts(BTreeMap<&'static str, (u64, u64)>);

/// Random requests, all queues at once, several in flight; what they were.
fn work(frontend: &mut Frontend, rng: &mut Rng, rounds: usize) -> Counts {
    let mut counts = Counts::default();
    let data = vec![7; 16 * BLOCK];
    for _ in 0..rounds {
        for queue in &mut frontend.queues {
            for tag in 0..1 + rng.below(8) {
                let kind = KINDS[rng.below(5) as usize];
                let len = (1 + rng.below(16)) * BLOCK as u64;
                let at = rng.below((SIZE - len) / 512) * 512;
                let command = match kind {
                    "read" => Command::Read(at, len as usize),
                    "write" => Command::Write(at, &data[..len as usize]),
                    "flush" => Command::Flush,
                    "discard" => Command::Discard(at, len),
                    _ => Command::WriteZeroes(at, len, false),
                };
                queue.submit(tag, command).unwrap();
                let (operations, bytes) = counts.0.entry(kind).or_default();
                *operations += 1;
                *bytes += if kind == "flush" { 0 } else { len };
            }
            queue.kick().unwrap();
        }
        for queue in &mut frontend.queues {
            while queue.outstanding() > 0 {
                queue.poll(|finished| finished.result.unwrap());
                assert!(queue.outstanding() == 0 || queue.wait(std::time::Duration::from_secs(20)).unwrap());
            }
        }
    }
    counts
}

/// What the JSON of a disk says.
fn counts_of(disk: &Value) -> Counts {
    let account = &disk["account"];
    let count = |kind: &'static str| {
        assert_eq!(account[kind]["errors"], 0);
        (
            kind,
            (account[kind]["latency"]["count"].as_u64().unwrap(), account[kind]["bytes"].as_u64().unwrap()),
        )
    };
    Counts(KINDS.map(count).into_iter().collect())
}

/// One request for the page; its head and body.
fn get(mut stream: impl Read + Write, path: &str, accept: &str) -> (String, String) {
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

fn page(place: &Place, socket: &str) -> String {
    let (head, body) = get(UnixStream::connect(place.path(socket)).unwrap(), "/metrics", "*/*");
    assert!(head.contains("200 ok") && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    accepted(&body);
    body
}

/// Lets Prometheus' own tool judge a page, where it is installed (package `prometheus`, or SAPWOOD_PROMTOOL names it).
fn accepted(page: &str) {
    let tool = std::env::var("SAPWOOD_PROMTOOL").unwrap_or_else(|_| "promtool".into());
    let mut command = Process::new(tool);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = command.spawn() else { return eprintln!("skipped: there is no promtool") };
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}\n{page}", String::from_utf8_lossy(&said));
}

/// A value on a page; the series as it is written there.
#[track_caller]
fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in {page}")).parse().unwrap()
}

/// What the page says of a disk.
fn counts_on(page: &str, disk: &str) -> Counts {
    let count = |kind: &'static str| {
        let labels = format!("{{disk=\"{disk}\",kind=\"{kind}\"}}");
        let of = |name: &str| value(page, &format!("sapwood_{name}{labels}")) as u64;
        assert_eq!(of("request_errors_total"), 0);
        assert_eq!(of("request_duration_seconds_count"), of("requests_total"));
        (kind, (of("requests_total"), of("request_bytes_total")))
    };
    Counts(KINDS.map(count).into_iter().collect())
}

#[test]
fn a_server_counts_what_its_client_counts() {
    for (engine, seed) in [("uring", 1), ("blocking", 2)] {
        let (place, mut rng) = (Place::new(), Rng::new(seed));
        place.sapwood("create disk 8M").text();
        let serve = format!("--engine {engine} disk --control control --queues 4");
        let (server, _) = Server::start(&place, &serve);
        let mut all = Counts::default();
        // Whoever connects next goes on counting.
        for _ in 0..2 {
            let options = Options { queues: 4, ..Options::default() };
            let mut frontend = Frontend::connect(&place.path("socket"), &options).unwrap();
            for (kind, (operations, bytes)) in work(&mut frontend, &mut rng, 20).0 {
                let sum = all.0.entry(kind).or_default();
                *sum = (sum.0 + operations, sum.1 + bytes);
            }
            let (status, said) = ask_at(&place, "control", "GET", "/v1/statistics", "");
            let disk = &said["disks"][0];
            assert_eq!(
                (status, disk["name"].as_str(), &disk["frontend-connected"]),
                (200, Some("disk"), &true.into())
            );
            assert_eq!(counts_of(disk), all);
            let page = page(&place, "control");
            assert_eq!(counts_on(&page, "disk"), all);
            assert_eq!(value(&page, "sapwood_requests_in_flight{disk=\"disk\"}"), 0.0);
            let (least, most) = (
                &disk["account"]["write"]["latency"]["p50-us"],
                &disk["account"]["write"]["latency"]["max-us"],
            );
            assert!(least.as_f64() > Some(0.0) && least.as_f64() <= most.as_f64(), "{disk}");
        }
        let written = ask_at(&place, "control", "GET", "/v1/statistics", "").1["disks"][0]["layer"].clone();
        assert!(written["written-bytes"]["guest"].as_u64() > Some(0), "{written}");
        let stream = UnixStream::connect(place.path("control")).unwrap();
        let (head, body) =
            get(stream, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        assert!(body.ends_with("# EOF\n"), "{body}");
        server.stops();
    }
}

#[test]
fn a_daemon_counts_for_each_of_its_disks() {
    let (place, mut rng) = (place(), Rng::new(3));
    for name in ["web", "db"] {
        about(&place, &format!("create :{name} 8M")).text();
    }
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    let mut counted = BTreeMap::new();
    for name in ["web", "db"] {
        about(&place, &format!("attach :{name} --socket {name}.sock")).text();
        let mut frontend = connect(&place, &format!("{name}.sock"));
        let first = work(&mut frontend, &mut rng, 10);
        // It goes on in a new layer.
        about(&place, &format!("snapshot :{name}@s")).text();
        let mut all = work(&mut frontend, &mut rng, 10);
        for (kind, (operations, bytes)) in first.0 {
            let sum = all.0.entry(kind).or_default();
            *sum = (sum.0 + operations, sum.1 + bytes);
        }
        counted.insert(name, all);
    }
    about(&place, "attach :web@s --socket s.sock").text();
    connect(&place, "s.sock").run(Command::Read(0, BLOCK)).unwrap();
    let (_, said) = ask_at(&place, "vms/daemon.sock", "GET", "/v1/statistics", "");
    let names: Vec<_> =
        said["disks"].as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["db", "web", "web@s"]);
    let page = page(&place, "vms/daemon.sock");
    for (disk, counts) in said["disks"].as_array().unwrap().iter().zip([&counted["db"], &counted["web"]]) {
        assert_eq!((&counts_of(disk), &counts_on(&page, disk["name"].as_str().unwrap())), (counts, counts));
    }
    assert_eq!(value(&page, "sapwood_requests_total{disk=\"web@s\",kind=\"read\"}"), 1.0);
    assert_eq!(value(&page, "sapwood_store_volumes"), 2.0);
    let stat = about(&place, "store stat vms --output=json").json();
    let taken = value(&page, "sapwood_store_files_bytes{part=\"packs\"}");
    assert_eq!(taken, stat["pack-bytes"].as_f64().unwrap());
    daemon.stops();
}

/// A port that nobody uses, at least now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn the_page_is_there_over_tcp_for_this_host_only() {
    let place = place();
    about(&place, "create :web 1M").text();
    place.sapwood("create disk 1M").text();
    for address in ["0.0.0.0:9123", "192.0.2.1:9123", "[::]:9123"] {
        place.sapwood(&format!("daemon --store vms --metrics {address}")).fails(64, &["other hosts"]);
        place.sapwood(&format!("serve disk --socket s --metrics {address}")).fails(64, &["other hosts"]);
    }
    place.sapwood("serve disk --socket s --metrics 9123").fails(64, &["127.0.0.1:9123"]);
    let get = |port: u16, path: &str| get(TcpStream::connect(("127.0.0.1", port)).unwrap(), path, "*/*");
    let port = free_port();
    let (daemon, _) =
        Daemon::start(&place, &format!("--store vms --no-background --metrics 127.0.0.1:{port}"));
    let (head, body) = get(port, "/metrics");
    assert!(head.contains("200 ok"), "{head}");
    assert_eq!(value(&body, "sapwood_store_volumes"), 1.0);
    for path in ["/v1", "/v1/store", "/v1/volumes", "/"] {
        assert!(get(port, path).0.contains("404 not found"), "nothing else is there");
    }
    let serve = format!("serve disk --socket s --metrics 127.0.0.1:{port}");
    place.sapwood(&serve).fails(1, &["cannot listen at 127.0.0.1", "in use"]);
    daemon.stops();
    let port = free_port();
    let (server, _) = Server::start(&place, &format!("disk --metrics 127.0.0.1:{port}"));
    assert_eq!(value(&get(port, "/metrics").1, "sapwood_disk_connected{disk=\"disk\"}"), 0.0);
    server.stops();
}
