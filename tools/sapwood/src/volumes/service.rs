//! An open store, what is attached of it, and its jobs: what operations run on, in the daemon and in a command
//! that has the store to itself.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use rustix::fs::Mode;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, run_alone};
use sapwood_blockdev::storage::HostStorage;
use sapwood_image::ErrorKind;
use sapwood_image::sealed::SealStats;
use sapwood_qos::governor::IN_FLIGHT_DEFAULT;
use sapwood_store::catalog::Look;
use sapwood_store::{Id, SnapshotName, Store, StoreError, StoreErrorKind, StoreOptions};

use super::answer::Counts;
use super::attached::Attached;
use super::background::Signal;
use super::events::Log;
use super::memory::Memory;
use super::operation::Long;
use super::throttle::Throttle;
use crate::control::http::HasJobs;
use crate::control::jobs::{self, Jobs, Refused};
use crate::control::wire::{Failure, Job};
use crate::host::{Host, HostEngine};

/// Jobs that run at a time.
const JOBS_MAX: usize = 8;

/// A store on the host.
pub type HostStore = Store<HostStorage, HostEngine>;

/// See the module's documentation.
pub struct Service {
    host: Host,
    store: Arc<HostStore>,
    /// Where the sockets of what is attached are by default; none where nothing can be attached.
    sockets: Option<PathBuf>,
    attached: Mutex<BTreeMap<Id, Arc<Attached>>>,
    /// Where it is written down what is attached.
    memory: Option<Memory>,
    throttle: Throttle,
    jobs: Jobs,
    events: Log,
    background: Signal,
    /// How often anything was changed that changes what is taken, and how often anything was taken away.
    changes: AtomicU64,
    removals: AtomicU64,
    /// What was sealed and imported so far.
    seals: Mutex<Counts>,
}

impl Service {
    /// Opens the store in `root`, and takes away what a crash has left. With a folder for sockets, volumes
    /// can be attached.
    pub fn open(host: Host, root: &Path, sockets: Option<PathBuf>) -> Result<Arc<Self>, Failure> {
        private();
        let engine = BlockingEngine::new().map_err(system)?;
        let (storage, owned) = (host.storage(), root.to_owned());
        let opening =
            |io| async move { Store::open(&storage, &io, engine, &owned, StoreOptions::default()).await };
        let store = run_alone(host.io()?, opening)?;
        let jobs = if sockets.is_some() { Jobs::new(JOBS_MAX) } else { Jobs::unlogged(JOBS_MAX) };
        let memory = sockets.as_deref().map(|sockets| Memory::new(root, sockets, store.id()));
        let memory = memory.transpose().map_err(system)?;
        let service = Arc::new(Self {
            host,
            store: Arc::new(store),
            sockets,
            attached: Mutex::default(),
            memory,
            throttle: Throttle::new(IN_FLIGHT_DEFAULT),
            jobs,
            events: Log::default(),
            background: Signal::default(),
            changes: AtomicU64::new(0),
            removals: AtomicU64::new(0),
            seals: Mutex::default(),
        });
        service.tidy();
        Ok(service)
    }

    /// What cannot be tidied up does not keep anybody from what can be used.
    fn tidy(&self) {
        match self.run(|store, io| async move { store.tidy(&io).await }) {
            Ok(tidied) if tidied == sapwood_store::Tidied::default() => {}
            Ok(tidied) => log::info!(
                "tidied up: {} deleted snapshots that nothing needs, {} files that nothing names; {} layers were closed",
                tidied.nodes,
                tidied.orphans.len(),
                tidied.settled.len(),
            ),
            Err(error) => log::warn!("cannot tidy up: {error}"),
        }
    }

    /// The host.
    pub fn host(&self) -> Host {
        self.host
    }

    /// The store.
    pub fn store(&self) -> &Arc<HostStore> {
        &self.store
    }

    /// The folder for sockets.
    pub fn sockets(&self) -> Option<&Path> {
        self.sockets.as_deref()
    }

    /// What happened.
    pub fn events(&self) -> &Log {
        &self.events
    }

    /// Notes that something happened.
    pub fn note(&self, kind: &str, message: String) {
        self.events.add(log::Level::Info, now_ms(), kind, message);
    }

    /// Notes that something happened that somebody should look after.
    pub fn warn(&self, kind: &str, message: String) {
        self.events.add(log::Level::Warn, now_ms(), kind, message);
    }

    /// Runs a task on a reactor of the calling thread.
    pub fn run<T: 'static, F, X>(
        &self,
        task: impl FnOnce(Arc<HostStore>, Io<HostEngine>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, X>> + 'static,
        X: Into<Failure> + 'static,
    {
        run_alone(self.host.io()?, |io| task(Arc::clone(&self.store), io)).map_err(Into::into)
    }

    /// The same for a task that no guest waits for: what it reads and writes takes its turn with what guests do.
    pub fn run_in_background<T: 'static, F, X>(
        &self,
        task: impl FnOnce(Arc<HostStore>, Io<HostEngine>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, X>> + 'static,
        X: Into<Failure> + 'static,
    {
        run_alone(self.background_io()?, |io| task(Arc::clone(&self.store), io)).map_err(Into::into)
    }

    /// Whether guests share by weight or reservation, and such tasks with them.
    pub fn guests_share(&self) -> bool {
        self.throttle.background().waits()
    }

    /// A reactor for such a task.
    pub fn background_io(&self) -> Result<Io<HostEngine>, Failure> {
        Ok(self.host.background_io(self.throttle.background())?)
    }

    /// The same for a task that only reads: when the job is cancelled, it goes on no more.
    pub fn run_until_cancelled<T: 'static, F, X>(
        &self,
        job: &Arc<jobs::Job>,
        task: impl FnOnce(Arc<HostStore>, Io<HostEngine>) -> F + 'static,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, X>> + 'static,
        X: Into<Failure> + 'static,
    {
        let job = Arc::clone(job);
        self.run_in_background(|store, io| async move {
            let mut task = pin!(task(store, io));
            poll_fn(|cx| match job.is_cancelled() {
                true => Poll::Ready(Err(cancelled())),
                false => task.as_mut().poll(cx).map_err(Into::into),
            })
            .await
        })
    }

    /// Waits until no job of the same kind works that was started before.
    pub fn wait_for_turn(&self, job: &jobs::Job) -> Result<(), Failure> {
        if self.jobs.wait_for_turn(job).is_break() { Err(cancelled()) } else { Ok(()) }
    }

    /// Starts a long operation as a job.
    pub fn start<O: Long>(self: &Arc<Self>, operation: O) -> Result<Job, Refused> {
        let (service, about) = (Arc::clone(self), operation.about());
        self.jobs.start(O::KIND, &about, move |job| Ok(operation.run(&service, job)?))
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Id, Arc<Attached>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What guests may do.
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// Has everything that is attached do what the catalog says now.
    pub fn apply_limits(&self) -> Result<(), Failure> {
        self.throttle.apply(&self.store, || self.all_attached())
    }

    /// Everything that is attached.
    pub fn all_attached(&self) -> Vec<Arc<Attached>> {
        self.table().values().cloned().collect()
    }

    /// The volume or snapshot of this id, if it is attached.
    pub fn attached(&self, id: Id) -> Option<Arc<Attached>> {
        self.table().get(&id).cloned()
    }

    /// Adds what was attached, unless it is there already: somebody was faster.
    pub fn add(&self, attached: &Arc<Attached>) -> bool {
        let mut table = self.table();
        let is_new = !table.contains_key(&attached.id());
        if is_new {
            table.insert(attached.id(), Arc::clone(attached));
        }
        drop(table);
        // What was changed before it was here.
        if is_new && let Err(error) = self.throttle.enter(&self.store, attached) {
            log::error!("limits are not applied: {error}");
        }
        is_new
    }

    /// Takes out what is to be detached.
    pub fn remove(&self, id: Id) -> Option<Arc<Attached>> {
        self.table().remove(&id)
    }

    /// Where it is written down what is attached; none where nothing can be.
    pub fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// Writes down what is attached now, for the next daemon.
    pub fn remember(&self) -> Result<(), Failure> {
        let Some(memory) = &self.memory else { return Ok(()) };
        memory.save(|| {
            let table = self.table();
            table.iter().map(|(id, attached)| (*id, attached.serve().clone())).collect()
        })
    }

    /// The id of a volume.
    pub fn volume(&self, name: &str) -> Result<Id, Failure> {
        let id = self.store.catalog().view()?.volume_named(name)?;
        id.ok_or_else(|| not_found(name, "volume"))
    }

    /// The id of a snapshot.
    pub fn snapshot(&self, name: &SnapshotName) -> Result<Id, Failure> {
        let volume = self.volume(&name.volume)?;
        let id = self.store.catalog().view()?.snapshot_named(volume, &name.snapshot)?;
        id.ok_or_else(|| not_found(&name.to_string(), "snapshot"))
    }

    /// What follows when something was sealed: volumes that are attached read it from the packs, and the files of
    /// layers that nobody reads any more go.
    pub fn after_seal(&self) {
        for attached in self.all_attached() {
            // What it reads stays where it is meanwhile. It is tried again after the next snapshot was sealed.
            if let Err(error) = attached.reopen_base(self) {
                log::warn!("what lies below a volume cannot be opened again yet: {error}");
            }
        }
        self.sweep();
    }

    /// Removes files that the catalog does not need and that nobody reads any more.
    pub fn sweep(&self) {
        let swept = self.run(|store, io| async move { Ok::<_, Failure>(store.sweep(&io).await) });
        if let Err(error) = swept {
            log::warn!("{error}: nothing is swept up now");
        }
    }

    /// Wakes and stops what is done in the background.
    pub fn background(&self) -> &Signal {
        &self.background
    }

    /// Notes that something takes another amount of space now.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that something was taken away.
    pub fn removed(&self) {
        self.changed();
        self.removals.fetch_add(1, Ordering::Relaxed);
    }

    /// How often something has changed, and how often something was taken away.
    pub fn changes(&self) -> (u64, u64) {
        (self.changes.load(Ordering::Relaxed), self.removals.load(Ordering::Relaxed))
    }

    /// Counts what a seal or an import did; the same as it is answered.
    pub fn count_seal(&self, stats: &SealStats) -> Counts {
        let counts = Counts::from(stats);
        self.seals.lock().unwrap_or_else(PoisonError::into_inner).add(&counts);
        counts
    }

    /// What all of them did so far.
    pub fn seals(&self) -> Counts {
        *self.seals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests of all guests so far.
    pub fn requests(&self) -> u64 {
        self.all_attached().iter().map(|attached| attached.requests()).sum()
    }

    /// Ends jobs, and detaches everything: what guests wrote is durable then. The next daemon attaches it again.
    pub fn close(&self) -> Result<(), Failure> {
        self.jobs.close();
        let mut result = Ok(());
        while let Some((_, attached)) = { self.table().pop_first() } {
            let detached = attached.detach(self);
            if let Err(error) = &detached {
                log::error!("{error}");
            }
            result = result.and(detached);
        }
        result
    }
}

impl HasJobs for Service {
    fn jobs(&self) -> &Jobs {
        &self.jobs
    }
}

fn cancelled() -> Failure {
    Failure::new(ErrorKind::Cancelled.name(), "it was cancelled")
}

fn not_found(name: &str, what: &str) -> Failure {
    if let Err(error) = name.parse::<sapwood_store::Name>() {
        return error.into();
    }
    let text = format!("there is no such {what} in the store");
    StoreError::new(name, StoreErrorKind::NotFound(text)).into()
}

/// Makes all files that this process makes from now on those of its user alone, as disks are.
pub fn private() {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
}

/// What the system said.
pub fn system(error: impl std::fmt::Display) -> Failure {
    Failure::new("system", error.to_string())
}

/// The time in milliseconds since 1970.
pub fn now_ms() -> u64 {
    (StoreOptions::default().clock)()
}
