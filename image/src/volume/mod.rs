//! A disk whose layer can be replaced while it is in use: what a snapshot of a running disk needs.
//!
//! A [`Volume`] is shared by threads, each with a [`VolumeQueue`] on the layer that is current (`queue`).
//! [`Volume::switch`] has all of them leave it, with what they have in flight there ended, before any of
//! them starts on the next (`members`). So the old layer is a consistent cut: no write that began after
//! another one was reported is on it while the other is not. [`Volume::snapshot`] is the whole sequence
//! (`snapshot`).
//!
//! What each poll and submission costs is one look at the phase: a number that is odd while the volume is
//! being switched. Everything else is behind a lock that is taken when it has changed, and when a thread
//! goes to sleep with nothing outstanding.

mod members;
mod queue;
mod snapshot;

use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_util::stream::{FuturesUnordered, Stream};
use sapwood_blockdev::device::{BlockDevice, Geometry};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;

use crate::error::{ErrorKind, ImageError};
use crate::layer::handover::Handover;
pub use crate::layer::handover::Successor;
#[cfg(feature = "mutations")]
use crate::layer::mutation::Mutation;
use crate::layer::{Layer, ResolveBase};
use members::Members;
pub use queue::VolumeQueue;

/// How often a volume was switched, twice, and one more while that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Phase(u64);

impl Phase {
    fn is_switching(self) -> bool {
        !self.0.is_multiple_of(2)
    }

    /// How often the volume was switched.
    fn number(self) -> u64 {
        self.0 / 2
    }
}

/// See the module's documentation.
pub struct Volume<E: Engine> {
    /// Changed under the lock.
    phase: AtomicU64,
    /// Size of the disk in bytes.
    size: AtomicU64,
    read_only: bool,
    /// Something is under way that must be alone: a snapshot, a change of size, an opening of what lies below, the end.
    is_busy: AtomicBool,
    state: Mutex<State<E>>,
}

/// What a disk goes on with.
struct Next<E: Engine> {
    layer: Arc<Layer<E>>,
    /// Knows what lies below, in a store.
    resolver: Option<Arc<dyn ResolveBase<E>>>,
}

impl<E: Engine> Clone for Next<E> {
    fn clone(&self) -> Self {
        Self { layer: Arc::clone(&self.layer), resolver: self.resolver.clone() }
    }
}

struct State<E: Engine> {
    layer: Arc<Layer<E>>,
    /// The layer that everybody goes on with once all have left the current one.
    next: Option<Next<E>>,
    members: Members,
    /// Who waits for the end of a switch.
    switching: Option<Waker>,
    /// What is left to do since the last switch.
    handover: Option<Arc<Handover<E>>>,
    /// The task that does the background work.
    maintenance: Option<Waker>,
    is_closing: bool,
}

/// The permission to do what must be alone.
struct Alone<'a>(&'a AtomicBool);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl<E: Engine> Volume<E> {
    /// A volume on an open layer, of which no queues have been made.
    pub fn new(layer: Arc<Layer<E>>) -> Arc<Self> {
        let Geometry { size, read_only, .. } = layer.geometry();
        let state = State {
            layer,
            next: None,
            members: Members::default(),
            switching: None,
            handover: None,
            maintenance: None,
            is_closing: false,
        };
        Arc::new(Self {
            phase: AtomicU64::new(0),
            size: AtomicU64::new(size),
            read_only,
            is_busy: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layer that is current. Its size is changed, and what lies below it, by way of the volume only.
    pub fn layer(&self) -> Arc<Layer<E>> {
        Arc::clone(&self.state().layer)
    }

    /// The file of the layer that is current.
    pub fn path(&self) -> PathBuf {
        self.layer().path().to_owned()
    }

    /// A queue over a reactor that the caller also uses for other things.
    pub fn queue_on(self: &Arc<Self>, io: Io<E>) -> VolumeQueue<E> {
        VolumeQueue::new(Arc::clone(self), io)
    }

    /// Lets the volume go on with `next`, whose disk is that of the current layer, once nothing is in flight
    /// on that. The requests that come meanwhile wait. Nothing keeps a switch that has begun from its end but
    /// a thread that neither polls its queue nor drops it, or sleeps with something outstanding there.
    async fn switch(&self, next: Next<E>) {
        let target = {
            let mut state = self.state();
            assert!(state.next.is_none(), "whoever is alone begins one");
            state.next = Some(next);
            let target = self.phase.fetch_add(1, Ordering::Release) + 2;
            if state.members.begin() {
                self.complete(&mut state);
            }
            target
        };
        poll_fn(|cx| {
            let mut state = self.state();
            if self.phase().0 >= target {
                return Poll::Ready(());
            }
            state.switching = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// All have left the current layer.
    fn complete(&self, state: &mut State<E>) {
        let Next { layer, resolver } = state.next.take().expect("a switch is under way");
        let old = std::mem::replace(&mut state.layer, Arc::clone(&layer));
        state.handover = Some(Arc::new(Handover::new(old, layer, resolver)));
        self.phase.fetch_add(1, Ordering::Release);
        state.members.end();
        state.switching.take().into_iter().for_each(Waker::wake);
        state.maintenance.take().into_iter().for_each(Waker::wake);
    }

    fn phase(&self) -> Phase {
        Phase(self.phase.load(Ordering::Acquire))
    }

    /// A queue that is woken by `waker` joins: its number, and the phase.
    fn join(&self, waker: Waker) -> (usize, Phase) {
        let mut state = self.state();
        (state.members.add(waker), self.phase())
    }

    /// A queue looks what there is to use, after it was parked or while it is not: the phase, and the layer
    /// that is current in it.
    fn enter(&self, member: usize, was_parked: bool) -> (Phase, Arc<Layer<E>>) {
        let mut state = self.state();
        if was_parked {
            state.members.unpark(member);
        }
        (self.phase(), Arc::clone(&state.layer))
    }

    /// A queue has left the layer that is to be replaced; with what it goes on if it was the last.
    fn leave(&self, member: usize) -> Option<(Phase, Arc<Layer<E>>)> {
        let mut state = self.state();
        let is_last = state.members.leave(member);
        if is_last {
            self.complete(&mut state);
            return Some((self.phase(), Arc::clone(&state.layer)));
        }
        #[cfg(feature = "mutations")]
        if let Some(next) = state.next.as_ref().map(|next| &next.layer)
            && next.breaks(Mutation::StartBeforeOthersLeft)
        {
            return Some((Phase(self.phase().0 + 1), Arc::clone(next)));
        }
        None
    }

    /// A queue goes to sleep with nothing outstanding.
    fn park(&self, member: usize) {
        let mut state = self.state();
        if state.members.park(member) {
            self.complete(&mut state);
        }
    }

    fn remove(&self, member: usize) {
        let mut state = self.state();
        if state.members.remove(member) {
            self.complete(&mut state);
        }
    }

    /// Whether a queue goes by a phase that has yet to come: only a mutation does.
    fn is_ahead(&self, queue: Phase, volume: Phase) -> bool {
        cfg!(feature = "mutations") && queue.0 == volume.0 + 1
    }

    /// The background work of whichever layer is current, until the volume is closed: to be run on a thread
    /// of its own or spawned beside a queue.
    pub async fn maintain(self: Arc<Self>, io: Io<E>) {
        let mut running = FuturesUnordered::new();
        let mut known: Option<Arc<Layer<E>>> = None;
        poll_fn(|cx| {
            let closing = {
                let mut state = self.state();
                if !known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &state.layer)) {
                    // The last one's ends when that is closed.
                    running.push(Box::pin(Arc::clone(&state.layer).maintain(io.clone())));
                    known = Some(Arc::clone(&state.layer));
                }
                state.maintenance = Some(cx.waker().clone());
                state.is_closing
            };
            match poll_all(&mut running, cx) && closing {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    /// Changes the size of the disk, durably.
    ///
    /// # Errors
    /// When the disk is read-only or cannot have that size; while a snapshot is taken.
    pub async fn resize(&self, io: &Io<E>, size: u64) -> Result<(), ImageError> {
        let _alone = self.alone()?;
        let layer = self.layer();
        let resized = layer.resize(io, size).await;
        self.size.store(layer.geometry().size, Ordering::Release);
        resized
    }

    /// Makes everything durable and leaves the layers tidy. All queues are drained and dropped before; nothing
    /// is done with the disk afterwards.
    ///
    /// # Errors
    /// When that, or an earlier sync, failed; while a snapshot is taken or the like, by whoever has not waited for its end:
    /// then nothing was done.
    pub async fn close(&self, io: &Io<E>) -> Result<(), ImageError> {
        let _alone = self.alone()?;
        let (layer, handover) = {
            let mut state = self.state();
            state.is_closing = true;
            state.maintenance.take().into_iter().for_each(Waker::wake);
            (Arc::clone(&state.layer), state.handover.clone())
        };
        let mut left = Ok(());
        if let Some(handover) = handover {
            left = handover.sync(io).await;
            // In any case: its background work ends by that.
            let closed = handover.close(io).await;
            left = left.and(closed);
        }
        let closed = layer.close(io).await;
        left.and(closed)
    }

    fn alone(&self) -> Result<Alone<'_>, ImageError> {
        if self.is_busy.swap(true, Ordering::Acquire) {
            return Err(busy(self.path()));
        }
        let alone = Alone(&self.is_busy);
        // Whoever began it may have given up.
        match self.phase().is_switching() {
            true => Err(busy(self.path())),
            false => Ok(alone),
        }
    }
}

/// Polls what runs; says whether it has all ended.
fn poll_all<F: Future<Output = ()>>(running: &mut FuturesUnordered<F>, cx: &mut Context<'_>) -> bool {
    let mut running = pin!(running);
    loop {
        match running.as_mut().poll_next(cx) {
            Poll::Ready(Some(())) => {}
            Poll::Ready(None) => return true,
            Poll::Pending => return false,
        }
    }
}

fn busy(path: PathBuf) -> ImageError {
    let detail = "a snapshot of it is taken, its size is changed, or what lies below it is opened again: wait for the \
                  end of that";
    ImageError::new(path, ErrorKind::Unfinished(detail.to_owned()))
}

impl<E: Engine> BlockDevice for Volume<E> {
    type Engine = E;
    type Queue = VolumeQueue<E>;

    fn geometry(&self) -> Geometry {
        Layer::<E>::geometry_of(self.size.load(Ordering::Acquire), self.read_only)
    }

    fn queue(self: &Arc<Self>, engine: E) -> VolumeQueue<E> {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        // The next layer takes it over from this one.
        self.state().layer.set_write_cache(enabled);
    }
}

#[cfg(test)]
mod tests;
