//! One virtual machine: what it is made of, how it starts, how it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Assets;
use super::accelerator::Accelerator;
use super::child::OwnedChild;
use super::cpio::Archive;
use super::report::{GuestReport, Lines, Waited};
use super::vmm::{Files, Vmm};

/// Beyond the script's own limit: time to boot and to switch off.
const BOOT_ALLOWANCE: Duration = Duration::from_secs(90);
/// How many lines of output a message shows.
const TAIL_LINES: usize = 30;
/// How the script of a disk that boots by itself begins.
const SCRIPT_MAGIC: &str = "#sapwood 1\n";
const SECTOR: usize = 512;

const INIT: &str = include_str!("init.sh");
const START: &str = include_str!("start.sh");
const LIBRARY: &str = include_str!("lib.sh");

/// Where a guest's script runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// In the Debian on the guest's first disk (`/dev/vda`), mounted for writing.
    FirstDisk,
    /// In the initial file system: busybox only, no disk needed.
    Initramfs,
}

/// A disk from a vhost-user-blk backend. Disks appear as `/dev/vda`, `/dev/vdb`, ... in order.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The backend's socket.
    pub socket: PathBuf,
    /// The number of virtqueues.
    pub queues: u16,
    /// Whether the guest may see and switch the backend's write cache (`CONFIG_WCE`).
    pub config_wce: bool,
    /// Whether QEMU connects again when the backend has gone.
    pub reconnect: bool,
}

impl Disk {
    /// A disk with one queue.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), queues: 1, config_wce: true, reconnect: false }
    }

    /// A disk with one queue of `qemu-storage-daemon`. Its configuration space (10.0) says
    /// "write through" although it caches, so that a guest that may look never flushes; one that
    /// may not look flushes.
    pub fn of_qemu(socket: impl Into<PathBuf>) -> Self {
        Self { config_wce: false, ..Self::new(socket) }
    }

    /// The same disk; when its backend has gone, QEMU waits for another at the same socket.
    #[must_use]
    pub fn reconnecting(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// The same disk with `queues` queues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The disks, in order.
    pub disks: Vec<Disk>,
    /// Where the script runs.
    pub root: Root,
    /// Shell text; `lib.sh` says what it may call beside programs. It runs with `set -eu`.
    pub script: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// How long the script may take, in whole seconds; the guest switches itself off after it.
    pub limit: Duration,
    /// Programs and other files that the guest finds in `/run/sapwood`, by name.
    pub files: Vec<(String, PathBuf)>,
    /// Whether it loads KVM, to run guests itself.
    pub kvm: bool,
}

impl GuestSpec {
    /// A guest that runs `script` in the Debian on the first of `disks`: 512 MiB, two processors,
    /// ten minutes.
    pub fn new(disks: Vec<Disk>, script: impl Into<String>) -> Self {
        Self {
            disks,
            root: Root::FirstDisk,
            script: script.into(),
            memory_mib: 512,
            cpus: 2,
            limit: Duration::from_secs(600),
            files: Vec::new(),
            kvm: false,
        }
    }

    /// A guest without disks that runs `script` in the initial file system.
    pub fn diskless(script: impl Into<String>) -> Self {
        Self { root: Root::Initramfs, ..Self::new(Vec::new(), script) }
    }
}

/// A guest that `sapwood boot` starts from a disk with a kernel of its own, as `cargo xtask setup` makes one
/// ([`Assets::bootable_image`]).
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// The arguments of `sapwood boot`. The disk with the script is added as the last one.
    pub arguments: Vec<String>,
    /// As for [`GuestSpec`], `lib.sh` included.
    pub script: String,
    /// How long all may take.
    pub limit: Duration,
}

/// A running guest. Dropping it ends it like a power cut.
#[derive(Debug)]
pub struct Guest {
    vmm: OwnedChild,
    lines: Lines,
    started: Instant,
    deadline: Instant,
    work: tempfile::TempDir,
}

impl Guest {
    /// Starts a guest in QEMU with the fastest accelerator that works on this machine.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn boot(spec: &GuestSpec, assets: &Assets) -> Result<Self> {
        Self::boot_with(spec, assets, &Vmm::Qemu(Accelerator::detect(assets)?))
    }

    /// Starts a guest in the given VMM.
    ///
    /// # Errors
    /// The VMM cannot be started.
    pub fn boot_with(spec: &GuestSpec, assets: &Assets, vmm: &Vmm) -> Result<Self> {
        let work = tempfile::tempdir().context("making a directory for the guest")?;
        let mut initramfs =
            fs::read(&assets.initramfs).with_context(|| format!("reading {}", assets.initramfs.display()))?;
        initramfs.extend(additions(spec)?);
        let files = Files {
            kernel: assets.kernel.clone(),
            initramfs: work.path().join("initramfs"),
            console: work.path().join("console"),
        };
        fs::write(&files.initramfs, initramfs)?;
        Self::start(&vmm.program(), &vmm.arguments(spec, &files), spec.limit + BOOT_ALLOWANCE, work)
    }

    /// Starts a guest from a disk with a kernel of its own.
    ///
    /// # Errors
    /// `program`, a `sapwood`, cannot be started.
    pub fn boot_from_disk(spec: &BootSpec, program: &Path) -> Result<Self> {
        let work = tempfile::tempdir().context("making a directory for the guest")?;
        let disk = work.path().join("script");
        let mut script = format!("{SCRIPT_MAGIC}{LIBRARY}{}", spec.script).into_bytes();
        script.resize(script.len().next_multiple_of(SECTOR), b'\n');
        fs::write(&disk, script)?;
        let mut arguments = vec!["boot".to_owned()];
        arguments.extend(spec.arguments.iter().cloned());
        arguments.extend(["--disk".to_owned(), format!("{},format=raw,readonly", disk.display())]);
        Self::start(&program.display().to_string(), &arguments, spec.limit, work)
    }

    fn start(program: &str, arguments: &[String], limit: Duration, work: tempfile::TempDir) -> Result<Self> {
        let started = Instant::now();
        let mut vmm = OwnedChild::start(program, arguments, Stdio::piped())?;
        let pipe = vmm.take_stdout().context("a VMM's output is a pipe")?;
        Ok(Self { vmm, lines: Lines::collect(pipe), started, deadline: started + limit, work })
    }

    /// Waits until the script said `mark NAME`, at most `limit`.
    ///
    /// # Errors
    /// The guest or its script ended first, or the time is over; the message holds the output.
    pub fn wait_for(&self, name: &str, limit: Duration) -> Result<()> {
        match self.lines.wait_for_mark(name, limit) {
            Waited::Found => Ok(()),
            Waited::Ended => bail!("the guest ended before mark {name}: {}", self.state()),
            Waited::TimedOut => {
                bail!("no mark {name} after {} s: {}", limit.as_secs(), self.state())
            }
        }
    }

    /// Ends the guest at once, as a power cut of the machine would, and gives what it said.
    ///
    /// # Errors
    /// It had ended by itself before.
    pub fn kill(mut self) -> Result<GuestReport> {
        self.vmm.kill()?;
        Ok(self.lines.finish(self.started))
    }

    /// Waits until the guest has switched itself off.
    ///
    /// # Errors
    /// It takes longer than its script may, or ended before its script did; the message holds its
    /// output. A failing script is no error here: see [`Guest::succeed`].
    pub fn finish(self) -> Result<GuestReport> {
        Ok(self.end()?.0)
    }

    /// Waits until the VMM has ended, and gives its exit code (`None`: a signal ended it), what the guest said, and what the
    /// VMM and the kernel wrote. The script need not have ended.
    ///
    /// # Errors
    /// It takes longer than it may; the message holds the output.
    pub fn exit(mut self) -> Result<(Option<i32>, GuestReport, String)> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.vmm.wait(left) {
            Ok(status) => {
                let context = format!("{status}: {}\n{}", self.vmm.stderr(), self.console());
                Ok((status.code(), self.lines.finish(self.started), context))
            }
            Err(error) => bail!("{error:#}\n{}", self.state()),
        }
    }

    /// What the guest said so far.
    pub fn so_far(&self) -> GuestReport {
        self.lines.report(self.started)
    }

    /// The report, and what the VMM and the kernel wrote.
    fn end(mut self) -> Result<(GuestReport, String)> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let status = match self.vmm.wait(left) {
            Ok(status) => status,
            Err(error) => bail!("{error:#}\n{}", self.state()),
        };
        let context = format!("{status}: {}\n{}", self.vmm.stderr(), self.console());
        let report = self.lines.finish(self.started);
        if report.timed_out() || report.status().is_none() {
            bail!("the guest ended before its script: {}\n{context}", report.tail(TAIL_LINES));
        }
        Ok((report, context))
    }

    /// Like [`Guest::finish`], but the script must also succeed.
    ///
    /// # Errors
    /// As for [`Guest::finish`], and when the script's status is not 0.
    pub fn succeed(self) -> Result<GuestReport> {
        let (report, context) = self.end()?;
        if report.status() != Some(0) {
            bail!("the guest's script failed: {}\n{context}", report.tail(TAIL_LINES));
        }
        Ok(report)
    }

    /// The last lines of the kernel's console.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.work.path().join("console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    fn state(&self) -> String {
        let lines = self.lines.so_far();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        format!("{}\n{tail}\nconsole:\n{}", self.vmm.stderr(), self.console())
    }
}

/// What is appended to the initial file system: everything but the drivers.
fn additions(spec: &GuestSpec) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.file("init", 0o755, INIT.as_bytes());
    archive.directory("sapwood");
    archive.file("sapwood/start.sh", 0o644, START.as_bytes());
    archive.file("sapwood/lib.sh", 0o644, LIBRARY.as_bytes());
    archive.file("sapwood/script.sh", 0o644, spec.script.as_bytes());
    for (name, path) in &spec.files {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        archive.file(&format!("sapwood/{name}"), 0o755, &bytes);
    }
    Ok(archive.finish())
}
