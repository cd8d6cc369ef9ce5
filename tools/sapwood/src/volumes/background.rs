//! What a daemon does by itself, on one thread of low priority: sealing.
//!
//! **Rule**: the oldest snapshot that can be sealed is, one after the other. Before each segment it looks how many requests guests
//! have sent since the last one. When that was more than [`BUSY_PER_SECOND`], it waits [`REST_FACTOR`] times as long as
//! the segment took, [`REST_MAX`] at most: it takes a small share of a busy host, and comes to an end all the same.
//! What fails is tried again after a time that doubles, up to [`RETRY_MAX`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sapwood_image::sealed::{LEVEL, SealStats, Step, Watch, Workers};

use super::service::{Service, system};
use super::upkeep::sealed;
use crate::control::wire::Failure;

/// Requests of all guests in a second from which on they are busy.
const BUSY_PER_SECOND: u64 = 100;
/// How much longer than it works it rests while guests are busy.
const REST_FACTOR: u32 = 8;
/// Longest rest.
const REST_MAX: Duration = Duration::from_secs(2);
/// How often it looks what there is to do, unless it is woken.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How long it leaves alone what has failed, at first and at most.
const RETRY_MIN: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// The priority of its threads, as of nice(1).
const NICE: i32 = 10;

/// Wakes and stops the thread.
#[derive(Default)]
pub struct Signal {
    state: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Asked {
    is_woken: bool,
    is_stopped: bool,
}

impl Signal {
    fn state(&self) -> MutexGuard<'_, Asked> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to do.
    pub fn wake(&self) {
        self.state().is_woken = true;
        self.changed.notify_all();
    }

    /// It is to end.
    pub fn stop(&self) {
        self.state().is_stopped = true;
        self.changed.notify_all();
    }

    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.state().is_stopped
    }

    /// Returns when it is to end, when it is woken if that counts, or after a time.
    fn rest(&self, time: Duration, until_woken: bool) {
        let is_over = |asked: &Asked| asked.is_stopped || until_woken && asked.is_woken;
        let waited = self.changed.wait_timeout_while(self.state(), time, |asked| !is_over(asked));
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        asked.is_woken &= !until_woken;
    }
}

/// The thread. Dropping it stops it and waits for its end.
pub struct Background {
    service: Arc<Service>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts it.
    pub fn start(service: &Arc<Service>) -> Result<Self, Failure> {
        let worker = Arc::clone(service);
        let thread = thread::Builder::new().name("background".into()).spawn(move || run(&worker));
        Ok(Self { service: Arc::clone(service), thread: Some(thread.map_err(system)?) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.service.background().stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the background thread panicked");
        }
    }
}

fn run(service: &Arc<Service>) {
    // Of this thread, and of those that it starts.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        log::info!("background work has the priority of guests: {error}");
    }
    let workers = match Workers::threads_of(1, LEVEL) {
        Ok(workers) => Arc::new(workers),
        Err(error) => return service.warn("background", format!("nothing is sealed by itself: {error}")),
    };
    let mut retry = RETRY_MIN;
    while !service.background().is_stopped() {
        match seal_one(service, &workers) {
            Ok(true) => retry = RETRY_MIN,
            Ok(false) => {
                service.sweep();
                service.background().rest(LOOK_INTERVAL, true);
            }
            Err(error) => {
                service.warn("seal-failed", format!("sealing: {error}"));
                service.background().rest(retry, false);
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

/// Seals one snapshot, or a part of it; whether there was one.
fn seal_one(service: &Arc<Service>, workers: &Arc<Workers>) -> Result<bool, Failure> {
    let (workers, mut watch) = (Arc::clone(workers), Politely::new(service));
    let next = service.run(|store, io| async move { store.seal_next(&io, &workers, &mut watch).await })?;
    let Some(node) = next else { return Ok(false) };
    sealed(service, &node);
    service.after_seal();
    Ok(true)
}

/// Leaves room to guests.
struct Politely {
    service: Arc<Service>,
    requests: u64,
    began: Instant,
}

impl Politely {
    fn new(service: &Arc<Service>) -> Self {
        Self { service: Arc::clone(service), requests: service.requests(), began: Instant::now() }
    }
}

impl Watch for Politely {
    async fn between(&mut self, _: &SealStats) -> Step {
        let took = self.began.elapsed();
        let since = self.service.requests().saturating_sub(self.requests);
        let rest = rest_after(took, since);
        if !rest.is_zero() {
            // The thread has nothing else to do.
            self.service.background().rest(rest, false);
        }
        self.requests = self.service.requests();
        self.began = Instant::now();
        if self.service.background().is_stopped() { Step::Stop } else { Step::Go }
    }
}

/// How long to rest after work that took so long, during which guests sent so many requests.
fn rest_after(took: Duration, requests: u64) -> Duration {
    let busy = u128::from(BUSY_PER_SECOND) * took.as_micros() / 1_000_000;
    if u128::from(requests) > busy { (took * REST_FACTOR).min(REST_MAX) } else { Duration::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_while_guests_are_busy_and_never_for_long() {
        let ms = Duration::from_millis;
        assert_eq!(rest_after(ms(100), 10), ms(0));
        assert_eq!(rest_after(ms(100), 11), ms(800));
        assert_eq!(rest_after(ms(1000), 100), ms(0));
        assert_eq!(rest_after(ms(1000), 101), REST_MAX);
    }

    #[test]
    fn a_signal_that_came_before_is_not_lost() {
        let signal = Signal::default();
        signal.wake();
        signal.rest(Duration::MAX, true);
        signal.stop();
        signal.rest(Duration::MAX, true);
        signal.rest(Duration::MAX, false);
        assert!(signal.is_stopped());
    }
}
