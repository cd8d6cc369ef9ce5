//! The programs that run guests: QEMU, and `sapwood boot` where KVM really works.
//!
//! A guest in QEMU has two serial ports, one for the kernel's messages and one for what its script writes. In `sapwood boot`
//! it has one: there the kernel is told to be quiet.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Assets;
use super::accelerator::Accelerator;
use super::machine::{Disk, GuestSpec, Root};

pub(super) const QEMU: &str = "qemu-system-x86_64";
/// The first PCI slot for disks; lower ones belong to the chipset.
const FIRST_SLOT: usize = 4;

/// Which program runs a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU.
    Qemu(Accelerator),
    /// `sapwood boot` of this `sapwood` program. It needs KVM.
    Sapwood(PathBuf),
}

/// The files of a guest that starts.
pub(super) struct Files {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// Where QEMU writes the kernel's messages.
    pub(super) console: PathBuf,
}

impl Vmm {
    /// `sapwood boot` where KVM really works on this machine, else QEMU. `program` is the `sapwood` program.
    ///
    /// # Errors
    /// See [`Accelerator::detect`].
    pub fn preferred(assets: &Assets, program: &Path) -> Result<Self> {
        Ok(match Accelerator::detect(assets)? {
            Accelerator::Kvm => Self::Sapwood(program.to_owned()),
            Accelerator::Tcg => Self::Qemu(Accelerator::Tcg),
        })
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        match self {
            Self::Qemu(accelerator) => format!("QEMU, {}", accelerator.name()),
            Self::Sapwood(_) => "sapwood boot, kvm".to_owned(),
        }
    }

    pub(super) fn program(&self) -> String {
        match self {
            Self::Qemu(_) => QEMU.to_owned(),
            Self::Sapwood(program) => program.display().to_string(),
        }
    }

    /// The arguments with which its standard output is what the script writes.
    pub(super) fn arguments(&self, spec: &GuestSpec, files: &Files) -> Vec<String> {
        match self {
            Self::Qemu(accelerator) => qemu_arguments(*accelerator, spec, files),
            Self::Sapwood(_) => sapwood_arguments(spec, files),
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// The kernel's command line: what `init.sh` and `start.sh` read, after `first`.
fn command_line(first: &str, output: &str, spec: &GuestSpec) -> String {
    let root = match spec.root {
        Root::FirstDisk => "/dev/vda",
        Root::Initramfs => "none",
    };
    let modules = if spec.kvm { " sapwood.modules=kvm" } else { "" };
    format!(
        "console=ttyS0 {first} panic=1 random.trust_cpu=on mitigations=off sapwood.root={root} sapwood.disks={} \
         sapwood.limit={} sapwood.output={output}{modules}",
        spec.disks.len(),
        spec.limit.as_secs()
    )
}

fn qemu_arguments(accelerator: Accelerator, spec: &GuestSpec, files: &Files) -> Vec<String> {
    let memory = spec.memory_mib;
    let mut arguments = words(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    arguments.extend(words(&["-machine", "q35,memory-backend=memory"]));
    // Shared memory: the backend reads and writes the guest's buffers itself.
    let object = format!("memory-backend-memfd,id=memory,size={memory}M,share=on");
    arguments.extend(words(&["-object", &object, "-m", &format!("{memory}M")]));
    arguments.extend(words(&["-smp", &spec.cpus.to_string()]));
    // A busy host can mislead the kernel about the speed of its clock. What guests of a guest wait for takes long
    // enough that this matters: there the kernel goes on watching the clock.
    let first = if spec.kvm { "loglevel=4" } else { "loglevel=4 tsc=reliable" };
    arguments.extend(words(&["-append", &command_line(first, "ttyS1", spec)]));
    arguments.extend(accelerator.arguments());
    arguments.extend(words(&["-kernel", &files.kernel.to_string_lossy()]));
    arguments.extend(words(&["-initrd", &files.initramfs.to_string_lossy()]));
    arguments.extend(words(&["-serial", &format!("file:{}", files.console.display())]));
    // The second serial port: what the script writes.
    arguments.extend(words(&["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]));
    for (index, disk) in spec.disks.iter().enumerate() {
        arguments.extend(qemu_disk(index, disk));
    }
    arguments
}

fn qemu_disk(index: usize, disk: &Disk) -> Vec<String> {
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

fn sapwood_arguments(spec: &GuestSpec, files: &Files) -> Vec<String> {
    let mut arguments = words(&["boot", "--no-reboot", "--kernel", &files.kernel.to_string_lossy()]);
    arguments.extend(words(&["--initrd", &files.initramfs.to_string_lossy()]));
    arguments.extend(words(&["--cmdline", &command_line("quiet loglevel=1", "ttyS0", spec)]));
    arguments.extend(words(&["--cpus", &spec.cpus.to_string()]));
    arguments.extend(words(&["--memory", &format!("{}M", spec.memory_mib)]));
    for disk in &spec.disks {
        arguments
            .extend(words(&["--disk", &format!("socket={},queues={}", disk.socket.display(), disk.queues)]));
    }
    arguments
}
