//! The control socket: what it promises to programs, and what it bears from them.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::Place;
use crate::serve::Server;

const DOCUMENT: &str = include_str!("../../../../docs/control-api.json");

/// One request to the control socket and its answer: status and body.
pub fn ask(place: &Place, method: &str, path: &str, body: &str) -> (u16, Value) {
    ask_at(place, "control", method, path, body)
}

/// The same at another socket.
pub fn ask_at(place: &Place, socket: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(place.path(socket)).expect("it listens");
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer}"));
    assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}")))
}

/// Whether a job has ended, in one way or another.
pub fn has_ended(job: &Value) -> bool {
    !["waiting", "running"].contains(&job["state"].as_str().expect("a state"))
}

/// Waits for a job that was begun; how it is in the end.
pub fn finish(place: &Place, begun: &Value) -> Value {
    for _ in 0..2000 {
        let (status, job) = ask(place, "GET", &format!("/v1/jobs/{}", begun["id"]), "");
        assert_eq!(status, 200, "{job}");
        if has_ended(&job) {
            return job;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it does not end: {begun}");
}

/// A layer over a raw disk, served with a control socket.
fn served() -> (Place, Server) {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.raw_disk("other.raw");
    place.sapwood("create -b base.raw -F raw disk.layer").text();
    let (server, _) = Server::start(&place, "disk.layer --control control");
    (place, server)
}

/// What a document says, with a reference followed.
pub fn follow<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(reference) => document.pointer(&reference[1..]).expect("what it refers to"),
        None => value,
    }
}

/// Checks a value against a schema, as far as this document uses them.
pub fn fits(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = follow(document, schema);
    for name in schema["required"].as_array().into_iter().flatten() {
        assert!(value.get(name.as_str().expect("a name")).is_some(), "{at}: no {name} in {value}");
    }
    if let Some(values) = schema["enum"].as_array() {
        assert!(values.contains(value), "{at}: {value}");
    }
    let types = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        other => panic!("{at}: type {other:?}"),
    };
    assert!(types.iter().any(is), "{at}: {value} is none of {types:?}");
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(value) = value.get(name) {
            fits(document, schema, value, &format!("{at}.{name}"));
        }
    }
    for item in value.as_array().into_iter().flatten() {
        fits(document, &schema["items"], item, &format!("{at}[]"));
    }
}

#[test]
fn it_answers_as_its_document_says() {
    let (place, server) = served();
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let bodies = [
        ("/v1/disk/resize", json!({ "size": 16 << 20 })),
        ("/v1/disk/rebase", json!({ "base": "other.raw", "format": "raw" })),
        ("/v1/disk/commit", json!({})),
        ("/v1/disk/flatten", json!({})),
    ];
    let mut asked = 0;
    let mut ask_for = |method: &str, path: &str, body: &str, wanted: &str| {
        let (status, answer) = ask(&place, &method.to_uppercase(), &path.replace("{id}", "1"), body);
        let operation = &document["paths"][path][method];
        let responses = &operation["responses"];
        let said = responses.get(status.to_string()).unwrap_or(&responses["default"]);
        let schema = &follow(&document, said)["content"]["application/json"]["schema"];
        fits(&document, schema, &answer, &format!("{method} {path}"));
        assert_eq!(status.to_string(), wanted, "{method} {path}: {answer}");
        asked += 1;
        answer
    };
    for (path, body) in &bodies {
        ask_for("post", path, r#"{"nonsense": 1}"#, "400");
        let job = ask_for("post", path, &body.to_string(), "202");
        let job = finish(&place, &job);
        assert_eq!(job["state"], "done", "{job}");
    }
    let limits = "/v1/disk/limits";
    ask_for("post", limits, r#"{"nonsense": 1}"#, "400");
    ask_for("post", limits, r#"{"limits": {"iops": 1}}"#, "422");
    assert_eq!(
        ask_for("post", limits, r#"{"limits": {"iops-total": 9}, "reset": true}"#, "200"),
        json!({ "iops-total": 9 })
    );
    // A page for Prometheus is no JSON: `metrics.rs` has it.
    for (path, item) in document["paths"].as_object().unwrap().iter().filter(|(path, _)| *path != "/metrics")
    {
        for method in ["get", "delete"].iter().filter(|method| item.get(**method).is_some()) {
            ask_for(method, path, "", "200");
        }
        assert_eq!(ask(&place, "PUT", &path.replace("{id}", "1"), "").0, 405);
    }
    assert_eq!(asked, 2 * bodies.len() + 3 + 8, "everything in the document");
    server.stops();
    let info = place.sapwood("info --output=json disk.layer").json();
    assert_eq!((&info["virtual-size"], &info["backing-filename"]), (&json!(16 << 20), &Value::Null));
}

#[test]
fn what_cannot_be_done_is_said() {
    let (place, server) = served();
    let says = |(status, answer): (u16, Value), expected: u16, kind: &str, word: &str| {
        assert_eq!((status, answer["error"]["kind"].as_str()), (expected, Some(kind)), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    };
    says(ask(&place, "GET", "/v2/disk", ""), 404, "not-found", "path");
    says(ask(&place, "GET", "/v1/jobs/9", ""), 404, "not-found", "job");
    says(ask(&place, "DELETE", "/v1/jobs/-", ""), 404, "not-found", "job");
    says(ask(&place, "DELETE", "/v1/disk", ""), 405, "method", "method");
    says(ask(&place, "POST", "/v1/disk/resize", "{"), 400, "invalid", "body");
    says(ask(&place, "POST", "/v1/disk/rebase", "{}"), 400, "invalid", "base");
    says(ask(&place, "POST", "/v1/disk/flatten", &" ".repeat(65 << 10)), 413, "invalid", "limit");
    // What is only found out when it is tried.
    let fails = |path: &str, body: Value, kind: &str, word: &str| {
        let (status, job) = ask(&place, "POST", path, &body.to_string());
        assert_eq!(status, 202, "{job}");
        let job = finish(&place, &job);
        assert_eq!((&job["state"], &job["error"]["kind"]), (&json!("failed"), &json!(kind)), "{job}");
        assert!(job["error"]["message"].as_str().unwrap().contains(word), "{job}");
    };
    fails("/v1/disk/resize", json!({ "size": 1 << 20 }), "invalid", "shrink");
    fails("/v1/disk/resize", json!({ "size": 777 }), "invalid", "shrink");
    fails("/v1/disk/resize", json!({ "size": 777, "shrink": true }), "invalid", "multiple");
    fails("/v1/disk/rebase", json!({ "base": "none.raw", "format": "raw" }), "io", "none.raw");
    fails("/v1/disk/rebase", json!({ "base": "other.raw", "format": "vmdk" }), "invalid", "vmdk");
    fails("/v1/disk/rebase", json!({ "base": "other.raw" }), "failed", "-F raw");
    server.stops();
    let (server, _) = Server::start(&place, "--readonly disk.layer --control control");
    says(ask(&place, "POST", "/v1/disk/resize", r#"{"size": 0}"#), 422, "unsupported", "read-only");
    server.stops();
    let (server, _) = Server::start(&place, "-f raw other.raw --control control");
    says(ask(&place, "POST", "/v1/disk/flatten", ""), 422, "unsupported", "no layer");
    assert_eq!(ask(&place, "GET", "/v1/disk", "").1["format"], "raw");
    server.stops();
}

#[test]
fn the_socket_is_private_and_replaced_when_stale() {
    let (place, server) = served();
    let mode = place.path("control").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700 & mode, "nobody else may connect: {mode:o}");
    place.sapwood("create other.layer 1G").text();
    place
        .sapwood("serve other.layer --socket other --control control")
        .fails(1, &["control", "another process"]);
    assert!(!place.exists("other"), "nothing is left of it");
    drop(server);
    assert!(place.exists("control"), "killed");
    let (server, _) = Server::start(&place, "disk.layer --control control");
    server.stops();
    assert!(!place.exists("control"));
    std::fs::write(place.path("control"), "a file").unwrap();
    place.sapwood("serve disk.layer --socket socket --control control").fails(1, &["not a socket"]);
    assert!(!place.exists("socket"));
}

/// Memory that a process has, in bytes.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}

#[test]
fn hostile_peers_are_bounded() {
    let (place, server) = served();
    let connect = || UnixStream::connect(place.path("control")).expect("it listens");
    let before = memory(server.pid());
    // What is not HTTP, and heads and bodies without an end.
    let endless = [b"GET /v1 HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 4 << 20]].concat();
    let many = [b"GET /v1 HTTP/1.1\r\n".to_vec(), b"X: y\r\n".repeat(100_000)].concat();
    let long = [
        b"POST /v1/disk/flatten HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n".to_vec(),
        vec![b' '; 4 << 20],
    ]
    .concat();
    let path = [b"GET /".to_vec(), vec![b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n".to_vec()].concat();
    let chunks = [
        b"POST /v1/disk/flatten HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
        b"100\r\n".iter().copied().chain([b' '; 256]).chain(*b"\r\n").collect::<Vec<_>>().repeat(10_000),
    ]
    .concat();
    let deep = "[".repeat(60_000);
    let nested =
        format!("POST /v1/disk/resize HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{deep}", deep.len());
    let odd: [&[u8]; 10] = [
        &[0xff; 4096],
        &[0; 64],
        b"GET",
        b"\r\n\r\n\r\n",
        &endless,
        &many,
        &long,
        &path,
        &chunks,
        nested.as_bytes(),
    ];
    for bytes in odd {
        let mut stream = connect();
        // It may have had enough before it was all written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    // Who says nothing waits in vain; who comes when there are too many waits for those.
    let mut idle: Vec<UnixStream> = (0..50).map(|_| connect()).collect();
    let (status, _) = ask(&place, "GET", "/v1/disk", "");
    assert_eq!(status, 200, "in the end it is its turn");
    idle[0].set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let mut rest = Vec::new();
    let first = idle[0].read_to_end(&mut rest);
    assert!(!matches!(&first, Err(error) if error.kind() == ErrorKind::WouldBlock), "{first:?}: shut out");
    drop(idle);
    let grown = memory(server.pid()).saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes more");
    server.stops();
}
