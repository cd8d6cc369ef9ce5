//! What guests may do: limits, weights and reservations of volumes and of groups of volumes.
//!
//! They are kept by name and number, as `sapwood_qos::names` has them, and checked before they are kept; a daemon
//! applies them. A group comes into being when something is said of it, may be in another one, and goes when it is deleted, which needs
//! that nothing is in it.

use std::collections::BTreeMap;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;
use sapwood_qos::arbiter::Settings;
use sapwood_qos::names::{Named, merge};

use crate::catalog::Look;
use crate::catalog::rows::{GroupRow, GroupRows, VolumeRow};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name;
use crate::store::{Store, volume};

/// Groups that a store can have.
pub const GROUPS_MAX: usize = 1024;
/// Groups that can be in one another.
pub const DEPTH_MAX: usize = 8;

/// A change of what a volume or group may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsChange {
    /// Values that take the place of those of the same name; 0 takes one away.
    pub limits: Named,
    /// Forget all others.
    pub reset: bool,
    /// The group that it is in from now on; `Some(None)`: none.
    pub group: Option<Option<String>>,
}

/// All that is limited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllLimits {
    /// Groups.
    pub groups: GroupRows,
    /// Volumes of which something is said, by name.
    pub volumes: BTreeMap<String, (Id, GroupRow)>,
}

/// Checks limits that may have been written by another program.
///
/// # Errors
/// What makes no sense.
pub fn settings(subject: &str, limits: &Named) -> Result<Settings> {
    Settings::from_named(limits).map_err(|error| StoreError::invalid(subject, error))
}

fn changed(subject: &str, row: GroupRow, change: &LimitsChange, groups: &GroupRows) -> Result<GroupRow> {
    let before = if change.reset { Named::new() } else { row.limits };
    let limits = merge(&before, &change.limits);
    settings(subject, &change.limits.keys().map(|name| (name.clone(), 0)).collect())?;
    settings(subject, &limits)?;
    let group = change.group.clone().unwrap_or(row.group);
    if let Some(group) = group.as_ref().filter(|group| !groups.contains_key(*group)) {
        return Err(no_group(group));
    }
    Ok(GroupRow { limits, group })
}

fn no_group(group: &str) -> StoreError {
    StoreError::new(group, StoreErrorKind::NotFound("there is no such group in the store".to_owned()))
}

/// Refuses groups that are in each other, or too deep.
fn check_depth(groups: &GroupRows, group: &str) -> Result<()> {
    let mut next = Some(group);
    for _ in 0..DEPTH_MAX {
        let Some(group) = next else { return Ok(()) };
        next = groups.get(group).and_then(|row| row.group.as_deref());
    }
    let text = format!("groups are in one another at most {DEPTH_MAX} deep, and never in themselves");
    next.map_or(Ok(()), |_| Err(StoreError::invalid(group, text)))
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Changes what a volume may do.
    ///
    /// # Errors
    /// There is no such volume or group, it makes no sense, what the catalog says.
    pub fn limit_volume(&self, name: &str, change: &LimitsChange) -> Result<()> {
        self.catalog.change(|catalog| {
            let (id, row) = volume(catalog, name)?;
            let old = GroupRow { limits: row.limits.clone(), group: row.group.clone() };
            let GroupRow { limits, group } = changed(name, old, change, &catalog.groups()?)?;
            catalog.put_volume(id, Some(&VolumeRow { limits, group, ..row }))
        })
    }

    /// Changes what a group may do, and makes it if there is none of that name.
    ///
    /// # Errors
    /// The name cannot be one, there are too many, it would be in itself; as for [`limit_volume`](Self::limit_volume).
    pub fn limit_group(&self, name: &str, change: &LimitsChange) -> Result<()> {
        name::check(name)?;
        self.catalog.change(|catalog| {
            let mut groups = catalog.groups()?;
            let row = changed(name, groups.get(name).cloned().unwrap_or_default(), change, &groups)?;
            groups.insert(name.to_owned(), row);
            if groups.len() > GROUPS_MAX {
                return Err(StoreError::invalid(name, format!("a store has at most {GROUPS_MAX} groups")));
            }
            groups.keys().try_for_each(|group| check_depth(&groups, group))?;
            catalog.put_groups(&groups)
        })
    }

    /// Deletes a group in which nothing is.
    ///
    /// # Errors
    /// There is none, something is in it, what the catalog says.
    pub fn delete_group(&self, name: &str) -> Result<()> {
        self.catalog.change(|catalog| {
            let mut groups = catalog.groups()?;
            groups.remove(name).ok_or_else(|| no_group(name))?;
            let is_in = |group: &Option<String>| group.as_deref() == Some(name);
            let members = groups.iter().filter(|(_, row)| is_in(&row.group)).map(|(group, _)| group.clone());
            let volumes = catalog.volumes()?.into_iter().filter(|(_, row)| is_in(&row.group));
            if let Some(member) = members.chain(volumes.map(|(_, row)| row.name)).next() {
                let text = format!("{member} is in it: take that out first (sapwood limit --in-group)");
                return Err(StoreError::new(name, StoreErrorKind::InUse(text)));
            }
            catalog.put_groups(&groups)
        })
    }

    /// All that is limited.
    ///
    /// # Errors
    /// What the catalog says.
    pub fn limits(&self) -> Result<AllLimits> {
        let view = self.catalog.view()?;
        let volumes = view.volumes()?.into_iter().filter_map(|(id, row)| {
            let VolumeRow { name, limits, group, .. } = row;
            let is_said = !limits.is_empty() || group.is_some();
            is_said.then_some((name, (id, GroupRow { limits, group })))
        });
        Ok(AllLimits { groups: view.groups()?, volumes: volumes.collect() })
    }
}
