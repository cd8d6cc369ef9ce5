//! The process that the guest runs in. It gets everything from the supervisor, and tells it by its exit code how the guest
//! ended.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Args;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use sapwood_vmm::{Config, Console, Disk, Ending};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::child::{self, CHILD_OF, end_with};
use super::machine;

/// How each ending is told to the supervisor; other codes are errors.
const CODES: [(Ending, u8); 5] = [
    (Ending::PowerOff, 40),
    (Ending::Reboot, 41),
    (Ending::Panic, 42),
    (Ending::Crash, 43),
    (Ending::Stopped, 44),
];

/// Run a virtual machine that `sapwood boot` describes
#[derive(Args, Debug)]
pub struct Worker {
    /// Process that started this one; when it ends this one does
    #[arg(long = CHILD_OF, value_name = "PID")]
    parent: u32,

    /// Inherited file with the description
    #[arg(value_name = "NUMBER")]
    handover: RawFd,
}

/// What the supervisor tells the worker. Files are inherited, and named by their numbers.
#[derive(Debug, Deserialize, Serialize)]
pub struct Handover {
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u8,
    /// The kernel.
    pub kernel: RawFd,
    /// The initial file system.
    pub initrd: Option<RawFd>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the disks are served.
    pub sockets: Vec<PathBuf>,
    /// Standard input leads to the serial port.
    pub input: bool,
    /// Standard input is a terminal.
    pub terminal: bool,
    /// A pipe that can be read when the machine is to stop.
    pub stop: RawFd,
}

impl Handover {
    /// Puts it into a file to be inherited.
    pub fn file(&self) -> anyhow::Result<File> {
        let mut file = File::from(memfd_create("sapwood-handover", MemfdFlags::CLOEXEC)?);
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        file.rewind()?;
        Ok(file)
    }
}

impl Worker {
    /// Runs the machine until it ends; the exit code that says how.
    pub fn run(self) -> anyhow::Result<u8> {
        end_with(self.parent, Signal::KILL)?;
        crate::abort_on_panic();
        // The terminal, or who ends all processes of a service, sends these to the supervisor, too, which decides.
        for signal in [SIGINT, SIGHUP, SIGQUIT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
        }
        let handover = child::inherited(self.handover)?;
        let handover: Handover =
            serde_json::from_reader(handover).context("the description of the machine")?;
        let stop = child::inherited(handover.stop)?;
        let config = handover.config()?;
        sapwood_vmm::inherited::close_others().context("cannot close what was inherited")?;
        let ending = machine::run(config, stop)?;
        let code = CODES.iter().find(|(known, _)| *known == ending).map(|(_, code)| *code);
        code.context("the machine ended in an unknown way")
    }
}

impl Handover {
    /// The machine that it describes.
    fn config(self) -> anyhow::Result<Config> {
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let input = if self.input { Some(own(io::stdin().as_fd())?) } else { None };
        let console = Console { input, output: own(io::stdout().as_fd())?, escape: self.terminal };
        Ok(Config {
            memory_bytes: self.memory_bytes,
            cpus: self.cpus,
            kernel: child::inherited(self.kernel)?,
            initrd: self.initrd.map(child::inherited).transpose()?,
            cmdline: self.cmdline,
            disks: self.sockets.into_iter().map(|socket| Disk { socket }).collect(),
            console,
        })
    }
}

/// How the guest ended, by the worker's exit status.
pub fn ending(status: ExitStatus) -> anyhow::Result<Ending> {
    let known = CODES.iter().find(|(_, code)| status.code() == Some(i32::from(*code)));
    match known {
        Some((ending, _)) => Ok(*ending),
        None if status.code() == Some(1) => {
            bail!("the virtual machine could not go on; the message above says why")
        }
        None => bail!("the process of the virtual machine ended unexpectedly ({status})"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn only_its_own_codes_are_endings() {
        let exit = |code: u8| ending(ExitStatus::from_raw(i32::from(code) << 8));
        for (expected, code) in CODES {
            assert_eq!(exit(code).unwrap(), expected);
        }
        for code in [0, 1, 64, 101, 130] {
            assert!(exit(code).is_err(), "{code}");
        }
        let killed = ending(ExitStatus::from_raw(31)).unwrap_err().to_string();
        assert!(killed.contains("SIGSYS"), "{killed}");
    }
}
