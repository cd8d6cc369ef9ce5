//! Threads that hash and compress; and doing so at once instead, so that everything is deterministic.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::thread::{self, JoinHandle};

use super::codec::Coder;

type Job = Box<dyn FnOnce(&mut Coder) + Send>;

/// Who hashes and compresses. Shared by as many seals as like.
pub struct Workers(Kind);

enum Kind {
    Inline(Mutex<Coder>),
    Pool { jobs: Option<Sender<Job>>, threads: Vec<JoinHandle<()>> },
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Workers").field(&self.threads()).finish()
    }
}

impl Workers {
    /// The calling thread itself, compressing at this level (see [`Coder::new`]).
    ///
    /// # Errors
    /// When there is no memory for tables.
    pub fn inline(level: i32) -> io::Result<Self> {
        Ok(Self(Kind::Inline(Mutex::new(Coder::new(level)?))))
    }

    /// So many threads of their own.
    ///
    /// # Errors
    /// When there is no memory for tables, or for threads.
    pub fn threads_of(threads: usize, level: i32) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let start = |number: usize| {
            let (queue, coder) = (Arc::clone(&queue), Coder::new(level)?);
            thread::Builder::new().name(format!("seal-{number}")).spawn(move || work(&queue, coder))
        };
        let threads = (0..threads.max(1)).map(start).collect::<io::Result<Vec<_>>>()?;
        Ok(Self(Kind::Pool { jobs: Some(jobs), threads }))
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        match &self.0 {
            Kind::Inline(_) => 0,
            Kind::Pool { threads, .. } => threads.len(),
        }
    }

    /// Has a job done.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Coder) -> T + Send + 'static,
    ) -> Ticket<T> {
        let ticket = Ticket(Arc::default());
        match &self.0 {
            Kind::Inline(coder) => {
                let result = job(&mut coder.lock().unwrap_or_else(PoisonError::into_inner));
                ticket.0.lock().unwrap_or_else(PoisonError::into_inner).result = Some(result);
            }
            Kind::Pool { jobs, .. } => {
                let promise = Promise(Arc::clone(&ticket.0));
                let job: Job = Box::new(move |coder| promise.keep(job(coder)));
                let jobs = jobs.as_ref().expect("it is there until the pool is dropped");
                jobs.send(job).expect("workers end when the pool is dropped");
            }
        }
        ticket
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if let Kind::Pool { jobs, threads } = &mut self.0 {
            jobs.take();
            for thread in threads.drain(..) {
                // One that panicked has said so where its result was awaited.
                let _ = thread.join();
            }
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>, mut coder: Coder) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(&mut coder),
            Err(_) => return,
        }
    }
}

struct State<T> {
    result: Option<T>,
    /// The job ended without a result.
    is_lost: bool,
    waker: Option<Waker>,
}

impl<T> Default for State<T> {
    fn default() -> Self {
        Self { result: None, is_lost: false, waker: None }
    }
}

/// The worker's end of a [`Ticket`].
struct Promise<T>(Arc<Mutex<State<T>>>);

impl<T> Promise<T> {
    fn keep(self, result: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).result = Some(result);
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_lost = state.result.is_none();
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// What a job will come to.
pub(super) struct Ticket<T>(Arc<Mutex<State<T>>>);

impl<T> Ticket<T> {
    /// Whether it is there.
    pub(super) fn is_ready(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).result.is_some()
    }

    /// Waits for it.
    ///
    /// # Panics
    /// When the job panicked.
    pub(super) async fn wait(self) -> T {
        poll_fn(|cx| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            assert!(!state.is_lost, "a worker failed");
            match state.result.take() {
                Some(result) => Poll::Ready(result),
                None => {
                    state.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
