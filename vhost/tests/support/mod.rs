//! What the tests share.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod ramdisk;
pub mod rig;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ramdisk::RamDisk;
use sapwood_blockdev::engine::UringEngine;
use sapwood_vhost::{Options, Server};
use tempfile::TempDir;

/// A disk being served in a directory of its own.
pub struct Served {
    pub disk: Arc<RamDisk>,
    pub server: Server,
    pub socket: PathBuf,
    _directory: TempDir,
}

pub fn serve(disk: Arc<RamDisk>, queues: u16) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let server = start(&disk, &socket, queues).unwrap();
    Served { disk, server, socket, _directory: directory }
}

pub fn start(disk: &Arc<RamDisk>, socket: &Path, queues: u16) -> Result<Server, sapwood_vhost::ServerError> {
    let options =
        Options { queues, serial: "a name of more than twenty bytes".into(), ..Options::new(socket) };
    let engine = || UringEngine::new();
    Server::start(Arc::clone(disk), options, engine)
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("never: {what}");
}
