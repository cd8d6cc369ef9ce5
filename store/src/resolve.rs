//! What a snapshot of the store is, for those who open layers over it.

use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_image::layer::{ResolveBase, Resolved, StoreBase};

use crate::catalog::rows::{NodeRow, NodeState};
use crate::catalog::{Catalog, Look};
use crate::directory::Directory;
use crate::error::Result;
use crate::id::Id;

/// Asks the catalog.
pub(crate) struct Resolver {
    catalog: Arc<Catalog>,
    directory: Directory,
}

impl Resolver {
    pub(crate) fn new(catalog: Arc<Catalog>, directory: Directory) -> Self {
        Self { catalog, directory }
    }
}

impl<E: Engine> ResolveBase<E> for Resolver {
    fn resolve(&self, base: &StoreBase) -> Result<Resolved, String> {
        if base.store != self.catalog.store().0 {
            return Err(format!("this store is another one, {}", self.catalog.store()));
        }
        let node = self.catalog.view().and_then(|view| view.node(Id(base.snapshot)));
        let node = node.map_err(|error| error.to_string())?.ok_or("the store has no such snapshot")?;
        match node.state {
            NodeState::Frozen { layer, .. } => {
                Ok(Resolved::Frozen { path: self.directory.layer(layer), layer: layer.0 })
            }
            NodeState::Bare => Err("the snapshot holds nothing itself, and cannot be a base".to_owned()),
        }
    }
}

/// The first node, from `node` down, that holds anything itself.
pub(crate) fn holder(look: &impl Look, node: Option<Id>) -> Result<Option<(Id, NodeRow)>> {
    let mut next = node;
    while let Some(id) = next {
        let row = look.needed_node(id)?;
        if row.state != NodeState::Bare {
            return Ok(Some((id, row)));
        }
        next = row.parent;
    }
    Ok(None)
}
