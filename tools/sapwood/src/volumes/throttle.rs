//! What the catalog says that guests may do, applied to what is attached.
//!
//! The catalog is read again for every change, under one lock: whoever comes last applies what holds then. Of a disk that is attached its own row is
//! read, and the groups that it is in; of a change, the rows of all that is attached.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::{Time, monotonic_now};
use sapwood_qos::arbiter::{Arbiter, NodeId, Settings};
use sapwood_qos::governor::{Background, Governor};
use sapwood_qos::limited::Limited;
use sapwood_qos::names::Named;
use sapwood_store::Id;
use sapwood_store::catalog::{Look, View};
use sapwood_store::rows::{GroupRows, VolumeRow};

use super::attached::Attached;
use super::service::HostStore;
use crate::control::wire::Failure;
use crate::metrics::groups::Ledger;

/// See the module's documentation.
pub struct Throttle {
    governor: Arc<Governor>,
    background: Background,
    /// Groups, as the governor knows them.
    groups: Mutex<BTreeMap<String, NodeId>>,
    /// What disks did in their groups.
    ledger: Ledger,
}

impl Throttle {
    /// One for disks that have not more than `in_flight_max` requests under way where they share.
    pub fn new(in_flight_max: usize) -> Self {
        let now = monotonic_now();
        let governor = Governor::new(in_flight_max, now);
        let background = governor.background(now);
        Self { governor, background, groups: Mutex::default(), ledger: Ledger::default() }
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

    /// What disks did in their groups.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<String, NodeId>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a volume, or a snapshot, of which nothing is said, do what the catalog says of it, from the first request on.
    pub fn limit<D: BlockDevice>(
        &self,
        store: &HostStore,
        id: Id,
        disk: Arc<D>,
    ) -> Result<Arc<Limited<D>>, Failure> {
        let mut groups = self.groups();
        let place = Place::of(&store.catalog().view()?, id)?;
        self.make_groups(&place.groups, &mut groups);
        Ok(Limited::new(disk, &self.governor, place.parent(&groups), &place.settings))
    }

    /// Applies what the catalog says now to one that was just attached, and enters it into its groups.
    pub fn enter(&self, store: &HostStore, attached: &Attached) -> Result<(), Failure> {
        let mut groups = self.groups();
        let place = Place::of(&store.catalog().view()?, attached.id())?;
        self.make_groups(&place.groups, &mut groups);
        self.put(attached, place, &groups, monotonic_now());
        Ok(())
    }

    /// Applies what the catalog says now to groups, and to what is attached.
    pub fn apply(
        &self,
        store: &HostStore,
        attached: impl FnOnce() -> Vec<Arc<Attached>>,
    ) -> Result<(), Failure> {
        let mut groups = self.groups();
        // First: whatever is attached from here on is entered with a later view.
        let attached = attached();
        let view = store.catalog().view()?;
        let rows = view.groups()?;
        self.make_groups(&rows, &mut groups);
        let now = monotonic_now();
        for attached in attached {
            self.put(&attached, Place::of(&view, attached.id())?, &groups, now);
        }
        groups.retain(|name, node| {
            let stays = rows.contains_key(name);
            if !stays {
                self.governor.remove_group(*node, now);
            }
            stays
        });
        self.ledger.retain(|group| rows.contains_key(group));
        Ok(())
    }

    fn put(&self, attached: &Attached, place: Place, groups: &BTreeMap<String, NodeId>, now: Time) {
        self.governor.change(attached.node(), place.parent(groups), &place.settings, now);
        self.ledger.place(attached.node(), place.path, || attached.totals());
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

/// In which groups a disk is, and what it may do.
#[derive(Default)]
struct Place {
    settings: Settings,
    /// From the inside to the outside.
    path: Vec<String>,
    /// The rows of these.
    groups: GroupRows,
}

impl Place {
    /// That of a volume, or of something else, of which nothing is said.
    fn of(view: &View, id: Id) -> Result<Self, Failure> {
        let Some(VolumeRow { name, limits, group, .. }) = view.volume(id)? else {
            return Ok(Self::default());
        };
        let mut place = Self { settings: settings(&name, &limits), ..Self::default() };
        if group.is_none() {
            return Ok(place);
        }
        // All are one row.
        let (mut all, mut next) = (view.groups()?, group);
        while let Some((name, row)) = next.and_then(|name| all.remove_entry(&name)) {
            next = row.group.clone();
            place.path.push(name.clone());
            place.groups.insert(name, row);
        }
        Ok(place)
    }

    fn parent(&self, groups: &BTreeMap<String, NodeId>) -> NodeId {
        node_of(groups, self.path.first().map(String::as_str))
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
