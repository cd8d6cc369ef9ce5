//! Jobs: work on a disk that takes long, one at a time.
//!
//! Each runs on a thread of its own with a reactor of its own, as a queue does, and is told to stop
//! through a flag at which it looks where it can stop.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use sapwood_image::{ErrorKind, ImageError};
use serde_json::Value;

use super::wire::{self, Failure, State};

/// Jobs that are remembered after they have ended.
const KEPT_MAX: usize = 32;

/// A piece of work as its thread sees it.
pub struct Job {
    id: u64,
    kind: &'static str,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
    end: Mutex<Option<Result<Value, anyhow::Error>>>,
}

/// Why a job was not started.
pub enum Refused {
    /// This one runs.
    Busy(u64),
    /// The server stops.
    Stopping,
    /// There is no thread for it.
    System(std::io::Error),
}

/// The jobs of one disk.
#[derive(Default)]
pub struct Jobs(Mutex<Table>);

#[derive(Default)]
struct Table {
    last_id: u64,
    jobs: VecDeque<Arc<Job>>,
    thread: Option<JoinHandle<()>>,
    closed: bool,
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

    fn has_ended(&self) -> bool {
        lock(&self.end).is_some()
    }

    fn view(&self) -> wire::Job {
        let (state, error, result) = match &*lock(&self.end) {
            None => (State::Running, None, None),
            Some(Ok(result)) => (State::Done, None, Some(result.clone())),
            Some(Err(error)) => match failure(error) {
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

/// An error as it is told.
pub fn failure(error: &anyhow::Error) -> Failure {
    let kind = error.downcast_ref::<ImageError>().map_or("failed", |error| error.kind.name());
    Failure { kind: kind.to_owned(), message: format!("{error:#}") }
}

impl Jobs {
    /// Starts `work` on a thread, unless another job runs.
    pub fn start(
        &self,
        kind: &'static str,
        work: impl FnOnce(&Arc<Job>) -> anyhow::Result<Value> + Send + 'static,
    ) -> Result<wire::Job, Refused> {
        let mut table = lock(&self.0);
        if table.closed {
            return Err(Refused::Stopping);
        }
        if let Some(job) = table.jobs.back().filter(|job| !job.has_ended()) {
            return Err(Refused::Busy(job.id));
        }
        let job = Arc::new(Job {
            id: table.last_id + 1,
            kind,
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            end: Mutex::new(None),
        });
        let running = Arc::clone(&job);
        let thread = thread::Builder::new().name(kind.into()).spawn(move || {
            log::info!("job {}: {} begins", running.id, running.kind);
            let result = work(&running);
            match &result {
                Ok(_) => log::info!("job {}: {} is done", running.id, running.kind),
                Err(error) => log::warn!("job {}: {}: {error:#}", running.id, running.kind),
            }
            *lock(&running.end) = Some(result);
        });
        // The one before has ended, so nobody waits for its thread.
        table.thread = Some(thread.map_err(Refused::System)?);
        table.last_id = job.id;
        let view = job.view();
        if table.jobs.len() == KEPT_MAX {
            table.jobs.pop_front();
        }
        table.jobs.push_back(job);
        Ok(view)
    }

    /// All that are remembered, the newest last.
    pub fn list(&self) -> Vec<wire::Job> {
        lock(&self.0).jobs.iter().map(|job| job.view()).collect()
    }

    /// The one that runs.
    pub fn running(&self) -> Option<u64> {
        lock(&self.0).jobs.back().filter(|job| !job.has_ended()).map(|job| job.id)
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<wire::Job> {
        self.find(id).map(|job| job.view())
    }

    /// Tells a job to stop where it can; nothing happens to one that has ended.
    pub fn cancel(&self, id: u64) -> Option<wire::Job> {
        let job = self.find(id)?;
        job.cancelled.store(true, Ordering::Relaxed);
        Some(job.view())
    }

    fn find(&self, id: u64) -> Option<Arc<Job>> {
        lock(&self.0).jobs.iter().find(|job| job.id == id).cloned()
    }

    /// Cancels what runs, waits for its end, and starts nothing more.
    pub fn close(&self) {
        let thread = {
            let mut table = lock(&self.0);
            table.closed = true;
            table.jobs.iter().for_each(|job| job.cancelled.store(true, Ordering::Relaxed));
            table.thread.take()
        };
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("a job's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

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
        let jobs = Jobs::default();
        let (go, wait_for_it) = channel::<()>();
        let first = id(jobs.start("flatten", move |job| {
            assert!(job.report(1, 2).is_continue());
            wait_for_it.recv()?;
            Ok(Value::Null)
        }));
        assert!(
            matches!(jobs.start("resize", |_| Ok(Value::Null)), Err(Refused::Busy(busy)) if busy == first)
        );
        assert_eq!(jobs.running(), Some(first));
        go.send(()).unwrap();
        let job = wait(&jobs, first);
        assert_eq!((job.state, job.done_bytes, job.total_bytes), (State::Done, 1, 2));
        for n in 0..KEPT_MAX as u64 {
            let failing = id(jobs.start("resize", |_| anyhow::bail!("no")));
            assert_eq!(failing, first + 1 + n);
            let error = wait(&jobs, failing).error.unwrap();
            assert_eq!((error.kind.as_str(), error.message.as_str()), ("failed", "no"));
        }
        assert_eq!(jobs.list().len(), KEPT_MAX);
        assert!(jobs.get(first).is_none(), "forgotten");
    }

    #[test]
    fn a_cancelled_job_ends_where_it_can() {
        let jobs = Jobs::default();
        let work = |job: &Arc<Job>| {
            while job.report(0, 0).is_continue() {
                thread::yield_now();
            }
            Err(ImageError::new("disk", ErrorKind::Cancelled).into())
        };
        let job = id(jobs.start("flatten", work));
        assert_eq!(jobs.cancel(job).unwrap().state, State::Running);
        assert_eq!(wait(&jobs, job).state, State::Cancelled);
        assert!(jobs.cancel(job + 1).is_none());
        let last = id(jobs.start("flatten", work));
        jobs.close();
        assert_eq!(jobs.get(last).unwrap().state, State::Cancelled, "ended when this returns");
        assert!(matches!(jobs.start("flatten", work), Err(Refused::Stopping)));
    }
}
