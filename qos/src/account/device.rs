//! A device that keeps account of what its queues do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sapwood_blockdev::device::{BlockDevice, DeviceQueue, Done as Reported, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time};
use slab::Slab;

use super::histogram::{Recorder, add};
use super::{Account, Done, Kind};

/// What one queue did with requests of one kind.
#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: Recorder,
}

impl Counters {
    fn done(&self) -> Done {
        Done {
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            latency: self.latency.histogram(),
        }
    }
}

/// What one queue did. On cache lines of its own.
#[derive(Default)]
#[repr(align(64))]
struct Book {
    taken: AtomicU64,
    in_flight: AtomicU64,
    kinds: [Counters; Kind::ALL.len()],
}

impl Book {
    fn account(&self) -> Account {
        let mut account = Account { in_flight: self.in_flight.load(Ordering::Relaxed), ..Account::default() };
        for kind in Kind::ALL {
            account[kind] = self.kinds[kind as usize].done();
        }
        account
    }
}

/// The books of a device.
#[derive(Default)]
struct Books {
    open: Vec<Arc<Book>>,
    /// What queues did that are gone, and how many requests these had taken.
    closed: Account,
    closed_taken: u64,
}

impl Books {
    /// Keeps what a queue did that goes.
    fn close(&mut self, book: &Arc<Book>) {
        self.open.retain(|other| !Arc::ptr_eq(other, book));
        let account = Account { in_flight: 0, ..book.account() };
        self.closed.merge(&account);
        self.closed_taken += book.taken.load(Ordering::Relaxed);
    }
}

fn locked(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that keeps account.
pub struct Accounted<D> {
    inner: Arc<D>,
    books: Arc<Mutex<Books>>,
}

impl<D> Accounted<D> {
    /// Keeps the account of a device, from now on.
    pub fn new(inner: Arc<D>) -> Arc<Self> {
        Arc::new(Self { inner, books: Arc::default() })
    }

    /// The device itself.
    pub fn inner(&self) -> &Arc<D> {
        &self.inner
    }

    /// What was done so far. A request counts before it is reported.
    pub fn account(&self) -> Account {
        let books = locked(&self.books);
        let mut account = books.closed.clone();
        books.open.iter().for_each(|book| account.merge(&book.account()));
        account
    }

    /// Requests that were taken so far; cheaper than the account.
    pub fn requests(&self) -> u64 {
        let books = locked(&self.books);
        let open: u64 = books.open.iter().map(|book| book.taken.load(Ordering::Relaxed)).sum();
        books.closed_taken + open
    }
}

impl<D: BlockDevice> BlockDevice for Accounted<D> {
    type Engine = D::Engine;
    type Queue = AccountedQueue<D::Queue>;

    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn queue(self: &Arc<Self>, engine: D::Engine) -> Self::Queue {
        let book = Arc::<Book>::default();
        locked(&self.books).open.push(Arc::clone(&book));
        AccountedQueue {
            inner: self.inner.queue(engine),
            books: Arc::clone(&self.books),
            book,
            flights: Slab::new(),
            submitting: None,
        }
    }

    fn set_write_cache(&self, enabled: bool) {
        self.inner.set_write_cache(enabled);
    }
}

/// A request that is not reported.
struct Flight {
    /// What the caller knows it by.
    tag: u64,
    kind: Kind,
    bytes: u64,
    since: Time,
}

/// A queue of an [`Accounted`] device.
pub struct AccountedQueue<Q> {
    inner: Q,
    books: Arc<Mutex<Books>>,
    book: Arc<Book>,
    /// The device below knows requests by their places here.
    flights: Slab<Flight>,
    /// When the requests were submitted that came after the last poll.
    submitting: Option<Time>,
}

impl<Q: DeviceQueue> AccountedQueue<Q> {
    fn now(&mut self) -> Time {
        self.inner.with_engine(|engine| engine.now())
    }

    fn show_in_flight(&self) {
        self.book.in_flight.store(self.flights.len() as u64, Ordering::Relaxed);
    }
}

impl<Q: DeviceQueue> DeviceQueue for AccountedQueue<Q> {
    type Engine = Q::Engine;

    fn submit(&mut self, mut request: Request) {
        let since = match self.submitting {
            Some(since) => since,
            None => *self.submitting.insert(self.inner.with_engine(|engine| engine.now())),
        };
        let kind = Kind::of(&request.command);
        // The length of a flush means nothing.
        let bytes = if kind == Kind::Flush { 0 } else { request.len };
        request.tag = self.flights.insert(Flight { tag: request.tag, kind, bytes, since }) as u64;
        add(&self.book.taken, 1);
        self.show_in_flight();
        self.inner.submit(request);
    }

    fn poll(&mut self, done: &mut Vec<Reported>) {
        self.submitting = None;
        let first = done.len();
        self.inner.poll(done);
        if done.len() == first {
            return;
        }
        let now = self.now();
        for reported in &mut done[first..] {
            let Flight { tag, kind, bytes, since } = self.flights.remove(reported.tag as usize);
            reported.tag = tag;
            let counters = &self.book.kinds[kind as usize];
            match reported.result {
                Ok(()) => add(&counters.bytes, bytes),
                Err(_) => add(&counters.errors, 1),
            }
            counters.latency.record(now.saturating_sub(since));
        }
        self.show_in_flight();
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.inner.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut Self::Engine) -> R) -> R {
        self.inner.with_engine(f)
    }
}

impl<Q> Drop for AccountedQueue<Q> {
    fn drop(&mut self) {
        locked(&self.books).close(&self.book);
    }
}
