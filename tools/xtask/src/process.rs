//! Runs other programs: every wait is bounded, and what outlives its limit is ended with all
//! that it started.

use std::fs;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How often a running program is looked at: at first, so that short ones are timed well, and in
/// the end.
const POLL_MIN: Duration = Duration::from_micros(100);
const POLL_MAX: Duration = Duration::from_millis(50);

/// Runs `command` with this process's output and waits at most `limit`.
///
/// # Errors
/// The program cannot be started, fails, or does not end in time.
pub fn run(command: &mut Command, limit: Duration) -> Result<()> {
    let status = run_status(command, limit)?;
    ensure!(status.success(), "{} ended with {status}", describe(command));
    Ok(())
}

/// Like [`run`], but a failing status is an answer and not an error.
///
/// # Errors
/// The program cannot be started or does not end in time.
pub fn run_status(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let child =
        command.stdin(Stdio::null()).spawn().with_context(|| format!("starting {}", describe(command)))?;
    wait_bounded(child, limit).with_context(|| format!("waiting for {}", describe(command)))
}

/// Runs `command` quietly and returns what it wrote on standard output.
///
/// # Errors
/// The program cannot be started, fails (the error holds what it wrote), or takes over `limit`.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let out = tempfile::tempfile().context("making a temporary file")?;
    let errors = tempfile::tempfile().context("making a temporary file")?;
    command.stdout(out.try_clone()?).stderr(errors.try_clone()?);
    let status = run_status(command, limit)?;
    let text = read_back(out)?;
    if !status.success() {
        bail!("{} ended with {status}: {}{text}", describe(command), read_back(errors)?);
    }
    Ok(text)
}

fn read_back(mut file: fs::File) -> Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The program and its arguments, for messages.
pub fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Where `program` is on `PATH` (or in the system's `sbin`, which some users' `PATH` lacks).
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn wait_bounded(mut child: Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    let mut poll = POLL_MIN;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            for pid in descendants(child.id()) {
                let _ = Pid::from_raw(pid as i32).map(|pid| kill_process(pid, Signal::KILL));
            }
            child.kill()?;
            child.wait()?;
            bail!("not finished after {} s, ended", limit.as_secs());
        }
        thread::sleep(poll);
        poll = (poll + poll / 8).min(POLL_MAX);
    }
}

/// Ids of the processes below `root`, as `/proc` shows them now.
fn descendants(root: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pairs: Vec<(u32, u32)> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, parent_of(pid)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(pairs.iter().filter(|pair| pair.1 == parent).map(|pair| pair.0));
        next += 1;
    }
    found.split_off(1)
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces; state and parent follow the last parenthesis.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_ended_with_its_children() {
        let begin = Instant::now();
        let limit = Duration::from_millis(200);
        let error = run(Command::new("sh").args(["-c", "sleep 60 & wait"]), limit).unwrap_err();
        assert!(format!("{error:#}").contains("not finished"), "{error:#}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn output_is_read_and_failures_carry_the_message() {
        let limit = Duration::from_secs(10);
        assert_eq!(output(Command::new("echo").arg("hi"), limit).unwrap(), "hi\n");
        let error = output(Command::new("sh").args(["-c", "echo no >&2; exit 3"]), limit);
        assert!(format!("{:#}", error.unwrap_err()).contains("no"));
    }
}
