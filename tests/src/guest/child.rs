//! A process that a test owns: it is ended when the value that stands for it is dropped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

const POLL: Duration = Duration::from_millis(5);
/// How long a process may take to vanish after SIGKILL (it may be in the middle of an I/O).
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How much of a program's standard error is shown, in bytes.
const STDERR_MAX: u64 = 1 << 20;

/// A running program whose standard error is kept.
#[derive(Debug)]
pub struct OwnedChild {
    name: String,
    child: Child,
    errors: File,
    status: Option<ExitStatus>,
}

impl OwnedChild {
    /// Starts `program` with `arguments`. The process is also ended when the *thread* that called
    /// this ends, so that a killed test leaves nothing behind.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(program: &str, arguments: &[String], stdout: Stdio) -> Result<Self> {
        let errors = tempfile::tempfile().context("making a temporary file")?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", program])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(errors.try_clone()?)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        Ok(Self { name: program.to_owned(), child, errors, status: None })
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Takes the pipe that `Stdio::piped` made.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// What the program wrote on standard error so far.
    pub fn stderr(&self) -> String {
        // Read by position: the file's own position belongs to the writer.
        let length = self.errors.metadata().map_or(0, |metadata| metadata.len().min(STDERR_MAX));
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        match self.errors.read_exact_at(&mut text, 0) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("(standard error cannot be read: {error})"),
        }
    }

    /// The status, if the process has ended.
    ///
    /// # Errors
    /// The system does not say.
    pub fn try_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits for the end, at most `limit`.
    ///
    /// # Errors
    /// The process still runs after `limit`. It goes on running.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_status()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {} s: {}", self.name, limit.as_secs(), self.stderr());
            }
            thread::sleep(POLL);
        }
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// The process has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.try_status()? {
            bail!("{} ended before the signal with {status}: {}", self.name, self.stderr());
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("a process id is a positive i32")?, signal)?;
        Ok(())
    }

    /// Ends the process with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// It had ended by itself before (the message holds its status), or does not vanish.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        let status = self.wait(KILL_LIMIT)?;
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("{} ended with {status} before it was killed: {}", self.name, self.stderr());
        }
        Ok(())
    }
}

impl Drop for OwnedChild {
    fn drop(&mut self) {
        if matches!(self.try_status(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.wait(KILL_LIMIT);
        }
    }
}
