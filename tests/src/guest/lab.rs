//! A place for one experiment with guests: a root layer over the Debian image, a data layer, their
//! backends, and the comparison of what a guest saw with what `sapwood convert` writes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{Assets, Backend, BackendSpec, Disk, Guest, GuestSpec, sapwood_program};

/// Queues of every disk: as many as a guest has processors by default.
const QUEUES: u16 = 2;

/// The layers and sockets of one experiment, in a directory that is removed with it.
#[derive(Debug)]
pub struct Lab {
    assets: Assets,
    program: PathBuf,
    work: TempDir,
}

/// The backends of a lab's two disks.
#[derive(Debug)]
pub struct Served {
    /// Serves the root layer.
    pub root: Backend,
    /// Serves the data layer.
    pub data: Backend,
}

impl Served {
    /// Ends both with SIGTERM; each must drain, sync and end with status 0.
    ///
    /// # Errors
    /// See [`Backend::stop`].
    pub fn stop(self) -> Result<()> {
        self.data.stop().context("the data disk's backend")?;
        self.root.stop().context("the root disk's backend")
    }

    /// Ends both with SIGKILL.
    ///
    /// # Errors
    /// See [`Backend::kill`].
    pub fn kill(self) -> Result<()> {
        self.data.kill()?;
        self.root.kill()
    }

    /// The disks as a guest gets them: root first.
    pub fn disks(&self) -> Vec<Disk> {
        [&self.root, &self.data].map(|backend| Disk::new(backend.socket()).queues(QUEUES)).into()
    }
}

impl Lab {
    /// Makes both layers; the data disk has `data_mib` MiB and nothing below it.
    ///
    /// # Errors
    /// The guest's files or the `sapwood` program are missing, or a layer cannot be made.
    pub fn new(data_mib: u32) -> Result<Self> {
        let work = tempfile::Builder::new().prefix("sapwood-lab-").tempdir()?;
        let lab = Self { assets: Assets::locate()?, program: sapwood_program()?, work };
        let base = lab.assets.root_image.display().to_string();
        let root = lab.root().display().to_string();
        lab.sapwood(&["create", "-f", "layer", "-b", &base, "-F", "raw", &root])?;
        let data = lab.data().display().to_string();
        lab.sapwood(&["create", "-f", "layer", &data, &format!("{data_mib}M")])?;
        Ok(lab)
    }

    /// The layer over the Debian image.
    pub fn root(&self) -> PathBuf {
        self.path("root.layer")
    }

    /// The layer without a base.
    pub fn data(&self) -> PathBuf {
        self.path("data.layer")
    }

    /// A path in the lab's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// Starts both backends. What was left by killed ones is recovered by them.
    ///
    /// # Errors
    /// See [`Backend::start`].
    pub fn serve(&self) -> Result<Served> {
        let start = |disk: &Path, socket: &str| {
            let spec = BackendSpec::layer(disk, QUEUES).with_program(&self.program);
            Backend::start(&spec, &self.path(socket))
        };
        Ok(Served { root: start(&self.root(), "root.sock")?, data: start(&self.data(), "data.sock")? })
    }

    /// Boots a guest from `disks`, the first being its root, and runs `script`.
    ///
    /// # Errors
    /// See [`Guest::boot`].
    pub fn boot(&self, disks: Vec<Disk>, script: impl Into<String>) -> Result<Guest> {
        Guest::boot(&GuestSpec::new(disks, script), &self.assets)
    }

    /// Checks both layers with `sapwood check`. No backend may run.
    ///
    /// # Errors
    /// A layer is not as it should be; the message holds what the check wrote.
    pub fn check(&self) -> Result<()> {
        for layer in [self.root(), self.data()] {
            self.sapwood(&["check", &layer.display().to_string()])?;
        }
        Ok(())
    }

    /// Writes what the data layer holds into the raw image `name` and gives its SHA-256.
    ///
    /// # Errors
    /// A program fails; the message holds what it wrote.
    pub fn convert_data(&self, name: &str) -> Result<String> {
        let (from, to) = (self.data().display().to_string(), self.path(name).display().to_string());
        self.sapwood(&["convert", "-f", "layer", "-O", "raw", &from, &to])?;
        let sum = output(Command::new("sha256sum").arg(&to))?;
        Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
    }

    /// Runs `sapwood` with `arguments` and gives its standard output.
    ///
    /// # Errors
    /// It fails; the message holds what it wrote.
    pub fn sapwood(&self, arguments: &[&str]) -> Result<String> {
        output(Command::new(&self.program).args(arguments))
    }
}

/// Runs `command`, which must succeed, and gives its standard output.
///
/// # Errors
/// It cannot be started or fails; the message holds what it wrote.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {errors}{text}", output.status);
    Ok(text)
}
