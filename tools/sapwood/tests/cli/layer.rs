//! Layers from the command line.

use std::fs;

use crate::harness::Place;

#[test]
fn a_layer_over_a_base_reads_as_the_base() {
    let place = Place::new();
    fs::create_dir(place.path("images")).unwrap();
    place.raw_disk("images/base.raw");
    let before = place.bytes("images/base.raw");
    place.sapwood("create -b base.raw -F raw images/vm.layer").text();
    let info = place.sapwood("info --output=json images/vm.layer").json();
    assert_eq!(info["virtual-size"], 8 << 20);
    assert_eq!(info["backing-filename"], "base.raw", "as given");
    assert_eq!(info["full-backing-filename"], "images/base.raw", "from here");
    assert_eq!(info["backing-filename-format"], "raw");
    place.sapwood("convert -O raw images/vm.layer out.raw").text();
    place.qemu_img("compare -s -f raw -F raw images/base.raw out.raw").text();
    place.sapwood("compare -s -F raw images/vm.layer out.raw").text();
    assert!(place.bytes("images/base.raw") == before, "the base is untouched");
}

#[test]
fn layers_stack_and_flatten() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.sapwood("create -b base.raw -F raw lower.layer").text();
    place.sapwood("create -b lower.layer upper.layer 12M").text();
    place.sapwood("convert -O layer upper.layer flat.layer").text();
    let flat = place.sapwood("info --output=json flat.layer").json();
    assert_eq!(flat["virtual-size"], 12 << 20);
    assert_eq!(flat["backing-filename"], serde_json::Value::Null);
    place.sapwood("compare -s upper.layer flat.layer").text();
    place.sapwood("convert -O raw flat.layer out.raw").text();
    place.qemu_img("compare -f raw -F raw base.raw out.raw").text();
    for layer in ["lower.layer", "upper.layer", "flat.layer"] {
        assert!(place.sapwood(&format!("check {layer}")).text().contains("No errors"), "{layer}");
    }
}

#[test]
fn create_knows_what_it_needs() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.sapwood("create new.layer").fails(1, &["SIZE", "-b"]);
    place.sapwood("create -F raw new.layer 1G").fails(1, &["-b"]);
    place.sapwood("create -b base.raw new.layer").fails(1, &["base.raw", "-F raw"]);
    place.sapwood("create -b none.raw -F raw new.layer").fails(1, &["none.raw"]);
    place.sapwood("create -o cluster_size=1 new.layer 1G").fails(1, &["cluster_size=1", "backing_file"]);
    assert!(!place.exists("new.layer"));
    place.sapwood("create -o backing_file=base.raw,backing_fmt=raw new.layer").text();
    let before = place.bytes("new.layer");
    place.sapwood("create new.layer 1G").fails(1, &["new.layer", "exists"]);
    assert!(place.bytes("new.layer") == before, "untouched");
}

#[test]
fn a_changed_base_is_refused() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.sapwood("create -b base.raw -F raw vm.layer").text();
    place.damage("base.raw", 0, b"changed");
    place.sapwood("convert -O raw vm.layer out.raw").fails(1, &["base.raw"]);
    assert!(!place.exists("out.raw"));
}

#[test]
fn map_names_the_file_of_each_extent() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.sapwood("create -b base.raw -F raw vm.layer 9M").text();
    let map = place.sapwood("map --output=json vm.layer").json();
    let entries = map.as_array().unwrap();
    let mut at = 0;
    for entry in entries {
        assert_eq!(entry["start"].as_u64(), Some(at), "no gaps: {entry}");
        at += entry["length"].as_u64().unwrap();
        if entry["data"] == true {
            assert_eq!((entry["depth"].as_u64(), entry["filename"].as_str()), (Some(1), Some("base.raw")));
        }
    }
    assert_eq!(at, 9 << 20);
    let data: u64 = entries.iter().filter(|e| e["data"] == true).map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(data, 5 * 4096, "four pieces, one of which lies across two blocks");
}

#[test]
fn resize_keeps_a_layer_sound() {
    let place = Place::new();
    place.raw_disk("base.raw");
    place.sapwood("create -b base.raw -F raw vm.layer").text();
    place.sapwood("resize --shrink vm.layer 2M").text();
    place.sapwood("resize vm.layer +6M").text();
    place.sapwood("check vm.layer").text();
    place.sapwood("convert -O raw vm.layer out.raw").text();
    let (out, base) = (place.bytes("out.raw"), place.bytes("base.raw"));
    assert!(out[..2 << 20] == base[..2 << 20]);
    assert!(out[2 << 20..].iter().all(|byte| *byte == 0), "what was cut off does not come back");
}

#[test]
fn check_finds_damaged_data() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    place.sapwood("convert -f raw -O layer disk.raw vm.layer").text();
    let map = place.sapwood("map --output=json vm.layer").json();
    let offset = map.as_array().unwrap().iter().find_map(|entry| entry["offset"].as_u64()).unwrap();
    place.damage("vm.layer", offset + 100, b"damage");
    let answer = place.sapwood("check vm.layer");
    assert_eq!(answer.code, 2, "{answer:?}");
    assert!(answer.stdout.contains("ERROR") && answer.stdout.contains("checksum"), "{answer:?}");
    let json: serde_json::Value =
        serde_json::from_str(&place.sapwood("check --output=json vm.layer").stdout).unwrap();
    assert_eq!(json["corruptions"], 1);
}
