//! Takes away nodes that nothing needs any more.
//!
//! A node is needed as long as it has a name, something lies over it, or somebody reads it. What a layer
//! names as its base is below it in the tree, so its node is needed as long as the layer is.
//!
//! A sealed snapshot is whole in itself. So a node without a name over which there are only such is needed by nobody, and is taken
//! out of the line: what lies over it then lies over what was below it.

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;

use crate::catalog::rows::{NodeRow, NodeState};
use crate::catalog::{Change, Child, Look};
use crate::error::Result;
use crate::id::Id;
use crate::store::Store;
use crate::usage::Usage;

impl Change {
    /// Takes away `node`, if nothing needs it, then what lies below it, and so on. The layers that no row
    /// names any more are added to `layers`.
    pub(crate) fn prune(&mut self, node: Option<Id>, usage: &Usage, layers: &mut Vec<Id>) -> Result<()> {
        let mut next = node;
        while let Some(id) = next {
            let row = self.needed_node(id)?;
            if row.name.is_some() || usage.is_pinned(id) || self.has_children(id)? {
                break;
            }
            self.put_node(id, None)?;
            self.remove_child(row.parent, Child::Node(id))?;
            if let NodeState::Frozen { layer, .. } = row.state {
                layers.push(layer);
            }
            next = row.parent;
        }
        Ok(())
    }

    /// Takes nodes without a name out of the lines of nodes where only sealed ones lie over them. How many.
    fn take_out(&mut self, usage: &Usage) -> Result<usize> {
        let mut count = 0;
        loop {
            let before = count;
            let ids: Vec<Id> = self.nodes()?.into_iter().map(|(id, _)| id).collect();
            for id in ids {
                let row = self.needed_node(id)?;
                // A layer is what others may be reading; it goes when it is sealed.
                if row.name.is_some() || matches!(row.state, NodeState::Frozen { .. }) || usage.is_pinned(id)
                {
                    continue;
                }
                let Some(over) = self.sealed_over(id)? else { continue };
                for (child, over) in over {
                    self.remove_child(Some(id), Child::Node(child))?;
                    self.add_child(row.parent, Child::Node(child))?;
                    self.put_node(child, Some(&NodeRow { parent: row.parent, ..over }))?;
                }
                self.put_node(id, None)?;
                self.remove_child(row.parent, Child::Node(id))?;
                count += 1;
            }
            if count == before {
                return Ok(count);
            }
        }
    }

    /// What lies over a node, if that is anything, and all of it is sealed.
    fn sealed_over(&self, id: Id) -> Result<Option<Vec<(Id, NodeRow)>>> {
        let mut over = Vec::new();
        for child in self.children(id)? {
            let Child::Node(child) = child else { return Ok(None) };
            let row = self.needed_node(child)?;
            if !matches!(row.state, NodeState::Sealed(_)) {
                return Ok(None);
            }
            over.push((child, row));
        }
        Ok((!over.is_empty()).then_some(over))
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Takes nodes out of the tree that only sealed ones lie over and nobody can name. None of them, as long as somebody reads
    /// a layer that was sealed: what was below that layer is read through it.
    pub(crate) fn take_out_unneeded(&self) -> Result<usize> {
        // Looked at before anything is written.
        let may_be = self.catalog.view()?.nodes()?.into_iter().any(|(_, row)| row.name.is_none());
        if !may_be {
            return Ok(0);
        }
        self.catalog.change(|change| match self.usage.is_any_sealed_layer_read() {
            true => Ok(0),
            false => change.take_out(&self.usage),
        })
    }
}
