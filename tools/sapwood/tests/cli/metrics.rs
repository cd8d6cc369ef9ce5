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

/// The counts of a data path in JSON, in the order of their names.
fn path_of(said: &Value) -> [u64; 8] {
    let count =
        |name: &str| said["data-path"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {said}"));
    [
        "first-writes",
        "frame-hits",
        "frame-misses",
        "joined-flushes",
        "joined-writes",
        "map-hits",
        "map-misses",
        "merged-blocks",
    ]
    .map(count)
}

/// The same on a page; `labels` say whose they are, as in `disk="web"`.
fn path_on(page: &str, prefix: &str, labels: &str) -> [u64; 8] {
    let count =
        |name: &str, more: &str| value(page, &format!("{prefix}{name}_total{{{labels}{more}}}")) as u64;
    let [map, frames] = [",cache=\"map\"", ",cache=\"frames\""];
    [
        count("first_writes", ""),
        count("cache_hits", frames),
        count("cache_misses", frames),
        count("joined_requests", ",kind=\"flush\""),
        count("joined_requests", ",kind=\"write\""),
        count("cache_hits", map),
        count("cache_misses", map),
        count("merged_blocks", ""),
    ]
}

#[test]
fn what_requests_are_for_the_layer_is_counted_exactly() {
    for engine in ["uring", "blocking"] {
        let place = Place::new();
        std::fs::write(place.path("base"), vec![1; SIZE as usize]).unwrap();
        place.sapwood("create -b base -F raw disk").text();
        let (server, _) = Server::start(&place, &format!("--engine {engine} disk --control control"));
        let mut frontend = Frontend::connect(&place.path("socket"), &Options::default()).unwrap();
        let mut run = |command| frontend.run(command).unwrap();
        let block = BLOCK as u64;
        run(Command::Write(0, &[2; 4 * BLOCK])); // 4 for the first time.
        run(Command::Write(block, &[3; 2 * BLOCK])); // None.
        run(Command::Write(10 * block + 512, &[4; BLOCK])); // 2, each merged with what lies below.
        run(Command::Write(10 * block, &[5; 512])); // 1 merged with what the layer holds.
        run(Command::Discard(0, 2 * block));
        run(Command::Write(0, &[6; BLOCK])); // 1 again.
        run(Command::WriteZeroes(20 * block, 3 * block - 512, false)); // 1, the last, of which the layer held nothing: it is merged.
        run(Command::Write(20 * block, &[7; BLOCK])); // 1 that was zero.
        run(Command::Read(0, 16 * BLOCK));
        run(Command::Flush);
        // First writes, frames, joined, the map by hits and misses, merged.
        let expected = [9, 0, 0, 0, 0, 9, 0, 4];
        let (_, said) = ask_at(&place, "control", "GET", "/v1/statistics", "");
        assert_eq!(path_of(&said["disks"][0]), expected, "{said}");
        assert_eq!(path_on(&page(&place, "control"), "sapwood_", "disk=\"disk\""), expected);
        // 32 at once: whoever finds the log busy is joined. The first one goes alone or with others.
        let queue = &mut frontend.queues[0];
        for tag in 0..32 {
            queue.submit(tag, Command::Write(tag * block, &[8; BLOCK])).unwrap();
        }
        queue.kick().unwrap();
        while queue.outstanding() > 0 {
            queue.poll(|finished| finished.result.unwrap());
            assert!(queue.outstanding() == 0 || queue.wait(std::time::Duration::from_secs(20)).unwrap());
        }
        let (_, said) = ask_at(&place, "control", "GET", "/v1/statistics", "");
        let [.., joined, _, _, _] = path_of(&said["disks"][0]);
        assert!((1..32).contains(&joined), "{said}");
        server.stops();
    }
}

/// What JSON and the page say of a group, which are the same.
fn counts_of_group(said: &Value, page: &str, group: &str) -> (Counts, u64) {
    let groups = said["groups"].as_array().unwrap();
    let found = groups.iter().find(|found| found["name"] == group).unwrap();
    let counts = counts_of(found);
    for (kind, (operations, bytes)) in &counts.0 {
        let on =
            |name: &str| value(page, &format!("sapwood_group_{name}{{group=\"{group}\",kind=\"{kind}\"}}"));
        assert_eq!((on("requests_total"), on("request_bytes_total")), (*operations as f64, *bytes as f64));
        assert_eq!(on("request_duration_seconds_count"), *operations as f64);
    }
    if !found["data-path"].is_null() {
        assert_eq!(path_on(page, "sapwood_group_", &format!("group=\"{group}\"")), path_of(found));
    }
    (counts, found["disks"].as_u64().unwrap())
}

#[test]
fn groups_count_what_their_disks_did_in_them() {
    let (place, mut rng) = (place(), Rng::new(4));
    for name in ["web", "db"] {
        about(&place, &format!("create :{name} 8M")).text();
    }
    let limit = |what: &str| about(&place, &format!("limit {what}")).text();
    for command in ["--group outer --weight 5", "--group inner --in-group outer", "--group other --weight 9"]
    {
        limit(&format!("--store vms {command}"));
    }
    limit(":web --in-group inner");
    limit(":db --in-group outer");
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    let attach = |name: &str| about(&place, &format!("attach :{name} --socket {name}.sock")).text();
    let look = || {
        let (_, said) = ask_at(&place, "vms/daemon.sock", "GET", "/v1/statistics", "");
        (said, page(&place, "vms/daemon.sock"))
    };
    let sum = |parts: &[&Counts]| {
        let mut sum = Counts(KINDS.map(|kind| (kind, (0, 0))).into_iter().collect());
        for (kind, (operations, bytes)) in parts.iter().flat_map(|counts| &counts.0) {
            let of = sum.0.get_mut(kind).unwrap();
            *of = (of.0 + operations, of.1 + bytes);
        }
        sum
    };
    ["web", "db"].into_iter().for_each(|name| drop(attach(name)));
    let web = work(&mut connect(&place, "web.sock"), &mut rng, 10);
    let db = work(&mut connect(&place, "db.sock"), &mut rng, 10);
    let (said, page) = look();
    assert_eq!(counts_of_group(&said, &page, "inner"), (sum(&[&web]), 1));
    assert_eq!(counts_of_group(&said, &page, "outer"), (sum(&[&web, &db]), 2));
    assert_eq!(counts_of_group(&said, &page, "other"), (sum(&[]), 0));
    assert_eq!(path_of(&said["groups"][0]), path_of(&said["disks"][1]), "inner has web alone");
    assert_eq!((&said["disks"][1]["group"], &said["groups"][0]["group"]), (&"inner".into(), &"outer".into()));
    assert_eq!(value(&page, "sapwood_disk_group{disk=\"web\",group=\"inner\"}"), 1.0);
    // A disk that leaves takes nothing away, of what nobody has looked at either.
    let db = sum(&[&db, &work(&mut connect(&place, "db.sock"), &mut rng, 5)]);
    about(&place, "detach :db").text();
    let (said, page) = look();
    assert_eq!(counts_of_group(&said, &page, "outer"), (sum(&[&web, &db]), 1));
    // It begins anew elsewhere.
    let web = sum(&[&web, &work(&mut connect(&place, "web.sock"), &mut rng, 5)]);
    limit(":web --in-group other");
    let more = work(&mut connect(&place, "web.sock"), &mut rng, 10);
    let (said, page) = look();
    assert_eq!(counts_of_group(&said, &page, "inner"), (sum(&[&web]), 0));
    assert_eq!(counts_of_group(&said, &page, "outer"), (sum(&[&web, &db]), 0));
    assert_eq!(counts_of_group(&said, &page, "other"), (sum(&[&more]), 1));
    // A group goes into another one, with what its disks do from then on.
    limit("--store vms --group other --in-group inner");
    attach("db");
    let again = work(&mut connect(&place, "db.sock"), &mut rng, 10);
    let last = work(&mut connect(&place, "web.sock"), &mut rng, 10);
    let (said, page) = look();
    assert_eq!(counts_of_group(&said, &page, "other"), (sum(&[&more, &last]), 1));
    assert_eq!(counts_of_group(&said, &page, "inner"), (sum(&[&web, &last]), 1));
    assert_eq!(counts_of_group(&said, &page, "outer"), (sum(&[&web, &db, &again, &last]), 2));
    daemon.stops();
}

#[test]
fn gains_of_the_store_are_on_the_page() {
    let place = place();
    let mut content = vec![3; 64 * BLOCK];
    content[..BLOCK].fill(9);
    content[32 * BLOCK..].fill(0);
    std::fs::write(place.path("raw"), &content).unwrap();
    about(&place, "create :web 8M").text();
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    about(&place, "import raw :disk -f raw").text();
    about(&place, "attach :web --socket web.sock").text();
    connect(&place, "web.sock").run(Command::Write(0, &[1; 8 * BLOCK])).unwrap();
    let before = page(&place, "vms/daemon.sock");
    assert!(!before.contains("sapwood_store_unique_bytes"), "nobody has counted yet");
    let result =
        |page: &str, result: &str| value(page, &format!("sapwood_sealed_bytes_total{{result=\"{result}\"}}"));
    let block = BLOCK as f64;
    assert_eq!(
        ["zero", "duplicate", "unique"].map(|kind| result(&before, kind)),
        [32.0 * block, 30.0 * block, 2.0 * block]
    );
    about(&place, "store account vms").text();
    let page = page(&place, "vms/daemon.sock");
    let stat = about(&place, "store stat vms --output=json").json();
    // Each different block of a snapshot once.
    assert_eq!(value(&page, "sapwood_store_referenced_bytes"), 2.0 * block);
    assert_eq!(value(&page, "sapwood_store_unique_bytes"), 2.0 * block);
    assert_eq!(value(&page, "sapwood_store_deduplication_ratio"), 1.0);
    let (_, said) = ask_at(&place, "vms/daemon.sock", "GET", "/v1/statistics", "");
    assert_eq!(said["seals"]["duplicate-bytes"].as_f64(), Some(30.0 * block));
    for (metric, field, unit) in [
        ("sapwood_store_referenced_bytes", "referenced-bytes", 1.0),
        ("sapwood_store_unique_bytes", "unique-bytes", 1.0),
        ("sapwood_store_stored_bytes", "stored-bytes", 1.0),
        ("sapwood_store_pack_blocks_bytes", "block-bytes", 1.0),
        ("sapwood_store_account_timestamp_seconds", "account-ms", 1e3),
    ] {
        assert_eq!(Some(value(&page, metric) * unit), stat[field].as_f64(), "{metric}");
    }
    let allocated =
        |volume: &str| value(&page, &format!("sapwood_volume_allocated_bytes{{volume=\"{volume}\"}}"));
    assert!(allocated("web") >= 8.0 * block && allocated("disk") <= allocated("web"), "{page}");
    assert_eq!(allocated("web") + allocated("disk"), stat["layer-bytes"].as_f64().unwrap());
    daemon.stops();
}

/// A port that nobody uses, at least now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_volume_that_is_served_without_a_daemon_has_numbers_too() {
    let (place, mut rng) = (place(), Rng::new(5));
    about(&place, "create :web 8M").text();
    about(&place, "limit --store vms --group g --iops 900000").text();
    about(&place, "limit :web --in-group g --bps 900G").text();
    let port = free_port();
    let serve = format!("vms:web --control control --metrics 127.0.0.1:{port}");
    let (server, _) = Server::start(&place, &serve);
    let mut frontend = Frontend::connect(&place.path("socket"), &Options::default()).unwrap();
    let counts = work(&mut frontend, &mut rng, 10);
    let (status, said) = ask_at(&place, "control", "GET", "/v1/statistics", "");
    assert_eq!((status, said["disks"][0]["name"].as_str()), (200, Some("web")));
    let page = page(&place, "control");
    assert_eq!((counts_of(&said["disks"][0]), counts_on(&page, "web")), (counts.clone(), counts.clone()));
    assert_eq!(counts_of_group(&said, &page, "g"), (counts.clone(), 1));
    let (_, body) = get(TcpStream::connect(("127.0.0.1", port)).unwrap(), "/metrics", "*/*");
    assert_eq!((counts_on(&body, "web"), value(&body, "sapwood_store_volumes")), (counts, 1.0));
    for path in ["/v1/volumes", "/v1/store", "/v1/disk"] {
        assert_eq!(ask_at(&place, "control", "GET", path, "").0, 404, "numbers alone");
    }
    let shown = place.sapwood("top --control control --once --interval 1").text();
    let line = |name: &str| {
        let line = shown.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name}: {shown}")).to_owned()
    };
    assert!(line("web ").contains("(g)") && line("web ").ends_with("bps 900 GiB"), "{shown}");
    assert!(line("(g) ").ends_with("iops 900000"), "{shown}");
    server.stops();
    assert!(!place.path("control").exists());
    // What cannot listen serves nothing, and leaves the store.
    let refused = "serve vms:web --socket s --control none/control";
    place.sapwood(refused).fails(1, &["none/control"]);
    about(&place, "list vms").text();
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
