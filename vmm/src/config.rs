//! What a virtual machine consists of, and how it can end.

use std::fs::File;
use std::path::PathBuf;

/// A virtual machine.
#[derive(Debug)]
pub struct Config {
    /// RAM in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u8,
    /// A bzImage, or an ELF file (`vmlinux`, or anything with a PVH entry).
    pub kernel: File,
    /// The initial file system.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The disks, in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// The serial port.
    pub console: Console,
}

/// A disk: whoever listens on a vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Where the backend listens.
    pub socket: PathBuf,
}

/// Both ends of the serial port.
#[derive(Debug)]
pub struct Console {
    /// What is typed; `None`: nothing ever is.
    pub input: Option<File>,
    /// Where the guest's output goes.
    pub output: File,
    /// Whether Ctrl-A X in the input ends the machine, and Ctrl-A Ctrl-A (or Ctrl-A A) is a Ctrl-A: for a terminal.
    pub escape: bool,
}

/// How a virtual machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest wants to start again.
    Reboot,
    /// The guest's kernel reported a panic.
    Panic,
    /// A processor cannot go on (a triple fault, for example).
    Crash,
    /// The user ended it, with the console's escape or a signal.
    Stopped,
}
