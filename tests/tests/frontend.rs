//! The client and the model against a server of another make.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::guest::{Backend, BackendSpec};
use sapwood_tests::model::{Failure, Model, Run};

const SIZE: u64 = 16 << 20;

/// QEMU's server of a sparse file, and its socket.
fn qemu_storage_daemon(directory: &Path, queues: u16) -> (Backend, PathBuf) {
    let (disk, socket) = (directory.join("disk"), directory.join("sock"));
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let spec = BackendSpec::Qemu { disk, format: "raw".to_owned(), readonly: false, queues };
    (Backend::start(&spec, &socket).unwrap(), socket)
}

#[test]
fn model_agrees_with_qemu_storage_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let (_daemon, socket) = qemu_storage_daemon(directory.path(), 2);
    let mut model = Model::zeroes(SIZE);
    for queues in [1, 2] {
        let options = Options { queues, ..Options::default() };
        let mut client = Frontend::connect(&socket, &options).unwrap();
        assert_eq!(client.size().unwrap(), SIZE);
        model.run(&mut client, &Run { seed: queues as u64, ..Run::default() }).unwrap();
        model.verify(&mut client).unwrap();
    }
}

#[test]
fn model_finds_a_wrong_sector() {
    let directory = tempfile::tempdir().unwrap();
    let (_daemon, socket) = qemu_storage_daemon(directory.path(), 1);
    let mut client = Frontend::connect(&socket, &Options::default()).unwrap();
    let mut model = Model::zeroes(SIZE);
    model.run(&mut client, &Run { operations: 200, ..Run::default() }).unwrap();
    client.run(Command::Write(77 * 512, &[1; 512])).unwrap();
    let found = model.verify(&mut client).unwrap_err();
    assert!(matches!(found, Failure::Mismatch { sector: 77, .. }), "{found}");
}
