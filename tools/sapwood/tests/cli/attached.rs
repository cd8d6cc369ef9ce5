//! What is attached outlives the daemon.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use sapwood_tests::frontend::Command;
use sapwood_tests::model::{Model, Run};
use serde_json::{Value, json};

use crate::control::{ask_at, has_ended};
use crate::daemon::{Daemon, connect};
use crate::harness::Place;
use crate::store::{about, place};

const START: &str = "--store vms --no-background";

/// Starts the daemon of the store, again where one was.
fn start(place: &Place) -> Daemon {
    Daemon::start(place, START).0
}

/// A store with a daemon, and these volumes attached, each with these options.
fn with_attached(volumes: &[(&str, &str)]) -> (Place, Daemon) {
    let place = place();
    let daemon = start(&place);
    for (name, options) in volumes {
        about(&place, &format!("create :{name} 8M")).text();
        about(&place, &format!("attach :{name} {options}")).text();
    }
    (place, daemon)
}

/// How a volume or snapshot is served now.
fn served(place: &Place, name: &str) -> Value {
    let mut entry = about(place, &format!("show --output=json {name}")).json();
    entry["attached"].take()
}

/// The file in which it is written down.
fn written_down(place: &Place, folder: &str) -> PathBuf {
    let names = fs::read_dir(place.path(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut found = names.filter(|path| path.extension().is_some_and(|end| end == "json"));
    let path = found.next().unwrap();
    assert!(found.next().is_none(), "one file");
    path
}

#[test]
fn what_was_attached_is_attached_again_until_it_is_detached() {
    let web = ("web", "--queues 3 --map-cache 8M --socket socket");
    let (place, daemon) = with_attached(&[web, ("db", "")]);
    about(&place, "snapshot :db@s").text();
    about(&place, "attach :db@s").text();
    let mut model = Model::zeroes(8 << 20);
    model.discards_zero = true;
    let mut frontend = connect(&place, "socket");
    model.run(&mut frontend, &Run { seed: 1, ..Run::default() }).unwrap();
    about(&place, "rename :db other").text();
    daemon.kill();
    drop(frontend);
    let daemon = start(&place);
    let mut frontend = connect(&place, "socket");
    model.verify(&mut frontend).unwrap();
    let web = served(&place, ":web");
    assert_eq!((&web["queues"], &web["socket"]), (&json!(3), &json!(place.path("socket"))), "{web}");
    // Where its guest looks for it, whatever it is called by now.
    let socket = place.path("vms/sockets/db.sock");
    assert_eq!(served(&place, ":other")["socket"], json!(socket.canonicalize().unwrap()));
    assert_eq!(served(&place, ":other@s")["read-only"], json!(true));
    let text = fs::read_to_string(written_down(&place, "vms/sockets")).unwrap();
    assert!(text.contains(r#""map-cache":8388608"#) && text.contains(r#""serial":"db""#), "{text}");
    model.run(&mut frontend, &Run { seed: 2, ..Run::default() }).unwrap();
    drop(frontend);
    about(&place, "detach :other@s").text();
    daemon.stops();
    assert!(!place.exists("socket") && !socket.exists(), "nobody is there");
    // Without the daemon, too.
    about(&place, "delete --with-snapshots :other").text();
    let daemon = start(&place);
    model.verify(&mut connect(&place, "socket")).unwrap();
    assert_eq!(about(&place, "list --output=json vms").json().as_array().unwrap().len(), 1);
    about(&place, "detach :web").text();
    daemon.kill();
    let daemon = start(&place);
    assert_eq!(served(&place, ":web"), Value::Null, "it was detached");
    daemon.stops();
}

#[test]
fn what_cannot_be_attached_again_keeps_nothing_else_from_it() {
    let options = ["a", "b", "c"].map(|name| (name, format!("--socket {name} --queues 2")));
    let (place, daemon) = with_attached(&options.each_ref().map(|(name, options)| (*name, options.as_str())));
    daemon.stops();
    fs::write(place.path("b"), "a file").unwrap();
    fs::create_dir(place.path("c")).unwrap();
    let daemon = start(&place);
    connect(&place, "a");
    for name in ["b", "c"] {
        let text = about(&place, &format!("show :{name}")).text();
        assert!(text.contains("could not be attached again: ") && text.contains("not a socket"), "{text}");
        assert_eq!(served(&place, &format!(":{name}")), Value::Null);
    }
    about(&place, "detach :c").text();
    about(&place, "detach :c").fails(1, &["c: it is not attached"]);
    assert!(!about(&place, "show :c").text().contains("attached"));
    daemon.kill();
    // The next one tries again.
    fs::remove_file(place.path("b")).unwrap();
    fs::remove_dir(place.path("c")).unwrap();
    let daemon = start(&place);
    connect(&place, "b");
    assert_eq!(served(&place, ":c"), Value::Null, "it was forgotten");
    daemon.stops();
    fs::write(place.path("b"), "a file").unwrap();
    let daemon = start(&place);
    // Elsewhere for a while, which changes nothing.
    let how = json!({ "transient": true }).to_string();
    for _ in 0..2 {
        assert_eq!(ask_at(&place, "vms/daemon.sock", "POST", "/v1/volumes/b/attach", &how).1["queues"], 1);
        connect(&place, "vms/sockets/b.sock");
        about(&place, "detach :b").text();
    }
    ask_at(&place, "vms/daemon.sock", "POST", "/v1/volumes/b/attach", &how);
    daemon.kill();
    fs::remove_file(place.path("b")).unwrap();
    let daemon = start(&place);
    assert_eq!(served(&place, ":b")["socket"], json!(place.path("b")));
    daemon.stops();
    // As it was.
    fs::write(place.path("b"), "a file").unwrap();
    let daemon = start(&place);
    fs::remove_file(place.path("b")).unwrap();
    about(&place, "attach :b").text();
    let b = served(&place, ":b");
    assert_eq!((&b["socket"], &b["queues"]), (&json!(place.path("b")), &json!(2)));
    daemon.stops();
    fs::write(place.path("b"), "a file").unwrap();
    let daemon = start(&place);
    // Elsewhere, and from now on there.
    about(&place, "attach :b --socket elsewhere").text();
    let log = daemon.stops();
    assert!(log.contains("/b: it cannot be attached again"), "{log}");
    let daemon = start(&place);
    connect(&place, "elsewhere");
    assert!(!about(&place, "show :b").text().contains("could not"));
    daemon.stops();
    let (daemon, _) = Daemon::start(&place, &format!("{START} --no-restore"));
    assert_eq!((served(&place, ":a"), served(&place, ":b")), (Value::Null, Value::Null));
    daemon.kill();
    let daemon = start(&place);
    assert_eq!(served(&place, ":a"), Value::Null, "that was forgotten, too");
    daemon.stops();
}

#[test]
fn a_copy_of_a_store_takes_no_socket_of_the_original() {
    let (place, daemon) = with_attached(&[("in", ""), ("out", "--socket out")]);
    daemon.stops();
    assert!(place.command("cp", "-a vms copy").status().unwrap().success());
    let (copy, _) = Daemon::start(&place, "--store copy --no-background");
    assert_eq!(served(&place, "copy:in")["socket"], json!(place.path("copy/sockets/in.sock")));
    assert_eq!(served(&place, "copy:out"), Value::Null);
    assert!(about(&place, "show copy:out").text().contains("attach it anew"));
    copy.stops();
    // It says so still, though its file was written anew.
    let (copy, _) = Daemon::start(&place, "--store copy --no-background");
    let daemon = start(&place);
    connect(&place, "out");
    assert_eq!(served(&place, "copy:out"), Value::Null);
    about(&place, "attach copy:out").text();
    assert_eq!(served(&place, "copy:out")["socket"], json!(place.path("copy/sockets/out.sock")));
    copy.stops();
    daemon.stops();
}

#[test]
fn what_is_asked_of_a_copy_is_not_done_to_the_original() {
    let place = place();
    // Its store holds a link to the socket.
    let (daemon, _) = Daemon::start(&place, "--store vms --socket control --sockets run --no-background");
    about(&place, "create :web 1M").text();
    assert!(place.path("vms/daemon.sock").is_symlink());
    assert!(place.command("cp", "-a vms copy").status().unwrap().success());
    place.sapwood("delete copy:web").text();
    place.sapwood("show copy:web").fails(1, &["web"]);
    about(&place, "show :web").text();
    daemon.stops();
}

#[test]
fn what_cannot_be_written_down_is_tried_again() {
    let (place, daemon) = with_attached(&[("web", "")]);
    let file = written_down(&place, "vms/sockets");
    daemon.stops();
    let in_the_way = file.with_extension("json.new");
    fs::create_dir(&in_the_way).unwrap();
    let daemon = start(&place);
    assert_eq!(served(&place, ":web")["queues"], 1, "there is nothing to write");
    for _ in 0..2 {
        about(&place, "detach :web").fails(1, &["cannot write down what is attached"]);
    }
    fs::remove_dir(&in_the_way).unwrap();
    about(&place, "detach :web").fails(1, &["it is not attached"]);
    daemon.kill();
    let daemon = start(&place);
    assert_eq!(served(&place, ":web"), Value::Null, "it was detached");
    daemon.stops();
}

#[test]
fn a_file_that_makes_no_sense_does_not_stop_the_daemon() {
    let place = place();
    about(&place, "create :web 1M").text();
    let start = format!("{START} --sockets run");
    let (daemon, _) = Daemon::start(&place, &start);
    about(&place, "attach :web").text();
    daemon.kill();
    let file = written_down(&place, "run");
    let sound = fs::read_to_string(&file).unwrap();
    let id = about(&place, "show --output=json :web").json()["id"].as_str().unwrap().to_owned();
    for (text, word) in [
        ("", "EOF"),
        (&sound[..sound.len() / 2], "EOF"),
        (&sound.replace(r#""version":0"#, r#""version":7"#), "version 7"),
        (&sound.replace(r#""queues":1"#, r#""queues":0"#), "queues"),
        (&sound.replace(&id, &"0".repeat(32)), "is deleted"),
        (&sound.replace(r#""socket":""#, r#""socket":"../"#), "absolute"),
    ] {
        assert_ne!(text, sound);
        fs::write(&file, text).unwrap();
        let (daemon, _) = Daemon::start(&place, &start);
        assert_eq!(served(&place, ":web"), Value::Null);
        if ["EOF", "version 7"].contains(&word) {
            assert_eq!(fs::read_to_string(file.with_extension("json.bad")).unwrap(), text, "it is kept");
        }
        let log = daemon.stops();
        assert!(log.contains(word), "no {word} in {log}");
    }
    // Named twice, it is attached once.
    let (start_of, entries) = sound.split_once('[').unwrap();
    let entry = entries.strip_suffix("]}").unwrap();
    fs::write(&file, format!("{start_of}[{entry},{entry}]}}")).unwrap();
    let (daemon, _) = Daemon::start(&place, &start);
    assert_eq!(served(&place, ":web")["queues"], 1);
    assert_eq!(fs::read_to_string(&file).unwrap().matches(&id).count(), 1, "and written down once");
    daemon.stops();
}

/// A volume with data in its layer, and a snapshot of the same, in a store with a daemon.
fn with_data() -> (Place, Daemon) {
    const STEP: usize = 64 << 10;
    let place = place();
    let daemon = start(&place);
    about(&place, "create :web 64M").text();
    about(&place, "attach :web --socket socket").text();
    let mut frontend = connect(&place, "socket");
    let mut write = |round: u8| {
        for n in 0..256 {
            let data: Vec<u8> = (0..STEP).map(|i| ((i / 4096) as u8 ^ n as u8 ^ round) | 128).collect();
            frontend.run(Command::Write(n * STEP as u64, &data)).unwrap();
        }
    };
    write(1);
    about(&place, "snapshot :web@s").text();
    write(2);
    drop(frontend);
    about(&place, "detach :web").text();
    (place, daemon)
}

/// What the daemon of the store answers.
pub fn api(place: &Place, method: &str, path: &str) -> Value {
    ask_at(place, "vms/daemon.sock", method, path, "").1
}

/// Waits for the end of a job.
pub fn end_of(place: &Place, job: &Value) -> Value {
    for _ in 0..6000 {
        let job = api(place, "GET", &format!("/v1/jobs/{}", job["id"]));
        if has_ended(&job) {
            return job;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("it does not end: {job}");
}

#[test]
fn jobs_say_how_far_they_are_and_end_when_told() {
    let (place, daemon) = with_data();
    let job = end_of(&place, &api(&place, "POST", "/v1/store/scrub"));
    assert_eq!(job["result"]["layers"], 2, "{job}");
    assert!(job["total-bytes"].as_u64().unwrap() > 32 << 20, "{job}");
    let diff = "/v1/volumes/web/snapshots/s/diff";
    let job = end_of(&place, &api(&place, "POST", diff));
    assert_eq!(job["result"]["bytes"], 16 << 20, "{job}");
    assert_eq!(job["total-bytes"], 64 << 20, "{job}");
    let is_cancelled = |_| {
        let job = api(&place, "POST", diff);
        api(&place, "DELETE", &format!("/v1/jobs/{}", job["id"]));
        end_of(&place, &job)["state"] == "cancelled"
    };
    // It may be done before it is told.
    assert!((0..100).any(is_cancelled));
    let copy = json!({ "path": place.path("copy") }).to_string();
    let (_, job) = ask_at(&place, "vms/daemon.sock", "POST", "/v1/backup", &copy);
    let job = end_of(&place, &job);
    assert!(job["total-bytes"].as_u64().unwrap() > 16 << 20, "{job}");
    about(&place, "store seal vms").text();
    for path in ["/v1/store/account", "/v1/store/gc"] {
        let job = end_of(&place, &api(&place, "POST", path));
        assert!(job["done-bytes"].as_u64().unwrap() > 4096, "{job}");
        assert_eq!(job["total-bytes"], 0, "nobody knows");
    }
    daemon.stops();
}
