//! Disks on block devices: loop devices, which need root. `cargo xtask test --only storage` runs these.

use std::fs;
use std::os::unix::fs::MetadataExt;

use sapwood_tests::mounts::LoopDevice;

use crate::harness::Place;
use crate::online::merges_under_a_guest;
use crate::serve::Server;
use crate::served::agrees_with_a_model;

const MIB: u64 = 1 << 20;

fn device(bytes: u64) -> LoopDevice {
    LoopDevice::new(bytes).expect("root, and a loop device: cargo xtask looks for both")
}

/// Bytes that the file below a device occupies.
fn allocated(device: &LoopDevice) -> u64 {
    fs::metadata(device.file()).expect("a file").blocks() * 512
}

#[test]
#[ignore = "needs root"]
fn device_holds_a_layer() {
    let (place, device) = (Place::new(), device(256 * MIB));
    let path = device.path().display();
    place.raw_disk("base.raw");
    place.sapwood(&format!("convert -f raw -O layer base.raw {path}")).text();
    let info = place.sapwood(&format!("info --output=json {path}")).json();
    assert_eq!((&info["format"], &info["block-device"]), (&"layer".into(), &true.into()));
    assert_eq!(info["virtual-size"], 8 * MIB);
    let used = info["actual-size"].as_u64().unwrap();
    assert!(used < 32 * MIB, "what the layer uses, not what the device has: {used}");
    assert_eq!(info["format-specific"]["data"]["live-bytes"], 5 * 4096);
    assert!(place.sapwood(&format!("info {path}")).text().contains("storage: a block device\n"));
    assert!(place.sapwood(&format!("check {path}")).text().contains("5 of 5 mapped"));
    assert!(place.sapwood(&format!("map {path}")).text().contains(&format!("{path}")));
    place.sapwood(&format!("resize {path} 1G")).text();
    place.sapwood(&format!("convert -O raw {path} out.raw")).text();
    place.qemu_img("compare -f raw -F raw base.raw out.raw").text();

    // The bytes are a layer in a file, too, and the other way round.
    let copy = |from: &str, to: &str| {
        let status = place.command("dd", &format!("if={from} of={to} bs=1M status=none")).status().unwrap();
        assert!(status.success(), "dd");
    };
    copy(&path.to_string(), "copy.layer");
    place.sapwood("compare -s copy.layer -F raw out.raw").text();
    place.sapwood("resize copy.layer 2G").text();
    let other = self::device(256 * MIB);
    let other = other.path().display();
    copy("copy.layer", &other.to_string());
    place.sapwood(&format!("resize {other} +1G")).text();
    assert!(place.sapwood(&format!("check {other}")).text().contains("5 of 5 mapped"));
}

#[test]
#[ignore = "needs root"]
fn device_in_use_is_refused() {
    let (place, device) = (Place::new(), device(64 * MIB));
    let path = device.path().display();
    let create = |options: &str| place.sapwood(&format!("create {options} {path} 1G"));
    create("-f raw").fails(1, &["-n", "nothing to make"]);
    create("-o segment_size=64M").fails(1, &["too small", "segment_size"]);
    create("").text();
    create("").fails(1, &["holds a Sapwood layer", "--force"]);
    create("--force").text();
    let (server, _) = Server::start(&place, &path.to_string());
    create("--force").fails(1, &["in use by process", "serve"]);
    server.stops();
    let run = |program: &str, arguments: &str| {
        let status = place.command(program, arguments).status().expect(program);
        assert!(status.success(), "{program} {arguments}");
    };
    run("mkfs.ext4", &format!("-q -F {path}"));
    create("").fails(1, &["ext4", "--force"]);
    fs::create_dir(place.path("mnt")).unwrap();
    run("mount", &format!("{path} mnt"));
    let refused = [create("--force"), place.sapwood(&format!("resize -f raw {path} 1M"))];
    run("umount", "mnt");
    refused.into_iter().for_each(|answer| answer.fails(1, &["in use by a mount"]));
    create("--force").text();
    run("mkswap", &format!("{path}"));
    create("").fails(1, &["swap space"]);
}

#[test]
#[ignore = "needs root"]
fn device_is_wiped_of_what_it_held() {
    let (place, device) = (Place::new(), device(64 * MIB));
    let path = device.path().display();
    for mkfs in ["mkfs.ext4 -q -F", "mkswap", ""] {
        match mkfs.is_empty() {
            // As a GPT that lost its first copy.
            true => place.damage(&path.to_string(), 64 * MIB - 512, b"EFI PART"),
            false => {
                let status = place.command("sh", "-c").arg(format!("{mkfs} {path}")).status().unwrap();
                assert!(status.success(), "{mkfs}");
            }
        }
        place.sapwood(&format!("create {path} 1G")).fails(1, &["holds", "--force"]);
        place.sapwood(&format!("create --force {path} 1G")).text();
        let found = place.command("wipefs", &format!("--noheadings {path}")).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "", "after {mkfs}");
    }
    assert!(allocated(&device) < 2 * MIB, "the space of the old contents was given back");
}

#[test]
#[ignore = "needs root"]
fn device_with_an_incomplete_copy_is_no_layer() {
    let (place, device) = (Place::new(), device(16 * MIB));
    let path = device.path().display();
    fs::write(place.path("full.raw"), vec![1; 32 << 20]).unwrap();
    let convert = "convert -f raw -O layer -o segment_size=1M full.raw";
    place.sapwood(&format!("{convert} {path}")).fails(1, &["not complete", "no space"]);
    place.sapwood(&format!("check {path}")).fails(1, &["neither a layer nor"]);
    assert!(device.path().exists(), "a device is not removed");
}

#[test]
#[ignore = "needs root"]
fn device_that_is_served_agrees_with_a_model() {
    for kind in ["layer", "raw"] {
        let device = device(64 * MIB);
        agrees_with_a_model(kind, |place| {
            let path = device.path().display().to_string();
            place.sapwood(&format!("create --force {path} 8M")).text();
            if kind == "raw" {
                place.raw_disk("disk.raw");
                place.sapwood(&format!("convert -n -f raw -O raw disk.raw {path}")).text();
            }
            (path, kind)
        });
        assert!(allocated(&device) < 40 * MIB, "{kind}: discards reach the file below");
    }
}

#[test]
#[ignore = "needs root"]
fn device_takes_what_a_layer_over_it_holds() {
    for (format, bytes) in [("raw", 8 * MIB), ("layer", 64 * MIB)] {
        let (place, device) = (Place::new(), device(bytes));
        let path = device.path().display().to_string();
        place.raw_disk("disk.raw");
        match format {
            "raw" => place.sapwood(&format!("convert -n -f raw -O raw disk.raw {path}")).text(),
            _ => place.sapwood(&format!("convert -f raw -O layer disk.raw {path}")).text(),
        };
        merges_under_a_guest(&path, format, format == "layer");
    }
}
