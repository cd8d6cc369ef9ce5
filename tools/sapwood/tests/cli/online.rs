//! Commands to a running server, while a vhost-user client uses the disk and a model says what it
//! must hold.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::model::{Model, Run};
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as Messages, VhostUserFrontend};

use crate::control::{ask, finish};
use crate::harness::{Answer, Place, SAPWOOD};
use crate::serve::Server;

const SIZE: u64 = 8 << 20;

/// Two raw disks and a layer over a layer over the first.
fn place() -> Place {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.raw_disk("other.raw");
    place.damage("other.raw", 2 << 20, &[7; 9000]);
    place.sapwood("create -b base.raw -F raw mid.layer").text();
    place.sapwood("create -b mid.layer disk.layer").text();
    place
}

fn connect(place: &Place) -> Frontend {
    let options = Options { queues: 2, ..Options::default() };
    Frontend::connect(&place.path("socket"), &options).expect("the server takes it")
}

fn start(place: &Place) -> Server {
    Server::start(place, "disk.layer --queues 2 --control control").0
}

/// Runs a command while a guest writes at random and reads back.
fn meanwhile(place: &Place, frontend: &mut Frontend, model: &mut Model, seed: u64, line: &str) -> Answer {
    thread::scope(|scope| {
        let command = scope.spawn(|| place.sapwood(line));
        let mut runs = 0;
        // At least once more after it has ended.
        while !command.is_finished() || runs == 0 {
            let run = Run { seed: seed + runs, operations: 400, ..Run::default() };
            model.run(frontend, &run).unwrap_or_else(|error| panic!("{line}: {error}"));
            runs += 1;
        }
        command.join().expect("no panic")
    })
}

/// Compares the disk, which nobody serves, with the model, through qemu-img's eyes too.
fn holds(place: &Place, model: &mut Model) {
    let check = place.sapwood("check disk.layer");
    assert!([0, 3].contains(&check.code) && check.stdout.contains("No errors"), "{check:?}");
    place.sapwood("convert -O raw disk.layer copy.raw").text();
    place.qemu_img("convert -f raw -O raw copy.raw theirs.raw").text();
    let (server, _) = Server::start(place, "--readonly -f raw theirs.raw --queues 2");
    model.verify(&mut connect(place)).expect("the same");
    server.stops();
    for name in ["copy.raw", "theirs.raw"] {
        std::fs::remove_file(place.path(name)).expect("made above");
    }
}

#[test]
fn a_layer_is_flattened_and_rebased_under_a_guest() {
    let place = place();
    let server = start(&place);
    let mut frontend = connect(&place);
    let mut model = Model::unknown(SIZE);
    model.discards_zero = true;
    model.verify(&mut frontend).expect("it is learned");
    let moves = [
        (
            "rebase -b other.raw -F raw",
            "disk.layer lies over other.raw (raw) now and reads as before\n",
            "other.raw",
        ),
        (
            "rebase -b mid.layer",
            "disk.layer lies over mid.layer (layer) now and reads as before\n",
            "mid.layer",
        ),
        ("rebase -u -b base.raw -F raw", "not what was recorded", "base.raw"),
        ("flatten", "disk.layer needs no base any more\n", ""),
    ];
    for (seed, (line, said, base)) in (0..).zip(moves) {
        let line = format!("{line} --control control");
        let answer = if line.contains("-u") {
            // Nothing reads differently: the layer between holds nothing.
            place.sapwood(&line)
        } else {
            meanwhile(&place, &mut frontend, &mut model, 100 * seed, &line)
        };
        assert!(answer.text().contains(said), "{line}");
        model.verify(&mut frontend).unwrap_or_else(|error| panic!("{line}: {error}"));
        let info = place.sapwood("info --output=json --control control").json();
        assert_eq!(info["backing-filename"].as_str().unwrap_or(""), base, "{line}");
        assert_eq!(info["frontend-connected"], true);
    }
    let text = place.sapwood("info --control control").text();
    assert!(text.starts_with("image: disk.layer\nfile format: layer\nvirtual size: 8 MiB"), "{text}");
    place
        .sapwood("rebase -b base.raw -F raw --control control")
        .fails(1, &["disk.layer", "no base", "nobody"]);
    drop(frontend);
    server.stops();
    std::fs::remove_file(place.path("base.raw")).expect("it is not needed");
    holds(&place, &mut model);
}

#[test]
fn a_resize_is_seen_by_the_guest() {
    let place = place();
    let server = start(&place);
    {
        // A frontend that takes notices.
        let mut messages = Messages::connect(place.path("socket"), 1).unwrap();
        messages.set_owner().unwrap();
        let features = messages.get_features().unwrap();
        messages.set_features(features).unwrap();
        let protocol = messages.get_protocol_features().unwrap();
        messages.set_protocol_features(protocol & VhostUserProtocolFeatures::all()).unwrap();
        messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        messages.set_backend_request_fd(&theirs).unwrap();
        for (line, size) in [("+4M", SIZE + (4 << 20)), ("--shrink -- -8M", SIZE - (4 << 20))] {
            place.sapwood(&format!("resize --control control {line}")).text();
            let mut notice = [0; 12];
            (&ours).read_exact(&mut notice).unwrap();
            assert_eq!(notice[0], 2, "the configuration has changed: {notice:?}");
            let flags = VhostUserConfigFlags::empty();
            let (_, space) = messages.get_config(0, 60, flags, &[0; 60]).unwrap();
            assert_eq!(space[..8], (size / 512).to_le_bytes(), "{line}");
        }
    }
    let mut frontend = connect(&place);
    assert_eq!(frontend.size().unwrap(), SIZE / 2);
    let said = place.sapwood("resize --control control 16M").text();
    assert_eq!(said, "Resized disk.layer from 4 MiB (4194304 bytes) to 16 MiB (16777216 bytes)\n");
    assert_eq!(frontend.size().unwrap(), 16 << 20);
    // What was cut off does not come back, from the base neither.
    assert_eq!(frontend.run(Command::Read(SIZE - 4096, 4096)).unwrap(), [0; 4096]);
    frontend.run(Command::Write((16 << 20) - 512, &[9; 512])).unwrap();
    place.sapwood("resize --control control 8M").fails(1, &["disk.layer", "--shrink"]);
    place.sapwood("resize --control control 100").fails(1, &["disk.layer", "--shrink"]);
    place.sapwood("resize --shrink --control control 100").fails(1, &["disk.layer", "multiple"]);
    drop(frontend);
    server.stops();
    assert_eq!(place.sapwood("info --output=json disk.layer").json()["virtual-size"], 16 << 20);
}

#[test]
fn a_raw_disk_grows_under_a_guest() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let (server, _) = Server::start(&place, "-f raw disk.raw --queues 2 --control control");
    let mut frontend = connect(&place);
    place.sapwood("resize --control control +1M").text();
    assert_eq!(frontend.size().unwrap(), SIZE + (1 << 20));
    frontend.run(Command::Write(SIZE, &[3; 512])).unwrap();
    place.sapwood("resize --shrink --control control 4M").fails(1, &["disk.raw", "only grow"]);
    place.sapwood("flatten --control control").fails(1, &["disk.raw", "no layer"]);
    server.stops();
}

#[test]
fn the_command_line_knows_where_to_go() {
    let place = place();
    place.sapwood("resize --control control 10Q").fails(64, &["10G"]);
    for line in ["resize", "flatten", "rebase -b other.raw -F raw", "info", "commit"] {
        let size = if line == "resize" { " 16M" } else { "" };
        place
            .sapwood(&format!("{line} --control control disk.layer{size}"))
            .fails(64, &["--control", "cannot be used"]);
        place.sapwood(&format!("{line} --control control{size}")).fails(1, &["control", "cannot connect"]);
    }
    let server = start(&place);
    for line in [
        "resize disk.layer 16M",
        "flatten disk.layer",
        "rebase -b other.raw -F raw disk.layer",
        "commit disk.layer",
    ] {
        place.sapwood(line).fails(1, &["disk.layer", "in use by process", "--control"]);
    }
    assert_eq!(place.sapwood("flatten -q --control control").text(), "");
    // The other socket is none of this kind.
    place.sapwood("flatten --control socket").fails(1, &["socket"]);
    server.stops();
}

#[test]
fn a_job_that_is_cancelled_or_killed_leaves_the_disk() {
    let rebase = json!({ "base": "other.raw", "format": "raw" });
    let posts = [("flatten", json!({})), ("rebase", rebase), ("commit", json!({}))];
    for (round, (path, body)) in (0..).zip(posts.iter().cycle().take(12)) {
        let place = place();
        let server = start(&place);
        let mut frontend = connect(&place);
        let mut model = Model::unknown(SIZE);
        model.discards_zero = true;
        model.verify(&mut frontend).expect("it is learned");
        model.run(&mut frontend, &Run { seed: round, operations: 100, ..Run::default() }).expect("no faults");
        let (status, job) = ask(&place, "POST", &format!("/v1/disk/{path}"), &body.to_string());
        assert_eq!(status, 202, "{job}");
        if round < 3 {
            ask(&place, "DELETE", &format!("/v1/jobs/{}", job["id"]), "");
            let state = finish(&place, &job)["state"].clone();
            assert!(state == "cancelled" || state == "done", "{state}");
            let info = place.sapwood("info --output=json --control control").json();
            let is_old = info["backing-filename"] == "mid.layer";
            assert!(is_old == (state == "cancelled") || *path == "commit" && is_old, "{info}");
            assert_eq!(info["job"], Value::Null);
        } else {
            // Another moment every time; whichever it is, the disk is the same.
            thread::sleep(Duration::from_micros(700 * (round - 3)));
        }
        drop((frontend, server));
        if *path == "commit" {
            // Only together with its base it is the disk, until it was finished; whoever serves it does that.
            let map = place.sapwood("map disk.layer");
            if map.code != 0 {
                map.fails(1, &["disk.layer", "finish that first (sapwood commit disk.layer)"]);
            }
            if round % 2 == 0 {
                start(&place).stops();
            } else {
                place.sapwood("commit disk.layer").text();
            }
        }
        holds(&place, &mut model);
        let server = start(&place);
        place.sapwood("flatten --control control").text();
        server.stops();
        holds(&place, &mut model);
    }
}

/// Merges a layer over `base`, of a format, into it, while a guest writes.
pub fn merges_under_a_guest(base: &str, format: &str, can_grow: bool) {
    let place = place();
    place.sapwood(&format!("rebase -u -b {base} -F {format} disk.layer")).text();
    let server = start(&place);
    let mut frontend = connect(&place);
    let mut model = Model::unknown(SIZE);
    model.discards_zero = true;
    model.verify(&mut frontend).expect("it is learned");
    for round in 0..3 {
        let answer = meanwhile(&place, &mut frontend, &mut model, 100 * round, "commit --control control");
        assert!(answer.text().starts_with("Merged disk.layer into "));
        model.verify(&mut frontend).unwrap_or_else(|error| panic!("{base}, {round}: {error}"));
    }
    // Nobody writes any more: the next one leaves nothing, but for what the cleaner is at, which has an end.
    let leaves_nothing = (0..20).any(|_| {
        place.sapwood("commit -q --control control").text();
        live_bytes(&place, "--control control") == 0
    });
    assert!(leaves_nothing, "{} bytes stay", live_bytes(&place, "--control control"));
    model.verify(&mut frontend).expect("the same");
    if can_grow {
        place.sapwood("resize --control control 9M").text();
        frontend.run(Command::Write(SIZE, &[5; 4096])).expect("room");
        place.sapwood("commit --control control").text();
        assert_eq!(live_bytes(&place, "--control control"), 0);
        place.sapwood("resize -q --shrink --control control 8M").text();
    }
    drop(frontend);
    server.stops();
    holds(&place, &mut model);
    assert!([0, 63].contains(&place.sapwood(&format!("check -f {format} {base}")).code), "sound");
    place.sapwood(&format!("convert -f {format} -O raw {base} theirs.raw")).text();
    let (server, _) = Server::start(&place, "--readonly -f raw theirs.raw --queues 2");
    assert_eq!(connect(&place).size().expect("a size"), if can_grow { 9 << 20 } else { SIZE });
    model.verify(&mut connect(&place)).expect("the base alone is the disk");
    server.stops();
}

#[test]
fn a_layer_is_merged_into_a_raw_disk_under_a_guest() {
    merges_under_a_guest("base.raw", "raw", true);
}

#[test]
fn a_layer_is_merged_into_a_layer_under_a_guest() {
    merges_under_a_guest("mid.layer", "layer", true);
}

fn live_bytes(place: &Place, disk: &str) -> u64 {
    let info = place.sapwood(&format!("info --output=json {disk}")).json();
    info["format-specific"]["data"]["live-bytes"].as_u64().expect("of a layer")
}

#[test]
fn a_base_that_others_read_is_not_merged_into() {
    let place = place();
    place.sapwood("create -b mid.layer other.layer").text();
    let server = start(&place);
    let (other, _) = Server::start_at(&place, "other.layer", "other");
    place.sapwood("commit --control control").fails(1, &["mid.layer", "in use by process"]);
    other.stops();
    place.sapwood("commit -q --control control").text();
    place.sapwood("flatten -q --control control").text();
    place.sapwood("commit --control control").fails(1, &["disk.layer", "no base"]);
    server.stops();
    place.sapwood("info other.layer").fails(1, &["other.layer", "changed"]);
}

/// Answers at the control socket as `answer` says of the first line of each request, until that says
/// nothing.
fn pretend(
    place: &Place,
    answer: impl Fn(&str) -> Option<Vec<u8>> + Send + 'static,
) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(place.path("control")).expect("a free name");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut head = String::new();
            BufReader::new(&stream).read_line(&mut head).expect("a request");
            let Some(bytes) = answer(head.trim()) else { return };
            // The client may have had enough.
            let _ = stream.write_all(&bytes);
        }
    })
}

fn response(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[test]
fn the_first_interrupt_cancels_the_job() {
    let place = Place::new();
    let job = |state: &str| {
        let job = json!({ "id": 7, "kind": "flatten", "state": state, "done-bytes": 1, "total-bytes": 2 });
        Some(response(&job))
    };
    let (asked, is_asked) = channel();
    let server = pretend(&place, move |request| {
        let path = request.strip_suffix(" HTTP/1.1").expect("HTTP");
        match path {
            "GET /v1/disk" => Some(response(&json!({ "filename": "disk.layer" }))),
            "POST /v1/disk/flatten" => job("running"),
            "GET /v1/jobs/7" => {
                // Nobody listens after the first.
                let _ = asked.send(());
                job("running")
            }
            "DELETE /v1/jobs/7" => job("cancelled"),
            other => panic!("{other}"),
        }
    });
    let mut command = place.command(SAPWOOD, "flatten --control control");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    is_asked.recv().expect("it looks at the job");
    kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
    Answer::of(child.wait_with_output().expect("it ends")).fails(1, &["sapwood: cancelled"]);
    drop(server);
}

#[test]
fn a_server_of_another_kind_is_an_error() {
    let endless = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 4 << 20]].concat();
    let long_head = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 4 << 20]].concat();
    let answers = [
        b"".to_vec(),
        b"SSH-2.0-OpenSSH\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[1".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]".to_vec(),
        b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}".to_vec(),
        endless,
        long_head,
    ];
    for bytes in answers {
        let place = Place::new();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        let _server = pretend(&place, move |_| Some(bytes.clone()));
        for line in ["info --control control", "flatten --control control", "resize --control control +1M"] {
            let answer = place.sapwood(line);
            assert!(answer.code == 1 && !answer.stderr.contains("panicked"), "{shown}: {answer:?}");
        }
    }
}
