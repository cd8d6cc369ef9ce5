//! qcow2 images, against qemu-img as the outside oracle.

use std::fs;

use serde_json::Value;

use crate::harness::Place;

/// `top.qcow2` over `low.qcow2` over `disk.raw`, with a snapshot at the top.
fn place() -> Place {
    let place = Place::new();
    place.raw_disk("disk.raw");
    place.qemu_img("create -q -f qcow2 -b disk.raw -F raw low.qcow2").text();
    place.qemu_img("create -q -f qcow2 -o extended_l2=on -b low.qcow2 -F qcow2 top.qcow2").text();
    let write = |disk: &str, command: &str| {
        let mut qemu_io = place.command("qemu-io", "-f qcow2");
        assert!(
            qemu_io.args(["-c", command, disk]).output().expect("qemu-io is installed").status.success(),
            "{command}"
        );
    };
    write("low.qcow2", "write -q -P 9 2M 100k");
    write("top.qcow2", "write -q -P 8 5M 3k");
    place.qemu_img("snapshot -c before top.qcow2").text();
    write("top.qcow2", "write -q -z 0 4k");
    place
}

#[test]
fn convert_and_compare_agree_with_qemu_img() {
    let place = place();
    place.qemu_img("convert -O raw top.qcow2 theirs.raw").text();
    place.sapwood("convert --allow-backing top.qcow2 ours.raw").text();
    assert!(place.bytes("ours.raw") == place.bytes("theirs.raw"));
    place.sapwood("convert -O layer --allow-backing top.qcow2 ours.layer").text();
    place.sapwood("compare -s --allow-backing top.qcow2 ours.layer").text();
    place.qemu_img("convert -O raw -l before top.qcow2 before.raw").text();
    for option in ["-l before", "--snapshot 1"] {
        let compare = format!("compare -s --allow-backing {option} -F raw top.qcow2 before.raw");
        place.sapwood(&compare).text();
    }
    let differs = place.sapwood("compare --allow-backing --second-snapshot before top.qcow2 top.qcow2");
    assert_eq!(differs.code, 1, "{differs:?}");
    place.sapwood("convert --allow-backing -l later top.qcow2 x.raw").fails(1, &["later", "sapwood info"]);
}

#[test]
fn info_agrees_with_qemu_img() {
    let place = place();
    place.qemu_img("create -q -f qcow2 -o compat=0.10,cluster_size=4k old.qcow2 10M").text();
    let aside = "-o compression_type=zstd,data_file=data,data_file_raw=on,lazy_refcounts=on,refcount_bits=8";
    place.qemu_img(&format!("create -q -f qcow2 {aside} aside.qcow2 10M")).text();
    for disk in ["top.qcow2", "low.qcow2", "old.qcow2", "aside.qcow2"] {
        let ours = place.sapwood(&format!("info --output=json {disk}")).json();
        let theirs = place.qemu_img(&format!("info --output=json {disk}")).json();
        for (field, value) in ours.as_object().unwrap() {
            match field.as_str() {
                "format-specific" => same_fields(&value["data"], &theirs[field]["data"]),
                "snapshots" => same_fields(&value[0], &theirs[field][0]),
                // These are not QEMU's.
                "block-device" | "direct-io" | "gives-space-back" => assert!(value.is_boolean()),
                _ => assert_eq!(*value, theirs[field], "{field} of {disk}"),
            }
        }
    }
    let text = place.sapwood("info top.qcow2").text();
    for line in ["backing file: low.qcow2", "1         before", "cluster_size: 65536", "extended l2: true"] {
        assert!(text.contains(line), "no '{line}' in {text}");
    }
}

/// What we say of an object, QEMU says too.
fn same_fields(ours: &Value, theirs: &Value) {
    for (field, value) in ours.as_object().expect("an object") {
        // Version 2 has zlib, which QEMU mentions, and nothing else, which it does not.
        let said = theirs.get(field).cloned().unwrap_or(Value::from(false));
        assert!(*value == said || field == "refcount-bits" && said == false, "{field}: {value} and {said}");
    }
}

#[test]
fn map_agrees_with_qemu_img() {
    let place = place();
    let mut ours = place.sapwood("map --allow-backing --output=json top.qcow2").json();
    for entry in ours.as_array_mut().unwrap() {
        entry.as_object_mut().unwrap().remove("filename");
    }
    assert_eq!(ours, place.qemu_img("map --output=json top.qcow2").json());
    let text = place.sapwood("map --allow-backing --snapshot before top.qcow2").text();
    assert!(text.contains("disk.raw") && text.contains("low.qcow2"), "{text}");
}

#[test]
fn check_finds_what_is_wrong() {
    let place = place();
    let report = place.sapwood("check --output=json top.qcow2").json();
    assert_eq!((&report["corruptions"], &report["format"]), (&0.into(), &"qcow2".into()));
    // The first entry of the L1 table names a table that is not aligned.
    let bytes = place.bytes("top.qcow2");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    place.damage("top.qcow2", l1 + 6, &[0x12]);
    let report = place.sapwood("check top.qcow2");
    assert!(report.code == 2 && report.stdout.contains("l1 entry"), "{report:?}");
    let cut = &bytes[..100_000];
    fs::write(place.path("cut.qcow2"), cut).unwrap();
    assert_eq!(place.sapwood("check cut.qcow2").code, 2);
}

#[test]
fn other_files_are_opened_with_leave_only() {
    let place = place();
    let commands = ["map IN", "convert IN x.raw", "compare IN IN", "serve --readonly --socket socket IN"];
    for command in commands {
        let code = if command.starts_with("compare") { 2 } else { 1 };
        let line = command.replace("IN", "top.qcow2");
        place.sapwood(&line).fails(code, &["top.qcow2", "low.qcow2", "--allow-backing"]);
    }
    assert!(!place.exists("x.raw") && !place.exists("socket"));
    // As a guest could write it into its raw disk.
    place.qemu_img("create -q -u -f qcow2 -b /etc/hostname -F raw forged.raw 1M").text();
    place.sapwood("convert forged.raw x.raw").fails(1, &["/etc/hostname", "--allow-backing"]);
    place.sapwood("convert -f raw forged.raw x.raw").text();
}

#[test]
fn qcow2_is_not_written() {
    let place = place();
    place.sapwood("create -f qcow2 new.qcow2 1M").fails(1, &["read, not made"]);
    place.sapwood("convert -f raw -O qcow2 disk.raw new.qcow2").fails(1, &["read, not made"]);
    let before = place.bytes("low.qcow2");
    place.sapwood("resize low.qcow2 16M").fails(1, &["read, not written"]);
    place.sapwood("convert -n -f raw -O qcow2 disk.raw low.qcow2").fails(1, &["read, not made"]);
    place.sapwood("serve --socket socket --allow-backing low.qcow2").fails(1, &["--readonly"]);
    place.sapwood("create -b low.qcow2 -F qcow2 over.layer").fails(1, &["low.qcow2"]);
    assert!(place.bytes("low.qcow2") == before);
    place.sapwood("info -f raw --output=json low.qcow2").text();
    place.sapwood("convert -f raw --snapshot 1 low.qcow2 x.raw").fails(1, &["snapshots"]);
}

#[test]
fn a_layer_over_qcow2_reads_as_the_image_does() {
    let place = place();
    let base = "-b top.qcow2 -F qcow2";
    place.sapwood(&format!("create {base} vm.layer")).fails(1, &["low.qcow2", "--allow-backing"]);
    place.sapwood("create -b disk.raw -F raw --allow-backing vm.layer").fails(1, &["-F qcow2"]);
    place.sapwood("create -l before vm.layer 1M").fails(1, &["-b"]);
    place.sapwood(&format!("create {base} --allow-backing -l later vm.layer")).fails(1, &["later"]);
    place.sapwood(&format!("create {base} --allow-backing vm.layer")).text();
    place.sapwood(&format!("create {base} --allow-backing -l before then.layer")).text();
    place.qemu_img("convert -O raw top.qcow2 theirs.raw").text();
    place.qemu_img("convert -O raw -l before top.qcow2 before.raw").text();
    // What the layer has recorded is leave to open the files again.
    place.sapwood("compare -s -F raw vm.layer theirs.raw").text();
    place.sapwood("compare -s -F raw then.layer before.raw").text();
    let info = place.sapwood("info then.layer").text();
    for line in ["backing file format: qcow2", "backing snapshot: before", "backing chain: 3 images"] {
        assert!(info.contains(line), "no '{line}' in {info}");
    }
    let info = place.sapwood("info --output=json vm.layer").json();
    assert_eq!(
        (&info["backing-chain-length"], &info["backing-filename-format"]),
        (&3.into(), &"qcow2".into())
    );
    let map = place.sapwood("map vm.layer").text();
    assert!(["top.qcow2", "low.qcow2", "disk.raw"].iter().all(|file| map.contains(file)), "{map}");
    assert!(place.sapwood("check vm.layer").text().contains("No errors"));
    let refused = place.sapwood("commit vm.layer");
    refused.fails(1, &["vm.layer", "top.qcow2 is a qcow2 image", "convert", "flatten"]);
    place.sapwood("compare -s -F raw vm.layer theirs.raw").text();

    // Elsewhere: by another path, onto a raw disk, and back.
    std::fs::rename(place.path("vm.layer"), place.path("moved.layer")).unwrap();
    place.sapwood("rebase -b theirs.raw -F raw moved.layer").text();
    place.sapwood(&format!("rebase {base} -l before --allow-backing moved.layer")).text();
    place.sapwood("compare -s -F raw moved.layer theirs.raw").text();
    place.sapwood("flatten moved.layer").text();
    place.sapwood("compare -s -F raw moved.layer theirs.raw").text();
}

#[test]
fn a_change_of_any_file_of_a_qcow2_base_is_told() {
    let place = place();
    place.sapwood("create -b top.qcow2 -F qcow2 --allow-backing vm.layer").text();
    place.sapwood("create -b vm.layer over.layer").text();
    let touch = |name: &str| {
        let file = std::fs::File::options().append(true).open(place.path(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
    };
    for name in ["disk.raw", "low.qcow2", "top.qcow2"] {
        touch(name);
        let words = [name, "top.qcow2 has changed", "was modified", "rebase -u -b BASE -F qcow2 vm.layer"];
        place.sapwood("convert vm.layer x.raw").fails(1, &words);
        place.sapwood("info over.layer").fails(1, &words);
        assert!(!place.path("x.raw").exists());
        let refused = place.sapwood("rebase -u -b top.qcow2 -F qcow2 vm.layer");
        refused.fails(1, &["--allow-backing"]);
        let said = place.sapwood("rebase -u -b top.qcow2 -F qcow2 --allow-backing vm.layer").text();
        assert!(said.contains(name) && said.contains("was modified"), "{said}");
        place.sapwood("rebase -u -b vm.layer over.layer").text();
        place.sapwood("compare -s --allow-backing over.layer top.qcow2").text();
    }
    std::fs::remove_file(place.path("low.qcow2")).unwrap();
    place
        .sapwood("info vm.layer")
        .fails(1, &["vm.layer: its base cannot be used", "low.qcow2", "No such file"]);
    std::fs::remove_file(place.path("top.qcow2")).unwrap();
    place.sapwood("info vm.layer").fails(1, &["if it was moved", "rebase -u -b BASE -F qcow2 vm.layer"]);
}
