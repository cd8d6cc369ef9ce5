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
    /// Layers that are made and not named by the catalog yet.
    making: BTreeSet<Id>,
}

/// What is in use.
#[derive(Default)]
pub(crate) struct Usage(Mutex<State>);

/// Something in use, until it is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Volume,
    Node,
    Layer,
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

    /// Lets a layer stay that is no orphan, although the catalog does not name it.
    pub(crate) fn making(self: &Arc<Self>, id: Id) -> Hold {
        self.state().making.insert(id);
        Hold { usage: Arc::clone(self), id, what: What::Layer }
    }

    pub(crate) fn is_being_made(&self, id: Id) -> bool {
        self.state().making.contains(&id)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.usage.state();
        match self.what {
            What::Volume => drop(state.volumes.remove(&self.id)),
            What::Layer => drop(state.making.remove(&self.id)),
            What::Node => {
                if let Some(count) = state.pinned.get_mut(&self.id) {
                    *count -= 1;
                    if *count == 0 {
                        state.pinned.remove(&self.id);
                    }
                }
            }
        }
    }
}
