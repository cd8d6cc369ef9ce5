//! What a snapshot of the store is, for those who open layers over it.
//!
//! A snapshot that is sealed meanwhile loses its layer's file, unless somebody keeps that. So the layer is kept before
//! the catalog is believed that it is still what the snapshot is.

use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_image::layer::{ResolveBase, Resolved, StoreBase};
use sapwood_image::sealed::{Child, Packs, Root};

use crate::catalog::rows::{NodeRow, NodeState};
use crate::catalog::{Catalog, Look};
use crate::directory::Directory;
use crate::error::Result;
use crate::id::Id;
use crate::usage::Usage;

/// Asks the catalog.
pub(crate) struct Resolver<E: Engine> {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) directory: Directory,
    pub(crate) usage: Arc<Usage>,
    pub(crate) packs: Arc<Packs<E>>,
}

impl<E: Engine> Resolver<E> {
    fn node(&self, base: &StoreBase) -> Result<NodeRow, String> {
        let node = self.catalog.view().and_then(|view| view.node(Id(base.snapshot)));
        node.map_err(|error| error.to_string())?.ok_or_else(|| "the store has no such snapshot".to_owned())
    }
}

impl<E: Engine> ResolveBase<E> for Resolver<E> {
    fn resolve(&self, base: &StoreBase) -> Result<Resolved<E>, String> {
        if base.store != self.catalog.store().0 {
            return Err(format!("this store is another one, {}", self.catalog.store()));
        }
        match self.node(base)? {
            NodeRow { state: NodeState::Bare, .. } => {
                Err("the snapshot holds nothing itself, and cannot be a base".to_owned())
            }
            NodeRow { state: NodeState::Sealed(top), size, .. } => {
                Ok(Resolved::Sealed { packs: Arc::clone(&self.packs), root: top.root(size) })
            }
            NodeRow { state: NodeState::Frozen { layer, .. }, .. } => {
                let kept = Arc::new(self.usage.keep_layer(layer));
                // It becomes sealed at most once, and nothing else.
                if let NodeRow { state: NodeState::Sealed(top), size, .. } = self.node(base)? {
                    return Ok(Resolved::Sealed { packs: Arc::clone(&self.packs), root: top.root(size) });
                }
                Ok(Resolved::Frozen { path: self.directory.layer(layer), layer: layer.0, kept })
            }
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

/// The sealed disk that a snapshot is; none, when a layer holds it.
pub(crate) fn sealed_root(look: &impl Look, node: Id) -> Result<Option<Root>> {
    Ok(match holder(look, Some(node))? {
        None => Some(Root { size: look.needed_node(node)?.size, tree: Child::ZERO }),
        Some((_, NodeRow { state: NodeState::Sealed(top), size, .. })) => Some(top.root(size)),
        Some(_) => None,
    })
}
