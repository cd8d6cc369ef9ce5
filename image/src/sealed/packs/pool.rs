//! The packs that are open: not more than a bound, however many there are.
//!
//! A pack that nobody reads at the moment may be closed for another one. Whoever opens one holds a permit until it has been
//! read or has found a place here; so the bound holds with those, too.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::pack::Pack;
use crate::below::{Permit, Permits};
use crate::error::ImageError;

/// Packs that are being opened or read without a place in the pool, at most.
const PASSING_MAX: usize = 8;

struct Entry<F> {
    pack: Arc<Pack<F>>,
    /// When it was last used, in the pool's own time.
    used: u64,
}

struct State<F> {
    packs: HashMap<u32, Entry<F>>,
    now: u64,
    /// How often packs were withdrawn: what was opened before that is not kept.
    withdrawals: u64,
}

/// See the module's documentation.
pub(super) struct Pool<F> {
    state: Mutex<State<F>>,
    places: usize,
    passing: Permits,
}

/// A pack that stays open at least until this is dropped.
pub(super) struct Lease<F> {
    pub(super) pack: Arc<Pack<F>>,
    /// Of one that found no place.
    _permit: Option<Permit>,
}

impl<F> Pool<F> {
    /// A pool with which not more than `files_max` packs, or two, are open.
    pub(super) fn new(files_max: usize) -> Self {
        let passing = PASSING_MAX.min(files_max / 2).max(1);
        let state = State { packs: HashMap::new(), now: 0, withdrawals: 0 };
        let places = files_max.saturating_sub(passing).max(1);
        Self { state: Mutex::new(state), places, passing: Permits::new(passing) }
    }

    fn state(&self) -> MutexGuard<'_, State<F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, number: u32) -> Option<Lease<F>> {
        let mut state = self.state();
        state.now += 1;
        let now = state.now;
        let entry = state.packs.get_mut(&number)?;
        entry.used = now;
        Some(Lease { pack: Arc::clone(&entry.pack), _permit: None })
    }

    /// Pack `number`, which `open` opens when it is not open.
    pub(super) async fn lease(
        &self,
        number: u32,
        open: impl Future<Output = Result<Pack<F>, ImageError>>,
    ) -> Result<Lease<F>, ImageError> {
        if let Some(lease) = self.get(number) {
            return Ok(lease);
        }
        let permit = self.passing.take().await;
        // While this one waited, another may have opened it.
        if let Some(lease) = self.get(number) {
            return Ok(lease);
        }
        let withdrawals = self.state().withdrawals;
        let pack = Arc::new(open.await?);
        let is_kept = self.keep(number, &pack, withdrawals);
        Ok(Lease { pack, _permit: (!is_kept).then_some(permit) })
    }

    /// Keeps a pack open if there is a place, or one that can be had by closing another; says whether there was one.
    fn keep(&self, number: u32, pack: &Arc<Pack<F>>, withdrawals: u64) -> bool {
        // Closed after the lock was given up.
        let _closed;
        let mut state = self.state();
        if state.withdrawals != withdrawals {
            return false;
        }
        if state.packs.len() >= self.places && !state.packs.contains_key(&number) {
            let idle = state.packs.iter().filter(|(_, entry)| Arc::strong_count(&entry.pack) == 1);
            let Some(oldest) = idle.min_by_key(|(_, entry)| entry.used).map(|(number, _)| *number) else {
                return false;
            };
            _closed = state.packs.remove(&oldest);
        }
        state.now += 1;
        let used = state.now;
        state.packs.insert(number, Entry { pack: Arc::clone(pack), used });
        true
    }

    /// Closes packs that are not to be used any more; those who read them end undisturbed.
    pub(super) fn withdraw(&self, numbers: &[u32]) {
        let mut state = self.state();
        state.withdrawals += 1;
        let closed: Vec<_> = numbers.iter().filter_map(|number| state.packs.remove(number)).collect();
        drop(state);
        drop(closed);
    }

    /// Packs that have a place.
    pub(super) fn len(&self) -> usize {
        self.state().packs.len()
    }
}
