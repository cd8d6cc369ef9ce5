//! This program, started once more.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};

use anyhow::{Context, bail};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal,
};

/// The option by which a child learns its parent's process id; see [`end_with`].
pub const CHILD_OF: &str = "child-of";

/// A command that starts this program again; its first argument is `command`.
pub fn again(command: &str) -> Command {
    // Not by its path: the program may have been replaced meanwhile.
    let mut again = Command::new("/proc/self/exe");
    again.arg0("sapwood").arg(command).arg(format!("--{CHILD_OF}={}", getpid().as_raw_pid()));
    again
}

/// Has this process end by `signal` when its parent, which must be the process `parent`, ends. Strictly it
/// is the thread that started this process: children are started by the main thread.
pub fn end_with(parent: u32, signal: Signal) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(signal)).context("cannot follow the parent process")?;
    // It may have ended before that.
    let now = getppid().map(Pid::as_raw_pid);
    if now.and_then(|pid| u32::try_from(pid).ok()) != Some(parent) {
        bail!("the parent process {parent} is gone");
    }
    Ok(())
}

/// A running child. Dropping it kills it.
pub struct Running {
    child: Child,
    ended: OwnedFd,
}

impl Running {
    /// Starts a child that inherits `files`, by the same numbers, beside its standard streams.
    pub fn start(command: &mut Command, files: &[BorrowedFd<'_>]) -> anyhow::Result<Self> {
        // Nobody else starts anything meanwhile: the supervisor has one thread.
        files.iter().try_for_each(|file| fcntl_setfd(file, FdFlags::empty()))?;
        let child = command.spawn().context("cannot start this program again");
        files.iter().try_for_each(|file| fcntl_setfd(file, FdFlags::CLOEXEC))?;
        let child = child?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let ended = ended.context("cannot watch a process (Linux 5.3 is needed)")?;
        Ok(Self { child, ended })
    }

    /// Readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Its standard output, if that is a pipe.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        // A process that has ended needs none.
        let _ = rustix::process::pidfd_send_signal(&self.ended, signal);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> std::io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number by which a child that inherits `file` knows it.
pub fn number(file: &impl AsFd) -> RawFd {
    file.as_fd().as_raw_fd()
}

/// An inherited file, by its number; the caller's from now on.
pub fn inherited(number: RawFd) -> anyhow::Result<File> {
    sapwood_vmm::inherited::take(number).with_context(|| format!("cannot use inherited file {number}"))
}
