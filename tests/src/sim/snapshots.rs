//! What a history knows of the snapshots that were taken in it.

use super::cut::Ledger;
use super::history::{History, Order, Outcome, Stop};
use super::live::SNAPSHOTS_MAX;
use super::register::Tick;
use super::subject::{Control, OpenError, Subject};

/// A snapshot, and what of the guest's writes it may hold.
pub(super) struct Snapshot {
    number: u64,
    since: Tick,
    until: Tick,
    ledger: Ledger,
    /// It was reported, so that it stays whatever happens.
    is_reported: bool,
    /// What it was found to hold.
    found: Option<Vec<u8>>,
}

impl<S: Subject> History<S> {
    /// Orders a snapshot once nothing else is under way that the owner has ordered.
    pub(super) fn take_snapshot(&mut self) -> Outcome {
        self.wait_for("earlier commands", |history| history.orders.is_empty())?;
        if self.snapshots_ordered < SNAPSHOTS_MAX {
            self.snapshots_ordered += 1;
            self.order(Control::Snapshot(self.snapshots_ordered), None);
        }
        Ok(())
    }

    /// An order has ended.
    pub(super) fn note_snapshot(&mut self, order: &Order, is_ok: bool) {
        // One that failed may have failed after its commit.
        self.note(order, is_ok);
    }

    fn note(&mut self, order: &Order, is_reported: bool) {
        let Control::Snapshot(number) = order.what else { return };
        let (since, until, ledger) = (order.since, self.contract.now(), self.contract.ledger());
        self.snapshots.push(Snapshot { number, since, until, ledger, is_reported, found: None });
    }

    /// The process dies, or the power fails. What was not reported may be there or not; what is there after
    /// a kill must be right, as long as the power does not fail before that was made durable.
    pub(super) fn lose_snapshots(&mut self, power: bool) {
        let whole = !power && self.session.as_ref().is_some_and(|session| !session.sync_failed());
        if whole {
            let orders = std::mem::take(&mut self.orders);
            orders.iter().for_each(|order| self.note(order, false));
        } else {
            self.snapshots.retain(|snapshot| snapshot.is_reported);
        }
    }

    /// Looks whether all snapshots are consistent cuts, and hold what they held before.
    pub(super) fn check_snapshots(&mut self) -> Outcome {
        for mut snapshot in std::mem::take(&mut self.snapshots) {
            let number = snapshot.number;
            let read = |subject: &S, storage, io| subject.snapshot(storage, io, number);
            let (read, process, worker) = self.in_new_process(read)?;
            worker.io.abandon_tasks();
            self.world.kill(process);
            let violation = |what: String| Err(Stop::Violation(format!("snapshot {number}: {what}")));
            match read {
                Ok(None) if snapshot.is_reported => return violation("it is gone".to_owned()),
                Ok(None) => continue,
                Ok(Some(data)) => match &snapshot.found {
                    Some(found) if *found != data => return violation("it has changed".to_owned()),
                    Some(_) => {}
                    None => {
                        let Snapshot { since, until, .. } = snapshot;
                        snapshot.ledger.check(&self.contract.contents, &data, since, until)?;
                        snapshot.found = Some(data);
                    }
                },
                Err(OpenError::Failed(error)) => return violation(format!("cannot be read: {error}")),
                Err(_) => {}
            }
            self.snapshots.push(snapshot);
        }
        Ok(())
    }
}
