//! A vhost-user-blk backend in a process of its own: `sapwood serve`, or `qemu-storage-daemon` as
//! the peer to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;

use super::child::OwnedChild;
use super::sapwood_program;

/// How long a backend may take until its socket listens (recovery included).
const READY_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
/// Of a line of `/proc/net/unix`: the bit of the flags that says "listening".
const LISTENING: u64 = 1 << 16;

/// Which program serves which disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendSpec {
    /// `sapwood serve`.
    Sapwood {
        /// The program; `None` finds it (see [`sapwood_program`]).
        program: Option<PathBuf>,
        /// The image.
        disk: PathBuf,
        /// The value of `-f`; `None` lets sapwood find out.
        format: Option<String>,
        /// `--readonly`.
        readonly: bool,
        /// `--queues`.
        queues: u16,
    },
    /// `qemu-storage-daemon`.
    Qemu {
        /// The image.
        disk: PathBuf,
        /// The block driver: `raw` or `qcow2`.
        format: String,
        /// Whether the guest may not write.
        readonly: bool,
        /// The number of queues offered.
        queues: u16,
    },
}

impl BackendSpec {
    /// `sapwood serve` of a layer, writable, with `queues` queues.
    pub fn layer(disk: impl Into<PathBuf>, queues: u16) -> Self {
        Self::Sapwood { program: None, disk: disk.into(), format: None, readonly: false, queues }
    }

    /// The same with a certain `sapwood` program; changes nothing of another backend.
    #[must_use]
    pub fn with_program(mut self, sapwood: &Path) -> Self {
        if let Self::Sapwood { program, .. } = &mut self {
            *program = Some(sapwood.to_owned());
        }
        self
    }

    fn command(&self, socket: &Path) -> Result<(String, Vec<String>)> {
        match self {
            Self::Sapwood { program, disk, format, readonly, queues } => {
                let mut words = vec!["serve".to_owned()];
                if let Some(format) = format {
                    words.extend(["-f".to_owned(), format.clone()]);
                }
                words.push(disk.display().to_string());
                words.extend(["--socket".to_owned(), socket.display().to_string()]);
                words.extend(["--queues".to_owned(), queues.to_string()]);
                if *readonly {
                    words.push("--readonly".to_owned());
                }
                let program = program.clone().map_or_else(sapwood_program, Ok)?;
                Ok((program.display().to_string(), words))
            }
            Self::Qemu { disk, format, readonly, queues } => {
                let onoff = if *readonly { "on" } else { "off" };
                let writable = if *readonly { "off" } else { "on" };
                let disk = disk.display();
                let words = [
                    "--blockdev".to_owned(),
                    format!("file,node-name=file,filename={disk},discard=unmap,read-only={onoff}"),
                    "--blockdev".to_owned(),
                    format!("{format},node-name=disk,file=file,discard=unmap,read-only={onoff}"),
                    "--export".to_owned(),
                    format!(
                        "vhost-user-blk,id=export,node-name=disk,writable={writable},\
                         num-queues={queues},addr.type=unix,addr.path={}",
                        socket.display()
                    ),
                ];
                Ok(("qemu-storage-daemon".to_owned(), words.to_vec()))
            }
        }
    }
}

/// A backend that listens on its socket. Dropping it ends it with SIGKILL.
#[derive(Debug)]
pub struct Backend {
    child: OwnedChild,
    socket: PathBuf,
}

impl Backend {
    /// Starts the backend and waits until `socket` listens. A socket left by a killed backend is
    /// removed first.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not listen within a minute; the message holds what it
    /// wrote.
    pub fn start(spec: &BackendSpec, socket: &Path) -> Result<Self> {
        let (program, arguments) = spec.command(socket)?;
        Self::start_program(&program, &arguments, socket)
    }

    /// The same for any program whose arguments make it listen on `socket`.
    ///
    /// # Errors
    /// As for [`Backend::start`].
    pub fn start_program(program: &str, arguments: &[String], socket: &Path) -> Result<Self> {
        if socket.exists() {
            ensure!(!is_listening(socket), "another backend listens on {}", socket.display());
            fs::remove_file(socket)?;
        }
        let child = OwnedChild::start(program, arguments, Stdio::null())?;
        let mut backend = Self { child, socket: socket.to_owned() };
        let deadline = Instant::now() + READY_LIMIT;
        while !is_listening(socket) {
            if let Some(status) = backend.child.try_status()? {
                bail!("{program} ended with {status}: {}", backend.stderr());
            }
            if Instant::now() >= deadline {
                bail!("{program} does not listen on {}: {}", socket.display(), backend.stderr());
            }
            thread::sleep(POLL);
        }
        Ok(backend)
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the backend wrote on standard error so far.
    pub fn stderr(&self) -> String {
        self.child.stderr()
    }

    /// Asks the backend to end (SIGTERM) and waits at most `limit`. A good backend drains, syncs
    /// and ends with status 0.
    ///
    /// # Errors
    /// It ended before, or does not end in time.
    pub fn terminate(mut self, limit: Duration) -> Result<ExitStatus> {
        self.child.signal(Signal::TERM)?;
        self.child.wait(limit)
    }

    /// Like [`Backend::terminate`] with a minute's limit, and the status must be 0.
    ///
    /// # Errors
    /// As for [`Backend::terminate`], and when the status is not 0; the message holds what the
    /// backend wrote.
    pub fn stop(mut self) -> Result<()> {
        self.child.signal(Signal::TERM)?;
        let status = self.child.wait(READY_LIMIT)?;
        ensure!(status.success(), "the backend ended with {status}: {}", self.stderr());
        Ok(())
    }

    /// Ends the backend with SIGKILL.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()
    }
}

/// Whether a process listens on the socket `path`; found without connecting, because a
/// connection would be the backend's first frontend.
fn is_listening(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let wanted = path.to_string_lossy();
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let flags = fields.get(3).and_then(|flags| u64::from_str_radix(flags, 16).ok());
        fields.get(7) == Some(&wanted.as_ref()) && flags.is_some_and(|f| f & LISTENING != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_is_seen_without_connecting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(!is_listening(&path));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path));
        drop(listener);
        assert!(!is_listening(&path));
    }
}
