//! `sapwood boot`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::output;
use super::size::Size;
use crate::boot::{self, Boot as What, ConsoleSpec, DiskSpec, Machine, Outcome};
use crate::host::Host;

/// Exit code when the guest's kernel panicked.
const EXIT_PANIC: u8 = 10;
/// Exit code when a processor of the guest could not go on.
const EXIT_CRASH: u8 = 11;
/// Exit code when the guest restarted, with `--no-reboot`.
const EXIT_REBOOT: u8 = 12;
/// Exit code when the time was over, as of `timeout` (GNU coreutils).
const EXIT_TIMED_OUT: u8 = 124;
/// Exit code when the user ended it.
const EXIT_STOPPED: u8 = 130;

/// The command line of a kernel that is given without one.
const CMDLINE: &str = "console=ttyS0";

/// No comment: its brackets would be links.
const DISK_HELP: &str = "One more disk: FILE[,format=raw|layer|qcow2][,readonly][,queues=N][,control=PATH], a volume of a \
    store as STORE:volume[,queues=N] or, served already, socket=PATH[,queues=N]. The guest sees the disks in the order given, DISK first";

/// Start a virtual machine from a disk
///
/// Finds the kernel on the first disk, or takes the one that is given, and starts it under KVM. Each disk that is a
/// file gets a server of its own, as with sapwood serve; a volume is attached to the daemon of its store, if that runs. The guest's first serial port is standard input and output; on a
/// terminal Ctrl-A X ends the machine. The exit code is 0 when the guest powers off.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood boot vm1.layer
  sapwood boot vm1.layer --cpus 4 --memory 4G --append 'quiet ro'
  sapwood boot vm1.layer --disk data.raw,format=raw --disk tools.qcow2,readonly
  sapwood boot /srv/vms:web
  sapwood boot /srv/vms:web --disk /srv/vms:data    # two volumes of one store: its daemon has to run
  sapwood boot --disk socket=/run/vm2.sock --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda'
  sapwood boot vm1.layer --console file=console.log --timeout 600 --no-reboot
  sapwood boot vm1.layer --print-qemu --extract-kernel boot/ > vm1.sh

Exit codes: 0 the guest powered off, 1 error, 10 its kernel panicked, 11 a processor crashed, 12 it restarted
(--no-reboot), 64 wrong usage, 124 the time was over, 130 ended by the user.")]
pub struct Boot {
    #[arg(long = "disk", value_name = "DISK", help = DISK_HELP)]
    disks: Vec<DiskSpec>,

    /// Start this kernel (a bzImage or an ELF file), not one from the first disk
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Initial file system for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Command line for --kernel [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Add this to the command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,

    /// Start this boot entry of the first disk, not the default one
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    entry: Option<String>,

    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,

    /// Memory of the guest: whole MiB
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory)]
    memory: u64,

    /// Where the guest's serial port leads: stdio, none or file=PATH
    #[arg(long, value_name = "CONSOLE", default_value = "stdio")]
    console: ConsoleSpec,

    /// End when the guest restarts
    #[arg(long)]
    no_reboot: bool,

    /// End the guest after this time
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=u64::from(u32::MAX)))]
    timeout: Option<u64>,

    /// Start nothing: print a shell script that starts the same machine in QEMU
    #[arg(long)]
    print_qemu: bool,

    /// Copy kernel and initial file system of the first disk to this folder, for --print-qemu
    #[arg(long, value_name = "FOLDER", requires = "print_qemu", conflicts_with = "kernel")]
    extract_kernel: Option<PathBuf>,

    /// Do not try first whether KVM can run a kernel here
    #[arg(long, hide = true)]
    skip_probe: bool,

    /// The first disk, as with --disk
    #[arg(value_name = "DISK", required_unless_present_any = ["disks", "kernel"])]
    disk: Option<DiskSpec>,
}

impl Boot {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let (print_qemu, extract) = (self.print_qemu, self.extract_kernel.clone());
        let mut machine = self.machine(*host);
        if print_qemu {
            let _ = boot::settle(&mut machine, *host, false)?;
            let no_kvm = boot::probe().err().map(|error| format!("{error:#}"));
            output::print(&boot::script(&machine, extract.as_deref(), no_kvm.as_deref())?)?;
            return Ok(0);
        }
        let outcome = boot::run(&mut machine)?;
        let (code, said) = match outcome {
            Outcome::PowerOff => (0, None),
            Outcome::Panic => (EXIT_PANIC, Some("the guest's kernel panicked")),
            Outcome::Crash => (EXIT_CRASH, Some("a processor of the guest could not go on (a triple fault)")),
            Outcome::Reboot => (EXIT_REBOOT, Some("the guest restarted")),
            Outcome::TimedOut => (EXIT_TIMED_OUT, Some("the time was over")),
            Outcome::Stopped => (EXIT_STOPPED, None),
        };
        if let Some(said) = said {
            eprintln!("sapwood: {said}");
        }
        Ok(code)
    }

    /// What the command line describes.
    fn machine(self, host: Host) -> Machine {
        let boot = match self.kernel {
            Some(kernel) => {
                let cmdline = self.cmdline.unwrap_or_else(|| CMDLINE.to_owned());
                let more = self.append.map(|more| format!(" {more}")).unwrap_or_default();
                What::Files { kernel, initrd: self.initrd, cmdline: cmdline + &more }
            }
            None => What::FirstDisk { entry: self.entry, append: self.append },
        };
        Machine {
            boot,
            cpus: self.cpus,
            memory_bytes: self.memory,
            disks: self.disk.into_iter().chain(self.disks).collect(),
            first_volume: None,
            host,
            console: self.console,
            no_reboot: self.no_reboot,
            timeout: self.timeout.map(Duration::from_secs),
            probe: !self.skip_probe,
        }
    }
}

/// Reads a size of memory.
fn memory(text: &str) -> Result<u64, String> {
    let Size(bytes) = text.parse()?;
    if bytes == 0 || bytes % (1 << 20) != 0 {
        return Err("memory is a number of whole MiB, for example 512M or 2G".to_owned());
    }
    Ok(bytes)
}
