//! Takes away what a crash has left, and finishes what it cut off.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::layer::glance;

use crate::catalog::Look;
use crate::catalog::rows::NodeState;
use crate::content::Numbers;
use crate::directory::{Directory, remove, sync_directory};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::Store;

/// What [`Store::tidy`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tidied {
    /// Nodes that nothing needed.
    pub nodes: usize,
    /// Layers that nothing named, and are gone.
    pub orphans: Vec<Id>,
    /// Files of packs and of the index that nothing named, and are gone.
    pub files: Vec<PathBuf>,
    /// Whether a part of the index could not be opened, and all of it was made again.
    pub mended: bool,
    /// Snapshots whose layers had not been closed properly, and were.
    pub settled: Vec<Id>,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
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
        found.retain(|id| !self.usage.is_layer_kept(*id));
        let view = self.catalog.view()?;
        let named: BTreeSet<Id> = view
            .volumes()?
            .into_iter()
            .filter_map(|(_, row)| row.layer)
            .chain(view.nodes()?.into_iter().filter_map(|(_, row)| match row.state {
                NodeState::Frozen { layer, .. } => Some(layer),
                NodeState::Bare | NodeState::Sealed(_) => None,
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
    /// What the storage says. A layer that cannot be closed is left as it is.
    pub async fn tidy(&self, io: &Io<E>) -> Result<Tidied> {
        let nodes = self.prune_unneeded(io).await?;
        let orphans = self.orphans()?;
        for orphan in &orphans {
            remove(io, &self.directory.layer(*orphan)).await?;
        }
        if !orphans.is_empty() {
            sync_directory(io, &self.directory.layers()).await?;
        }
        let mut settled = Vec::new();
        for (id, row) in self.catalog.view()?.nodes()? {
            let NodeState::Frozen { layer, settled: false, .. } = row.state else { continue };
            if row.volume.is_some_and(|volume| self.usage.of_volume(volume).is_some()) {
                continue;
            }
            match self.settle(io, layer).await {
                // A disk that is running lies over it, and will close it.
                Err(StoreError { kind: StoreErrorKind::Locked { .. }, .. }) => continue,
                Err(error) if !self.catalog.is_unknown() => {
                    // It keeps nobody from the rest of the store.
                    log::warn!("{error}: the snapshot stays unsettled, and cannot be sealed");
                    continue;
                }
                settled => settled?,
            };
            self.settled(id)?;
            settled.push(id);
        }
        let files = self.remove_orphaned_files(io).await?;
        let mended = self.mend_index(io).await.unwrap_or_else(|error| {
            // What is read by places that hold can be read all the same.
            log::warn!("{error}: the index of what is sealed stays incomplete");
            false
        });
        Ok(Tidied { nodes, orphans, files, settled, mended })
    }

    /// Removes [such files](Self::orphaned_files).
    async fn remove_orphaned_files(&self, io: &Io<E>) -> Result<Vec<PathBuf>> {
        let all = self.orphaned_files()?;
        for path in &all {
            remove(io, path).await?;
        }
        if !all.is_empty() {
            sync_directory(io, &self.directory.packs()).await?;
            sync_directory(io, &self.directory.index()).await?;
        }
        Ok(all)
    }

    /// Packs and runs of the index that the catalog does not name, whole or not, if they were begun before the store
    /// was opened: of others somebody may be making one.
    pub(crate) fn orphaned_files(&self) -> Result<Vec<PathBuf>> {
        let content = &self.content;
        let (packs, index) = (self.directory.packs(), self.directory.index());
        let listed = (self.names_in(&packs)?, self.names_in(&index)?);
        let view = self.catalog.view()?;
        let named_packs: BTreeSet<u32> = view.packs()?.into_iter().map(|(number, _)| number).collect();
        let named_runs: BTreeSet<u32> = view.index_runs()?.into_iter().map(|(number, _)| number).collect();
        let orphans =
            |folder: &Path, listed: Vec<String>, ending, named: &BTreeSet<u32>, numbers: &Numbers| {
                let is_orphan = |name: &String| {
                    let number = number_of(name, ending);
                    number.is_some_and(|(number, whole)| {
                        numbers.is_old(number) && !(whole && named.contains(&number))
                    })
                };
                listed.into_iter().filter(is_orphan).map(|name| folder.join(name)).collect::<Vec<_>>()
            };
        let mut all = orphans(&packs, listed.0, ".pack", &named_packs, &content.pack_numbers);
        all.extend(orphans(&index, listed.1, ".index", &named_runs, &content.run_numbers));
        Ok(all)
    }

    fn names_in(&self, folder: &Path) -> Result<Vec<String>> {
        let names = self.storage.list_directory(folder);
        let names = names.map_err(|error| StoreError::io(folder, "list", error))?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Takes away all nodes that nothing needs, and their layers. How many.
    pub(crate) async fn prune_unneeded(&self, io: &Io<E>) -> Result<usize> {
        let (nodes, layers) = self.prune_all()?;
        self.remove_layers(io, &layers).await;
        Ok(nodes)
    }

    /// Notes of snapshots that their layers are closed, where somebody has closed them and could not note it.
    pub(crate) async fn note_settled(&self, io: &Io<E>) -> Result<()> {
        for (id, row) in self.catalog.view()?.nodes()? {
            let NodeState::Frozen { layer, settled: false, .. } = row.state else { continue };
            // One that is open is locked.
            if glance(&self.storage, io, &self.directory.layer(layer)).await.is_ok_and(|layer| layer.is_clean)
            {
                self.settled(id)?;
            }
        }
        Ok(())
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

/// The number of a pack or run, and whether it is whole.
fn number_of(name: &str, ending: &str) -> Option<(u32, bool)> {
    let (number, whole) = match name.strip_suffix(".tmp") {
        Some(name) => (name.strip_suffix(ending)?, false),
        None => (name.strip_suffix(ending)?, true),
    };
    Some((u32::from_str_radix(number, 16).ok()?, whole))
}
