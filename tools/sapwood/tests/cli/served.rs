//! Served disks, driven by a vhost-user client against a model: every base, with and without
//! io_uring, one and four queues; and what is there after a kill, a clean stop, a conversion.

use sapwood_tests::frontend::{Frontend, Options};
use sapwood_tests::model::{Model, Run};

use crate::harness::Place;
use crate::serve::Server;

const SIZE: u64 = 8 << 20;

/// A disk of [`SIZE`] to serve, and its format.
fn make(place: &Place, kind: &str) -> &'static str {
    match kind {
        "raw" => {
            place.raw_disk("disk");
            return "raw";
        }
        "layer over nothing" => place.sapwood("create disk 8M"),
        "layer over raw" => {
            place.raw_disk("base.raw");
            place.sapwood("create -b base.raw -F raw disk")
        }
        "layer over layer" => {
            place.raw_disk("base.raw");
            place.sapwood("create -b base.raw -F raw base.layer").text();
            place.sapwood("create -b base.layer disk")
        }
        other => panic!("{other}"),
    }
    .text();
    "layer"
}

fn connect(place: &Place, queues: usize) -> Frontend {
    let options = Options { queues, ..Options::default() };
    Frontend::connect(&place.path("socket"), &options).expect("the server takes it")
}

/// Serves a disk, lets `work` use it, and stops the server; cleanly if `clean`.
fn with_server(place: &Place, arguments: &str, queues: usize, clean: bool, work: impl FnOnce(&mut Frontend)) {
    let (server, _) = Server::start(place, &format!("{arguments} --queues {queues}"));
    let mut frontend = connect(place, queues);
    work(&mut frontend);
    drop(frontend);
    if clean {
        server.stops();
    }
}

fn random_requests(kind: &str) {
    agrees_with_a_model(kind, |place| ("disk".to_owned(), make(place, kind)));
}

/// Serves a disk that `make` makes, by its path and format, to random requests.
pub fn agrees_with_a_model(kind: &str, make: impl Fn(&Place) -> (String, &'static str)) {
    for (seed, engine, queues) in [(1, "uring", 1), (2, "uring", 4), (3, "blocking", 1), (4, "blocking", 4)] {
        let place = Place::new();
        let (disk, format) = make(&place);
        let serve = format!("--engine {engine} -f {format} {disk}");
        let mut model = Model::unknown(SIZE);
        model.discards_zero = true;
        let fits =
            |result: Result<(), _>| result.unwrap_or_else(|e| panic!("{kind}, {engine}, {queues}: {e}"));
        // Killed when idle: everything that was reported is there.
        with_server(&place, &serve, queues, false, |frontend| {
            fits(model.verify(frontend));
            fits(model.run(frontend, &Run { seed, ..Run::default() }).map(drop));
        });
        with_server(&place, &serve, queues, true, |frontend| {
            fits(model.verify(frontend));
            fits(model.run(frontend, &Run { seed: seed + 100, ..Run::default() }).map(drop));
        });
        assert!([0, 63].contains(&place.sapwood(&format!("check -f {format} {disk}")).code), "sound");
        place.sapwood(&format!("convert -f {format} -O raw {disk} copy")).text();
        for copy in [serve.as_str(), "--readonly -f raw copy"] {
            with_server(&place, copy, 1, true, |frontend| fits(model.verify(frontend)));
        }
    }
}

#[test]
fn raw_agrees_with_a_model() {
    random_requests("raw");
}

#[test]
fn a_layer_over_nothing_agrees_with_a_model() {
    random_requests("layer over nothing");
}

#[test]
fn a_layer_over_raw_agrees_with_a_model() {
    random_requests("layer over raw");
}

#[test]
fn a_layer_over_a_layer_agrees_with_a_model() {
    random_requests("layer over layer");
}

#[test]
fn qcow2_is_served_as_qemu_reads_it() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.qemu_img("convert -f raw -O qcow2 -c base.raw packed").text();
    place.qemu_img("create -q -f qcow2 -o extended_l2=on -b packed -F qcow2 disk").text();
    let write = place.command("qemu-io", "-f qcow2 disk -c").arg("write -q -P 9 1028k 5k").status();
    assert!(write.expect("qemu-io is installed").success());
    place.qemu_img("convert -f qcow2 -O raw disk theirs").text();
    for (engine, queues) in [("uring", 4), ("blocking", 1)] {
        // Learned from one, found in the other.
        let mut model = Model::unknown(SIZE);
        for disk in ["--allow-backing disk", "-f raw theirs"] {
            let serve = format!("--engine {engine} --readonly {disk}");
            with_server(&place, &serve, queues, true, |frontend| {
                model.verify(frontend).unwrap_or_else(|e| panic!("{engine}, {disk}: {e}"));
            });
        }
    }
}
