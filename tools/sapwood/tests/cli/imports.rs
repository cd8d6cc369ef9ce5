//! Imports at the same time: they take turns, so that what they have in common is stored once.

#![allow(clippy::unwrap_used)] // A test, though not in a `#[test]` function.

use std::fs;

use serde_json::{Value, json};

use crate::attached::{api, end_of};
use crate::control::ask_at;
use crate::daemon::Daemon;
use crate::harness::Place;
use crate::store::{about, place};

const START: &str = "--store vms --no-background";
const BYTES: usize = 32 << 20;

/// A raw disk that cannot be compressed, in `large.raw`.
fn large_disk(place: &Place) {
    let mut state: u64 = 1;
    let words = (0..BYTES / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    fs::write(place.path("large.raw"), words.collect::<Vec<u8>>()).unwrap();
}

/// Has the daemon begin to import the disk.
fn begin(place: &Place, volume: &str) -> Value {
    let import = json!({ "volume": volume, "path": place.path("large.raw"), "format": "raw" });
    let (status, job) = ask_at(place, "vms/daemon.sock", "POST", "/v1/import", &import.to_string());
    assert_eq!(status, 202, "{job}");
    job
}

/// Bytes of all packs of a store.
fn pack_bytes(place: &Place, store: &str) -> u64 {
    let packs = fs::read_dir(place.path(store).join("packs")).unwrap();
    packs.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn what_imports_at_the_same_time_have_in_common_is_stored_once() {
    let place = place();
    large_disk(&place);
    place.sapwood("store init -q other").text();
    for name in ["a", "b", "c"] {
        place.sapwood(&format!("import -q -f raw large.raw other:{name}")).text();
    }
    let (daemon, _) = Daemon::start(&place, START);
    let jobs = ["a", "b", "c"].map(|name| begin(&place, name));
    for job in jobs {
        let job = end_of(&place, &job);
        assert_eq!(job["state"], "done", "{job}");
    }
    let log = daemon.stops();
    // They were at the same time.
    assert!(log.contains("job 2: import waits for the end of job 1"), "{log}");
    assert_eq!(pack_bytes(&place, "vms"), pack_bytes(&place, "other"));
    assert!(pack_bytes(&place, "vms") < BYTES as u64 * 11 / 10);
}

#[test]
fn an_import_that_waits_is_cancelled_and_refuses_at_once_what_cannot_be() {
    let place = place();
    large_disk(&place);
    let (daemon, _) = Daemon::start(&place, START);
    about(&place, "create :taken 1M").text();
    let is_cancelled_while_it_waits = |n: usize| {
        let first = begin(&place, &format!("first-{n}"));
        let [waiting, taken] = [&format!("second-{n}"), "taken"].map(|name| begin(&place, name));
        let taken = end_of(&place, &taken);
        assert_eq!(taken["error"]["kind"], "exists", "{taken}");
        let path = format!("/v1/jobs/{}", waiting["id"]);
        let did_wait = api(&place, "DELETE", &path)["state"] == "waiting";
        let waiting = end_of(&place, &waiting);
        let is_first_done = end_of(&place, &first)["state"] == "done";
        is_first_done && did_wait && waiting["state"] == "cancelled"
    };
    // It may be its turn before it is told.
    assert!((0..50).any(is_cancelled_while_it_waits));
    let names = about(&place, "list vms").text();
    assert!(names.contains("first-0") && !names.contains("second-0") || names.contains("first-1"), "{names}");
    daemon.stops();
}
