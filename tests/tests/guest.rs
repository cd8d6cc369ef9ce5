//! x
use sapwood_tests::guest::*;
use std::process::Command;
use std::time::Duration;

#[test]
#[ignore = "boots a guest"]
fn harness() {
    let assets = Assets::locate().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("d.qcow2");
    let st = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&assets.root_image)
        .arg(&disk)
        .status()
        .unwrap();
    assert!(st.success());
    let spec = BackendSpec::Qemu {
        disk,
        format: "qcow2".into(),
        readonly: false,
        queues: 2,
    };
    let backend = Backend::start(&spec, &dir.path().join("s")).unwrap();
    let script = "uname -a; cat /etc/debian_version; mount | head -5; df -h /; fio --version; mark hi; value a b c; cat /proc/uptime; nproc; ls /sys/block/vda/mq";
    let guest = Guest::boot(
        &GuestSpec::new(vec![Disk::new(backend.socket()).queues(2)], script),
        &assets,
    )
    .unwrap();
    guest.wait_for("hi", Duration::from_secs(60)).unwrap();
    let report = guest.succeed().unwrap();
    println!("{report:#?}");
    println!("{}", backend.stderr());
    backend.stop().unwrap();
}
