//! The simulated engine: one thread's view of a world.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use sapwood_blockdev::engine::{Completion, Engine, Op, Time};

use super::medium::Stamp;
use super::storage::SimFile;
use super::turns::Turn;
use super::world::{EngineId, World};

/// What an engine's waker sets.
#[derive(Default)]
pub struct WakeFlag(AtomicBool);

impl WakeFlag {
    /// Whether the waker was used since the last look.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    /// Whether the waker was used.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// An engine over simulated files.
pub struct SimEngine {
    world: World,
    id: EngineId,
    wake: Arc<WakeFlag>,
    submitted: Vec<(u64, Stamp, Op<SimFile>)>,
    /// Of a thread that takes turns with others.
    turn: Option<Arc<Turn>>,
}

impl SimEngine {
    pub(super) fn new(world: World, id: EngineId, wake: Arc<WakeFlag>) -> Self {
        Self { world, id, wake, submitted: Vec::new(), turn: None }
    }

    /// Which engine of its world this is.
    pub fn id(&self) -> EngineId {
        self.id
    }

    /// Lets other threads go on whenever its own waits.
    #[must_use]
    pub fn taking_turns(mut self, turn: Arc<Turn>) -> Self {
        self.turn = Some(turn);
        self
    }

    fn start(&mut self) {
        if !self.submitted.is_empty() {
            let mut state = self.world.state();
            for (token, stamp, op) in self.submitted.drain(..) {
                state.start(self.id, token, stamp, op);
            }
        }
    }
}

impl Drop for SimEngine {
    fn drop(&mut self) {
        self.world.state().gone(self.id);
    }
}

impl Engine for SimEngine {
    type File = SimFile;

    fn submit(&mut self, token: u64, op: Op<SimFile>) {
        let stamp = self.world.state().stamp;
        self.submitted.push((token, stamp, op));
    }

    fn collect(&mut self, done: &mut Vec<Completion<SimFile>>) {
        self.start();
        self.world.state().collect(self.id, done);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.start();
        if self.wake.take() {
            return;
        }
        if let Some(turn) = &self.turn {
            turn.pass();
            // What this thread waits for may be another one, which goes on when its turn comes.
            if self.wake.take() || deadline.is_none() && self.world.next_due().is_none() {
                return;
            }
        }
        self.world.state().wait(self.id, deadline);
    }

    fn in_flight(&self) -> usize {
        self.submitted.len() + self.world.state().in_flight(self.id)
    }

    fn now(&self) -> Time {
        self.world.state().now
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.wake))
    }
}
