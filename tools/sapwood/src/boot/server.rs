//! The server of a disk that is a file: `sapwood serve` as a child.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;
use sapwood_image::{ErrorKind, ImageError};
use tempfile::TempDir;

use super::child::{Running, again};
use super::events::{Events, Wake};
use super::plan::{DiskPlace, DiskSpec};

/// A server that ends sooner after its start is not started again: it would end again.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// Longest ready line that is read, in bytes: more than a path has.
const READY_BYTES_MAX: usize = 16 << 10;

/// Longest path of a folder for what is temporary: an address of a socket has 108 bytes (unix(7)), and this leaves room for
/// `/sapwood-boot-XXXXXX/disk99.sock` and a NUL.
const FOLDER_BYTES_MAX: usize = 108 - 33;

/// All servers of a machine, and the folder of their sockets.
pub struct Servers {
    servers: Vec<Server>,
    sockets: Vec<PathBuf>,
    /// After the servers, so that it is removed last.
    _folder: Option<TempDir>,
}

/// One of them.
struct Server {
    disk: DiskSpec,
    cpus: u8,
    socket: PathBuf,
    running: Running,
    since: Instant,
    is_ready: bool,
}

impl Servers {
    /// Starts the server of every disk that is a file, and waits until all are ready; `None`: they were told to stop
    /// before that.
    pub fn start(disks: &[DiskSpec], cpus: u8, events: &mut Events) -> anyhow::Result<Option<Self>> {
        let files = disks.iter().any(|disk| matches!(disk.place, DiskPlace::File { .. }));
        let folder = if files { Some(folder()?) } else { None };
        let mut all = Self { servers: Vec::new(), sockets: Vec::new(), _folder: folder };
        let started = all.start_each(disks, cpus, events);
        match started {
            Ok(true) => Ok(Some(all)),
            Ok(false) => all.stop(events).map(|()| None),
            Err(error) => {
                // What could not be started is the news.
                if let Err(other) = all.stop(events) {
                    log::error!("{other:#}");
                }
                Err(error)
            }
        }
    }

    /// Starts them one after the other; whether all were started.
    fn start_each(&mut self, disks: &[DiskSpec], cpus: u8, events: &mut Events) -> anyhow::Result<bool> {
        for (index, disk) in disks.iter().enumerate() {
            let socket = match (&disk.place, &self._folder) {
                (DiskPlace::File { .. }, Some(folder)) => folder.path().join(format!("disk{index}.sock")),
                (place, _) => {
                    let (DiskPlace::File { path, .. } | DiskPlace::Socket(path)) = place;
                    self.sockets.push(path.clone());
                    continue;
                }
            };
            self.sockets.push(socket.clone());
            self.servers.push(Server::start(disk, cpus, socket)?);
            let Some(server) = self.servers.last_mut() else { continue };
            if !server.wait_until_ready(events)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where each disk is served, in the guest's order.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// For each server, what is readable when it has ended.
    pub fn ended(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.servers.iter().map(|server| server.running.ended())
    }

    /// Starts a server again that has ended beneath its guest. The machine connects to it again by itself.
    pub fn restart(&mut self, index: usize, events: &mut Events) -> anyhow::Result<()> {
        let server = &mut self.servers[index];
        let status = server.running.wait()?;
        let what = format!("the server of {} ended ({status})", server.disk.name().display());
        if server.since.elapsed() < SETTLED_AFTER {
            bail!("{what} soon after its start");
        }
        log::warn!("{what}: it is started again");
        *server = Server::start(&server.disk, server.cpus, server.socket.clone())?;
        // If it is told to stop instead, the machine is, too.
        server.wait_until_ready(events).map(drop)
    }

    /// Has every server make everything durable and end.
    pub fn stop(mut self, events: &mut Events) -> anyhow::Result<()> {
        let running = std::mem::take(&mut self.servers);
        running.iter().for_each(|server| server.running.signal(Signal::TERM));
        let mut failed = Ok(());
        for mut server in running {
            let name = server.disk.name().display().to_string();
            loop {
                match events.wait(&[server.running.ended()], None)? {
                    Wake::Ready(_) => break,
                    // It recovers when it is next opened.
                    Wake::Insisted => server.running.signal(Signal::KILL),
                    Wake::Asked | Wake::Late => {}
                }
            }
            let status = server.running.wait()?;
            if server.is_ready && !status.success() {
                failed = Err(ended_badly(&name, status));
            }
        }
        failed
    }
}

/// Says that a server failed at its end.
fn ended_badly(name: &str, status: ExitStatus) -> anyhow::Error {
    anyhow::anyhow!("{name}: its server did not end cleanly ({status}): what was not flushed may be lost")
}

impl Server {
    fn start(disk: &DiskSpec, cpus: u8, socket: PathBuf) -> anyhow::Result<Self> {
        let mut command = again("serve");
        command.args(arguments(disk, cpus, &socket));
        // In a process group of its own: a Ctrl-C in the terminal is the supervisor's to deal with.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        // It shares the terminal with the guest: only what matters.
        if std::env::var_os("SAPWOOD_LOG").is_none() {
            command.env("SAPWOOD_LOG", "warn");
        }
        let running = Running::start(&mut command, &[])?;
        Ok(Self { disk: disk.clone(), cpus, socket, running, since: Instant::now(), is_ready: false })
    }

    /// Waits for the line that says that it listens; false: it is told to stop before that. How long a
    /// disk takes to open is for its server to say, so there is no limit but the user's.
    fn wait_until_ready(&mut self, events: &mut Events) -> anyhow::Result<bool> {
        let mut stdout = self.running.take_stdout().context("the server's output is a pipe")?;
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            if events.asked().is_some() {
                return Ok(false);
            }
            if events.wait(&[stdout.as_fd()], None)? == Wake::Ready(0) && !read_some(&mut stdout, &mut line)?
            {
                let status = self.running.wait()?;
                let name = self.disk.name().display();
                bail!("{name}: its server did not start ({status}); the message above says why");
            }
        }
        self.is_ready = true;
        Ok(true)
    }
}

/// Takes what a pipe holds; false at its end.
fn read_some(pipe: &mut ChildStdout, line: &mut Vec<u8>) -> anyhow::Result<bool> {
    let mut buffer = [0; 1024];
    let n = pipe.read(&mut buffer)?;
    line.extend_from_slice(&buffer[..n]);
    if line.len() > READY_BYTES_MAX {
        bail!("the server says too much");
    }
    Ok(n > 0)
}

/// The arguments of `sapwood serve` for a disk.
pub fn arguments(disk: &DiskSpec, cpus: u8, socket: &Path) -> Vec<String> {
    let mut words = Vec::new();
    if let DiskPlace::File { path, format, read_only, control } = &disk.place {
        words.extend(format.map(|format| format!("--format={format}")));
        words.extend(read_only.then(|| "--readonly".to_owned()));
        words.push(format!("--queues={}", disk.queues(cpus)));
        words.push(format!("--socket={}", socket.display()));
        words.extend(control.as_ref().map(|control| format!("--control={}", control.display())));
        words.push("--".to_owned());
        words.push(path.display().to_string());
    }
    words
}

/// Why a disk cannot be opened, with the way in which `sapwood boot` writes the options that the message may name.
pub fn with_options(error: ImageError) -> anyhow::Error {
    match error.kind {
        ErrorKind::Unsupported(_) | ErrorKind::Invalid(_) => anyhow::anyhow!(
            "{:#} (for sapwood boot: DISK,format=raw or DISK,readonly; an image with backing files needs a layer over it)",
            anyhow::Error::from(error)
        ),
        _ => error.into(),
    }
}

/// A folder that only this user can enter.
fn folder() -> anyhow::Result<TempDir> {
    let place = std::env::temp_dir();
    if place.as_os_str().len() > FOLDER_BYTES_MAX {
        bail!("{}: too long a path for sockets (TMPDIR names another)", place.display());
    }
    let mut builder = tempfile::Builder::new();
    let made = builder.prefix("sapwood-boot-").permissions(Permissions::from_mode(0o700)).tempdir();
    made.with_context(|| {
        format!("cannot make a folder for sockets in {} (TMPDIR names another)", place.display())
    })
}

/// Removes the folder of a socket when it is empty: what a server does whose supervisor cannot any more.
pub fn remove_folder_of(socket: &Path) {
    // Another server's socket may be in it still: that server removes it then.
    let _ = socket.parent().map(fs::remove_dir);
}
