//! The files of frozen layers that are open: not more than a bound, whatever the length of the chain. A chain and its extensions
//! share them, so they go by the layers' ids.
//!
//! A file that no read needs at the moment may be closed for another one. Whoever opens one holds a
//! permit until it has been read or has found a place here; so the bound holds with those, too.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::StorageFile;

use crate::layer::{Layer, LayerId};

/// Files that are being opened or read without a place in the pool, at most.
const PASSING_MAX: usize = 8;

/// An open link.
pub(crate) enum Opened<E: Engine> {
    /// All that its map says is known.
    File(E::File),
    /// Its map is asked.
    Layer(Arc<Layer<E>>),
}

impl<E: Engine> Clone for Opened<E> {
    fn clone(&self) -> Self {
        match self {
            Self::File(file) => Self::File(file.clone()),
            Self::Layer(layer) => Self::Layer(Arc::clone(layer)),
        }
    }
}

impl<E: Engine> Opened<E> {
    /// The file with the data.
    pub(crate) fn file(&self) -> E::File {
        match self {
            Self::File(file) => file.clone(),
            Self::Layer(layer) => layer.frozen_file(),
        }
    }

    /// Whether anybody else uses it, too.
    fn is_used(&self) -> bool {
        match self {
            Self::File(file) => file.is_shared(),
            // Its own clone makes two.
            Self::Layer(layer) => Arc::strong_count(layer) > 1 || layer.is_file_shared(),
        }
    }
}

struct Entry<E: Engine> {
    opened: Opened<E>,
    /// When it was last used, in the pool's own time.
    used: u64,
}

impl<E: Engine> Entry<E> {
    /// Whether its map is asked.
    fn is_layer(&self) -> bool {
        matches!(self.opened, Opened::Layer(_))
    }
}

struct State<E: Engine> {
    entries: HashMap<LayerId, Entry<E>>,
    now: u64,
}

/// See the module's documentation.
pub(super) struct Pool<E: Engine> {
    state: Mutex<State<E>>,
    files_max: usize,
    layers_max: usize,
    passing: Permits,
}

impl<E: Engine> Pool<E> {
    /// A pool with which not more than `files_max` files are open, `layers_max` of them with a map of
    /// their own. There is always one to pass by.
    pub(super) fn new(files_max: usize, layers_max: usize) -> Self {
        let passing = PASSING_MAX.min(files_max.div_ceil(2)).max(1);
        let state = State { entries: HashMap::new(), now: 0 };
        let files_max = files_max.saturating_sub(passing);
        let layers_max = layers_max.min(files_max);
        Self { state: Mutex::new(state), files_max, layers_max, passing: Permits::new(passing) }
    }

    fn state(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A layer that is open.
    pub(super) fn get(&self, layer: &LayerId) -> Option<Opened<E>> {
        let mut state = self.state();
        state.now += 1;
        let now = state.now;
        let entry = state.entries.get_mut(layer)?;
        entry.used = now;
        Some(entry.opened.clone())
    }

    /// Waits until a file may be opened.
    pub(super) async fn permit(&self) -> Permit {
        self.passing.take().await
    }

    /// Whether there is a place without closing anything.
    pub(super) fn has_place(&self) -> bool {
        self.state().entries.len() < self.files_max
    }

    /// Keeps a layer open if there is a place, or one that can be had by closing another; says whether
    /// there was one. If it is kept already, this takes the place.
    pub(super) fn keep(&self, layer: &LayerId, opened: &Opened<E>) -> bool {
        // Closed after the lock was given up.
        let (_closed, _replaced);
        let mut state = self.state();
        let kept = state.entries.get(layer);
        let is_full = kept.is_none() && state.entries.len() >= self.files_max;
        let layers = || state.entries.values().filter(|entry| entry.is_layer()).count();
        let is_more = matches!(opened, Opened::Layer(_)) && !kept.is_some_and(Entry::is_layer);
        let no_layer = is_more && layers() >= self.layers_max;
        if is_full || no_layer {
            _closed = state.take_idle(no_layer);
            if _closed.is_none() {
                return false;
            }
        }
        state.now += 1;
        let entry = Entry { opened: opened.clone(), used: state.now };
        _replaced = state.entries.insert(*layer, entry);
        true
    }
}

impl<E: Engine> State<E> {
    /// Takes out the one that was not used for the longest time and is not used now; a layer if it has
    /// to be one.
    fn take_idle(&mut self, layer: bool) -> Option<Entry<E>> {
        let free =
            self.entries.iter().filter(|(_, entry)| (!layer || entry.is_layer()) && !entry.opened.is_used());
        let (id, _) = free.min_by_key(|(_, entry)| entry.used)?;
        let id = *id;
        self.entries.remove(&id)
    }
}

/// A number of permits, and who waits for one.
pub(crate) struct Permits(Arc<Mutex<(usize, VecDeque<Waker>)>>);

/// One of them, given back when dropped.
pub(crate) struct Permit(Arc<Mutex<(usize, VecDeque<Waker>)>>);

impl Permits {
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new((count, VecDeque::new()))))
    }

    /// Waits for one.
    pub(crate) async fn take(&self) -> Permit {
        poll_fn(|cx| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if state.0 == 0 {
                state.1.push_back(cx.waker().clone());
                return Poll::Pending;
            }
            state.0 -= 1;
            Poll::Ready(())
        })
        .await;
        Permit(Arc::clone(&self.0))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        // All of them: one who was woken may have given up.
        state.1.drain(..).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use sapwood_blockdev::engine::BlockingEngine;
    use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage};

    use super::*;

    #[test]
    fn a_file_in_use_is_not_closed() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| HostStorage.open(&folder.path().join(name), OpenOptions::CREATE).unwrap();
        // Two of three are for those who pass by.
        let pool: Pool<BlockingEngine> = Pool::new(3, 8);
        assert!(pool.has_place());
        assert!(pool.keep(&[0; 16], &Opened::File(file("a"))));
        assert!(!pool.has_place());
        let used = pool.get(&[0; 16]).unwrap();
        assert!(!pool.keep(&[7; 16], &Opened::File(file("b"))));
        assert!(pool.get(&[0; 16]).is_some() && pool.get(&[7; 16]).is_none());
        drop(used);
        assert!(pool.keep(&[7; 16], &Opened::File(file("c"))));
        assert!(pool.get(&[0; 16]).is_none() && pool.get(&[7; 16]).is_some());
    }

    #[test]
    fn what_is_kept_already_closes_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file =
            |name: u8| HostStorage.open(&folder.path().join(name.to_string()), OpenOptions::CREATE).unwrap();
        let pool: Pool<BlockingEngine> = Pool::new(6, 8);
        (0..3).for_each(|n| assert!(pool.keep(&[n; 16], &Opened::File(file(n)))));
        let again = || HostStorage.open(&folder.path().join("2"), OpenOptions::READ).unwrap();
        assert!(pool.keep(&[2; 16], &Opened::File(again())));
        let used: Vec<_> = (0..3).map(|n| pool.get(&[n; 16]).expect("all are kept")).collect();
        assert!(pool.keep(&[2; 16], &Opened::File(again())), "it has a place when all are used");
        drop(used);
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let file =
            |name: u8| HostStorage.open(&folder.path().join(name.to_string()), OpenOptions::CREATE).unwrap();
        let pool: Pool<BlockingEngine> = Pool::new(6, 8);
        (0..3).for_each(|n| assert!(pool.keep(&[n; 16], &Opened::File(file(n)))));
        drop(pool.get(&[0; 16]));
        assert!(pool.keep(&[3; 16], &Opened::File(file(3))));
        let open: Vec<u8> = (0..4).filter(|n| pool.get(&[*n; 16]).is_some()).collect();
        assert_eq!(open, [0, 2, 3]);
    }
}
