//! Who holds a lock: what `/proc` tells about it, for messages only.

use std::fs;

use rustix::fs::Stat;

/// Characters of a command line that a message shows.
const COMMAND_CHARS_MAX: usize = 80;

/// The process that holds a flock(2) lock on the file, for example
/// `process 4711 (sapwood serve disk.layer)`.
///
/// The number is that of the process that took the lock; a child that inherited the descriptor
/// may hold it by now. `None` when `/proc/locks` does not show it (another PID namespace, or a
/// file system that numbers its devices differently there).
pub(super) fn holder(stat: &Stat) -> Option<String> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let pid = locks.lines().find_map(|line| pid_of(line, device, stat.st_ino))?;
    Some(match command(pid) {
        Some(command) => format!("process {pid} ({command})"),
        None => format!("process {pid}"),
    })
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
