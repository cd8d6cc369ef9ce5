//! Several things that are done with a store at a time, each by a thread of its own.
//!
//! Threads take turns ([`turns`](crate::sim::turns)) whenever one waits for its engine. The catalog's engine takes no turns, as a
//! change of the catalog holds a lock that others would wait for: it is made in one piece. What was done must be what is left when
//! the same is done in some order, one after the other; but anything may be refused for what somebody else does with it, which
//! cannot become of all of them.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use sapwood_blockdev::engine::Time;

use super::action::{Action, SNAPSHOTS, VOLUMES, cut_off, marks, writes};
use super::history::{End, History, Report};
use super::model::{Content, Model};
use super::rig::Rig;
use crate::sim::rng::Rng;
use crate::sim::turns::turns;

/// Time after which threads are said to block each other: far more than they need.
const BLOCKED_AFTER: Duration = Duration::from_secs(60);

/// What a history was.
#[derive(PartialEq, Eq)]
pub struct Past {
    /// What was done, and said.
    pub log: Vec<String>,
    /// When it has ended.
    pub end: Time,
    /// How many things were done while others were.
    pub at_a_time: usize,
    /// How many of these were refused for what others did.
    pub refused: usize,
}

impl Action {
    /// Something with archives, if there is anything to do it with: mostly with those of `of`.
    pub(super) fn with_archive(
        rng: &mut Rng,
        model: &Model,
        mark: u64,
        of: Option<&(String, String)>,
    ) -> Option<Self> {
        let there: Vec<&(String, String)> = model.snapshots.keys().collect();
        let mut archives: Vec<u64> = model.archives.keys().copied().collect();
        let content = of.map(|of| &model.snapshots[of].content);
        let is_of = |number: &u64| Some(&model.archives[number].content) == content;
        if archives.iter().any(is_of) && rng.percent(70) {
            archives.retain(is_of);
        }
        if there.is_empty() || rng.percent(50) && !archives.is_empty() {
            let archive = if archives.is_empty() { return None } else { rng.pick(&archives) };
            let volumes: Vec<&String> = model.volumes.keys().collect();
            let volume = match volumes.is_empty() || rng.percent(50) {
                true => format!("v{}", rng.below(VOLUMES)),
                false => rng.pick(&volumes).clone(),
            };
            return Some(Self::ImportArchive(volume, format!("s{}", rng.below(SNAPSHOTS)), archive));
        }
        let since = rng.percent(50).then(|| rng.pick(&there).clone());
        let of = of.filter(|_| rng.percent(70)).unwrap_or_else(|| rng.pick(&there));
        Some(Self::Export(of.clone(), since, mark))
    }

    /// Something that may be done while other things are, mostly with `focus` or its volume.
    fn beside(rng: &mut Rng, model: &Model, mark: u64, focus: Option<&(String, String)>) -> Option<Self> {
        let volumes: Vec<&String> = model.volumes.keys().collect();
        let snapshots: Vec<&(String, String)> = model.snapshots.keys().collect();
        let any = |rng: &mut Rng| format!("v{}", rng.below(VOLUMES));
        let name = |rng: &mut Rng| format!("s{}", rng.below(SNAPSHOTS));
        let there = |rng: &mut Rng| match focus {
            Some((volume, _)) if model.volumes.contains_key(volume) && rng.percent(50) => {
                Some(volume.clone())
            }
            _ => (!volumes.is_empty()).then(|| rng.pick(&volumes).clone()),
        };
        let old = |rng: &mut Rng| match focus {
            Some(focus) if rng.percent(70) => Some(focus.clone()),
            _ => (!snapshots.is_empty()).then(|| rng.pick(&snapshots).clone()),
        };
        Some(match rng.below(100) {
            0..25 => Self::Collect(rng.pick(&[50, 100])),
            25..45 => Self::Seal(rng.between(1, 6)),
            45..56 => Self::Import(any(rng), name(rng), marks(rng)),
            56..66 => Self::with_archive(rng, model, mark, focus)?,
            66..74 => Self::Read(old(rng)?),
            74..80 => Self::Write(there(rng)?, writes(rng, mark), rng.percent(60)),
            80..84 => {
                let (before, after) = (writes(rng, 2 * mark), writes(rng, 2 * mark + 1));
                Self::Live(there(rng)?, name(rng), before, after)
            }
            84..87 => Self::Snapshot(there(rng)?, name(rng)),
            87..90 => {
                let (of, name) = old(rng)?;
                Self::Clone(of, name, vec![any(rng)])
            }
            90..92 => Self::Switch(there(rng)?, old(rng)?, true),
            92..94 => Self::DeleteVolume(there(rng)?, rng.percent(70)),
            _ => {
                let (of, name) = old(rng)?;
                Self::DeleteSnapshot(of, name)
            }
        })
    }
}

/// Does all of these, each on a thread of its own.
fn perform(rng: Rng, rig: &Rig, actions: &[Action]) -> Result<Vec<Report>, String> {
    let (sender, ended) = channel();
    let threads =
        turns(rng, actions.len()).into_iter().zip(actions).enumerate().map(|(n, (turn, action))| {
            let (turn, action, seat, sender) = (Arc::new(turn), action.clone(), rig.seat(), sender.clone());
            std::thread::spawn(move || {
                turn.begin();
                let report = Report::of(&mut seat.sit(&turn), &action);
                // Before it leaves: who looks at the results finds nobody at work any more.
                sender.send((n, report)).ok();
            })
        });
    let threads: Vec<_> = threads.collect();
    drop(sender);
    let mut reports = Vec::new();
    loop {
        match ended.recv_timeout(BLOCKED_AFTER) {
            Ok(report) => reports.push(report),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Err("threads block each other".to_owned()),
        }
    }
    if threads.into_iter().map(std::thread::JoinHandle::join).any(|ended| ended.is_err()) {
        return Err("a thread has panicked".to_owned());
    }
    reports.sort_by_key(|(n, _)| *n);
    Ok(reports.into_iter().map(|(_, report)| report).collect())
}

/// All orders of so many things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let mut orders = vec![Vec::new()];
    for n in 0..count {
        orders = orders
            .into_iter()
            .flat_map(|order: Vec<usize>| {
                (0..=n).map(move |at| {
                    let mut order = order.clone();
                    order.insert(at, n);
                    order
                })
            })
            .collect();
    }
    orders
}

/// Whether what was read can be what a disk holds.
fn may_be(content: &Content, found: &[u32]) -> bool {
    content.len() == found.len() && content.iter().zip(found).all(|(marks, found)| marks.contains(found))
}

/// What may be there after an action, of which this was reported.
fn after(model: &Model, action: &Action, report: &Report) -> Vec<Model> {
    let is_busy = report.fits(Err("in-use"));
    let fits = model.outcomes(action).into_iter().filter(|(outcome, _)| report.fits(*outcome));
    let fits = fits.filter(|_| match (action, &report.found) {
        (Action::Read(of), Some(found)) => may_be(&model.snapshots[of].content, found),
        _ => true,
    });
    fits.map(|(_, model)| model).chain(is_busy.then(|| model.clone())).collect()
}

impl History {
    /// Does several things at a time; whether something has ended the session, which `end` was to do.
    pub(super) fn group(&mut self, end: Option<End>) -> Result<bool, String> {
        let (mut actions, model) = (Vec::new(), &self.models[0]);
        let snapshots: Vec<_> = model.snapshots.keys().collect();
        let focus = (!snapshots.is_empty()).then(|| self.rng.pick(&snapshots));
        for _ in 0..self.rng.between(2, 3) {
            self.mark += 1;
            actions.extend(Action::beside(&mut self.rng, model, self.mark, focus));
        }
        if actions.is_empty() {
            return Ok(false);
        }
        self.log.push(format!("at a time: {actions:?}"));
        let reports = perform(self.rng.fork(self.mark), &self.rig, &actions)?;
        let is_cut = |report: &Report| end.is_some_and(|end| self.is_cut_off(report, end));
        let cut: Vec<bool> = reports.iter().map(is_cut).collect();
        self.log.push(format!("    {reports:?}"));
        let refused = reports.iter().filter(|report| report.fits(Err("in-use"))).count();
        if refused == reports.len() {
            return Err(format!("all of {actions:?} are refused: {reports:?}"));
        }
        self.at_a_time += reports.len();
        self.refused += refused;
        let power = end.is_some_and(|end| end != End::Kill);
        let mut left = Vec::new();
        for order in orders(actions.len()) {
            let mut models = self.models.clone();
            for n in order {
                let one = |model: &Model| match cut[n] {
                    true => cut_off(model, &actions[n], reports[n].progress, power),
                    false => after(model, &actions[n], &reports[n]),
                };
                models = models.iter().flat_map(one).collect();
            }
            left.extend(models.into_iter().filter(|model| !left.contains(model)).collect::<Vec<_>>());
        }
        if left.is_empty() {
            return Err(format!("in no order is {reports:?} what {actions:?} may say"));
        }
        self.models = left;
        Ok(cut.contains(&true) || !self.rig.world.is_alive(self.rig.process))
    }

    /// Does several things at a time, without any failure.
    pub(super) fn undisturbed_group(&mut self) -> Result<(), String> {
        self.group(None)?;
        self.look()?;
        if self.rng.percent(30) { self.collect() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_things_have_six_orders() {
        let mut orders = orders(3);
        orders.sort();
        orders.dedup();
        assert_eq!(orders.len(), 6);
        assert!(orders.iter().all(|order| order.len() == 3 && (0..3).all(|n| order.contains(&n))));
    }
}
