//! Takes away what a crash has left, and finishes what it cut off.

use std::collections::BTreeSet;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use crate::catalog::Look;
use crate::catalog::rows::NodeState;
use crate::directory::{Directory, remove, sync_directory};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::Store;

/// What [`Store::tidy`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tidied {
    /// Nodes that nothing needed.
    pub nodes: usize,
    /// Files that nothing named, and are gone.
    pub orphans: Vec<Id>,
    /// Snapshots whose layers had not been closed properly, and were.
    pub settled: Vec<Id>,
}

impl<S: Storage> Store<S> {
    /// Layers in the directory that the catalog does not name: what was made, or was to be removed, when
    /// the process ended.
    ///
    /// # Errors
    /// What the storage says.
    pub fn orphans(&self) -> Result<Vec<Id>> {
        let folder = self.directory.layers();
        // Before the look into the catalog: what is made later is none.
        let names = self.storage.list_directory(&folder);
        let names = names.map_err(|error| StoreError::io(&folder, "list", error))?;
        let mut found: Vec<Id> =
            names.iter().filter_map(|name| Directory::layer_of(name.to_str()?)).collect();
        found.retain(|id| !self.usage.is_being_made(*id));
        let view = self.catalog.view()?;
        let named: BTreeSet<Id> = view
            .volumes()?
            .into_iter()
            .filter_map(|(_, row)| row.layer)
            .chain(view.nodes()?.into_iter().filter_map(|(_, row)| match row.state {
                NodeState::Frozen { layer, .. } => Some(layer),
                NodeState::Bare => None,
            }))
            .collect();
        found.retain(|id| !named.contains(id));
        Ok(found)
    }

    /// Removes nodes that nothing needs and layers that nothing names, and closes the layers of snapshots
    /// whose taking a crash has cut off. To be called after opening, before anything is attached; at
    /// any other time it leaves alone what is in use.
    ///
    /// # Errors
    /// What the storage says, or a layer that cannot be opened.
    pub async fn tidy<E: Engine<File = S::File>>(&self, io: &Io<E>) -> Result<Tidied> {
        let (nodes, layers) = self.prune_all()?;
        self.remove_layers(io, &layers).await;
        let orphans = self.orphans()?;
        for orphan in &orphans {
            remove(io, &self.directory.layer(*orphan)).await?;
        }
        if !orphans.is_empty() {
            sync_directory(io, &self.directory.layers()).await?;
        }
        let mut settled = Vec::new();
        for (id, row) in self.catalog.view()?.nodes()? {
            let NodeState::Frozen { layer, settled: false } = row.state else { continue };
            if row.volume.is_some_and(|volume| self.usage.of_volume(volume).is_some()) {
                continue;
            }
            match self.settle(io, layer).await {
                // A disk that is running lies over it, and will close it.
                Err(StoreError { kind: StoreErrorKind::Locked { .. }, .. }) => continue,
                settled => settled?,
            };
            self.settled(id)?;
            settled.push(id);
        }
        Ok(Tidied { nodes, orphans, settled })
    }

    /// Takes away all nodes that nothing needs: those whose last reader has ended after their last name
    /// was gone. How many, and their layers.
    fn prune_all(&self) -> Result<(usize, Vec<Id>)> {
        let view = self.catalog.view()?;
        let before = view.nodes()?;
        let mut unneeded = Vec::new();
        for (id, row) in &before {
            if row.name.is_none() && !self.usage.is_pinned(*id) && !view.has_children(*id)? {
                unneeded.push(*id);
            }
        }
        if unneeded.is_empty() {
            return Ok((0, Vec::new()));
        }
        self.catalog.change(|change| {
            let mut layers = Vec::new();
            for id in unneeded {
                if change.node(id)?.is_some() {
                    change.prune(Some(id), &self.usage, &mut layers)?;
                }
            }
            Ok((before.len() - change.nodes()?.len(), layers))
        })
    }
}
