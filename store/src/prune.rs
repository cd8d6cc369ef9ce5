//! Takes away nodes that nothing needs any more.
//!
//! A node is needed as long as it has a name, something lies over it, or somebody reads it. What a layer
//! names as its base is below it in the tree, so its node is needed as long as the layer is.

use crate::catalog::rows::NodeState;
use crate::catalog::{Change, Child, Look};
use crate::error::Result;
use crate::id::Id;
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
}
