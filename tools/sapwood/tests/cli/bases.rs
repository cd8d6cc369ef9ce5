//! Bases that are changed, moved and merged into, from the command line.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::harness::Place;

/// Raw disks `old.raw` (8 MiB) and `new.raw` (5 MiB, otherwise filled), a layer `mid.layer` over the first
/// and `top.layer` (12 MiB) over that, both with data of their own.
fn place() -> Place {
    let place = Place::new();
    place.raw_disk("old.raw");
    let new = fs::File::create_new(place.path("new.raw")).expect("a new file");
    new.set_len(5 << 20).expect("a size");
    for (mark, at) in [(0x91, 0), (0x92, 3 << 20), (0x93, (5 << 20) - 4096)] {
        new.write_all_at(&[mark; 4096], at).expect("space");
    }
    fill(&place, "mid.layer", "-b old.raw -F raw", 8 << 20, &[(0xa1, 512), (0xa2, 2 << 20)]);
    fill(&place, "top.layer", "-b mid.layer", 12 << 20, &[(0xb1, 2 << 20), (0xb2, (11 << 20) + 512)]);
    place
}

/// Makes a layer over a base and writes marks into it: a copy of what it reads, changed, is rebased
/// onto the base.
fn fill(place: &Place, name: &str, base: &str, size: u64, marks: &[(u8, u64)]) {
    place.sapwood(&format!("create {base} {name} {size}")).text();
    place.sapwood(&format!("convert -O raw {name} filled.raw")).text();
    let file = fs::OpenOptions::new().write(true).open(place.path("filled.raw")).expect("the copy");
    for &(mark, at) in marks {
        file.write_all_at(&[mark; 4096], at).expect("space");
    }
    drop(file);
    fs::remove_file(place.path(name)).expect("the layer");
    place.sapwood(&format!("create -b filled.raw -F raw {name}")).text();
    place.sapwood(&format!("rebase {base} {name}")).text();
    fs::remove_file(place.path("filled.raw")).expect("the copy");
}

impl Place {
    /// What a disk reads.
    fn read(&self, disk: &str) -> Vec<u8> {
        self.sapwood(&format!("convert -O raw {disk} read.raw")).text();
        let bytes = self.bytes("read.raw");
        fs::remove_file(self.path("read.raw")).expect("the copy");
        bytes
    }

    /// The base of a layer, as it names it.
    fn base(&self, layer: &str) -> serde_json::Value {
        self.sapwood(&format!("info --output=json {layer}")).json()["backing-filename"].clone()
    }

    fn is_sound(&self, layer: &str) {
        assert!(self.sapwood(&format!("check {layer}")).text().contains("No errors"));
    }

    fn live_bytes(&self, layer: &str) -> u64 {
        let info = self.sapwood(&format!("info --output=json {layer}")).json();
        info["format-specific"]["data"]["live-bytes"].as_u64().expect("a number")
    }
}

#[test]
fn a_rebase_keeps_what_the_disk_reads() {
    let place = place();
    let disk = place.read("top.layer");
    assert_eq!((disk.len(), disk[(2 << 20) + 1], disk[513]), (12 << 20, 0xb1, 0xa1));
    for base in ["-b new.raw -F raw", "-b old.raw -F raw", "-b mid.layer", "-b ''", "-b new.raw -F raw"] {
        let arguments = base.replace("''", "");
        let mut command = place.command(crate::harness::SAPWOOD, &format!("rebase {arguments}"));
        if base.contains("''") {
            command.arg("");
        }
        let output = command.arg("top.layer").output().unwrap();
        assert!(output.status.success(), "{base}: {output:?}");
        assert!(place.read("top.layer") == disk, "{base}");
        place.is_sound("top.layer");
    }
    assert_eq!(place.base("top.layer"), "new.raw");
}

#[test]
fn a_flat_layer_needs_no_other_file() {
    let place = place();
    let disk = place.read("top.layer");
    assert!(place.live_bytes("top.layer") < 5 * 4096, "what it has of its own");
    assert!(place.sapwood("flatten top.layer").text().contains("top.layer"));
    for base in ["mid.layer", "old.raw"] {
        fs::remove_file(place.path(base)).unwrap();
    }
    assert!(place.read("top.layer") == disk);
    assert_eq!(place.base("top.layer"), serde_json::Value::Null);
    assert!(place.live_bytes("top.layer") < 12 * 4096, "zeroes are not stored");
    place.is_sound("top.layer");
}

#[test]
fn a_base_that_was_moved_is_named_anew() {
    let place = place();
    let disk = place.read("top.layer");
    fs::create_dir(place.path("bases")).unwrap();
    fs::rename(place.path("mid.layer"), place.path("bases/mid.layer")).unwrap();
    place
        .sapwood("info top.layer")
        .fails(1, &["mid.layer", "No such file", "sapwood rebase -u -b BASE -F layer"]);
    // Its base was relative to its folder.
    let moved = place.sapwood("rebase -u -b bases/mid.layer -F layer top.layer");
    moved.fails(1, &["bases/old.raw", "sapwood rebase -u -b BASE -F raw"]);
    let said = place.sapwood("rebase -u -b ../old.raw -F raw bases/mid.layer").text();
    assert!(said.contains("which is what was recorded"), "{said}");
    let said = place.sapwood("rebase -u -b bases/mid.layer -F layer top.layer").text();
    assert!(said.contains("not what was recorded (it was opened for writing since: generation"), "{said}");
    assert!(place.read("top.layer") == disk);
}

#[test]
fn a_changed_base_is_refused_with_what_has_changed() {
    let place = place();
    let refused = |words: &[&str]| place.sapwood("info top.layer").fails(1, words);
    place.sapwood("resize mid.layer 9M").text();
    refused(&[
        "mid.layer",
        "its size was 8388608 and is 9437184",
        "opened for writing since: generation",
        "sapwood rebase",
    ]);
    place.sapwood("create other.layer 9M").text();
    fs::rename(place.path("other.layer"), place.path("mid.layer")).unwrap();
    refused(&["it is another layer: its id was"]);
    place.sapwood("create -b old.raw -F raw low.layer").text();
    place.damage("old.raw", 0, b"changed");
    place.sapwood("info low.layer").fails(1, &["old.raw", "it was modified: last at 20", ", now at 20"]);
    place.sapwood("rebase -b new.raw -F raw low.layer").fails(1, &["it was modified"]);
    place.sapwood("commit low.layer").fails(1, &["it was modified"]);
    let said = place.sapwood("rebase -u -b old.raw -F raw low.layer").text();
    assert!(said.contains("not what was recorded (it was modified"), "{said}");
    assert_eq!(&place.read("low.layer")[..7], b"changed");
    place.sapwood("rebase -b low.layer low.layer").fails(1, &["low.layer"]);
}

#[test]
fn a_commit_moves_a_layer_into_its_base() {
    let place = place();
    let disk = place.read("top.layer");
    place.sapwood("create -b mid.layer sibling.layer").text();
    let said = place.sapwood("commit top.layer").text();
    assert!(said.contains("mid.layer") && said.contains("empty"), "{said}");
    assert!(place.read("mid.layer") == disk, "grown, too");
    assert!(place.read("top.layer") == disk);
    assert_eq!(place.live_bytes("top.layer"), 0);
    place.sapwood("info sibling.layer").fails(1, &["mid.layer", "has changed"]);
    place.is_sound("mid.layer");
    place.sapwood("commit -d top.layer").text();
    assert!(!place.exists("top.layer"));
    place.sapwood("commit -d mid.layer").text();
    assert!(place.bytes("old.raw") == disk && !place.exists("mid.layer"));
}

#[test]
fn a_commit_leaves_the_rest_of_a_larger_base() {
    let place = Place::new();
    place.raw_disk("base.raw");
    let base = place.bytes("base.raw");
    fill(&place, "vm.layer", "-b base.raw -F raw", 8 << 20, &[(7, 1 << 20)]);
    place.sapwood("resize --shrink vm.layer 4195328").text();
    let disk = place.read("vm.layer");
    place.sapwood("commit vm.layer").text();
    let merged = place.bytes("base.raw");
    assert!(merged[..4_195_328] == disk[..] && merged[4_195_328..] == base[4_195_328..]);
    assert!(place.read("vm.layer") == disk);
}

#[test]
fn a_commit_needs_a_base_that_it_can_have() {
    let place = place();
    place.sapwood("flatten mid.layer").text();
    place.sapwood("commit mid.layer").fails(1, &["mid.layer", "no base"]);
    place.sapwood("create -b old.raw -F raw low.layer").text();
    let file = fs::File::open(place.path("old.raw")).unwrap();
    file.lock_shared().unwrap();
    place.sapwood("commit low.layer").fails(1, &["old.raw", "in use"]);
    place.sapwood("info low.layer").text();
    drop(file);
    place.sapwood("commit low.layer").text();
}

#[test]
fn a_commit_that_could_not_begin_leaves_the_layer_as_it_was() {
    let place = Place::new();
    place.sapwood("create -o segment_size=64K base.layer 1G").text();
    place.sapwood("create -b base.layer vm.layer 8T").text();
    place.sapwood("commit vm.layer").fails(1, &["base.layer", "segments are too small"]);
    assert_eq!(place.base("vm.layer"), "base.layer");
}
