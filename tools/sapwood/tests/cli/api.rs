//! The daemon's API: what it promises to programs.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::control::{ask_at, fits, follow, has_ended};
use crate::daemon::Daemon;
use crate::harness::Place;
use crate::store::place;

const DOCUMENT: &str = include_str!("../../../../docs/daemon-api.json");
const SOCKET: &str = "vms/daemon.sock";

/// One request, checked against the document.
struct Api<'a> {
    place: &'a Place,
    document: Value,
    asked: BTreeSet<(String, String)>,
}

impl Api<'_> {
    /// Asks for a path as the document has it, with its parameters in place; the answer.
    fn ask(&mut self, method: &str, path: &str, parameters: &[&str], body: &Value, status: u16) -> Value {
        let (mut real, mut parameters) = (String::new(), parameters.iter());
        for piece in path.split('/').skip(1) {
            let piece = if piece.starts_with('{') { parameters.next().expect("a parameter") } else { piece };
            real += &format!("/{piece}");
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (got, answer) = ask_at(self.place, SOCKET, &method.to_uppercase(), &real, &body);
        assert_eq!(got, status, "{method} {real} {body}: {answer}");
        let responses = &self.document["paths"][path][method]["responses"];
        assert!(responses.is_object(), "{method} {path} is not documented");
        let said = responses.get(got.to_string()).unwrap_or(&responses["default"]);
        let schema = &follow(&self.document, said)["content"]["application/json"]["schema"];
        fits(&self.document, schema, &answer, &format!("{method} {path}"));
        if status < 300 {
            self.asked.insert((method.to_owned(), path.to_owned()));
        }
        answer
    }

    /// Has a job done, whose result must be as this schema says.
    fn job(&mut self, path: &str, parameters: &[&str], body: &Value, schema: Option<&str>) -> Value {
        let mut job = self.ask("post", path, parameters, body, 202);
        for _ in 0..2000 {
            job = self.ask("get", "/v1/jobs/{id}", &[&job["id"].to_string()], &Value::Null, 200);
            if has_ended(&job) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(job["state"], "done", "{path}: {job}");
        let result = job["result"].clone();
        if let Some(schema) = schema {
            fits(&self.document, &self.document["components"]["schemas"][schema].clone(), &result, path);
        }
        result
    }
}

const VOLUMES: &str = "/v1/volumes";
const VOLUME: &str = "/v1/volumes/{volume}";
const SNAPSHOTS: &str = "/v1/volumes/{volume}/snapshots";
const SNAPSHOT: &str = "/v1/volumes/{volume}/snapshots/{snapshot}";

fn volumes(api: &mut Api<'_>) {
    let none = Value::Null;
    api.ask("post", VOLUMES, &[], &json!({ "name": "web 1", "size": 1 << 20 }), 200);
    api.ask("post", VOLUMES, &[], &json!({ "name": "web 1", "size": 1 << 20 }), 409);
    api.ask("post", VOLUMES, &[], &json!({ "name": "a/b", "size": 1 << 20 }), 422);
    api.ask("post", VOLUMES, &[], &json!({ "name": "x", "size": 1, "colour": 1 }), 400);
    api.ask("post", VOLUMES, &[], &json!([]), 400);
    let path = |rest: &str| format!("{VOLUME}/{rest}");
    let web = "web%201";
    api.ask("post", &path("rename"), &[web], &json!({ "to": "f\u{f6}re" }), 200);
    let web = "f%C3%B6re";
    assert_eq!(api.ask("get", VOLUME, &[web], &none, 200)["name"], "f\u{f6}re");
    api.ask("post", &path("rename"), &[web], &json!({ "to": "web", "volume": "x" }), 400);
    api.ask("post", &path("rename"), &[web], &json!({ "to": "web" }), 200);
    api.ask("get", VOLUME, &["none"], &none, 404);
    api.ask("get", VOLUME, &["%ff"], &none, 400);
    let notes = json!({ "notes": { "protected": true, "description": "shop", "labels": { "a": "b" } } });
    api.ask("post", &path("notes"), &["web"], &notes, 200);
    let notes = json!({ "notes": { "protected": false, "labels": { "a": null } } });
    api.ask("post", &path("notes"), &["web"], &notes, 200);
    api.ask("post", SNAPSHOTS, &["web"], &json!({ "name": "s" }), 200);
    api.ask("post", &path("switch"), &["web"], &json!({ "to": "web@s" }), 200);
    api.ask("post", &path("rollback"), &["web"], &none, 200);
    let attach = json!({ "socket": api.place.path("socket"), "queues": 2, "transient": true });
    api.ask("post", &path("attach"), &["web"], &json!({ "socket": "socket" }), 422);
    api.ask("post", &path("attach"), &["web"], &attach, 200);
    api.ask("post", &path("attach"), &["web"], &attach, 409);
    api.ask("post", &path("attach"), &["none"], &json!({ "queues": "many" }), 400);
    assert_eq!(api.ask("get", VOLUME, &["web"], &none, 200)["attached"]["queues"], 2);
    assert_eq!(api.ask("get", "/v1/statistics", &[], &none, 200)["disks"][0]["name"], "web");
    api.job(&path("resize"), &["web"], &json!({ "size": 2 << 20 }), None);
    let resized = api.job(&path("resize"), &["web"], &json!({ "difference": 1 << 20 }), None);
    assert_eq!(resized["size"], 3 << 20);
    let read = json!({ "start": 512, "length": 1024 });
    assert_eq!(api.ask("post", &path("read"), &["web"], &read, 200)["data"], "00".repeat(1024));
    for (start, length) in [(1, 512), (0, 1), (3 << 20, 512), (u64::MAX - 511, 512), (0, 2 << 20)] {
        api.ask("post", &path("read"), &["web"], &json!({ "start": start, "length": length }), 422);
    }
    api.ask("post", &path("rollback"), &["web"], &none, 409);
    api.ask("post", &path("detach"), &["web"], &none, 200);
    api.ask("post", &path("detach"), &["web"], &none, 404);
    api.ask("delete", VOLUME, &["web"], &none, 409);
}

fn snapshots(api: &mut Api<'_>) {
    let none = Value::Null;
    let path = |rest: &str| format!("{SNAPSHOT}/{rest}");
    api.ask("post", &path("rename"), &["web", "s"], &json!({ "to": "t" }), 200);
    let notes = json!({ "notes": { "description": "first" } });
    api.ask("post", &path("notes"), &["web", "t"], &notes, 200);
    assert_eq!(api.ask("get", SNAPSHOT, &["web", "t"], &none, 200)["description"], "first");
    api.ask("get", SNAPSHOT, &["web", "none"], &none, 404);
    let made = api.ask("post", &path("clone"), &["web", "t"], &json!({ "names": ["a", "b"] }), 200);
    assert_eq!(made["made"][1]["name"], "b");
    api.ask("post", &path("attach"), &["web", "t"], &json!({ "socket": api.place.path("socket") }), 200);
    api.ask("delete", SNAPSHOT, &["web", "t"], &none, 409);
    api.ask("post", &path("detach"), &["web", "t"], &none, 200);
    let import = json!({ "volume": "disk", "path": api.place.path("disk.raw"), "format": "raw" });
    let imported = api.job("/v1/import", &[], &import, Some("Imported"));
    assert_eq!(imported["name"], "disk@imported");
    api.job(&path("seal"), &["disk", "imported"], &none, Some("Sealed"));
    let export = json!({ "path": api.place.path("archive") });
    let exported = api.job(&path("export"), &["disk", "imported"], &export, Some("Exported"));
    assert_eq!(exported["hash"], imported["hash"]);
    api.ask("post", &path("export"), &["disk", "imported"], &json!({}), 400);
    let diff = api.job(&path("diff"), &["disk", "imported"], &json!({ "from": "web@t" }), Some("Diff"));
    assert_eq!(diff["bytes"], 5 * 4096);
    assert_eq!(diff["extents"][0], json!({ "start": 0, "length": 4096 }));
    assert_eq!(api.ask("get", SNAPSHOTS, &["web"], &none, 200)["entries"][0]["name"], "web@t");
    api.ask("delete", SNAPSHOT, &["web", "t"], &none, 200);
    api.ask("delete", VOLUME, &["web"], &none, 200);
    api.ask("delete", VOLUME, &["disk"], &json!({ "with-snapshots": true }), 200);
}

fn limits(api: &mut Api<'_>) {
    let none = Value::Null;
    let [volume, group, limits] = ["/v1/volumes/{volume}/limits", "/v1/groups/{group}/limits", "/v1/limits"];
    let set = json!({ "limits": { "bps-total": 1 << 20 } });
    let set_group = api.ask("post", group, &["g"], &set, 200);
    assert_eq!(set_group["groups"]["g"]["limits"]["bps-total"], 1 << 20);
    api.ask("post", volume, &["a"], &json!({ "limits": { "weight": 7 }, "group": "g" }), 200);
    api.ask("post", volume, &["a"], &json!({ "group": "none" }), 404);
    api.ask("post", volume, &["a"], &json!({ "limits": { "weight": 1 << 20 } }), 422);
    api.ask("post", volume, &["a"], &json!({ "limits": { "weight": -1 } }), 400);
    api.ask("post", group, &["g"], &json!({ "parent": "g" }), 422);
    assert_eq!(api.ask("get", limits, &[], &none, 200)["volumes"]["a"]["group"], "g");
    api.ask("delete", "/v1/groups/{group}", &["g"], &none, 409);
    api.ask("post", volume, &["a"], &json!({ "reset": true, "group": null }), 200);
    api.ask("delete", "/v1/groups/{group}", &["g"], &none, 200);
    assert_eq!(api.ask("get", limits, &[], &none, 200), json!({ "groups": {}, "volumes": {} }));
}

fn whole(api: &mut Api<'_>) {
    let none = Value::Null;
    api.ask("get", "/v1", &[], &none, 200);
    api.ask("get", "/v1/openapi.json", &[], &none, 200);
    let settings = json!({ "quota": 1 << 30, "reserve": null, "watermarks": [80, 95] });
    api.ask("post", "/v1/store/settings", &[], &settings, 200);
    api.ask("post", "/v1/store/settings", &[], &json!({ "watermarks": [95, 80] }), 422);
    api.ask("post", "/v1/store/settings", &[], &json!({ "quota": 0 }), 422);
    let store = api.ask("get", "/v1/store", &[], &none, 200);
    assert_eq!((&store["quota"], &store["reserve"]), (&json!(1 << 30), &none));
    api.ask("post", "/v1/store/settings", &[], &json!({ "quota": null }), 200);
    let store = api.ask("get", "/v1/store", &[], &none, 200);
    assert_eq!((&store["quota"], &store["watermarks"]), (&none, &json!([80, 95])), "the rest stays");
    limits(api);
    api.job("/v1/store/seal", &[], &none, Some("Sealed"));
    api.job("/v1/store/account", &[], &none, Some("Accounted"));
    api.job("/v1/store/gc", &[], &json!({ "live-percent": 90 }), Some("Collected"));
    assert_eq!(api.job("/v1/store/check", &[], &none, Some("Checked"))["problems"], json!([]));
    assert_eq!(api.job("/v1/store/scrub", &[], &none, Some("Scrub"))["sound"], true);
    api.ask("post", "/v1/backup", &[], &none, 400);
    let copy = api.place.path("copy");
    let backup = api.job("/v1/backup", &[], &json!({ "path": copy }), Some("BackedUp"));
    assert_eq!((&backup["path"], &backup["without-heads"]), (&json!(copy), &json!([])));
    assert_eq!(api.ask("get", "/v1/tree", &[], &none, 200)["nameless"], 1);
    assert_eq!(api.ask("get", VOLUMES, &[], &none, 200)["entries"].as_array().unwrap().len(), 2);
    let events = api.ask("get", "/v1/events", &[], &none, 200);
    let kinds: Vec<&str> =
        events["events"].as_array().unwrap().iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds[..4], ["snapshot", "attached", "detached", "attached"]);
    let jobs = api.ask("get", "/v1/jobs", &[], &none, 200)["jobs"].clone();
    assert!(jobs.as_array().unwrap().iter().all(|job| job["state"] == "done" && job["result"].is_null()));
    api.ask("delete", "/v1/jobs/{id}", &["1"], &none, 200);
    api.ask("delete", "/v1/jobs/{id}", &["99"], &none, 404);
    api.ask("delete", "/v1/jobs/{id}", &["%ff"], &none, 404);
}

#[test]
fn the_daemon_answers_as_its_document_says() {
    let place = place();
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let mut api = Api { place: &place, document, asked: BTreeSet::new() };
    volumes(&mut api);
    snapshots(&mut api);
    whole(&mut api);
    let paths = api.document["paths"].as_object().unwrap();
    // A page for Prometheus is no JSON: `metrics.rs` has it.
    for (path, item) in paths.iter().filter(|(path, _)| *path != "/metrics") {
        for method in item.as_object().unwrap().keys().filter(|method| *method != "parameters") {
            assert!(api.asked.contains(&(method.clone(), path.clone())), "{method} {path} was not tried");
        }
    }
    for (method, path, status) in
        [("PUT", "/v1/volumes", 405), ("GET", "/v2/volumes", 404), ("GET", "/v1/x", 404)]
    {
        assert_eq!(ask_at(&place, SOCKET, method, path, "").0, status);
    }
    let long = "x".repeat(65 << 10);
    assert_eq!(ask_at(&place, SOCKET, "POST", "/v1/volumes", &long).0, 413);
    daemon.stops();
}
