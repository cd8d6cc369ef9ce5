//! Operations that change nothing: lists, the tree, one volume or snapshot, the store, events.

use std::sync::Arc;

use sapwood_store::catalog::{Look, View};
use sapwood_store::rows::{GroupRow, NodeRow, VolumeRow};
use sapwood_store::tree::{self, Tree};
use sapwood_store::{Id, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Entries, Entry, Events, Forest, Stat, State};
use super::attached::Attached;
use super::operation::{Quick, operation};
use super::service::Service;
use crate::control::wire::Failure;
use crate::metrics::page::{Page, StoreNumbers};
use crate::metrics::{GroupStatistics, Statistics};

/// All volumes, by name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ListVolumes {}

/// The snapshots of a volume, by time.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ListSnapshots {
    /// The volume.
    pub volume: String,
}

/// All that there is, as it lies over one another.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowTree {}

/// A volume.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowVolume {
    /// Its name.
    pub volume: String,
}

/// A snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowSnapshot {
    /// Its volume.
    pub volume: String,
    /// Its own name.
    pub snapshot: String,
}

/// The store itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowStore {}

/// What happened lately.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ListEvents {}

/// What guests do with all that is attached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowStatistics {}

operation!(ListVolumes: Get "/v1/volumes" -> Entries);
operation!(ListSnapshots: Get "/v1/volumes/{volume}/snapshots" -> Entries);
operation!(ShowTree: Get "/v1/tree" -> Forest);
operation!(ShowVolume: Get "/v1/volumes/{volume}" -> Entry);
operation!(ShowSnapshot: Get "/v1/volumes/{volume}/snapshots/{snapshot}" -> Entry);
operation!(ShowStore: Get "/v1/store" -> Stat);
operation!(ListEvents: Get "/v1/events" -> Events);
operation!(ShowStatistics: Get "/v1/statistics" -> Statistics);

impl Quick for ListVolumes {
    fn run(self, service: &Arc<Service>) -> Result<Entries, Failure> {
        let (tree, listed) = (service.store().tree()?, service.store().list()?);
        let entries = listed.into_iter().filter_map(|listed| {
            let mut entry = entry(service, &tree, listed.id)?;
            entry.snapshots = Some(listed.snapshots as u64);
            Some(entry)
        });
        Ok(Entries { entries: entries.collect() })
    }
}

impl Quick for ListSnapshots {
    fn run(self, service: &Arc<Service>) -> Result<Entries, Failure> {
        let id = service.volume(&self.volume)?;
        let view = service.store().catalog().view()?;
        let mut entries = Vec::new();
        for (name, node) in view.snapshots_of(id)? {
            let name = SnapshotName { volume: self.volume.clone(), snapshot: name };
            entries.push(snapshot_entry(service, &view, &name, node, view.needed_node(node)?)?);
        }
        entries.sort_by(|a, b| (a.created_ms, &a.name).cmp(&(b.created_ms, &b.name)));
        Ok(Entries { entries })
    }
}

impl Quick for ShowTree {
    fn run(self, service: &Arc<Service>) -> Result<Forest, Failure> {
        let tree = service.store().tree()?;
        let mut entries = Vec::new();
        // Those that were made at once by name. From the last to the first, as the last one in is the first one out.
        let last_first = |ids: &[Id]| {
            let mut ids = ids.to_vec();
            let key = |id: &Id| tree.entries.get(id).map(|entry| (entry.created_ms, entry.name.as_str()));
            ids.sort_by(|a, b| key(b).cmp(&key(a)));
            ids
        };
        let mut next = last_first(&tree.roots);
        while let Some(id) = next.pop() {
            next.extend(tree.entries.get(&id).into_iter().flat_map(|entry| last_first(&entry.children)));
            entries.extend(entry(service, &tree, id));
        }
        Ok(Forest { entries, nameless: tree.nameless as u64 })
    }
}

/// An entry of the tree as it is answered.
fn entry(service: &Service, tree: &Tree, id: Id) -> Option<Entry> {
    let found = tree.entries.get(&id)?;
    let state = match found.state {
        tree::State::Head => State::Volume,
        tree::State::Bare => State::Bare,
        tree::State::Frozen => State::Frozen,
        tree::State::Sealed => State::Sealed,
    };
    let mut entry = Entry::new(id, found.name.clone(), state, found.notes.clone(), found.space);
    let parent = found.parent.and_then(|parent| tree.entries.get(&parent));
    entry.parent = parent.map(|parent| parent.name.clone());
    entry.created_ms = found.created_ms;
    entry.virtual_size = found.size;
    add_serving(service, id, &mut entry);
    Some(entry)
}

/// What is only known of what is attached.
fn add_serving(service: &Service, id: Id, entry: &mut Entry) {
    if let Some(attached) = service.attached(id) {
        entry.virtual_size = attached.size();
        entry.attached = Some(attached.serving());
    }
    entry.attach_failed = service.memory().and_then(|memory| memory.failure(id));
}

impl Quick for ShowVolume {
    fn run(self, service: &Arc<Service>) -> Result<Entry, Failure> {
        let id = service.volume(&self.volume)?;
        let view = service.store().catalog().view()?;
        let row =
            view.volume(id)?.ok_or_else(|| Failure::new("not-found", "the volume was deleted meanwhile"))?;
        let VolumeRow { name, created_ms, size, parent, notes, space, .. } = row;
        let mut entry = Entry::new(id, name, State::Volume, notes, space);
        entry.created_ms = created_ms;
        entry.virtual_size = size;
        entry.parent = named_below(&view, parent)?;
        entry.snapshots = Some(view.snapshots_of(id)?.len() as u64);
        add_serving(service, id, &mut entry);
        Ok(entry)
    }
}

impl Quick for ShowSnapshot {
    fn run(self, service: &Arc<Service>) -> Result<Entry, Failure> {
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let id = service.snapshot(&name)?;
        let view = service.store().catalog().view()?;
        let row = view.needed_node(id)?;
        snapshot_entry(service, &view, &name, id, row)
    }
}

fn snapshot_entry(
    service: &Service,
    view: &View,
    name: &SnapshotName,
    id: Id,
    row: NodeRow,
) -> Result<Entry, Failure> {
    let mut entry = Entry::new(id, name.to_string(), State::of(&row.state), row.notes, row.space);
    entry.created_ms = row.created_ms;
    entry.virtual_size = row.size;
    entry.parent = named_below(view, row.parent)?;
    add_serving(service, id, &mut entry);
    Ok(entry)
}

/// The first snapshot from `node` down that has a name.
fn named_below(view: &View, node: Option<Id>) -> Result<Option<String>, Failure> {
    let mut next = node;
    while let Some(id) = next {
        let row = view.needed_node(id)?;
        if let (Some(snapshot), Some(owner)) = (row.name, row.volume)
            && let Some(owner) = view.volume(owner)?
        {
            return Ok(Some(SnapshotName { volume: owner.name, snapshot }.to_string()));
        }
        next = row.parent;
    }
    Ok(None)
}

impl Quick for ShowStore {
    fn run(self, service: &Arc<Service>) -> Result<Stat, Failure> {
        let store = service.store();
        let stat = store.stat()?;
        Ok(Stat {
            path: store.directory().root().to_owned(),
            id: store.id(),
            volumes: stat.volumes as u64,
            bare: stat.snapshots.bare as u64,
            frozen: stat.snapshots.frozen as u64,
            sealed: stat.snapshots.sealed as u64,
            nameless: stat.snapshots.nameless as u64,
            attached: service.all_attached().len() as u64,
            layer_bytes: stat.taken.layers,
            pack_bytes: stat.taken.packs,
            index_bytes: stat.taken.index,
            catalog_bytes: stat.taken.catalog,
            live_bytes: stat.live_bytes,
            block_bytes: stat.block_bytes,
            compression: stat.compression,
            referenced_bytes: stat.account.as_ref().and_then(|account| account.referenced_bytes),
            unique_bytes: stat.account.as_ref().map(|account| account.unique_bytes),
            stored_bytes: stat.account.as_ref().map(|account| account.stored_bytes),
            deduplication: stat.deduplication,
            account_ms: stat.account.map(|account| account.found_ms),
            quota: stat.settings.quota,
            reserve: stat.settings.reserve,
            watermarks: stat.settings.watermarks,
            left_bytes: stat.left,
            full_percent: stat.full_percent,
            watermark: stat.watermark,
        })
    }
}

impl Quick for ListEvents {
    fn run(self, service: &Arc<Service>) -> Result<Events, Failure> {
        Ok(Events { events: service.events().list() })
    }
}

impl Quick for ShowStatistics {
    fn run(self, service: &Arc<Service>) -> Result<Statistics, Failure> {
        let view = service.store().catalog().view()?;
        let attached = service.all_attached();
        let of = |attached: &Arc<Attached>| (attached.node(), attached.totals());
        let (totals, mut counted) = service.throttle().ledger().look(&attached, of);
        let mut disks = Vec::new();
        for (attached, totals) in attached.iter().zip(totals) {
            let id = attached.id();
            let (name, row) = match view.volume(id)? {
                Some(VolumeRow { name, limits, group, .. }) => (Some(name), GroupRow { limits, group }),
                None if view.node(id)?.is_some() => (named_below(&view, Some(id))?, GroupRow::default()),
                None => (None, GroupRow::default()),
            };
            // What has no name is being detached or deleted.
            disks.extend(name.map(|name| attached.statistics(name, row, totals)));
        }
        let groups = view.groups()?.into_iter().map(|(name, GroupRow { limits, group })| {
            let (disks, totals) = counted.remove(&name).unwrap_or_default();
            GroupStatistics { name, group, limits, disks, totals }
        });
        Ok(Statistics { seals: Some(service.seals()), ..Statistics::now(disks, groups.collect()) })
    }
}

/// The page for Prometheus.
pub fn page(service: &Arc<Service>) -> Result<Page, Failure> {
    let Statistics { disks, groups, seals, .. } = ShowStatistics {}.run(service)?;
    let store = StoreNumbers::new(service.store().stat()?, seals.unwrap_or_default());
    Ok(Page { disks, groups, store: Some(store) })
}
