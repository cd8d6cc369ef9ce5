//! What is being done in this process: which volumes are taken, which nodes and layers must stay.
//!
//! Nothing of it is stored: when a process ends, nothing is in use any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;

#[derive(Default)]
struct State {
    /// Volumes, and what is done with each.
    volumes: BTreeMap<Id, &'static str>,
    /// Nodes that are read, and by how many.
    pinned: BTreeMap<Id, usize>,
    /// Nodes that are sealed at the moment.
    sealing: BTreeSet<Id>,
    /// Files of layers that must stay, whatever the catalog says, and by how many they are used.
    layers: BTreeMap<Id, usize>,
    /// Layers that the catalog does not name any more, and that were in use when that began.
    left: BTreeSet<Id>,
    /// Layers whose files are read as such, and by how many.
    examined: BTreeMap<Id, usize>,
    /// Layers that are waited for to be written, and by how many.
    wanted: BTreeMap<Id, usize>,
    /// What is done with the whole store, once at a time.
    jobs: BTreeSet<&'static str>,
}

/// What is in use.
#[derive(Default)]
pub(crate) struct Usage(Mutex<State>);

/// Something in use, until it is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Volume,
    Node,
    Sealing,
    Layer,
    Examined,
    Wanted,
    Job(&'static str),
}

/// Keeps something in use until it is dropped.
pub(crate) struct Hold {
    usage: Arc<Usage>,
    id: Id,
    what: What,
}

impl Usage {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a volume for one purpose, as in "it is being deleted".
    pub(crate) fn take(self: &Arc<Self>, id: Id, name: &str, purpose: &'static str) -> Result<Hold> {
        let mut state = self.state();
        if let Some(other) = state.volumes.get(&id) {
            let text = format!("the volume is {other}: wait for the end of that, or end it, first");
            return Err(StoreError::new(name, StoreErrorKind::InUse(text)));
        }
        state.volumes.insert(id, purpose);
        Ok(Hold { usage: Arc::clone(self), id, what: What::Volume })
    }

    /// What is done with a volume.
    pub(crate) fn of_volume(&self, id: Id) -> Option<&'static str> {
        self.state().volumes.get(&id).copied()
    }

    /// Lets a node stay.
    pub(crate) fn pin(self: &Arc<Self>, id: Id) -> Hold {
        *self.state().pinned.entry(id).or_default() += 1;
        Hold { usage: Arc::clone(self), id, what: What::Node }
    }

    pub(crate) fn is_pinned(&self, id: Id) -> bool {
        self.state().pinned.contains_key(&id)
    }

    /// Takes a node to be sealed; none, when somebody else does that.
    pub(crate) fn sealing(self: &Arc<Self>, id: Id) -> Option<Hold> {
        let is_free = self.state().sealing.insert(id);
        is_free.then(|| Hold { usage: Arc::clone(self), id, what: What::Sealing })
    }

    /// Takes a job that is done once at a time; none, when somebody else does it.
    pub(crate) fn job(self: &Arc<Self>, job: &'static str) -> Option<Hold> {
        let is_free = self.state().jobs.insert(job);
        is_free.then(|| Hold { usage: Arc::clone(self), id: Id([0; 16]), what: What::Job(job) })
    }

    /// Takes a layer whose file is read as such, which has to end as soon as it [`is_wanted`](Self::is_wanted); none, when it
    /// is already.
    pub(crate) fn examine(self: &Arc<Self>, id: Id) -> Option<Hold> {
        let mut state = self.state();
        if state.wanted.contains_key(&id) {
            return None;
        }
        *state.examined.entry(id).or_default() += 1;
        drop(state);
        Some(Hold { usage: Arc::clone(self), id, what: What::Examined })
    }

    pub(crate) fn is_examined(&self, id: Id) -> bool {
        self.state().examined.contains_key(&id)
    }

    /// Has whoever examines a layer let go of it, and others keep off it.
    pub(crate) fn want(self: &Arc<Self>, id: Id) -> Hold {
        *self.state().wanted.entry(id).or_default() += 1;
        Hold { usage: Arc::clone(self), id, what: What::Wanted }
    }

    pub(crate) fn is_wanted(&self, id: Id) -> bool {
        self.state().wanted.contains_key(&id)
    }

    /// Lets the file of a layer stay: one that is made and not named by the catalog yet, or that somebody reads.
    pub(crate) fn keep_layer(self: &Arc<Self>, id: Id) -> Hold {
        *self.state().layers.entry(id).or_default() += 1;
        Hold { usage: Arc::clone(self), id, what: What::Layer }
    }

    pub(crate) fn is_layer_kept(&self, id: Id) -> bool {
        self.state().layers.contains_key(&id)
    }

    /// Takes note of a layer that the catalog does not name any more; whether its file may go now. If not, it is
    /// given out by [`Self::take_left`] when nobody uses it any more.
    pub(crate) fn leave(&self, id: Id) -> bool {
        let mut state = self.state();
        let is_free = !state.layers.contains_key(&id);
        if !is_free {
            state.left.insert(id);
        }
        is_free
    }

    /// Whether anybody may be reading a layer that the catalog has forgotten, or forgets at the moment.
    pub(crate) fn is_any_sealed_layer_read(&self) -> bool {
        let state = self.state();
        !state.sealing.is_empty() || state.left.iter().any(|id| state.layers.contains_key(id))
    }

    /// Layers that were in use when the catalog forgot them, and are not any more.
    pub(crate) fn take_left(&self) -> Vec<Id> {
        let state = &mut *self.state();
        let free: Vec<Id> = state.left.iter().filter(|id| !state.layers.contains_key(id)).copied().collect();
        state.left.retain(|id| !free.contains(id));
        free
    }
}

fn release(counts: &mut BTreeMap<Id, usize>, id: Id) {
    if let Some(count) = counts.get_mut(&id) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&id);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.usage.state();
        match self.what {
            What::Volume => drop(state.volumes.remove(&self.id)),
            What::Sealing => drop(state.sealing.remove(&self.id)),
            What::Job(job) => drop(state.jobs.remove(job)),
            What::Examined => release(&mut state.examined, self.id),
            What::Wanted => release(&mut state.wanted, self.id),
            What::Layer => release(&mut state.layers, self.id),
            What::Node => release(&mut state.pinned, self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_wanted_until_nobody_wants_it() {
        let (usage, id) = (Arc::<Usage>::default(), Id([1; 16]));
        let (first, second) = (usage.want(id), usage.want(id));
        drop(first);
        assert!(usage.is_wanted(id) && usage.examine(id).is_none());
        drop(second);
        assert!(!usage.is_wanted(id) && usage.examine(id).is_some());
    }
}
