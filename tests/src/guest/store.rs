//! A store with its daemon, from which guests get their disks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::lab::output;
use super::{Backend, Disk};

/// A daemon that serves a store. Dropping it ends it with SIGKILL.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    store: PathBuf,
    backend: Backend,
    /// Of the daemon and of volumes: a path of a socket must be short.
    sockets: TempDir,
}

impl Daemon {
    /// Makes a store in `store`, where nothing is.
    ///
    /// # Errors
    /// It cannot be made; the message says why.
    pub fn init(program: &Path, store: &Path) -> Result<()> {
        output(Command::new(program).args(["store", "init"]).arg(store)).map(drop)
    }

    /// Starts the daemon of a store.
    ///
    /// # Errors
    /// See [`Backend::start`].
    pub fn start(program: &Path, store: &Path) -> Result<Self> {
        Self::start_with(program, store, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// See [`Backend::start`].
    pub fn start_with(program: &Path, store: &Path, more: &[&str]) -> Result<Self> {
        let sockets = tempfile::Builder::new().prefix("sapwood-").tempdir()?;
        Self::start_at(program, store, sockets, more)
    }

    fn start_at(program: &Path, store: &Path, sockets: TempDir, more: &[&str]) -> Result<Self> {
        let socket = sockets.path().join("daemon.sock");
        let arguments = [
            "daemon",
            "--store",
            &text(store)?,
            "--socket",
            &text(&socket)?,
            "--sockets",
            &text(sockets.path())?,
        ]
        .map(str::to_owned);
        let arguments: Vec<String> =
            arguments.into_iter().chain(more.iter().map(|more| (*more).to_owned())).collect();
        let backend = Backend::start_program(&text(program)?, &arguments, &socket)?;
        Ok(Self { program: program.to_owned(), store: store.to_owned(), backend, sockets })
    }

    /// Runs `sapwood` on the store, and gives its standard output.
    ///
    /// # Errors
    /// It fails; the message holds what it wrote.
    pub fn sapwood(&self, arguments: &[&str]) -> Result<String> {
        output(Command::new(&self.program).args(arguments).env("SAPWOOD_STORE", &self.store))
    }

    /// Attaches a volume: the disk, with so many queues.
    ///
    /// # Errors
    /// As of [`Self::sapwood`].
    pub fn attach(&self, volume: &str, queues: u16) -> Result<Disk> {
        let socket = self.sockets.path().join(format!("{volume}.sock"));
        self.sapwood(&["attach", "--queues", &queues.to_string(), "--socket", &text(&socket)?, volume])?;
        Ok(Disk::new(socket).queues(queues))
    }

    /// Ends it with SIGTERM: it must close all volumes, and end with status 0.
    ///
    /// # Errors
    /// See [`Backend::stop`].
    pub fn stop(self) -> Result<()> {
        self.backend.stop()
    }

    /// Ends it with SIGKILL, and starts another one, whose sockets have the same paths.
    ///
    /// # Errors
    /// It had ended before; see [`Backend::start`].
    pub fn kill_and_restart(self) -> Result<Self> {
        self.backend.kill()?;
        Self::start_at(&self.program, &self.store, self.sockets, &[])
    }
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned())
}
