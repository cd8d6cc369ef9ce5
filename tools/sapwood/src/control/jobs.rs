//! Jobs: work that takes long, as many at a time as their owner allows.
//!
//! Each runs on a thread of its own with a reactor of its own, as a queue does, and is told to stop
//! through a flag at which it looks where it can stop.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use sapwood_blockdev::thread::give_way;
use sapwood_image::ErrorKind;
use sapwood_image::sealed::collect::Pace;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::wire::{self, Failure, State};

/// Jobs that are remembered after they have ended.
const KEPT_MAX: usize = 32;
/// Bytes of their results: older jobs are forgotten where there are more.
const RESULTS_BYTES_MAX: usize = 64 << 20;
/// What ends by itself soon, and is not cut off between its steps.
const UNCANCELLABLE: [&str; 1] = ["resize"];

/// A piece of work as its thread sees it.
pub struct Job {
    id: u64,
    kind: &'static str,
    /// Of jobs with the same, one runs at a time.
    about: String,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
    /// It is not its turn yet.
    waits: AtomicBool,
    /// Of work that goes by one: stops it, and says how far it has come.
    pace: Mutex<Option<Arc<Pace>>>,
    end: Mutex<Option<End>>,
}

/// How a job ended.
struct End {
    /// How many had ended then.
    number: u64,
    result: Result<Arc<RawValue>, anyhow::Error>,
}

/// Why a job was not started, or not cancelled.
pub enum Refused {
    /// This one runs, and has to end first.
    Busy(u64),
    /// The server stops.
    Stopping,
    /// This one is not cut off.
    Uncancellable(u64),
    /// There is no thread for it.
    System(std::io::Error),
}

/// The jobs of one owner: a served disk, or a store.
pub struct Jobs {
    running_max: usize,
    /// Log how they go. Where the only one who asks is told anyway, not.
    is_logged: bool,
    shared: Arc<Shared>,
}

/// What the threads of jobs see, too.
#[derive(Default)]
struct Shared {
    table: Mutex<Table>,
    /// Told when a job has ended, or is to end: others wait for their turn.
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    last_id: u64,
    ended: u64,
    jobs: VecDeque<Arc<Job>>,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

impl Table {
    /// The job that has to end before one about `about` begins.
    fn in_the_way(&self, about: &str, running_max: usize) -> Option<u64> {
        let running = || self.jobs.iter().filter(|job| !job.has_ended());
        let same = running().find(|job| job.about == about);
        let any = running().next().filter(|_| running().count() >= running_max);
        same.or(any).map(|job| job.id)
    }

    fn find(&self, id: u64) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id == id).map(|job| &**job)
    }

    /// A job of the same kind that was started before this one, and has not ended.
    fn before(&self, job: &Job) -> Option<u64> {
        let mut earlier = self.jobs.iter().filter(|other| other.id < job.id && other.kind == job.kind);
        earlier.find(|other| !other.has_ended()).map(|other| other.id)
    }

    /// Enters how a job ended.
    fn end(&mut self, job: &Job, result: Result<Arc<RawValue>, anyhow::Error>) {
        self.ended += 1;
        *lock(&job.end) = Some(End { number: self.ended, result });
        self.forget();
    }

    /// Forgets those that ended first, as far as there are too many, or their results are too long. What ended last
    /// stays: somebody may be about to ask for its result.
    fn forget(&mut self) {
        loop {
            let ended = || self.jobs.iter().filter_map(|job| job.ended());
            let (count, bytes) = (ended().count(), ended().map(|(_, bytes)| bytes).sum::<usize>());
            let is_too_much = self.jobs.len() > KEPT_MAX || bytes > RESULTS_BYTES_MAX;
            let Some((first, _)) = ended().min().filter(|_| is_too_much && count > 1) else { return };
            self.jobs.retain(|job| job.ended().is_none_or(|(number, _)| number != first));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    /// Says how far it has come; whether to go on.
    pub fn report(&self, done: u64, total: u64) -> ControlFlow<()> {
        self.done_bytes.store(done, Ordering::Relaxed);
        self.total_bytes.store(total, Ordering::Relaxed);
        if self.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Whether it is to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// A pace for work that goes by one: it stops when the job is cancelled, and is the job's progress where that is not
    /// reported.
    pub fn pace(&self) -> Arc<Pace> {
        let pace = Arc::new(Pace::default());
        let mut own = lock(&self.pace);
        if self.is_cancelled() {
            pace.stop();
        }
        *own = Some(Arc::clone(&pace));
        pace
    }

    fn cancel(&self) {
        let pace = lock(&self.pace);
        self.cancelled.store(true, Ordering::Relaxed);
        pace.iter().for_each(|pace| pace.stop());
    }

    /// Bytes that are done, and in all.
    fn progress(&self) -> (u64, u64) {
        let reported = (self.done_bytes.load(Ordering::Relaxed), self.total_bytes.load(Ordering::Relaxed));
        match &*lock(&self.pace) {
            Some(pace) if reported == (0, 0) => pace.progress(),
            _ => reported,
        }
    }

    /// Of one that has ended: how many had by then, and the bytes of its result.
    fn ended(&self) -> Option<(u64, usize)> {
        let end = lock(&self.end);
        end.as_ref().map(|end| (end.number, end.result.iter().map(|result| result.get().len()).sum()))
    }

    fn has_ended(&self) -> bool {
        lock(&self.end).is_some()
    }

    fn view(&self, with_result: bool) -> wire::Job {
        let (mut done_bytes, total_bytes) = self.progress();
        let (state, error, result) = match lock(&self.end).as_ref().map(|end| &end.result) {
            None if self.waits.load(Ordering::Relaxed) => (State::Waiting, None, None),
            None => (State::Running, None, None),
            Some(Ok(result)) => (State::Done, None, with_result.then(|| Arc::clone(result))),
            Some(Err(error)) => match Failure::of(error) {
                failure if failure.kind == ErrorKind::Cancelled.name() => (State::Cancelled, None, None),
                failure => (State::Failed, Some(failure), None),
            },
        };
        if state == State::Done && total_bytes > 0 {
            done_bytes = total_bytes;
        }
        wire::Job { id: self.id, kind: self.kind.to_owned(), state, done_bytes, total_bytes, error, result }
    }
}

impl Jobs {
    /// Jobs of which at most so many run at a time.
    pub fn new(running_max: usize) -> Self {
        Self { running_max, is_logged: true, shared: Arc::default() }
    }

    /// The same, of which nothing is logged.
    pub fn unlogged(running_max: usize) -> Self {
        Self { is_logged: false, ..Self::new(running_max) }
    }

    /// Starts `work` on a thread, unless another job about the same runs, or as many as may.
    pub fn start<R: Serialize>(
        &self,
        kind: &'static str,
        about: &str,
        work: impl FnOnce(&Arc<Job>) -> anyhow::Result<R> + Send + 'static,
    ) -> Result<wire::Job, Refused> {
        let mut table = lock(&self.shared.table);
        if table.closed {
            return Err(Refused::Stopping);
        }
        if let Some(busy) = table.in_the_way(about, self.running_max) {
            return Err(Refused::Busy(busy));
        }
        let job = Arc::new(Job {
            id: table.last_id + 1,
            kind,
            about: about.to_owned(),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            pace: Mutex::new(None),
            end: Mutex::new(None),
        });
        let (running, is_logged, entered) = (Arc::clone(&job), self.is_logged, Arc::clone(&self.shared));
        let thread = thread::Builder::new().name(kind.into()).spawn(move || {
            // It has as much of a processor as anybody, but no guest that has something to do waits for its time to pass.
            if let Err(error) = give_way(0) {
                log::debug!("job {}: {error}", running.id);
            }
            if is_logged {
                log::info!("job {}: {} begins", running.id, running.kind);
            }
            let result = work(&running).and_then(|result| Ok(to_raw_value(&result)?.into()));
            match &result {
                _ if !is_logged => {}
                Ok(_) => log::info!("job {}: {} is done", running.id, running.kind),
                Err(error) => log::warn!("job {}: {}: {error:#}", running.id, running.kind),
            }
            lock(&entered.table).end(&running, result);
            entered.changed.notify_all();
        });
        // Nobody waits for those that have ended.
        table.threads.retain(|thread| !thread.is_finished());
        table.threads.push(thread.map_err(Refused::System)?);
        table.last_id = job.id;
        let view = job.view(true);
        table.jobs.push_back(job);
        table.forget();
        Ok(view)
    }

    /// Waits for the end of all jobs of the same kind that were started before, so that one works at a time, first come first
    /// served. When the job is cancelled it goes on no more.
    pub fn wait_for_turn(&self, job: &Job) -> ControlFlow<()> {
        let mut table = lock(&self.shared.table);
        while !job.is_cancelled()
            && let Some(first) = table.before(job)
        {
            if !job.waits.swap(true, Ordering::Relaxed) && self.is_logged {
                log::info!("job {}: {} waits for the end of job {first}", job.id, job.kind);
            }
            table = self.shared.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        job.waits.store(false, Ordering::Relaxed);
        if job.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// All that are remembered, the newest last, without their results.
    pub fn list(&self) -> Vec<wire::Job> {
        lock(&self.shared.table).jobs.iter().map(|job| job.view(false)).collect()
    }

    /// The one that runs, or the newest of them.
    pub fn running(&self) -> Option<u64> {
        lock(&self.shared.table).jobs.iter().rev().find(|job| !job.has_ended()).map(|job| job.id)
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<wire::Job> {
        lock(&self.shared.table).find(id).map(|job| job.view(true))
    }

    /// Tells a job to stop where it can; nothing happens to one that has ended.
    pub fn cancel(&self, id: u64) -> Option<Result<wire::Job, Refused>> {
        // Locked, so that a job that is about to wait for its turn hears it.
        let table = lock(&self.shared.table);
        let job = table.find(id)?;
        if UNCANCELLABLE.contains(&job.kind) && !job.has_ended() {
            return Some(Err(Refused::Uncancellable(id)));
        }
        job.cancel();
        self.shared.changed.notify_all();
        Some(Ok(job.view(true)))
    }

    /// Cancels what runs, and starts nothing more.
    pub fn stop(&self) {
        let mut table = lock(&self.shared.table);
        table.closed = true;
        table.jobs.iter().for_each(|job| job.cancel());
        self.shared.changed.notify_all();
    }

    /// Cancels what runs, waits for its end, and starts nothing more.
    pub fn close(&self) {
        self.stop();
        let threads = std::mem::take(&mut lock(&self.shared.table).threads);
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a job's thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use sapwood_image::ImageError;
    use serde_json::Value;

    use super::*;

    fn wait(jobs: &Jobs, id: u64) -> wire::Job {
        while jobs.running() == Some(id) {
            thread::yield_now();
        }
        jobs.get(id).unwrap()
    }

    fn id(started: Result<wire::Job, Refused>) -> u64 {
        started.unwrap_or_else(|_| panic!("it is free")).id
    }

    #[test]
    fn one_runs_at_a_time_and_the_last_are_remembered() {
        let jobs = Jobs::new(1);
        let (go, wait_for_it) = channel::<()>();
        let first = id(jobs.start("flatten", "disk", move |job| {
            assert!(job.report(1, 2).is_continue());
            wait_for_it.recv()?;
            Ok(Value::Null)
        }));
        assert!(
            matches!(jobs.start("resize", "disk", |_| Ok(Value::Null)), Err(Refused::Busy(busy)) if busy == first)
        );
        assert_eq!(jobs.running(), Some(first));
        go.send(()).unwrap();
        let job = wait(&jobs, first);
        assert_eq!((job.state, job.done_bytes, job.total_bytes), (State::Done, 2, 2));
        for n in 0..KEPT_MAX as u64 {
            let failing = id(jobs.start::<Value>("resize", "disk", |_| anyhow::bail!("no")));
            assert_eq!(failing, first + 1 + n);
            let error = wait(&jobs, failing).error.unwrap();
            assert_eq!((error.kind.as_str(), error.message.as_str()), ("failed", "no"));
        }
        assert_eq!(jobs.list().len(), KEPT_MAX);
        assert!(jobs.get(first).is_none(), "forgotten");
    }

    #[test]
    fn a_cancelled_job_ends_where_it_can() {
        let jobs = Jobs::new(1);
        let work = |job: &Arc<Job>| -> anyhow::Result<Value> {
            while job.report(0, 0).is_continue() {
                thread::yield_now();
            }
            Err(ImageError::new("disk", ErrorKind::Cancelled).into())
        };
        let job = id(jobs.start("flatten", "disk", work));
        let cancelled = jobs.cancel(job).unwrap().unwrap_or_else(|_| panic!("it can be"));
        assert_eq!(cancelled.state, State::Running);
        assert_eq!(wait(&jobs, job).state, State::Cancelled);
        assert!(jobs.cancel(job + 1).is_none());
        let last = id(jobs.start("flatten", "disk", work));
        jobs.stop();
        assert!(matches!(jobs.start("flatten", "other", work), Err(Refused::Stopping)));
        assert_eq!(wait(&jobs, last).state, State::Cancelled);
        jobs.close();
        assert_eq!(jobs.get(last).unwrap().state, State::Cancelled, "ended when this returns");
        assert!(matches!(jobs.start("flatten", "disk", work), Err(Refused::Stopping)));
    }

    #[test]
    fn jobs_about_different_things_run_side_by_side() {
        let jobs = Jobs::new(2);
        let (go, wait_for_it) = channel::<()>();
        let first = id(jobs.start("import", "a", move |_| {
            wait_for_it.recv()?;
            Ok(Value::Null)
        }));
        let busy = |started| match started {
            Err(Refused::Busy(id)) => Some(id),
            _ => None,
        };
        assert_eq!(busy(jobs.start("export", "a", |_| Ok(Value::Null))), Some(first), "about the same");
        let (go_too, wait_too) = channel::<()>();
        let second = id(jobs.start("gc", "packs", move |_| {
            wait_too.recv()?;
            Ok(Value::Null)
        }));
        assert_eq!(busy(jobs.start("import", "b", |_| Ok(Value::Null))), Some(first), "two at a time");
        go_too.send(()).unwrap();
        while jobs.get(second).unwrap().state == State::Running {
            thread::yield_now();
        }
        for _ in 0..KEPT_MAX {
            let next = id(jobs.start("import", "b", |_| Ok(Value::Null)));
            while jobs.get(next).unwrap().state == State::Running {
                thread::yield_now();
            }
        }
        assert_eq!(jobs.get(first).unwrap().state, State::Running, "what runs is not forgotten");
        assert!(jobs.get(second).is_none());
        go.send(()).unwrap();
        while jobs.get(first).unwrap().state == State::Running {
            thread::yield_now();
        }
        let last = id(jobs.start("import", "b", |_| Ok(Value::Null)));
        assert_eq!(jobs.get(first).unwrap().state, State::Done, "it began first, but did not end first");
        jobs.close();
        assert!(jobs.get(last).is_some());
    }

    #[test]
    fn jobs_take_turns_in_the_order_in_which_they_were_started() {
        let jobs = Arc::new(Jobs::new(5));
        let (go, wait_for_it) = channel::<()>();
        let (told, hear) = channel();
        let first = id(jobs.start("import", "0", move |_| Ok(wait_for_it.recv()?)));
        let waits = |about: u64| {
            let (told, all) = (told.clone(), Arc::clone(&jobs));
            id(jobs.start("import", &about.to_string(), move |job| {
                if all.wait_for_turn(job).is_break() {
                    return Err(ImageError::new("disk", ErrorKind::Cancelled).into());
                }
                Ok(told.send(about)?)
            }))
        };
        let others = [1, 2, 3].map(waits);
        let until = |job: u64, state: State| {
            while jobs.get(job).unwrap().state != state {
                thread::yield_now();
            }
        };
        others.iter().for_each(|job| until(*job, State::Waiting));
        let other = id(jobs.start("export", "4", |_| Ok(Value::Null)));
        until(other, State::Done);
        jobs.cancel(others[1]).unwrap().unwrap_or_else(|_| panic!("it can be"));
        until(others[1], State::Cancelled);
        assert_eq!([others[0], others[2]].map(|job| jobs.get(job).unwrap().state), [State::Waiting; 2]);
        go.send(()).unwrap();
        others
            .iter()
            .zip([State::Done, State::Cancelled, State::Done])
            .for_each(|(job, state)| until(*job, state));
        until(first, State::Done);
        assert_eq!(hear.try_iter().collect::<Vec<_>>(), [1, 3]);
        let _held = id(jobs.start("import", "5", |job| {
            while job.report(0, 0).is_continue() {
                thread::yield_now();
            }
            Ok(Value::Null)
        }));
        let last = waits(6);
        until(last, State::Waiting);
        jobs.close();
        assert_eq!(jobs.get(last).unwrap().state, State::Cancelled);
    }

    #[test]
    fn a_pace_tells_how_far_a_job_has_come_and_stops_it() {
        let jobs = Jobs::new(1);
        let job = id(jobs.start("backup", "backup", |job| {
            let pace = job.pace();
            pace.expect(7);
            while !pace.is_stopped() {
                thread::yield_now();
            }
            Err::<Value, _>(ImageError::new("disk", ErrorKind::Cancelled).into())
        }));
        while jobs.get(job).unwrap().total_bytes != 7 {
            thread::yield_now();
        }
        assert!(jobs.cancel(job).is_some());
        assert_eq!(wait(&jobs, job).state, State::Cancelled);
    }

    #[test]
    fn what_is_not_cut_off_says_so() {
        let jobs = Jobs::new(1);
        let (go, wait_for_it) = channel::<()>();
        let job = id(jobs.start("resize", "disk", move |_| Ok(wait_for_it.recv()?)));
        assert!(matches!(jobs.cancel(job), Some(Err(Refused::Uncancellable(id))) if id == job));
        go.send(()).unwrap();
        assert_eq!(wait(&jobs, job).state, State::Done);
        assert!(matches!(jobs.cancel(job), Some(Ok(_))), "nothing happens to one that has ended");
    }

    #[test]
    fn long_results_are_not_kept_and_not_listed() {
        let jobs = Jobs::new(1);
        let long = || "x".repeat(RESULTS_BYTES_MAX * 2 / 3);
        let ran = [0; 3].map(|_| {
            let job = id(jobs.start("diff", "disk", move |_| Ok(long())));
            assert!(wait(&jobs, job).result.unwrap().get().len() > RESULTS_BYTES_MAX / 2);
            job
        });
        assert!(jobs.get(ran[0]).is_none() && jobs.get(ran[1]).is_none(), "there is no room for two");
        assert!(jobs.get(ran[2]).is_some(), "somebody may be about to ask");
        assert!(jobs.list().iter().all(|job| job.result.is_none()));
    }
}
