//! Raw disks, against qemu-img as the outside oracle.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::harness::Place;

#[test]
fn create_makes_a_sparse_disk_that_others_read() {
    let place = Place::new();
    place.sapwood("create -f raw disk.raw 10M").text();
    assert_eq!(fs::metadata(place.path("disk.raw")).unwrap().blocks(), 0);
    let info = place.qemu_img("info -f raw --output=json disk.raw").json();
    assert_eq!(info["virtual-size"], 10 << 20);
    place.sapwood("create -f raw disk.raw 20M").fails(1, &["disk.raw", "exists"]);
    place.sapwood("create -f raw -o preallocation=falloc full.raw 1M").text();
    assert!(fs::metadata(place.path("full.raw")).unwrap().blocks() * 512 >= 1 << 20);
    place.sapwood("create -f raw odd.raw 1000").text();
    assert_eq!(fs::metadata(place.path("odd.raw")).unwrap().len(), 1024, "whole sectors");
}

#[test]
fn create_says_what_is_missing_or_wrong() {
    let place = Place::new();
    place.sapwood("create -f raw x").fails(1, &["SIZE"]);
    place.sapwood("create -f raw -b base.raw x 1M").fails(1, &["-f layer"]);
    place.sapwood("create -f raw -o cluster_size=1 x 1M").fails(1, &["cluster_size=1", "preallocation"]);
    place.sapwood("create -f raw -o preallocation=perhaps x 1M").fails(1, &["off or falloc"]);
    assert!(!place.exists("x"));
}

#[test]
fn info_agrees_with_qemu_img() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    for name in ["disk.raw", "odd.raw"] {
        if name == "odd.raw" {
            fs::write(place.path(name), [1; 1000]).unwrap();
        }
        let ours = place.sapwood(&format!("info -f raw --output=json {name}")).json();
        let theirs = place.qemu_img(&format!("info -f raw --output=json {name}")).json();
        for field in ["virtual-size", "actual-size", "filename", "format", "dirty-flag"] {
            assert_eq!(ours[field], theirs[field], "{field} of {name}");
        }
    }
    let text = place.sapwood("info disk.raw").text();
    assert!(text.contains("virtual size: 8 MiB (8388608 bytes)"), "{text}");
}

#[test]
fn map_agrees_with_qemu_img() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let mut ours = place.sapwood("map -f raw --output=json disk.raw").json();
    for entry in ours.as_array_mut().unwrap() {
        assert_eq!(entry.as_object_mut().unwrap().remove("filename"), Some(Value::from("disk.raw")));
    }
    assert_eq!(ours, place.qemu_img("map -f raw --output=json disk.raw").json());
    let text = place.sapwood("map -f raw disk.raw").text();
    assert_eq!(text, place.qemu_img("map -f raw disk.raw").text());
    let part = place.sapwood("map -f raw --output=json -s 1M -l 4K disk.raw").json();
    assert_eq!((part[0]["start"].as_u64(), part[0]["length"].as_u64()), (Some(1 << 20), Some(4096)));
    assert_eq!(part.as_array().unwrap().len(), 1);
}

#[test]
fn conversion_keeps_contents_and_holes() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    place.sapwood("convert -f raw disk.raw copy.raw").text();
    place.qemu_img("compare -f raw -F raw -s disk.raw copy.raw").text();
    let allocated = |name| fs::metadata(place.path(name)).unwrap().blocks();
    assert!(allocated("copy.raw") <= allocated("disk.raw"));
    // Stored zeroes become holes.
    fs::write(place.path("zeroes.raw"), vec![0; 1 << 20]).unwrap();
    place.sapwood("convert -f raw zeroes.raw hole.raw").text();
    assert_eq!(allocated("hole.raw"), 0);
    assert_eq!(place.bytes("hole.raw"), vec![0; 1 << 20]);
}

#[test]
fn conversion_into_an_existing_target() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    fs::write(place.path("small.raw"), vec![7; 1 << 20]).unwrap();
    fs::write(place.path("large.raw"), vec![7; 9 << 20]).unwrap();
    place.sapwood("convert -f raw disk.raw large.raw").fails(1, &["large.raw", "exists"]);
    place.sapwood("convert -n -f raw disk.raw small.raw").fails(1, &["small.raw", "too small"]);
    assert!(place.bytes("small.raw") == vec![7; 1 << 20], "untouched");
    place.sapwood("convert -n -f raw disk.raw large.raw").text();
    let expected = [place.bytes("disk.raw"), vec![0; 1 << 20]].concat();
    assert!(place.bytes("large.raw") == expected);
}

#[test]
fn compare_answers_as_qemu_img_does() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    fs::copy(place.path("disk.raw"), place.path("other.raw")).unwrap();
    let both = |arguments: &str| {
        let (ours, theirs) = (
            place.sapwood(&format!("compare -f raw -F raw {arguments}")),
            place.qemu_img(&format!("compare -f raw -F raw {arguments}")),
        );
        assert_eq!((ours.code, &ours.stdout), (theirs.code, &theirs.stdout), "{arguments}");
        ours.code
    };
    assert_eq!(both("disk.raw other.raw"), 0);
    place.damage("other.raw", 4096 + 4096, &[1]);
    assert_eq!(place.sapwood("compare -q -f raw -F raw disk.raw other.raw").code, 1);
    let answer = place.sapwood("compare -f raw -F raw disk.raw other.raw");
    assert_eq!((answer.code, answer.stdout.as_str()), (1, "Content mismatch at offset 8192!\n"));
    fs::copy(place.path("disk.raw"), place.path("longer.raw")).unwrap();
    place.sapwood("resize -q -f raw longer.raw +1M").text();
    assert_eq!(both("disk.raw longer.raw"), 0, "zeroes at the end do not count");
    assert_eq!(both("-s disk.raw longer.raw"), 1, "but with -s they do");
}

#[test]
fn resize_grows_and_shrinks_on_request() {
    let place = Place::new();
    place.raw_disk("disk.raw");
    let size = || fs::metadata(place.path("disk.raw")).unwrap().len();
    place.sapwood("resize -f raw disk.raw +1M").text();
    assert_eq!(size(), 9 << 20);
    place.sapwood("resize -f raw disk.raw 8M").fails(1, &["--shrink"]);
    place.sapwood("resize -f raw disk.raw -1M").fails(1, &["--shrink"]);
    place.sapwood("resize -f raw disk.raw -- -10M").fails(1, &["9 MiB"]);
    assert_eq!(size(), 9 << 20, "nothing happened");
    place.sapwood("resize -f raw --shrink disk.raw -1M").text();
    assert_eq!(size(), 8 << 20);
}
