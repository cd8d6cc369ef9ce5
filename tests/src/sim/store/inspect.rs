//! What is to be found in a store, beside what its disks hold.

use std::collections::BTreeSet;
use std::path::Path;

use sapwood_blockdev::storage::Storage;
use sapwood_store::StoreError;
use sapwood_store::catalog::Look;
use sapwood_store::rows::NodeState;
use sapwood_store::tree::State;

use super::model;
use super::rig::{ARCHIVES, BLOCK, Done, Rig, snapshot_name};

impl Rig {
    /// The blocks in which a snapshot differs from another, or from zeroes.
    ///
    /// # Errors
    /// What the store says.
    pub fn diff(&self, from: Option<&(String, String)>, to: &(String, String)) -> Done<Vec<usize>> {
        let name = |(volume, snapshot): &(String, String)| snapshot_name(volume, snapshot);
        let (io, store, from, to) = (self.io.clone(), self.store(), from.map(name), name(to));
        let found = self.run(async move {
            let mut ranges = Vec::new();
            let found = store.diff(&io, from.as_ref(), &to, &mut |range| ranges.push(range)).await;
            found.map(|found| (found, ranges))
        });
        let (found, ranges) = found?;
        assert_eq!(found.extents, ranges.len() as u64);
        assert!(ranges.is_sorted_by(|a, b| a.end < b.start), "apart, and in order: {ranges:?}");
        let blocks =
            ranges.into_iter().flat_map(|range| range.start as usize / BLOCK..range.end as usize / BLOCK);
        let of_model = |block: usize| {
            assert!(block.is_multiple_of(self.setup.spread), "nobody wrote block {block}");
            block / self.setup.spread
        };
        Ok(blocks.map(of_model).collect())
    }

    /// What the store says is there, as [`model::Model::summary`] does.
    ///
    /// # Errors
    /// What the store says.
    pub fn summary(&self) -> Done<BTreeSet<String>> {
        let tree = self.store().tree()?;
        let name = |id| tree.entries.get(&id).map_or_else(|| format!("{id}?"), |entry| entry.name.clone());
        let lines = tree.entries.values().map(|entry| {
            let is_head = entry.state == State::Head;
            model::line(&entry.name, entry.parent.map(name), entry.notes.protected, is_head)
        });
        let archives = self.storage.list_directory(Path::new(ARCHIVES)).unwrap_or_default();
        let archives = archives.into_iter().filter_map(|name| name.into_string().ok());
        Ok(lines.chain(archives.filter(|name| !name.ends_with(".tmp"))).collect())
    }

    /// Compares the files with what the catalog names, and looks for nodes that nothing needs.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check_files(&self) -> Result<(), String> {
        let store = self.store();
        let told = |error: StoreError| error.to_string();
        let view = store.catalog().view().map_err(told)?;
        let mut named = BTreeSet::new();
        for (_, row) in view.volumes().map_err(told)? {
            named.extend(row.layer);
        }
        for (id, row) in view.nodes().map_err(told)? {
            if let NodeState::Frozen { layer, .. } = row.state {
                named.insert(layer);
            }
            if row.name.is_none() && !view.has_children(id).map_err(told)? {
                return Err(format!("nothing needs node {id}"));
            }
        }
        let folder = store.directory().layers();
        self.compare_files(&folder, named.iter().map(|id| format!("{id}.layer")).collect())?;
        let packs = view.packs().map_err(told)?.into_iter().map(|(number, _)| format!("{number:08x}.pack"));
        self.compare_files(&store.directory().packs(), packs.collect())?;
        let runs = view.index_runs().map_err(told)?.into_iter();
        let runs = runs.map(|(number, _)| format!("{number:08x}.index"));
        self.compare_files(&store.directory().index(), runs.collect())
    }

    fn compare_files(&self, folder: &Path, named: BTreeSet<String>) -> Result<(), String> {
        let found = self.storage.list_directory(folder).map_err(|error| error.to_string())?;
        let found: BTreeSet<String> = found.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        if found == named {
            return Ok(());
        }
        let (too_many, missing) = (&found - &named, &named - &found);
        Err(format!("{}: {too_many:?} without a name, {missing:?} without a file", folder.display()))
    }
}
