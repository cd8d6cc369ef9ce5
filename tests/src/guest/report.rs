//! What a guest said: the lines of its second serial port, as they come and in the end.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A guest that writes more lines than this is cut off: a test's memory stays bounded.
const LINES_MAX: usize = 200_000;
const BEGIN: &str = "SAPWOOD-BEGIN";
const RESULT: &str = "SAPWOOD-RESULT ";
const MARK: &str = "SAPWOOD-MARK ";
const VALUE: &str = "SAPWOOD-VALUE ";
const TIMEOUT: &str = "SAPWOOD-TIMEOUT";

/// What a guest's script wrote and how it ended.
#[derive(Clone, Debug)]
pub struct GuestReport {
    /// The complete lines, in order. A line cut short by the guest's end is not among them.
    pub lines: Vec<String>,
    /// From starting the virtual machine to its end.
    pub elapsed: Duration,
    /// From starting the virtual machine to the script's first command.
    pub booted: Option<Duration>,
}

impl GuestReport {
    /// The script's exit status; `None` when the guest ended before its script did.
    pub fn status(&self) -> Option<i32> {
        self.lines.iter().find_map(|line| line.strip_prefix(RESULT)?.trim().parse().ok())
    }

    /// Whether the guest switched itself off because the script took too long.
    pub fn timed_out(&self) -> bool {
        self.lines.iter().any(|line| line == TIMEOUT)
    }

    /// What the script said with `value KEY ...`, in order.
    pub fn values(&self, key: &str) -> Vec<&str> {
        let words = |line: &'_ String| -> Option<usize> {
            let rest = line.strip_prefix(VALUE)?.strip_prefix(key)?;
            rest.starts_with(' ').then(|| line.len() - rest.len() + 1)
        };
        self.lines.iter().filter_map(|line| words(line).map(|at| &line[at..])).collect()
    }

    /// The last of [`Self::values`].
    pub fn value(&self, key: &str) -> Option<&str> {
        self.values(key).last().copied()
    }

    /// The last `count` lines as one text, for messages.
    pub fn tail(&self, count: usize) -> String {
        self.lines[self.lines.len().saturating_sub(count)..].join("\n")
    }
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
    booted: Option<Instant>,
}

/// Collects lines from a pipe on a thread of its own.
#[derive(Debug)]
pub struct Lines {
    shared: Arc<(Mutex<State>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

/// Why [`Lines::wait_for_mark`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The mark came.
    Found,
    /// The guest's output ended, or its script did, without the mark.
    Ended,
    /// The time was over.
    TimedOut,
}

impl Lines {
    /// Starts collecting from `pipe` until its end.
    pub fn collect(pipe: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let reader = thread::spawn({
            let shared = Arc::clone(&shared);
            move || read_lines(BufReader::new(pipe), &shared)
        });
        Self { shared, reader: Some(reader) }
    }

    /// Waits until the script said `mark NAME`, at most `limit`.
    pub fn wait_for_mark(&self, name: &str, limit: Duration) -> Waited {
        let deadline = Instant::now() + limit;
        let mut seen = 0;
        let mut state = lock(&self.shared.0);
        loop {
            for line in &state.lines[seen..] {
                if line.strip_prefix(MARK) == Some(name) {
                    return Waited::Found;
                }
                if line.starts_with(RESULT) {
                    return Waited::Ended;
                }
            }
            seen = state.lines.len();
            if state.ended {
                return Waited::Ended;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Waited::TimedOut;
            }
            let woken = self.shared.1.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The complete lines so far.
    pub fn so_far(&self) -> Vec<String> {
        lock(&self.shared.0).lines.clone()
    }

    /// Reads to the pipe's end (its writer must have ended) and gives the report.
    pub fn finish(mut self, started: Instant) -> GuestReport {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.report(started)
    }

    /// The report of what came so far.
    pub fn report(&self, started: Instant) -> GuestReport {
        let state = lock(&self.shared.0);
        GuestReport {
            lines: state.lines.clone(),
            elapsed: started.elapsed(),
            booted: state.booted.map(|at| at - started),
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_lines(mut pipe: impl BufRead, shared: &(Mutex<State>, Condvar)) {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = pipe.read_until(b'\n', &mut bytes);
        let complete = bytes.last() == Some(&b'\n');
        let mut state = lock(&shared.0);
        if !matches!(read, Ok(1..)) || state.lines.len() >= LINES_MAX {
            state.ended = true;
            shared.1.notify_all();
            return;
        }
        if complete {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if line == BEGIN && state.booted.is_none() {
                state.booted = Some(Instant::now());
            }
            state.lines.push(line);
            shared.1.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &'static str) -> GuestReport {
        Lines::collect(text.as_bytes()).finish(Instant::now())
    }

    #[test]
    fn values_and_the_result() {
        let report = report("x\nSAPWOOD-VALUE sum 1 2\r\nSAPWOOD-VALUE summary 3\nSAPWOOD-RESULT 7\n");
        assert_eq!(report.values("sum"), ["1 2"]);
        assert_eq!(report.value("summary"), Some("3"));
        assert_eq!(report.status(), Some(7));
    }

    #[test]
    fn a_line_cut_short_is_not_believed() {
        let report = report("SAPWOOD-VALUE a 1\nSAPWOOD-VALUE a 2");
        assert_eq!(report.values("a"), ["1"]);
        assert_eq!(report.status(), None);
    }

    #[test]
    fn waiting_ends_with_the_output() {
        let lines = Lines::collect(&b"SAPWOOD-MARK a\nSAPWOOD-MARK ab\n"[..]);
        let limit = Duration::from_secs(10);
        assert_eq!(lines.wait_for_mark("ab", limit), Waited::Found);
        assert_eq!(lines.wait_for_mark("b", limit), Waited::Ended);
    }
}
