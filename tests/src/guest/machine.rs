//! One virtual machine: what it is made of, how it starts, how it ends.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Assets;
use super::accelerator::Accelerator;
use super::child::OwnedChild;
use super::cpio::Archive;
use super::report::{GuestReport, Lines, Waited};

const QEMU: &str = "qemu-system-x86_64";
/// Beyond the script's own limit: time to boot and to switch off.
const BOOT_ALLOWANCE: Duration = Duration::from_secs(90);
/// How many lines of output a message shows.
const TAIL_LINES: usize = 30;
/// The first PCI slot for disks; lower ones belong to the chipset.
const FIRST_SLOT: usize = 4;

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
        }
    }

    /// A guest without disks that runs `script` in the initial file system.
    pub fn diskless(script: impl Into<String>) -> Self {
        Self { root: Root::Initramfs, ..Self::new(Vec::new(), script) }
    }
}

/// A running guest. Dropping it ends it like a power cut.
#[derive(Debug)]
pub struct Guest {
    qemu: OwnedChild,
    lines: Lines,
    started: Instant,
    deadline: Instant,
    work: tempfile::TempDir,
}

impl Guest {
    /// Starts a guest with the fastest accelerator that works on this machine.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn boot(spec: &GuestSpec, assets: &Assets) -> Result<Self> {
        Self::boot_with(spec, assets, Accelerator::detect(assets)?)
    }

    /// Starts a guest with the given accelerator.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn boot_with(spec: &GuestSpec, assets: &Assets, accelerator: Accelerator) -> Result<Self> {
        let work = tempfile::tempdir().context("making a directory for the guest")?;
        let mut initramfs =
            fs::read(&assets.initramfs).with_context(|| format!("reading {}", assets.initramfs.display()))?;
        initramfs.extend(scripts(&spec.script));
        fs::write(work.path().join("initramfs"), initramfs)?;
        let mut arguments = machine_arguments(spec, accelerator);
        arguments.extend(words(&["-kernel", &assets.kernel.to_string_lossy()]));
        for (option, file) in [("-initrd", "initramfs"), ("-serial", "console")] {
            let prefix = if option == "-serial" { "file:" } else { "" };
            let path = work.path().join(file);
            arguments.extend(words(&[option, &format!("{prefix}{}", path.display())]));
        }
        // The second serial port: what the script writes.
        arguments.extend(words(&["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]));
        for (index, disk) in spec.disks.iter().enumerate() {
            arguments.extend(disk_arguments(index, disk));
        }
        let started = Instant::now();
        let mut qemu = OwnedChild::start(QEMU, &arguments, Stdio::piped())?;
        let pipe = qemu.take_stdout().context("QEMU's output is a pipe")?;
        let lines = Lines::collect(pipe);
        Ok(Self { qemu, lines, started, deadline: started + spec.limit + BOOT_ALLOWANCE, work })
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
        self.qemu.kill()?;
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

    /// The report, and what QEMU and the kernel wrote.
    fn end(mut self) -> Result<(GuestReport, String)> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if let Err(error) = self.qemu.wait(left) {
            bail!("{error:#}\n{}", self.state());
        }
        let context = format!("{}\n{}", self.qemu.stderr(), self.console());
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
        format!("{}\n{tail}\nconsole:\n{}", self.qemu.stderr(), self.console())
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// What is appended to the initial file system: everything but the drivers.
fn scripts(script: &str) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.file("init", 0o755, INIT.as_bytes());
    archive.directory("sapwood");
    archive.file("sapwood/start.sh", 0o644, START.as_bytes());
    archive.file("sapwood/lib.sh", 0o644, LIBRARY.as_bytes());
    archive.file("sapwood/script.sh", 0o644, script.as_bytes());
    archive.finish()
}

fn machine_arguments(spec: &GuestSpec, accelerator: Accelerator) -> Vec<String> {
    let memory = spec.memory_mib;
    let root = match spec.root {
        Root::FirstDisk => "/dev/vda",
        Root::Initramfs => "none",
    };
    let command_line = format!(
        "console=ttyS0 loglevel=4 panic=1 random.trust_cpu=on tsc=reliable mitigations=off \
         sapwood.root={root} sapwood.disks={} sapwood.limit={}",
        spec.disks.len(),
        spec.limit.as_secs()
    );
    let mut arguments = words(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    arguments.extend(words(&["-machine", "q35,memory-backend=memory"]));
    // Shared memory: the backend reads and writes the guest's buffers itself.
    let object = format!("memory-backend-memfd,id=memory,size={memory}M,share=on");
    arguments.extend(words(&["-object", &object, "-m", &format!("{memory}M")]));
    arguments.extend(words(&["-smp", &spec.cpus.to_string(), "-append", &command_line]));
    arguments.extend(accelerator.arguments());
    arguments
}

fn disk_arguments(index: usize, disk: &Disk) -> Vec<String> {
    let reconnect = if disk.reconnect { ",reconnect-ms=100" } else { "" };
    let chardev = format!("socket,id=disk{index},path={}{reconnect}", disk.socket.display());
    let device = format!(
        "vhost-user-blk-pci,id=vd{index},chardev=disk{index},num-queues={},config-wce={},addr={:#x}",
        disk.queues,
        if disk.config_wce { "on" } else { "off" },
        FIRST_SLOT + index
    );
    words(&["-chardev", &chardev, "-device", &device])
}
