//! What happened in a world, as text.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use sapwood_blockdev::engine::Time;

/// Lines kept: the end of a history tells most.
const LINES_MAX: usize = 20_000;

/// The latest lines, when somebody wants them.
#[derive(Debug)]
pub struct Trace {
    enabled: bool,
    lines: VecDeque<String>,
    hasher: DefaultHasher,
}

impl Trace {
    /// A trace that keeps lines if `enabled`.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, lines: VecDeque::new(), hasher: DefaultHasher::new() }
    }

    /// Adds a line; it is not even made when nobody wants it.
    pub fn add(&mut self, now: Time, line: impl FnOnce() -> String) {
        if self.enabled {
            if self.lines.len() == LINES_MAX {
                self.lines.pop_front();
            }
            let line = format!("{:>10} us  {}", now.as_micros() - 1_000_000, line());
            line.hash(&mut self.hasher);
            self.lines.push_back(line);
        }
    }

    /// The lines, oldest first.
    pub fn lines(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }

    /// A hash of every line ever added: equal for histories that replay.
    pub fn hash(&self) -> u64 {
        self.hasher.finish()
    }
}
