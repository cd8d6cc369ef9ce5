//! What the disks of groups did while they were in them.
//!
//! A group's counts never go back: they are not those of the disks that are in it now, but the sum of what each disk did for as long as
//! it was in the group. So before a disk goes to another group, or away, what it did since it was last looked at is added to the groups that it was in
//! until then; and the same whenever somebody asks. A group that is deleted, which is empty then, is forgotten.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sapwood_qos::arbiter::NodeId;

use super::Totals;

/// See the module's documentation.
#[derive(Default)]
pub struct Ledger(Mutex<Books>);

#[derive(Default)]
struct Books {
    disks: BTreeMap<NodeId, Disk>,
    groups: BTreeMap<String, Totals>,
}

/// A disk that is served.
struct Disk {
    /// The groups that it is in, from the inside to the outside; unknown at first.
    groups: Option<Vec<String>>,
    /// What it did by now that its groups know of.
    known: Totals,
}

impl Books {
    /// Adds to a disk's groups what it did meanwhile.
    fn settle(&mut self, disk: NodeId, now: &Totals) {
        let Some(Disk { groups: Some(groups), known }) = self.disks.get_mut(&disk) else { return };
        let more = now.since(known);
        known.clone_from(now);
        for group in groups {
            self.groups.entry(group.clone()).or_default().merge(&more);
        }
    }
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk is served from now on.
    pub fn add(&self, disk: NodeId) {
        self.books().disks.insert(disk, Disk { groups: None, known: Totals::default() });
    }

    /// A disk, if it is still served, is in these groups from now on, the innermost first; the first ones had it from the beginning.
    /// `now` tells what it did so far. It is asked under the lock, so that nobody counts an older state after a newer one.
    pub fn place(&self, disk: NodeId, groups: Vec<String>, now: impl FnOnce() -> Totals) {
        let mut books = self.books();
        if books.disks.contains_key(&disk) {
            books.settle(disk, &now());
            books.disks.entry(disk).and_modify(|disk| disk.groups = Some(groups));
        }
    }

    /// A disk does nothing any more; `last` tells what it did.
    pub fn remove(&self, disk: NodeId, last: impl FnOnce() -> Totals) {
        let mut books = self.books();
        if books.disks.contains_key(&disk) {
            books.settle(disk, &last());
            books.disks.remove(&disk);
        }
    }

    /// Forgets the groups that `is_there` does not know.
    pub fn retain(&self, is_there: impl Fn(&str) -> bool) {
        self.books().groups.retain(|group, _| is_there(group));
    }

    /// What each of these disks did so far, as `now` tells, in their order, and what that makes of the groups in which any was, with how many of these are in
    /// each now.
    pub fn look<D>(
        &self,
        disks: &[D],
        now: impl Fn(&D) -> (NodeId, Totals),
    ) -> (Vec<Totals>, BTreeMap<String, (u64, Totals)>) {
        let mut books = self.books();
        let found: Vec<(NodeId, Totals)> = disks.iter().map(now).collect();
        found.iter().for_each(|(disk, totals)| books.settle(*disk, totals));
        let mut groups: BTreeMap<String, (u64, Totals)> =
            books.groups.iter().map(|(name, totals)| (name.clone(), (0, totals.clone()))).collect();
        for (disk, totals) in &found {
            for group in books.disks.get(disk).into_iter().flat_map(|disk| &disk.groups).flatten() {
                let (members, sum) = groups.entry(group.clone()).or_default();
                *members += 1;
                sum.account.in_flight += totals.account.in_flight;
            }
        }
        (found.into_iter().map(|(_, totals)| totals).collect(), groups)
    }
}

#[cfg(test)]
mod tests {
    use sapwood_qos::account::Kind;
    use sapwood_qos::arbiter::{Arbiter, Settings};

    use super::*;
    use crate::metrics::DataPath;
    use crate::metrics::tests::histogram;

    /// What a disk did that has read so often, and has one request in flight.
    fn totals(reads: u64) -> Totals {
        let mut totals = Totals { throttled_us: reads * 10, ..Totals::default() };
        totals.data_path = Some(DataPath { first_writes: reads * 100, ..DataPath::default() });
        totals.account.in_flight = 1;
        totals.account[Kind::Read].bytes = reads * 512;
        totals.account[Kind::Read].latency = histogram(&vec![50; reads as usize]);
        totals
    }

    /// What a group has: members, reads, and of these by the other counts.
    fn of(found: &BTreeMap<String, (u64, Totals)>, group: &str) -> (u64, u64, u64) {
        let (members, totals) = &found[group];
        let reads = totals.account.operations();
        assert_eq!(
            (totals.account[Kind::Read].bytes, totals.throttled_us, totals.data_path.unwrap().first_writes),
            (reads * 512, reads * 10, reads * 100)
        );
        (*members, reads, totals.account.in_flight)
    }

    #[test]
    fn a_group_keeps_what_disks_did_in_it() {
        let mut arbiter = Arbiter::new(None, sapwood_blockdev::engine::Time::ZERO);
        let mut disk =
            || arbiter.add_disk(Arbiter::ROOT, &Settings::default(), sapwood_blockdev::engine::Time::ZERO);
        let (a, b, ledger) = (disk(), disk(), Ledger::default());
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let look = |disks: &[(NodeId, u64)]| ledger.look(disks, |(disk, reads)| (*disk, totals(*reads))).1;
        [a, b].into_iter().for_each(|disk| ledger.add(disk));
        assert!(look(&[(a, 1), (b, 1)]).is_empty(), "nobody has said yet where they are");
        ledger.place(a, names(&["in", "out"]), || totals(2));
        ledger.place(b, names(&["out"]), || totals(2));
        let found = look(&[(a, 5), (b, 3)]);
        assert_eq!((of(&found, "in"), of(&found, "out")), ((1, 5, 1), (2, 8, 2)));
        assert_eq!(look(&[(a, 5), (b, 3)]), found, "nothing counts twice");
        // It moves, and what it did until then stays.
        ledger.place(a, names(&["other"]), || totals(7));
        let found = look(&[(a, 8), (b, 3)]);
        assert_eq!(
            (of(&found, "in"), of(&found, "out"), of(&found, "other")),
            ((0, 7, 0), (1, 10, 1), (1, 1, 1))
        );
        ledger.remove(b, || totals(4));
        ledger.place(b, names(&["out"]), || unreachable!("it has gone"));
        ledger.remove(b, || unreachable!("it has gone"));
        let found = look(&[(a, 8)]);
        assert_eq!(of(&found, "out"), (0, 11, 0));
        // What comes in its place begins anew.
        ledger.add(b);
        ledger.place(b, names(&["out"]), || totals(0));
        assert_eq!(of(&look(&[(a, 8), (b, 2)]), "out"), (1, 13, 1));
        ledger.retain(|group| group == "out");
        assert_eq!(look(&[]).keys().collect::<Vec<_>>(), ["out"]);
    }
}
