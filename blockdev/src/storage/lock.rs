//! Who holds a lock: what `/proc` tells about it, for messages and to see whether waiting helps.

use std::fs;
use std::path::Path;

use rustix::fs::Stat;

/// Characters of a command line that a message shows.
const COMMAND_CHARS_MAX: usize = 80;

/// A process that holds a flock(2) lock.
///
/// The number is that of the process that took the lock; a child that inherited the descriptor
/// may hold it by now.
pub(super) struct Holder {
    pid: u32,
}

impl Holder {
    /// The holder of a lock on the file. `None` when `/proc/locks` does not show one (it is in
    /// another PID namespace, the file system numbers its devices differently there, or the lock
    /// has just been given up).
    pub(super) fn of(stat: &Stat) -> Option<Self> {
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        let pid = locks.lines().find_map(|line| pid_of(line, device, stat.st_ino))?;
        Some(Self { pid })
    }

    /// Whether the process has ended, or is ending: it has no memory left to run in.
    pub(super) fn has_ended(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.pid)).is_ok_and(|line| line.is_empty())
            || !Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    /// For example `process 4711 (sapwood serve disk.layer)`.
    pub(super) fn name(&self) -> String {
        match command(self.pid) {
            Some(command) => format!("process {} ({command})", self.pid),
            None => format!("process {}", self.pid),
        }
    }
}

/// The PID in a line of `/proc/locks` (proc_locks(5)) if it shows a flock(2) lock that is held on
/// this file, such as `4: FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF`.
fn pid_of(line: &str, (major, minor): (u32, u32), inode: u64) -> Option<u32> {
    // A process that waits has `->` before the type, which the match on FLOCK leaves out.
    let mut fields = line.split_ascii_whitespace().skip(1);
    if fields.next()? != "FLOCK" {
        return None;
    }
    let pid: u32 = fields.nth(2)?.parse().ok()?;
    let mut id = fields.next()?.split(':');
    let same = u32::from_str_radix(id.next()?, 16).ok()? == major
        && u32::from_str_radix(id.next()?, 16).ok()? == minor
        && id.next()?.parse::<u64>().ok()? == inode;
    (same && pid != 0).then_some(pid)
}

/// A process's command line with the program's directory left out, or the name of its thread.
fn command(pid: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&line);
    let mut words: Vec<&str> = text.split('\0').filter(|word| !word.is_empty()).collect();
    let comm;
    if let Some(program) = words.first_mut() {
        *program = program.rsplit('/').next().unwrap_or(program);
    } else {
        comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        words.push(comm.trim_end());
    }
    // Any process may write here: no control characters into our messages.
    let clean = words.join(" ").replace(|c: char| c.is_control(), "?");
    Some(match clean.char_indices().nth(COMMAND_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &clean[..end]),
        None => clean,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_line_of_a_file() {
        let pid = |line| pid_of(line, (0xfe, 0), 131_090);
        assert_eq!(pid("4: FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF"), Some(4711));
        assert_eq!(pid("4: FLOCK  ADVISORY  READ 12 fe:00:131090 0 EOF"), Some(12));
        assert_eq!(pid("4: -> FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF"), None);
        assert_eq!(pid("4: POSIX  ADVISORY  WRITE 4711 fe:00:131090 0 EOF"), None);
        assert_eq!(pid("4: FLOCK  ADVISORY  WRITE 4711 fe:01:131090 0 EOF"), None);
        assert_eq!(pid("4: FLOCK  ADVISORY  WRITE 4711 fe:00:131091 0 EOF"), None);
        assert_eq!(pid("4: FLOCK  ADVISORY  WRITE -1 fe:00:131090 0 EOF"), None);
        assert_eq!(pid("4: FLOCK  ADVISORY"), None);
        assert_eq!(pid(""), None);
    }

    #[test]
    fn names_this_process() {
        let name = command(std::process::id()).unwrap();
        assert!(name.contains("sapwood_blockdev"), "{name}");
        assert!(!name.contains('/') || !name.starts_with('/'), "{name}");
    }
}
