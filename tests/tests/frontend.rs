//! The client and the model against a server of another make.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Child, Command as Process};
use std::time::Duration;

use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::model::{Failure, Model, Run};

const SIZE: u64 = 16 << 20;

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// QEMU's server, of a sparse file.
fn qemu_storage_daemon(directory: &Path, queues: usize) -> Daemon {
    let (image, socket) = (directory.join("disk"), directory.join("sock"));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let daemon = Process::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={},discard=unmap", image.display()))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
            socket.display()
        ))
        .spawn()
        .unwrap();
    let daemon = Daemon(daemon);
    for _ in 0..500 {
        if socket.exists() {
            return daemon;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("qemu-storage-daemon does not listen");
}

#[test]
fn model_agrees_with_qemu_storage_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = qemu_storage_daemon(directory.path(), 2);
    let mut model = Model::zeroes(SIZE);
    for queues in [1, 2] {
        let options = Options { queues, ..Options::default() };
        let mut client = Frontend::connect(&directory.path().join("sock"), &options).unwrap();
        assert_eq!(client.size().unwrap(), SIZE);
        model.run(&mut client, &Run { seed: queues as u64, ..Run::default() }).unwrap();
        model.verify(&mut client).unwrap();
    }
}

#[test]
fn model_finds_a_wrong_sector() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = qemu_storage_daemon(directory.path(), 1);
    let mut client = Frontend::connect(&directory.path().join("sock"), &Options::default()).unwrap();
    let mut model = Model::zeroes(SIZE);
    model.run(&mut client, &Run { operations: 200, ..Run::default() }).unwrap();
    client.run(Command::Write(77 * 512, &[1; 512])).unwrap();
    let found = model.verify(&mut client).unwrap_err();
    assert!(matches!(found, Failure::Mismatch { sector: 77, .. }), "{found}");
}
