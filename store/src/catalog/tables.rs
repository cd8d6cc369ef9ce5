//! The tables of the catalog, and access to them: [`View`] reads one moment, [`Change`] changes it.
//!
//! Keys and values are bytes: ids as they are, names in UTF-8, numbers big-endian, so that keys sort;
//! values are JSON, but for counters. Two ids one behind the other are the key where one thing
//! belongs to another.

use std::path::{Path, PathBuf};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::meta::{self, Meta};
use super::rows::{AccountRow, GroupRows, IndexRow, NodeRow, PackRow, SpaceSettings, VolumeRow};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;

/// A table.
pub(super) type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// What the store is.
pub(super) const META: Table = TableDefinition::new("meta");
/// Volumes by id.
pub(super) const VOLUMES: Table = TableDefinition::new("volumes");
/// Nodes by id.
pub(super) const NODES: Table = TableDefinition::new("nodes");
/// The id of a volume by its name.
const NAMES: Table = TableDefinition::new("names");
/// The id of a snapshot by its volume's id and its name.
const SNAPSHOT_NAMES: Table = TableDefinition::new("snapshot_names");
/// By the id of a node and that of a node or volume directly over it: what that is.
const CHILDREN: Table = TableDefinition::new("children");
/// Packs by number.
const PACKS: Table = TableDefinition::new("packs");
/// Runs of the index by number.
const INDEX_RUNS: Table = TableDefinition::new("index_runs");
/// Settings by name.
const SETTINGS: Table = TableDefinition::new("settings");
/// Counters by name.
const COUNTERS: Table = TableDefinition::new("counters");

const ALL: [Table; 10] =
    [META, VOLUMES, NODES, NAMES, SNAPSHOT_NAMES, CHILDREN, PACKS, INDEX_RUNS, SETTINGS, COUNTERS];

/// The key of the limits of space.
const SPACE: &[u8] = b"space";
/// The key of the groups of volumes.
const GROUPS: &[u8] = b"groups";
/// The key of what the last account has found.
const ACCOUNT: &[u8] = b"account";

/// What lies directly over a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// Another node.
    Node(Id),
    /// A volume.
    Volume(Id),
}

impl Child {
    fn id(self) -> Id {
        match self {
            Self::Node(id) | Self::Volume(id) => id,
        }
    }

    fn kind(self) -> &'static [u8] {
        match self {
            Self::Node(_) => b"n",
            Self::Volume(_) => b"v",
        }
    }
}

/// The catalog as it was at one moment.
pub struct View {
    transaction: ReadTransaction,
    path: PathBuf,
}

/// A change of the catalog under way: it sees what it has changed itself.
pub struct Change {
    transaction: WriteTransaction,
    path: PathBuf,
}

/// A key and its value.
type Pair = (Vec<u8>, Vec<u8>);

/// Reading the catalog's tables.
pub trait Look {
    /// The catalog's file.
    fn path(&self) -> &Path;

    /// The value of a key.
    #[doc(hidden)]
    fn value(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// The pairs whose keys begin with `prefix`, at most `max` of them, in order.
    #[doc(hidden)]
    fn pairs(&self, table: Table, prefix: &[u8], max: usize) -> Result<Vec<Pair>>;

    /// A row.
    #[doc(hidden)]
    fn row<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>> {
        let value = self.value(table, key)?;
        value.map(|value| decode(self.path(), table, key, &value)).transpose()
    }

    /// All rows of a table whose keys are ids.
    #[doc(hidden)]
    fn rows<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(Id, T)>> {
        let pairs = self.pairs(table, &[], usize::MAX)?.into_iter();
        let path = self.path();
        pairs.map(|(key, value)| Ok((id(path, table, &key)?, decode(path, table, &key, &value)?))).collect()
    }

    /// All rows of a table whose keys are numbers.
    #[doc(hidden)]
    fn numbered<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(u32, T)>> {
        let path = self.path();
        let pairs = self.pairs(table, &[], usize::MAX)?.into_iter();
        let number = |key: &[u8]| -> Result<u32> {
            let bytes = key.try_into().map_err(|_| damaged(path, table, key, "the key is no number"))?;
            Ok(u32::from_be_bytes(bytes))
        };
        pairs.map(|(key, value)| Ok((number(&key)?, decode(path, table, &key, &value)?))).collect()
    }

    /// A volume by id.
    fn volume(&self, id: Id) -> Result<Option<VolumeRow>> {
        self.row(VOLUMES, &id.0)
    }

    /// All volumes.
    fn volumes(&self) -> Result<Vec<(Id, VolumeRow)>> {
        self.rows(VOLUMES)
    }

    /// A node by id.
    fn node(&self, id: Id) -> Result<Option<NodeRow>> {
        self.row(NODES, &id.0)
    }

    /// A node that another row names.
    fn needed_node(&self, id: Id) -> Result<NodeRow> {
        self.node(id)?
            .ok_or_else(|| damaged(self.path(), NODES, &id.0, "another row names it, it is not there"))
    }

    /// All nodes.
    fn nodes(&self) -> Result<Vec<(Id, NodeRow)>> {
        self.rows(NODES)
    }

    /// The id of a volume.
    fn volume_named(&self, name: &str) -> Result<Option<Id>> {
        let value = self.value(NAMES, name.as_bytes())?;
        value.map(|value| id(self.path(), NAMES, &value)).transpose()
    }

    /// The id of a snapshot of a volume.
    fn snapshot_named(&self, volume: Id, name: &str) -> Result<Option<Id>> {
        let value = self.value(SNAPSHOT_NAMES, &joined(volume, name.as_bytes()))?;
        value.map(|value| id(self.path(), SNAPSHOT_NAMES, &value)).transpose()
    }

    /// The names and ids of a volume's snapshots.
    fn snapshots_of(&self, volume: Id) -> Result<Vec<(String, Id)>> {
        let path = self.path();
        let pairs = self.pairs(SNAPSHOT_NAMES, &volume.0, usize::MAX)?.into_iter();
        let decoded = pairs.map(|(key, value)| {
            let name = String::from_utf8(key[16..].to_vec())
                .map_err(|_| damaged(path, SNAPSHOT_NAMES, &key, "the name is not UTF-8"))?;
            Ok((name, id(path, SNAPSHOT_NAMES, &value)?))
        });
        decoded.collect()
    }

    /// Whether anything lies directly over a node.
    fn has_children(&self, node: Id) -> Result<bool> {
        Ok(!self.pairs(CHILDREN, &node.0, 1)?.is_empty())
    }

    /// What lies directly over a node.
    fn children(&self, node: Id) -> Result<Vec<Child>> {
        let pairs = self.pairs(CHILDREN, &node.0, usize::MAX)?.into_iter();
        pairs.map(|(key, value)| Ok(child_of(self.path(), &key, &value)?.1)).collect()
    }

    /// The names of all volumes, and their ids.
    fn volume_names(&self) -> Result<Vec<(String, Id)>> {
        let path = self.path();
        let pairs = self.pairs(NAMES, &[], usize::MAX)?.into_iter();
        let decoded = pairs.map(|(key, value)| {
            let volume = id(path, NAMES, &value)?;
            let name = String::from_utf8(key);
            let name =
                name.map_err(|error| damaged(path, NAMES, error.as_bytes(), "the name is not UTF-8"))?;
            Ok((name, volume))
        });
        decoded.collect()
    }

    /// All nodes that anything lies over, each with what that is.
    fn all_children(&self) -> Result<Vec<(Id, Child)>> {
        let pairs = self.pairs(CHILDREN, &[], usize::MAX)?.into_iter();
        pairs.map(|(key, value)| child_of(self.path(), &key, &value)).collect()
    }

    /// All packs.
    fn packs(&self) -> Result<Vec<(u32, PackRow)>> {
        self.numbered(PACKS)
    }

    /// All runs of the index.
    fn index_runs(&self) -> Result<Vec<(u32, IndexRow)>> {
        self.numbered(INDEX_RUNS)
    }

    /// The limits of space.
    fn space_settings(&self) -> Result<SpaceSettings> {
        Ok(self.row(SETTINGS, SPACE)?.unwrap_or_default())
    }

    /// The groups of volumes.
    fn groups(&self) -> Result<GroupRows> {
        Ok(self.row(SETTINGS, GROUPS)?.unwrap_or_default())
    }

    /// What the last account has found of the whole store.
    fn account_row(&self) -> Result<Option<AccountRow>> {
        self.row(SETTINGS, ACCOUNT)
    }

    /// A counter; 0 before it was set.
    fn counter(&self, name: &str) -> Result<u64> {
        let value = self.value(COUNTERS, name.as_bytes())?;
        let number = |value: Vec<u8>| {
            let bytes = value.try_into();
            let bytes =
                bytes.map_err(|_| damaged(self.path(), COUNTERS, name.as_bytes(), "it is no number"))?;
            Ok(u64::from_be_bytes(bytes))
        };
        value.map_or(Ok(0), number)
    }
}

/// A row of the children: the node, and what lies over it.
fn child_of(path: &Path, key: &[u8], value: &[u8]) -> Result<(Id, Child)> {
    let (node, child) = key.split_at(key.len().min(16));
    let (node, child) = (id(path, CHILDREN, node)?, id(path, CHILDREN, child)?);
    match value {
        b"n" => Ok((node, Child::Node(child))),
        b"v" => Ok((node, Child::Volume(child))),
        _ => Err(damaged(path, CHILDREN, key, "it is neither a node nor a volume")),
    }
}

/// The key of what belongs to `id`.
fn joined(id: Id, rest: &[u8]) -> Vec<u8> {
    [&id.0, rest].concat()
}

fn damaged(path: &Path, table: Table, key: &[u8], detail: &str) -> StoreError {
    use redb::TableHandle;
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!("the row {key} of its table {} is damaged: {detail}", table.name());
    StoreError::new(path.display(), StoreErrorKind::Corrupt(text))
}

fn id(path: &Path, table: Table, bytes: &[u8]) -> Result<Id> {
    bytes.try_into().map(Id).map_err(|_| damaged(path, table, bytes, "it is no id"))
}

fn decode<T: DeserializeOwned>(path: &Path, table: Table, key: &[u8], value: &[u8]) -> Result<T> {
    serde_json::from_slice(value).map_err(|error| {
        let detail = format!("{error}; if a newer program wrote it, use that");
        damaged(path, table, key, &detail)
    })
}

/// Reads from a table of either kind of transaction.
fn look<T: ReadableTable<&'static [u8], &'static [u8]>>(
    table: &T,
    prefix: &[u8],
    max: usize,
) -> Result<Vec<Pair>, redb::Error> {
    let mut pairs = Vec::new();
    for pair in table.range::<&[u8]>(prefix..)? {
        let (key, value) = pair?;
        if pairs.len() == max || !key.value().starts_with(prefix) {
            break;
        }
        pairs.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(pairs)
}

fn one<T: ReadableTable<&'static [u8], &'static [u8]>>(
    table: &T,
    key: &[u8],
) -> Result<Option<Vec<u8>>, redb::Error> {
    Ok(table.get(key)?.map(|value| value.value().to_vec()))
}

impl View {
    pub(super) fn begin(database: &Database, path: &Path) -> Result<Self> {
        let transaction = database.begin_read();
        let transaction = transaction.map_err(|error| StoreError::database(path, "read", error))?;
        Ok(Self { transaction, path: path.to_owned() })
    }
}

/// Both kinds of transaction open tables in the same way, of types of their own.
macro_rules! look {
    ($transaction:ident) => {
        impl Look for $transaction {
            fn path(&self) -> &Path {
                &self.path
            }

            fn value(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
                let table = self.transaction.open_table(table).map_err(redb::Error::from);
                let value = table.and_then(|table| one(&table, key));
                value.map_err(|error| StoreError::database(&self.path, "read", error))
            }

            fn pairs(&self, table: Table, prefix: &[u8], max: usize) -> Result<Vec<Pair>> {
                let table = self.transaction.open_table(table).map_err(redb::Error::from);
                let pairs = table.and_then(|table| look(&table, prefix, max));
                pairs.map_err(|error| StoreError::database(&self.path, "read", error))
            }
        }
    };
}

look!(View);
look!(Change);

impl Change {
    pub(super) fn new(transaction: WriteTransaction, path: &Path) -> Self {
        Self { transaction, path: path.to_owned() }
    }

    pub(super) fn commit(self) -> Result<()> {
        let Self { transaction, path } = self;
        transaction.commit().map_err(|error| StoreError::database(&path, "commit a change of", error))
    }

    pub(super) fn abort(self) {
        if let Err(error) = self.transaction.abort() {
            log::warn!("{}: a change that failed could not be ended: {error}", self.path.display());
        }
    }

    /// Makes the tables, and says what the store is.
    pub(super) fn prepare(&mut self, meta: &Meta) -> Result<()> {
        for table in ALL {
            let opened = self.transaction.open_table(table).map(drop);
            opened.map_err(|error| StoreError::database(&self.path, "make tables in", error))?;
        }
        self.put(META, meta::KEY, meta)
    }

    /// Takes over all rows of another catalog, but for what that says of its store.
    pub(crate) fn copy(&mut self, from: &View) -> Result<()> {
        for table in ALL.into_iter().skip(1) {
            for (key, value) in from.pairs(table, &[], usize::MAX)? {
                self.put_bytes(table, &key, Some(&value))?;
            }
        }
        Ok(())
    }

    fn put_bytes(&mut self, table: Table, key: &[u8], value: Option<&[u8]>) -> Result<()> {
        let change = || {
            let mut table = self.transaction.open_table(table)?;
            match value {
                Some(value) => drop(table.insert(key, value)?),
                None => drop(table.remove(key)?),
            }
            Ok(())
        };
        change().map_err(|error: redb::Error| StoreError::database(&self.path, "change", error))
    }

    fn put<T: Serialize>(&mut self, table: Table, key: &[u8], row: &T) -> Result<()> {
        let bytes =
            serde_json::to_vec(row).map_err(|error| damaged(&self.path, table, key, &error.to_string()))?;
        self.put_bytes(table, key, Some(&bytes))
    }

    fn put_row<T: Serialize>(&mut self, table: Table, key: &[u8], row: Option<&T>) -> Result<()> {
        match row {
            Some(row) => self.put(table, key, row),
            None => self.put_bytes(table, key, None),
        }
    }

    /// Sets or removes a volume's row.
    pub fn put_volume(&mut self, id: Id, row: Option<&VolumeRow>) -> Result<()> {
        self.put_row(VOLUMES, &id.0, row)
    }

    /// Sets or removes a node's row.
    pub fn put_node(&mut self, id: Id, row: Option<&NodeRow>) -> Result<()> {
        self.put_row(NODES, &id.0, row)
    }

    /// Names a volume, or takes the name away.
    pub fn put_name(&mut self, name: &str, id: Option<Id>) -> Result<()> {
        self.put_bytes(NAMES, name.as_bytes(), id.as_ref().map(|id| &id.0[..]))
    }

    /// Names a snapshot of a volume, or takes the name away.
    pub fn put_snapshot_name(&mut self, volume: Id, name: &str, id: Option<Id>) -> Result<()> {
        let id = id.as_ref().map(|id| &id.0[..]);
        self.put_bytes(SNAPSHOT_NAMES, &joined(volume, name.as_bytes()), id)
    }

    /// Notes that something lies over a node.
    pub fn add_child(&mut self, node: Option<Id>, child: Child) -> Result<()> {
        let Some(node) = node else { return Ok(()) };
        self.put_bytes(CHILDREN, &joined(node, &child.id().0), Some(child.kind()))
    }

    /// Notes that something does not lie over a node any more.
    pub fn remove_child(&mut self, node: Option<Id>, child: Child) -> Result<()> {
        let Some(node) = node else { return Ok(()) };
        self.put_bytes(CHILDREN, &joined(node, &child.id().0), None)
    }

    /// Sets or removes a pack's row.
    pub fn put_pack(&mut self, number: u32, row: Option<&PackRow>) -> Result<()> {
        let key = number.to_be_bytes();
        self.put_row(PACKS, &key, row)
    }

    /// Sets or removes the row of a run of the index.
    pub fn put_index_run(&mut self, number: u32, row: Option<&IndexRow>) -> Result<()> {
        let key = number.to_be_bytes();
        self.put_row(INDEX_RUNS, &key, row)
    }

    /// Sets the limits of space.
    pub fn put_space_settings(&mut self, settings: &SpaceSettings) -> Result<()> {
        self.put(SETTINGS, SPACE, settings)
    }

    /// Sets the groups of volumes.
    pub fn put_groups(&mut self, groups: &GroupRows) -> Result<()> {
        self.put(SETTINGS, GROUPS, groups)
    }

    /// Sets what an account has found of the whole store.
    pub fn put_account_row(&mut self, row: &AccountRow) -> Result<()> {
        self.put(SETTINGS, ACCOUNT, row)
    }

    /// Sets a counter.
    pub fn put_counter(&mut self, name: &str, value: u64) -> Result<()> {
        self.put_bytes(COUNTERS, name.as_bytes(), Some(&value.to_be_bytes()))
    }
}
