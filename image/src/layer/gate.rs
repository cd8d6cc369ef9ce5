//! How much layers may grow together for what their guests write: a limit that somebody else knows.

use std::sync::atomic::{AtomicU64, Ordering};

/// No limit.
const NONE: u64 = u64::MAX;

/// Bytes that the files of some layers may still grow for guests' data. Each takes from them before it grows; whoever knows the
/// limit sets them anew now and then. Where they do not suffice, guests' writes are refused as on a full host.
#[derive(Debug)]
pub struct SpaceGate(AtomicU64);

impl Default for SpaceGate {
    fn default() -> Self {
        Self(AtomicU64::new(NONE))
    }
}

impl SpaceGate {
    /// Sets what is left; none: there is no limit.
    pub fn set(&self, left: Option<u64>) {
        self.0.store(left.map_or(NONE, |left| left.min(NONE - 1)), Ordering::Relaxed);
    }

    /// Takes some of what is left; whether there was enough.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let take = |left: u64| if left == NONE { Some(NONE) } else { left.checked_sub(bytes) };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_is_left() {
        let gate = SpaceGate::default();
        assert!(gate.take(u64::MAX) && gate.take(1), "there is no limit");
        gate.set(Some(10));
        assert!(gate.take(7) && !gate.take(4) && gate.take(3) && gate.take(0) && !gate.take(1));
        gate.set(None);
        assert!(gate.take(1 << 60));
    }
}
