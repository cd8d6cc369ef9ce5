//! What the catalog says that guests may do, applied to what is attached.
//!
//! The catalog is read again for every change, under one lock: whoever comes last applies what holds then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::monotonic_now;
use sapwood_qos::arbiter::{Arbiter, NodeId, Settings};
use sapwood_qos::governor::{Background, Governor};
use sapwood_qos::limited::Limited;
use sapwood_qos::names::Named;
use sapwood_store::rows::GroupRows;
use sapwood_store::{AllLimits, Id};

use super::attached::Attached;
use super::service::HostStore;
use crate::control::wire::Failure;

/// See the module's documentation.
pub struct Throttle {
    governor: Arc<Governor>,
    background: Background,
    /// Groups, as the governor knows them.
    groups: Mutex<BTreeMap<String, NodeId>>,
}

impl Throttle {
    /// One for disks that have not more than `in_flight_max` requests under way where they share.
    pub fn new(in_flight_max: usize) -> Self {
        let now = monotonic_now();
        let governor = Governor::new(in_flight_max, now);
        Self { background: governor.background(now), governor, groups: Mutex::default() }
    }

    /// The place of work that no guest waits for.
    pub fn background(&self) -> &Background {
        &self.background
    }

    /// Another bound for requests under way where disks share, and another weight of what is done in the background.
    pub fn share(&self, in_flight_max: usize, background_weight: u32) {
        let now = monotonic_now();
        self.governor.set_in_flight_max(in_flight_max, now);
        self.background.set_weight(background_weight, now);
    }

    /// Has a volume, or a snapshot, of which nothing is said, do what the catalog says of it, from the first request on.
    pub fn limit<D: BlockDevice>(
        &self,
        store: &HostStore,
        id: Id,
        disk: Arc<D>,
    ) -> Result<Arc<Limited<D>>, Failure> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let limits = store.limits()?;
        self.make_groups(&limits.groups, &mut groups);
        let (parent, settings) = place_of(&limits, &groups, id);
        Ok(Limited::new(disk, &self.governor, parent, &settings))
    }

    /// Applies what the catalog says now to groups, and to what is attached.
    pub fn apply(
        &self,
        store: &HostStore,
        attached: impl FnOnce() -> Vec<Arc<Attached>>,
    ) -> Result<(), Failure> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let limits = store.limits()?;
        self.make_groups(&limits.groups, &mut groups);
        let now = monotonic_now();
        for attached in attached() {
            let (parent, settings) = place_of(&limits, &groups, attached.id());
            self.governor.change(attached.node(), parent, &settings, now);
        }
        groups.retain(|name, node| {
            let stays = limits.groups.contains_key(name);
            if !stays {
                self.governor.remove_group(*node, now);
            }
            stays
        });
        Ok(())
    }

    /// Makes the groups that the catalog has, and has each be as it says.
    fn make_groups(&self, rows: &GroupRows, groups: &mut BTreeMap<String, NodeId>) {
        let now = monotonic_now();
        for name in rows.keys() {
            if !groups.contains_key(name) {
                let node = self.governor.add_group(Arbiter::ROOT, &Settings::default(), now);
                groups.insert(name.clone(), node);
            }
        }
        let places: Vec<_> = rows
            .iter()
            .map(|(name, row)| {
                (groups[name], node_of(groups, row.group.as_deref()), settings(name, &row.limits))
            })
            .collect();
        // Out of the old places first: a group may be about to go into one that is in it.
        for (node, parent, settings) in &places {
            if self.governor.parent_of(*node) != Some(*parent) {
                self.governor.change(*node, Arbiter::ROOT, settings, now);
            }
        }
        for (node, parent, settings) in &places {
            self.governor.change(*node, *parent, settings, now);
        }
    }
}

fn node_of(groups: &BTreeMap<String, NodeId>, group: Option<&str>) -> NodeId {
    group.and_then(|group| groups.get(group)).copied().unwrap_or(Arbiter::ROOT)
}

/// In which group a volume is, and what it may do.
fn place_of(limits: &AllLimits, groups: &BTreeMap<String, NodeId>, id: Id) -> (NodeId, Settings) {
    let found = limits.volumes.iter().find(|(_, (volume, _))| *volume == id);
    match found {
        Some((name, (_, row))) => (node_of(groups, row.group.as_deref()), settings(name, &row.limits)),
        None => (Arbiter::ROOT, Settings::default()),
    }
}

/// What was checked before it was kept; a newer program may have kept what this one does not know.
fn settings(name: &str, limits: &Named) -> Settings {
    Settings::from_named(limits).unwrap_or_else(|error| {
        log::warn!("{name}: its limits are not applied: {error}");
        Settings::default()
    })
}

#[cfg(test)]
mod tests {
    use sapwood_store::rows::GroupRow;

    use super::*;

    #[test]
    fn groups_that_change_places_are_never_in_each_other() {
        let rows = |pairs: &[(&str, Option<&str>)]| -> GroupRows {
            let row =
                |group: Option<&str>| GroupRow { group: group.map(str::to_owned), ..GroupRow::default() };
            pairs.iter().map(|(name, group)| ((*name).to_owned(), row(*group))).collect()
        };
        let (throttle, mut groups) = (Throttle::new(1), BTreeMap::new());
        for places in [
            rows(&[("a", Some("b")), ("b", Some("c")), ("c", None)]),
            rows(&[("a", None), ("b", Some("a")), ("c", Some("b"))]),
            rows(&[("a", Some("c")), ("b", Some("a")), ("c", None)]),
        ] {
            throttle.make_groups(&places, &mut groups);
            for (name, row) in &places {
                let parent = row.group.as_deref().map_or(Arbiter::ROOT, |group| groups[group]);
                assert_eq!(throttle.governor.parent_of(groups[name]), Some(parent), "{name}");
            }
        }
    }
}
