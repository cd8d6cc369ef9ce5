//! What a daemon does by itself, on one thread of low priority, one thing at a time.
//!
//! **Sealing**: the oldest snapshot that can be sealed is, one after the other. Before each segment it looks how many requests guests
//! have sent since the last one. When that was more than [`BUSY_PER_SECOND`], it rests so long that it works one part in
//! [`SHARE`] of the time, or in [`SHARE_BESIDE_SHARES`] where any guest has a weight or a reservation, and [`REST_MAX`] at most:
//! a small share of a busy host, and it comes to an end all the same.
//! What fails is tried again after a time that doubles, up to [`RETRY_MAX`].
//!
//! **Accounts and collections** follow when there is nothing to seal: an account when anything has changed since the last one, a
//! collection when anything was deleted or switched; each once for what was there when the daemon
//! started. Neither begins before [`SHARE`] times as long has passed as the last one took, and
//! [`ACCOUNT_INTERVAL`] or [`COLLECT_INTERVAL`]; a collection does not wait for that when a watermark is reached. While guests
//! are busy they read and write [`BUSY_RATE`] bytes a second.
//!
//! **Watermarks** are looked at every [`WATERMARK_INTERVAL`]; that one is reached, and that it is not any more, are events.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sapwood_blockdev::io::Io;
use sapwood_blockdev::thread::give_way;
use sapwood_image::sealed::collect::{Limits, Pace};
use sapwood_image::sealed::{LEVEL, SealStats, Step, Watch, Workers};

use super::service::{Service, system};
use super::upkeep::{self, collect, sealed};
use crate::control::wire::Failure;
use crate::host::HostEngine;

/// Requests of all guests in a second from which on they are busy.
const BUSY_PER_SECOND: u64 = 100;
/// While guests are busy, work in the background takes one part in so many of the time.
const SHARE: u32 = 20;
/// The same of sealing where guests share by weight or reservation: fewer than one request in a hundred are to meet it, so that it
/// is hardly seen in their 99th percentile.
const SHARE_BESIDE_SHARES: u32 = 50;
/// Longest rest.
const REST_MAX: Duration = Duration::from_secs(2);
/// How often it looks whether it is to end, while it rests.
const STOP_INTERVAL: Duration = Duration::from_millis(50);
/// How often it looks what there is to do, unless it is woken.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How long it leaves alone what has failed, at first and at most.
const RETRY_MIN: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// Time between two accounts, at least.
const ACCOUNT_INTERVAL: Duration = Duration::from_secs(60);
/// Time between two collections, at least.
const COLLECT_INTERVAL: Duration = Duration::from_secs(600);
/// Time between two looks at the space.
const WATERMARK_INTERVAL: Duration = Duration::from_secs(60);
/// Bytes that accounts and collections read and write in a second while guests are busy.
const BUSY_RATE: u64 = 16 << 20;
/// How often it looks whether they are.
const PACE_INTERVAL: Duration = Duration::from_millis(200);
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

    /// Returns when it is to end, when it is woken, or after a time; whether it was woken.
    fn rest(&self, time: Duration) -> bool {
        let is_over = |asked: &Asked| asked.is_stopped || asked.is_woken;
        let waited = self.changed.wait_timeout_while(self.state(), time, |asked| !is_over(asked));
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut asked.is_woken)
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
    if let Err(error) = give_way(NICE) {
        log::info!("background work has the priority of guests: {error}");
    }
    let workers = match Workers::threads_of(1, LEVEL) {
        Ok(workers) => Arc::new(workers),
        Err(error) => return service.warn("background", format!("nothing is sealed by itself: {error}")),
    };
    let (mut retry, mut is_woken) = (Retry::default(), true);
    let (mut account, mut collection) = (Turn::new(ACCOUNT_INTERVAL), Turn::new(COLLECT_INTERVAL));
    let mut watermark = Watermark::default();
    while !service.background().is_stopped() {
        // Who wakes it has something new to seal.
        if is_woken || retry.is_due() {
            match seal_one(service, &workers) {
                Ok(true) => {
                    (retry, is_woken) = (Retry::default(), true);
                    continue;
                }
                Ok(false) => retry = Retry::default(),
                // That keeps nothing else from being done.
                Err(error) => {
                    service.warn("seal-failed", format!("sealing: {error}"));
                    retry.failed();
                }
            }
        }
        tidy(service);
        let is_reached = watermark.look(service);
        let (changes, removals) = service.changes();
        collection.take(removals, is_reached, || {
            paced(service, |pace| collect(service, pace, Limits::default()).map(drop))
        });
        account.take(changes, false, || paced(service, |pace| upkeep::account(service, pace).map(drop)));
        is_woken = service.background().rest(LOOK_INTERVAL);
    }
}

/// When to try again what has failed.
#[derive(Default)]
struct Retry {
    /// The time that was left to it last, and its end; none when nothing has failed.
    failed: Option<(Duration, Instant)>,
}

impl Retry {
    fn is_due(&self) -> bool {
        self.failed.is_none_or(|(_, next)| Instant::now() >= next)
    }

    /// It has failed again; when it was tried before its time, that time stays.
    fn failed(&mut self) {
        if self.is_due() {
            let rest = self.failed.map_or(RETRY_MIN, |(rest, _)| (rest * 2).min(RETRY_MAX));
            self.failed = Some((rest, Instant::now() + rest));
        }
    }
}

/// Removes files that nobody needs, and keeps the runs of the index few.
fn tidy(service: &Service) {
    if let Err(error) = service.run_in_background(|store, io| async move { store.upkeep(&io).await }) {
        log::warn!("upkeep: {error}");
    }
}

/// Work that is done when something has changed, and takes its share of the time only.
struct Turn {
    interval: Duration,
    /// What had changed when it was done last.
    seen: u64,
    next: Instant,
}

impl Turn {
    /// Nobody knows what has changed before now.
    fn new(interval: Duration) -> Self {
        Self { interval, seen: u64::MAX, next: Instant::now() + interval }
    }

    /// Does the work if it is its turn, or if that does not matter.
    fn take(&mut self, changes: u64, at_once: bool, work: impl FnOnce() -> Result<(), Failure>) {
        if changes == self.seen || !at_once && Instant::now() < self.next {
            return;
        }
        let began = Instant::now();
        match work() {
            Ok(()) => self.seen = changes,
            // Somebody does the same, or it was told to stop.
            Err(error) if ["in-use", "cancelled"].contains(&error.kind.as_str()) => {}
            Err(error) => log::warn!("in the background: {error}"),
        }
        self.next = Instant::now() + self.interval.max(began.elapsed() * SHARE);
    }
}

/// Does work at a pace that leaves room to guests, and ends when the daemon does.
fn paced<T>(service: &Service, work: impl FnOnce(Arc<Pace>) -> Result<T, Failure>) -> Result<T, Failure> {
    let pace = Arc::new(Pace::default());
    let (over, is_over) = sync_channel::<()>(0);
    thread::scope(|scope| {
        let reins = Arc::clone(&pace);
        scope.spawn(move || {
            let mut requests = service.requests();
            while is_over.recv_timeout(PACE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if service.background().is_stopped() {
                    reins.stop();
                }
                let now = service.requests();
                let is_busy = is_busy(PACE_INTERVAL, now.saturating_sub(requests));
                reins.set_rate(if is_busy { BUSY_RATE } else { 0 });
                requests = now;
            }
        });
        let done = work(pace);
        drop(over);
        done
    })
}

/// The watermark that was reached when it was looked last.
#[derive(Default)]
struct Watermark {
    reached: Option<u8>,
    next: Option<Instant>,
}

impl Watermark {
    /// Says when one is reached; whether one is.
    fn look(&mut self, service: &Service) -> bool {
        if self.next.is_some_and(|next| Instant::now() < next) {
            return self.reached.is_some();
        }
        self.next = Some(Instant::now() + WATERMARK_INTERVAL);
        let reached = match service.store().watermark() {
            Ok(reached) => reached,
            Err(error) => {
                log::warn!("the space of the store: {error}");
                return self.reached.is_some();
            }
        };
        match (self.reached, reached) {
            (before, Some(mark)) if before < Some(mark) => {
                let text =
                    format!("the watermark of {mark} % is reached: delete what is not needed, or add space");
                service.warn("watermark", text);
            }
            (Some(mark), after) if after < Some(mark) => {
                service.note("watermark", format!("the watermark of {mark} % is not reached any more"));
            }
            _ => {}
        }
        self.reached = reached;
        reached.is_some()
    }
}

/// Seals one snapshot, or a part of it; whether there was one.
fn seal_one(service: &Arc<Service>, workers: &Arc<Workers>) -> Result<bool, Failure> {
    let (workers, guests) = (Arc::clone(workers), Arc::clone(service));
    let next = service.run_in_background(|store, io| async move {
        store.seal_next(&io, &workers, &mut Politely::new(&guests, &io)).await
    })?;
    let Some(node) = next else { return Ok(false) };
    sealed(service, &node);
    service.after_seal();
    Ok(true)
}

/// Leaves room to guests.
struct Politely {
    service: Arc<Service>,
    io: Io<HostEngine>,
    requests: u64,
    began: Instant,
}

impl Politely {
    fn new(service: &Arc<Service>, io: &Io<HostEngine>) -> Self {
        let requests = service.requests();
        Self { service: Arc::clone(service), io: io.clone(), requests, began: Instant::now() }
    }

    /// Rests for a time, or until the daemon ends. What is being written goes on meanwhile, and keeps no guest's place.
    async fn rest(&self, time: Duration) {
        let end = self.io.now() + time;
        while self.io.now() < end && !self.service.background().is_stopped() {
            self.io.sleep_until(end.min(self.io.now() + STOP_INTERVAL)).await;
        }
    }
}

impl Watch for Politely {
    async fn between(&mut self, _: &SealStats) -> Step {
        let took = self.began.elapsed();
        let since = self.service.requests().saturating_sub(self.requests);
        if is_busy(took, since) {
            let share = if self.service.guests_share() { SHARE_BESIDE_SHARES } else { SHARE };
            self.rest(rest_after(took, share)).await;
        }
        self.requests = self.service.requests();
        self.began = Instant::now();
        if self.service.background().is_stopped() { Step::Stop } else { Step::Go }
    }
}

/// Whether guests are busy that sent so many requests in such a time.
fn is_busy(time: Duration, requests: u64) -> bool {
    u128::from(requests) > u128::from(BUSY_PER_SECOND) * time.as_micros() / 1_000_000
}

/// How long to rest after work that took so long and is to take one part in `share` of the time.
fn rest_after(took: Duration, share: u32) -> Duration {
    (took * (share - 1)).min(REST_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_while_guests_are_busy_and_never_for_long() {
        let ms = Duration::from_millis;
        assert!(!is_busy(ms(100), 10) && is_busy(ms(100), 11));
        assert!(!is_busy(ms(1000), 100) && is_busy(ms(1000), 101));
        assert_eq!((rest_after(ms(10), 20), rest_after(ms(10), 50)), (ms(190), ms(490)));
        assert_eq!(rest_after(ms(1000), 20), REST_MAX);
    }

    #[test]
    fn work_is_done_when_something_has_changed_and_it_is_its_turn() {
        let mut turn = Turn::new(Duration::from_secs(3600));
        let mut done = 0;
        let mut take = |turn: &mut Turn, changes, at_once| {
            turn.take(changes, at_once, || {
                done += 1;
                if changes == 7 { Err(Failure::new("in-use", "busy")) } else { Ok(()) }
            });
            done
        };
        assert_eq!(take(&mut turn, 0, false), 0, "it is not its turn");
        assert_eq!(take(&mut turn, 0, true), 1, "for what there was before");
        assert_eq!(take(&mut turn, 0, true), 1, "nothing has changed since");
        assert_eq!(take(&mut turn, 1, false), 1, "it is not its turn");
        assert_eq!(take(&mut turn, 1, true), 2);
        assert_eq!(take(&mut turn, 7, true), 3);
        assert_eq!(take(&mut turn, 7, true), 4, "it was not done");
    }

    #[test]
    fn what_failed_is_left_alone_for_a_time_that_doubles() {
        let mut retry = Retry::default();
        assert!(retry.is_due());
        for rest in [10, 20, 40, 80, 160, 320, 600, 600] {
            retry.failed();
            assert!(!retry.is_due());
            // A try before its time changes nothing.
            retry.failed();
            assert_eq!(retry.failed.unwrap().0, Duration::from_secs(rest));
            retry.failed.as_mut().unwrap().1 = Instant::now();
            assert!(retry.is_due());
        }
    }

    #[test]
    fn a_signal_that_came_before_is_not_lost() {
        let signal = Signal::default();
        signal.wake();
        assert!(signal.rest(Duration::MAX));
        assert!(!signal.rest(Duration::ZERO), "that was it");
        signal.stop();
        assert!(!signal.rest(Duration::MAX));
        assert!(signal.is_stopped());
    }
}
