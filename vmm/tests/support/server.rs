//! Sapwood's own backend in a process of its own, which a test can kill: the test's program again, with a file and
//! a socket in its environment.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use sapwood_blockdev::engine::UringEngine;
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::raw::RawDevice;
use sapwood_vhost::{Options, Server};

use super::eventually;

const FILE: &str = "SAPWOOD_TEST_FILE";
const SOCKET: &str = "SAPWOOD_TEST_SOCKET";
const READ_ONLY: &str = "SAPWOOD_TEST_READ_ONLY";
/// The name of the test that is the server; each test file has one that calls [`be_a_server`].
const TEST: &str = "server_process";

/// Serves a raw file.
pub fn serve(
    file: &Path,
    socket: &Path,
    queues: u16,
    read_only: bool,
) -> (Server, Arc<RawDevice<UringEngine>>) {
    let device = RawDevice::open(&HostStorage, file, read_only).unwrap();
    let options = Options { queues, ..Options::new(socket) };
    (Server::start(Arc::clone(&device), options, UringEngine::new).unwrap(), device)
}

/// In the other process: serves until it is killed. In the test's own process: nothing.
pub fn be_a_server() {
    let (Some(file), Some(socket)) = (std::env::var_os(FILE), std::env::var_os(SOCKET)) else { return };
    let read_only = std::env::var_os(READ_ONLY).is_some();
    let (server, _device) = serve(file.as_ref(), socket.as_ref(), 2, read_only);
    // The test's process ends it; its end closes this.
    let mut nothing = String::new();
    let _ = std::io::stdin().read_line(&mut nothing);
    server.stop();
}

/// A backend in another process.
pub struct Process(Child);

impl Process {
    pub fn start(file: &Path, socket: &Path) -> Self {
        Self::spawn(file, socket, false)
    }

    pub fn spawn(file: &Path, socket: &Path, read_only: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([TEST, "--exact", "--nocapture"]).env(FILE, file).env(SOCKET, socket);
        if read_only {
            command.env(READ_ONLY, "1");
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut process = Self(child);
        eventually("the backend listens", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        assert!(process.0.try_wait().unwrap().is_none(), "the one that listens is this one");
        process
    }

    /// Stops it; returns when all its threads stand still.
    pub fn pause(&self) {
        kill_process(self.pid(), Signal::STOP).unwrap();
        let tasks = format!("/proc/{}/task", self.0.id());
        eventually("the backend stands still", || {
            std::fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                // The state follows the name, which is in parentheses.
                stat.rsplit_once(") ").unwrap().1.starts_with('T')
            })
        });
    }

    /// Ends it at once, in whatever it is doing.
    pub fn kill(mut self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
        self.0.wait().unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file of zeroes in a directory, and the path of a socket beside it.
pub fn disk(directory: &Path, bytes: u64) -> (PathBuf, PathBuf) {
    let (file, socket) = (directory.join("disk.raw"), directory.join("disk.sock"));
    std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
    (file, socket)
}

/// QEMU's backend.
pub fn qemu_storage_daemon(file: &Path, socket: &Path) -> Process {
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", file.display()))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        ))
        .spawn()
        .unwrap();
    let process = Process(child);
    eventually("qemu-storage-daemon listens", || std::os::unix::net::UnixStream::connect(socket).is_ok());
    process
}
