//! `sapwood boot` with a kernel that lies on the disk.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::guests::{self, POWER_OFF, RESTART};
use super::{Lab, has_kvm};
use crate::daemon::{Daemon, connect};

/// A lab whose layer lies over a file system with two kernels: the newer one says `new`, the other one `old`.
fn lab() -> Lab {
    let lab = Lab::new("", POWER_OFF);
    let tree = lab.place.path("tree");
    fs::create_dir_all(tree.join("boot")).expect("a folder");
    fs::create_dir_all(tree.join("etc")).expect("a folder");
    fs::write(tree.join("etc/fstab"), "").expect("a file");
    fs::write(tree.join("boot/vmlinuz-6.1.0-2"), guests::kernel("new\n", POWER_OFF)).expect("a file");
    fs::write(tree.join("boot/initrd.img-6.1.0-2"), "an initial file system").expect("a file");
    fs::write(tree.join("boot/vmlinuz-6.1.0-1"), guests::kernel("old\n", RESTART)).expect("a file");
    fs::File::create(lab.place.path("disk.raw")).expect("a file").set_len(16 << 20).expect("a file");
    let mut format = Command::new("mke2fs");
    format.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree);
    assert!(
        format.arg(lab.place.path("disk.raw")).status().expect("mke2fs is installed (e2fsprogs)").success()
    );
    fs::remove_file(lab.place.path("disk.layer")).expect("a file");
    lab.place.sapwood("create -b disk.raw -F raw disk.layer").text();
    lab
}

#[test]
fn the_kernel_on_the_disk_is_started() {
    if !has_kvm("the_kernel_on_the_disk_is_started") {
        return;
    }
    let lab = lab();
    let answer = lab.boot_any("--skip-probe disk.layer");
    assert_eq!((answer.code, answer.stdout.as_str(), answer.stderr.as_str()), (0, "new\n", ""));
    let answer = lab.boot_any("--skip-probe --disk disk.layer --entry 6.1.0-1 --no-reboot");
    assert_eq!((answer.code, answer.stdout.as_str()), (12, "old\n"), "{answer:?}");
    // It is looked for whenever the guest restarts: the layer is free then, and what the guest wrote is in it.
    let answer = lab.boot_any("--skip-probe disk.layer --entry 6.1.0-1 --timeout 3");
    assert_eq!(answer.code, 124, "{answer:?}");
    assert!(answer.stdout.lines().count() > 1, "{answer:?}");
    lab.is_clean();
}

#[test]
fn what_is_not_on_the_disk_is_said() {
    let lab = lab();
    lab.boot_any("--skip-probe disk.layer --entry nonsense").fails(1, &["disk.layer", "nonsense", "6.1.0-1"]);
    lab.place.sapwood("create empty.layer 8M").text();
    lab.boot_any("--skip-probe empty.layer").fails(1, &["empty.layer", "no kernel", "--kernel"]);
    lab.boot_any("--skip-probe disk.raw").fails(1, &["disk.raw", "DISK,format=raw"]);
    lab.is_clean();
}

/// A lab with the same disk as a volume.
fn volume() -> Lab {
    let lab = lab();
    lab.place.sapwood("store init -q vms").text();
    lab.place.sapwood("import -q -f raw disk.raw vms:web").text();
    lab
}

#[test]
fn a_volume_is_started_with_a_daemon_and_without() {
    if !has_kvm("a_volume_is_started_with_a_daemon_and_without") {
        return;
    }
    let lab = volume();
    let attached = || lab.place.sapwood("show --output=json vms:web").json()["attached"].clone();
    let starts = |arguments: &str| {
        let answer = lab.boot_any(&format!("--skip-probe {arguments}"));
        assert_eq!((answer.code, answer.stdout.as_str(), answer.stderr.as_str()), (0, "new\n", ""));
    };
    starts("vms:web");
    starts("--disk vms:web,queues=3 --cpus 2");
    let (daemon, _) = Daemon::start(&lab.place, "--store vms --no-background");
    starts("vms:web --cpus 2");
    assert!(attached().is_null(), "it is given back");
    lab.place.sapwood("attach vms:web").text();
    starts("vms:web --cpus 2");
    assert_eq!(attached()["queues"], 1, "it stays as it was");
    let guest = connect(&lab.place, "vms/sockets/web.sock");
    lab.boot_any("--skip-probe vms:web").fails(1, &["vms:web", "another virtual machine"]);
    drop(guest);
    daemon.stops();
    lab.is_clean();
}

#[test]
fn what_is_said_of_a_volume_is_checked() {
    let lab = volume();
    lab.boot_any("--skip-probe vms:none").fails(1, &["none", "no such volume"]);
    lab.boot_any("--skip-probe vms:web@imported").fails(1, &["web@imported", "a volume is wanted"]);
    lab.boot_any("--skip-probe vms:web,readonly").fails(1, &["vms:web", "readonly"]);
    lab.place.sapwood("create vms:data 1M").text();
    lab.boot_any("--skip-probe vms:web --disk vms:data")
        .fails(1, &["start sapwood daemon --store vms", "two volumes"]);
    let script = "--print-qemu --extract-kernel out vms:web";
    let text = lab.boot_any(script).text();
    assert!(text.contains("-- vms:web & server0") && text.contains("-kernel out/kernel"), "{text}");
    let kernel = || fs::read(lab.place.path("out/kernel")).unwrap();
    let original = fs::read(lab.place.path("tree/boot/vmlinuz-6.1.0-2")).unwrap();
    assert!(kernel().starts_with(&original));
    fs::remove_file(lab.place.path("out/kernel")).unwrap();
    let (daemon, _) = Daemon::start(&lab.place, "--store vms --no-background");
    lab.boot_any(script).fails(1, &["vms:web", "sapwood attach"]);
    lab.place.sapwood("attach vms:web --socket socket").text();
    let text = lab.boot_any(script).text();
    assert!(text.contains("/socket,reconnect=1") && !text.contains("serve"), "{text}");
    assert!(kernel().starts_with(&original), "through the daemon");
    daemon.stops();
    lab.is_clean();
}

#[test]
fn the_kernel_is_copied_for_qemu() {
    let lab = lab();
    let text = lab.boot_any("--print-qemu --extract-kernel out disk.layer --append quiet").text();
    for part in ["-kernel out/kernel", "-initrd out/initrd", "console=ttyS0", "quiet'"] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    let same = |copy: &str, original: &str| {
        let read = |name: &str| fs::read(lab.place.path("").join(Path::new(name))).unwrap();
        assert!(read(copy).starts_with(&read(original)), "{copy}");
    };
    same("out/kernel", "tree/boot/vmlinuz-6.1.0-2");
    same("out/initrd", "tree/boot/initrd.img-6.1.0-2");
    lab.is_clean();
}
