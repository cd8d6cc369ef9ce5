//! One thread's reactor over an engine.
//!
//! - Transfers are finished here: short reads and writes, EINTR and EAGAIN are retried for every
//!   engine in this one place.
//! - [`Io::start`] is the fast path: a token in, a token out, no task.
//! - [`Io::run`] and [`Io::spawn`] are the slow path: futures on a small executor whose only
//!   source of events is this engine.
//!
//! An [`Io`] is a handle; clones share the reactor. It never leaves its thread.

#[cfg(test)]
mod tests;
mod timer;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::stream::{FuturesUnordered, Stream};
use slab::Slab;

use crate::Errno;
use crate::buffer::Memory;
use crate::engine::{Completion, Engine, Op, Time};
use timer::{Sleep, Timers};

/// EINTR and EAGAIN in a row after which an operation fails: a bound, not a policy.
const RETRIES_MAX: u32 = 1000;

/// Rounds of running woken tasks within one [`Io::poll`]: tasks that wake themselves, to share the
/// thread, must not keep it from the caller.
const ROUNDS_MAX: usize = 64;

/// What became of an operation started with [`Io::start`] or [`Io::run`].
#[derive(Debug)]
pub struct Outcome {
    /// Bytes moved, or the error. A read is short only at the end of the file; a write is never
    /// short.
    pub result: Result<usize, Errno>,
    /// The memory that was lent.
    pub memory: Option<Memory>,
}

impl Outcome {
    /// The result and memory of a read, with everything past the end of the file set to zero.
    pub fn zero_filled(self) -> Result<Memory, Errno> {
        let done = self.result?;
        let mut memory = self.memory.unwrap_or_default();
        let rest = memory.len() - done;
        memory.zero_at(done, rest);
        Ok(memory)
    }
}

/// A future run by the reactor.
type Task = Pin<Box<dyn Future<Output = ()>>>;

enum Target {
    /// Reported by [`Io::poll`] under this token.
    Fast(u64),
    /// Awaited by a future.
    Future(FutureState),
    /// The future was dropped; the outcome is thrown away.
    Abandoned,
}

enum FutureState {
    Waiting(Option<Waker>),
    Ready(Outcome),
}

struct Flight {
    target: Target,
    retries: u32,
}

/// Woken tasks raise a flag; [`Io::poll`] runs them. A task woken while its thread waits also ends
/// that wait; while the thread runs, as it mostly does, the flag is enough.
///
/// The two sides set one flag and then look at the other, in one total order (`SeqCst`): either
/// the waiter sees that a task is awake, or the waker sees that the thread waits.
struct Woken {
    flag: AtomicBool,
    /// From before [`Io::wait`] blocks until the next [`Io::poll`].
    waiting: AtomicBool,
    engine: Waker,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.flag.swap(true, Ordering::SeqCst) && self.waiting.load(Ordering::SeqCst) {
            self.engine.wake_by_ref();
        }
    }
}

struct Reactor<E: Engine> {
    engine: RefCell<E>,
    flights: RefCell<Slab<Flight>>,
    completions: Cell<Vec<Completion<E::File>>>,
    tasks: RefCell<FuturesUnordered<Task>>,
    spawned: RefCell<Vec<Task>>,
    timers: RefCell<Timers>,
    woken: Arc<Woken>,
}

/// A handle on a thread's reactor.
pub struct Io<E: Engine>(Rc<Reactor<E>>);

impl<E: Engine> Clone for Io<E> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<E: Engine> Io<E> {
    /// A reactor over `engine`, for the calling thread.
    pub fn new(engine: E) -> Self {
        let (flag, waiting) = (AtomicBool::new(false), AtomicBool::new(false));
        let woken = Woken { flag, waiting, engine: engine.waker() };
        Self(Rc::new(Reactor {
            engine: RefCell::new(engine),
            flights: RefCell::default(),
            completions: Cell::default(),
            tasks: RefCell::default(),
            spawned: RefCell::default(),
            timers: RefCell::default(),
            woken: Arc::new(woken),
        }))
    }

    /// Starts an operation whose outcome [`Io::poll`] reports under `token`.
    pub fn start(&self, token: u64, op: Op<E::File>) {
        self.launch(Target::Fast(token), op);
    }

    /// Performs an operation. It is submitted at once; dropping the future abandons the outcome,
    /// not the operation.
    pub fn run(&self, op: Op<E::File>) -> impl Future<Output = Outcome> + use<E> {
        let key = self.launch(Target::Future(FutureState::Waiting(None)), op);
        Running { io: self.clone(), key: Some(key) }
    }

    /// Runs a future beside the caller, on this thread, within [`Io::poll`].
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.0.spawned.borrow_mut().push(Box::pin(future));
        self.0.woken.flag.store(true, Ordering::SeqCst);
    }

    /// Drops all futures given to [`Io::spawn`]; operations they had started run to their end.
    ///
    /// Futures that hold an [`Io`] keep the reactor and its engine alive: whoever abandons
    /// unfinished ones calls this, outside of them, before dropping the last handle.
    pub fn abandon_tasks(&self) {
        loop {
            let tasks = (self.0.tasks.take(), self.0.spawned.take());
            if tasks.0.is_empty() && tasks.1.is_empty() {
                return;
            }
        }
    }

    /// Waits until `deadline`.
    pub fn sleep_until(&self, deadline: Time) -> impl Future<Output = ()> + use<E> {
        Sleep { io: self.clone(), deadline, key: None }
    }

    /// Moves everything that can move: starts submitted operations, collects finished ones, runs
    /// woken tasks. Outcomes of [`Io::start`] are appended to `finished`. Not to be called from a
    /// task.
    pub fn poll(&self, finished: &mut Vec<(u64, Outcome)>) {
        self.0.woken.waiting.store(false, Ordering::SeqCst);
        for _ in 0..ROUNDS_MAX {
            let mut completions = self.0.completions.take();
            self.0.engine.borrow_mut().collect(&mut completions);
            for completion in completions.drain(..) {
                self.complete(completion, finished);
            }
            self.0.completions.set(completions);
            let now = self.now();
            while let Some(waker) = self.due(now) {
                waker.wake();
            }
            if !self.0.woken.flag.swap(false, Ordering::SeqCst) {
                return;
            }
            self.run_tasks();
        }
        // Tasks are still awake: the next wait returns at once.
        self.0.woken.flag.store(true, Ordering::SeqCst);
    }

    /// Blocks until polling may bring something new, or `deadline`.
    pub fn wait(&self, deadline: Option<Time>) {
        self.0.woken.waiting.store(true, Ordering::SeqCst);
        if self.0.woken.flag.load(Ordering::SeqCst) {
            return;
        }
        let timer = self.0.timers.borrow().next();
        let until = match (deadline, timer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.0.engine.borrow_mut().wait(until);
    }

    /// Now, by the engine's clock.
    pub fn now(&self) -> Time {
        self.0.engine.borrow().now()
    }

    /// Operations not yet finished.
    pub fn in_flight(&self) -> usize {
        self.0.flights.borrow().len()
    }

    /// Futures not yet finished.
    pub fn tasks(&self) -> usize {
        self.0.tasks.borrow().len() + self.0.spawned.borrow().len()
    }

    /// Access to the engine.
    pub fn with_engine<R>(&self, f: impl FnOnce(&mut E) -> R) -> R {
        f(&mut self.0.engine.borrow_mut())
    }

    fn launch(&self, target: Target, op: Op<E::File>) -> usize {
        let key = self.0.flights.borrow_mut().insert(Flight { target, retries: 0 });
        self.0.engine.borrow_mut().submit(key as u64, op);
        key
    }

    /// One task whose timer has run out.
    fn due(&self, now: Time) -> Option<Waker> {
        self.0.timers.borrow_mut().due(now)
    }

    fn complete(&self, completion: Completion<E::File>, finished: &mut Vec<(u64, Outcome)>) {
        let Completion { token, mut result, mut op } = completion;
        let key = token as usize;
        if must_go_on(&mut op, &mut result, &mut self.0.flights.borrow_mut()[key].retries) {
            self.0.engine.borrow_mut().submit(token, op);
            return;
        }
        // Declared before the borrow: what an abandoned operation held is dropped after it.
        let outcome = Outcome { result, memory: op.into_memory() };
        let mut flights = self.0.flights.borrow_mut();
        match &mut flights[key].target {
            Target::Fast(token) => {
                finished.push((*token, outcome));
                flights.remove(key);
            }
            Target::Future(state) => {
                let waiting = std::mem::replace(state, FutureState::Ready(outcome));
                drop(flights);
                if let FutureState::Waiting(Some(waker)) = waiting {
                    waker.wake();
                }
            }
            Target::Abandoned => {
                flights.remove(key);
            }
        }
    }

    fn run_tasks(&self) {
        let waker = Waker::from(Arc::clone(&self.0.woken));
        let mut cx = Context::from_waker(&waker);
        let mut tasks = self.0.tasks.take();
        loop {
            tasks.extend(self.0.spawned.take());
            match Pin::new(&mut tasks).poll_next(&mut cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        debug_assert!(self.0.tasks.borrow().is_empty(), "poll is not reentrant");
        *self.0.tasks.borrow_mut() = tasks;
    }
}

/// Performs one operation on an engine that nothing else uses meanwhile, and blocks until it has
/// ended: for those who have an engine and neither a thread nor a reactor.
pub fn perform<E: Engine>(engine: &mut E, op: Op<E::File>) -> Outcome {
    let (mut retries, mut done) = (0, Vec::new());
    engine.submit(0, op);
    loop {
        engine.collect(&mut done);
        let Some(Completion { mut result, mut op, .. }) = done.pop() else {
            engine.wait(None);
            continue;
        };
        if !must_go_on(&mut op, &mut result, &mut retries) {
            return Outcome { result, memory: op.into_memory() };
        }
        engine.submit(0, op);
    }
}

/// Whether `op` must be submitted again because it was interrupted or moved only a part;
/// otherwise `result` is final.
fn must_go_on<F>(op: &mut Op<F>, result: &mut Result<usize, Errno>, retries: &mut u32) -> bool {
    match *result {
        Err(Errno::INTR | Errno::AGAIN) if *retries < RETRIES_MAX => {
            *retries += 1;
            true
        }
        Err(_) => false,
        Ok(moved) => {
            let (transfer, is_write) = match op {
                Op::Read(transfer) => (transfer, false),
                Op::Write(transfer) => (transfer, true),
                _ => return false,
            };
            if moved > 0 {
                *retries = 0;
            }
            transfer.done += moved;
            assert!(transfer.done <= transfer.memory.len(), "an engine moved more than it was given");
            if transfer.done < transfer.memory.len() && moved > 0 {
                return true;
            }
            *result = if is_write && transfer.done < transfer.memory.len() {
                Err(Errno::IO)
            } else {
                Ok(transfer.done)
            };
            false
        }
    }
}

/// The future of an operation.
struct Running<E: Engine> {
    io: Io<E>,
    key: Option<usize>,
}

impl<E: Engine> Future for Running<E> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let key = self.key.expect("polled after completion");
        let mut flights = self.io.0.flights.borrow_mut();
        let Target::Future(state) = &mut flights[key].target else { unreachable!("a future's flight") };
        match std::mem::replace(state, FutureState::Waiting(Some(cx.waker().clone()))) {
            FutureState::Waiting(_) => Poll::Pending,
            FutureState::Ready(outcome) => {
                flights.remove(key);
                drop(flights);
                self.key = None;
                Poll::Ready(outcome)
            }
        }
    }
}

impl<E: Engine> Drop for Running<E> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut flights = self.io.0.flights.borrow_mut();
        let abandoned = std::mem::replace(&mut flights[key].target, Target::Abandoned);
        if let Target::Future(FutureState::Ready(_)) = abandoned {
            flights.remove(key);
        }
        // Memory and wakers end when nothing is borrowed.
        drop(flights);
        drop(abandoned);
    }
}

/// Runs `future` on this thread, polling and waiting on `io`, until it has finished: for set-up
/// and for tools.
pub fn block_on<E: Engine, T: 'static>(io: &Io<E>, future: impl Future<Output = T> + 'static) -> T {
    let slot = Rc::new(Cell::new(None));
    let result = Rc::clone(&slot);
    io.spawn(async move { result.set(Some(future.await)) });
    let mut finished = Vec::new();
    loop {
        io.poll(&mut finished);
        assert!(finished.is_empty(), "block_on does not serve Io::start");
        if let Some(value) = slot.take() {
            return value;
        }
        io.wait(None);
    }
}

/// Runs what `task` makes of a reactor until it has finished, and gives the reactor up: what was spawned on it and has not ended
/// is [abandoned](Io::abandon_tasks), and lets go of what it holds, such as files and their locks.
pub fn run_alone<E: Engine, T: 'static, F>(io: Io<E>, task: impl FnOnce(Io<E>) -> F) -> T
where
    F: Future<Output = T> + 'static,
{
    let value = block_on(&io, task(io.clone()));
    io.abandon_tasks();
    value
}
