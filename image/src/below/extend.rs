//! A layer is put on a chain that is open, so that a snapshot of a disk in use costs the same at any depth.
//!
//! Only that layer is opened. All else is the other chain's, which goes on as it is: links, open files, caches. What the layer's map
//! says is merged into the uppermost index.

use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;

use super::open::{NextLink, Opener};
use super::{Chain, LINKS_MAX, LayerLink, Link, Stage};
use crate::layer::in_store::Resolved;

impl Stage {
    /// The same, when one more link lies over it.
    fn lowered(&self) -> Self {
        match self {
            Self::Index { first, index } => Self::Index { first: first + 1, index: Arc::clone(index) },
            Self::Link(link) => Self::Link(link + 1),
        }
    }
}

impl<E: Engine> Chain<E> {
    fn layers(&self) -> impl Iterator<Item = &LayerLink> {
        self.links.iter().filter_map(|link| match &**link {
            Link::Layer(layer) => Some(&**layer),
            _ => None,
        })
    }

    /// Whether it begins with what a store says that its snapshot is now. What a path leads to it began with when it was opened. What
    /// was sealed further down is not noticed here: a disk in use learns that by `reopen_base`.
    fn is_still(&self, next: &NextLink<E>) -> bool {
        match (&next.resolved, &*self.links[0]) {
            (Some(Resolved::Frozen { layer, .. }), Link::Layer(link)) => link.id() == layer,
            (Some(Resolved::Sealed { root, .. }), Link::Sealed(snapshot)) => snapshot.root() == *root,
            (resolved, _) => resolved.is_none(),
        }
    }
}

impl<S: Storage, E: Engine<File = S::File>> Opener<'_, S, E> {
    /// Whether what was opened, the first link, can be put on `below`, which its layer has below it, as one that names `next`.
    /// Otherwise all has to be opened: where an index or a chain gets too large, what it begins with was sealed, or there is a loop.
    pub(super) fn fits_on(&self, below: &Chain<E>, next: Option<&NextLink<E>>) -> bool {
        let first = match below.stages.first() {
            Some(Stage::Index { index, .. }) => index.len(),
            _ => 0,
        };
        // Each of its runs may split another; what is in other indexes stays as it is.
        let runs = self.index.len_max() + first + below.index_runs();
        self.stages.is_empty()
            && runs <= self.runs_max()
            && below.links.len() < LINKS_MAX
            && next.is_some_and(|next| below.is_still(next))
            && below.layers().all(|layer| !self.layers.contains(layer.id()))
    }

    /// The chain that has it on `below`.
    pub(super) fn finish_on(mut self, below: &Chain<E>) -> Chain<E> {
        let mut stages = &below.stages[..];
        if let Some((Stage::Index { index, .. }, others)) = stages.split_first() {
            self.index.add_index(1, index);
            stages = others;
        }
        self.finish_index();
        self.stages.extend(stages.iter().map(Stage::lowered));
        let size = self.limits[0];
        self.limits.extend(below.limits.iter().map(|limit| size.min(*limit)));
        self.links.extend(below.links.iter().cloned());
        if let Link::Layer(top) = &*self.links[0]
            && let Some(opened) = self.pool.get(top.id())
        {
            below.pool.keep(top.id(), &opened);
        }
        self.pool = Arc::clone(&below.pool);
        let (tables, clusters) = (Arc::clone(&below.tables), Arc::clone(&below.clusters));
        Chain { tables, clusters, ..self.finish() }
    }
}
