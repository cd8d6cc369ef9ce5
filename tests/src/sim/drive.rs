//! How a history goes on: threads, storage and time take turns.

use std::time::Duration;

use sapwood_blockdev::engine::Time;

use super::history::{History, Outcome, Stop};
use super::session::Worker;
use super::subject::{Subject, Task};

/// Rounds after which a history that waits for something is stuck.
const ROUNDS_MAX: u64 = 50_000;
/// What a guest that goes on submitting still sees the end of.
const SOON: Duration = Duration::from_millis(1);

impl<S: Subject> History<S> {
    /// One thread runs, or one operation of the storage completes, or time passes until something
    /// can. False when nothing will ever happen again.
    pub(super) fn round(&mut self) -> Outcome<bool> {
        if self.luck.percent(40) && self.event()? {
            return Ok(true);
        }
        if let Some(session) = &mut self.session
            && session.run_one(&mut self.contract, &mut self.luck)?
        {
            self.finish_orders()?;
            return Ok(true);
        }
        if self.event()? {
            return Ok(true);
        }
        let deadline = self.world.next_deadline().filter(|deadline| self.is_near(*deadline));
        if let Some(deadline) = deadline {
            self.world.advance(deadline);
        }
        Ok(deadline.is_some())
    }

    /// Goes on for some rounds while the guest does something else: what takes long does not come
    /// to its end by that alone, or slow operations would never meet what happens after them.
    pub(super) fn run_rounds(&mut self, rounds: u64) -> Outcome {
        for _ in 0..rounds {
            self.hurried = true;
            let went_on = self.round();
            self.hurried = false;
            if !went_on? {
                break;
            }
        }
        Ok(())
    }

    fn is_near(&self, time: Time) -> bool {
        !self.hurried || time <= self.world.now() + SOON
    }

    /// Completes the next operation, unless a thread's timer is due before.
    pub(super) fn event(&mut self) -> Outcome<bool> {
        let due = self.world.next_due();
        if due.is_some_and(|due| !self.is_near(due)) {
            return Ok(false);
        }
        let deadline = self.world.next_deadline().filter(|deadline| due.is_some_and(|due| *deadline < due));
        match deadline {
            Some(deadline) if deadline > self.world.now() => self.world.advance(deadline),
            Some(_) => return Ok(false),
            None if !self.world.step() => return Ok(false),
            None => {}
        }
        match self.cut {
            Some(cut) if self.world.events() >= cut.event => {
                self.cut = None;
                Err(Stop::Cut(cut))
            }
            _ => Ok(true),
        }
    }

    /// Goes on until `done`.
    pub(super) fn wait_for(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) -> Outcome {
        for _ in 0..ROUNDS_MAX {
            if done(self) {
                return Ok(());
            }
            if !self.round()? {
                break;
            }
        }
        if done(self) { Ok(()) } else { Err(Stop::Violation(format!("stuck waiting for {what}"))) }
    }

    pub(super) fn pass(&mut self, time: Duration) -> Outcome {
        let end = self.world.now() + time;
        for _ in 0..500 {
            if self.world.now() >= end || !self.round()? {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn drain(&mut self) -> Outcome {
        self.wait_for("everything to be reported", |history| {
            history.session().outstanding() == 0 && history.orders.is_empty()
        })?;
        let sectors = self.session().sectors();
        Ok(self.contract.shows_size(sectors)?)
    }

    /// Takes in the orders that have finished.
    fn finish_orders(&mut self) -> Outcome {
        let orders = std::mem::take(&mut self.orders);
        for order in orders {
            let Some(result) = order.result.take() else {
                self.orders.push(order);
                continue;
            };
            self.world.note(|| format!("{:?} ended: {result:?}", order.what));
            self.note_snapshot(&order, result.is_ok());
            if let Some(ticket) = &order.ticket {
                self.session().resizes += 1;
                match &result {
                    Ok(()) => self.contract.done(ticket, &[])?,
                    Err(_) => self.contract.failed(ticket),
                }
            }
            if let Err(error) = result
                && !self.session().storage_failed()
            {
                return Err(Stop::Violation(format!("{:?} failed without a reason: {error}", order.what)));
            }
        }
        Ok(())
    }

    /// Runs a task on a thread of its own until it has a result, while the rest goes on.
    pub(super) fn complete<T: 'static>(&mut self, worker: &Worker, task: Task<T>) -> Outcome<T> {
        let slot = worker.give(&self.world, task);
        for _ in 0..ROUNDS_MAX {
            let ran = worker.run(&self.world);
            if let Some(value) = slot.take() {
                return Ok(value);
            }
            if !self.round()? && !ran {
                break;
            }
        }
        Err(Stop::Violation("stuck in opening, checking or creating".to_owned()))
    }
}
