//! Jobs: work that takes long, as many at a time as their owner allows.
//!
//! Each runs on a thread of its own with a reactor of its own, as a queue does, and is told to stop
//! through a flag at which it looks where it can stop.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use sapwood_image::ErrorKind;
use serde_json::Value;

use super::wire::{self, Failure, State};

/// Jobs that are remembered after they have ended.
const KEPT_MAX: usize = 32;

/// A piece of work as its thread sees it.
pub struct Job {
    id: u64,
    kind: &'static str,
    /// Of jobs with the same, one runs at a time.
    about: String,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
    /// Is called when it is cancelled.
    on_cancel: Mutex<Option<Box<dyn Fn() + Send>>>,
    end: Mutex<Option<Result<Value, anyhow::Error>>>,
}

/// Why a job was not started.
pub enum Refused {
    /// This one runs, and has to end first.
    Busy(u64),
    /// The server stops.
    Stopping,
    /// There is no thread for it.
    System(std::io::Error),
}

/// The jobs of one owner: a served disk, or a store.
pub struct Jobs {
    running_max: usize,
    /// Log how they go. Where the only one who asks is told anyway, not.
    is_logged: bool,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    last_id: u64,
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
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    /// Says how far it has come; whether to go on.
    pub fn report(&self, done: u64, total: u64) -> ControlFlow<()> {
        self.done_bytes.store(done, Ordering::Relaxed);
        self.total_bytes.store(total, Ordering::Relaxed);
        if self.cancelled.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// Has `stop` called when the job is cancelled, or now if it is already: for work that does not ask.
    pub fn on_cancel(&self, stop: impl Fn() + Send + 'static) {
        let mut on_cancel = lock(&self.on_cancel);
        if self.cancelled.load(Ordering::Relaxed) {
            stop();
        }
        *on_cancel = Some(Box::new(stop));
    }

    fn cancel(&self) {
        let on_cancel = lock(&self.on_cancel);
        self.cancelled.store(true, Ordering::Relaxed);
        on_cancel.iter().for_each(|stop| stop());
    }

    fn has_ended(&self) -> bool {
        lock(&self.end).is_some()
    }

    fn view(&self) -> wire::Job {
        let (state, error, result) = match &*lock(&self.end) {
            None => (State::Running, None, None),
            Some(Ok(result)) => (State::Done, None, Some(result.clone())),
            Some(Err(error)) => match Failure::of(error) {
                failure if failure.kind == ErrorKind::Cancelled.name() => (State::Cancelled, None, None),
                failure => (State::Failed, Some(failure), None),
            },
        };
        wire::Job {
            id: self.id,
            kind: self.kind.to_owned(),
            state,
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            error,
            result,
        }
    }
}

impl Jobs {
    /// Jobs of which at most so many run at a time.
    pub fn new(running_max: usize) -> Self {
        Self { running_max, is_logged: true, table: Mutex::default() }
    }

    /// The same, of which nothing is logged.
    pub fn unlogged(running_max: usize) -> Self {
        Self { is_logged: false, ..Self::new(running_max) }
    }

    /// Starts `work` on a thread, unless another job about the same runs, or as many as may.
    pub fn start(
        &self,
        kind: &'static str,
        about: &str,
        work: impl FnOnce(&Arc<Job>) -> anyhow::Result<Value> + Send + 'static,
    ) -> Result<wire::Job, Refused> {
        let mut table = lock(&self.table);
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
            on_cancel: Mutex::new(None),
            end: Mutex::new(None),
        });
        let (running, is_logged) = (Arc::clone(&job), self.is_logged);
        let thread = thread::Builder::new().name(kind.into()).spawn(move || {
            if is_logged {
                log::info!("job {}: {} begins", running.id, running.kind);
            }
            let result = work(&running);
            match &result {
                _ if !is_logged => {}
                Ok(_) => log::info!("job {}: {} is done", running.id, running.kind),
                Err(error) => log::warn!("job {}: {}: {error:#}", running.id, running.kind),
            }
            if result.is_ok() {
                running.done_bytes.store(running.total_bytes.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            *lock(&running.end) = Some(result);
        });
        // Nobody waits for those that have ended.
        table.threads.retain(|thread| !thread.is_finished());
        table.threads.push(thread.map_err(Refused::System)?);
        table.last_id = job.id;
        let view = job.view();
        if table.jobs.len() >= KEPT_MAX
            && let Some(oldest) = table.jobs.iter().position(|job| job.has_ended())
        {
            table.jobs.remove(oldest);
        }
        table.jobs.push_back(job);
        Ok(view)
    }

    /// All that are remembered, the newest last.
    pub fn list(&self) -> Vec<wire::Job> {
        lock(&self.table).jobs.iter().map(|job| job.view()).collect()
    }

    /// The one that runs, or the newest of them.
    pub fn running(&self) -> Option<u64> {
        lock(&self.table).jobs.iter().rev().find(|job| !job.has_ended()).map(|job| job.id)
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<wire::Job> {
        self.find(id).map(|job| job.view())
    }

    /// Tells a job to stop where it can; nothing happens to one that has ended.
    pub fn cancel(&self, id: u64) -> Option<wire::Job> {
        let job = self.find(id)?;
        job.cancel();
        Some(job.view())
    }

    fn find(&self, id: u64) -> Option<Arc<Job>> {
        lock(&self.table).jobs.iter().find(|job| job.id == id).cloned()
    }

    /// Cancels what runs, and starts nothing more.
    pub fn stop(&self) {
        let mut table = lock(&self.table);
        table.closed = true;
        table.jobs.iter().for_each(|job| job.cancel());
    }

    /// Cancels what runs, waits for its end, and starts nothing more.
    pub fn close(&self) {
        self.stop();
        let threads = std::mem::take(&mut lock(&self.table).threads);
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
            let failing = id(jobs.start("resize", "disk", |_| anyhow::bail!("no")));
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
        let work = |job: &Arc<Job>| {
            while job.report(0, 0).is_continue() {
                thread::yield_now();
            }
            Err(ImageError::new("disk", ErrorKind::Cancelled).into())
        };
        let job = id(jobs.start("flatten", "disk", work));
        assert_eq!(jobs.cancel(job).unwrap().state, State::Running);
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
        jobs.close();
        assert_eq!(jobs.get(first).unwrap().state, State::Done);
    }
}
