//! What happened in a store lately, for those who ask; all of it is also logged.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::answer::Event;

/// Events that are remembered.
const KEPT_MAX: usize = 256;

/// The last events.
#[derive(Default)]
pub struct Log(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    last_id: u64,
    events: VecDeque<Event>,
}

impl Log {
    /// Adds an event, and logs it.
    pub fn add(&self, level: log::Level, time_ms: u64, kind: &str, message: String) {
        log::log!(level, "{message}");
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.last_id += 1;
        let event = Event { id: kept.last_id, time_ms, kind: kind.to_owned(), message };
        if kept.events.len() == KEPT_MAX {
            kept.events.pop_front();
        }
        kept.events.push_back(event);
    }

    /// Those that are remembered, the newest last.
    pub fn list(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).events.iter().cloned().collect()
    }
}
