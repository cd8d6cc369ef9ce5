//! The reactor over an engine that does what a script says.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::rc::Weak;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;
use crate::buffer::{AlignedBuf, SharedBuf};
use crate::storage::{Alignment, FileIdentity, Lock, LockError, StorageFile};
use crate::units::FileOffset;

/// A file in name only.
#[derive(Clone, Debug)]
struct File;

impl StorageFile for File {
    fn path(&self) -> &Path {
        Path::new("file")
    }
    fn is_shared(&self) -> bool {
        false
    }
    fn size(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { size: 0, mtime_ns: 0 })
    }
    fn alignment(&self) -> Alignment {
        Alignment::NONE
    }
    fn lock(&self, _: Lock) -> Result<(), LockError> {
        Ok(())
    }
    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts wakes.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Ends operations in the order of submission with the results of the script; after its end they
/// stay in flight. Time passes only in `wait`.
#[derive(Default)]
struct Scripted {
    script: VecDeque<Result<usize, Errno>>,
    queue: VecDeque<(u64, Op<File>)>,
    /// `done` of every transfer submitted.
    attempts: Vec<usize>,
    waits: Vec<Option<Time>>,
    now: Time,
    wakes: Arc<Count>,
}

impl Engine for Scripted {
    type File = File;

    fn submit(&mut self, token: u64, op: Op<File>) {
        if let Op::Read(transfer) | Op::Write(transfer) = &op {
            self.attempts.push(transfer.done);
        }
        self.queue.push_back((token, op));
    }

    fn collect(&mut self, done: &mut Vec<Completion<File>>) {
        while !self.script.is_empty() && !self.queue.is_empty() {
            let (token, op) = self.queue.pop_front().unwrap();
            done.push(Completion { token, result: self.script.pop_front().unwrap(), op });
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.waits.push(deadline);
        assert!(self.waits.len() < 10_000, "it spins");
        self.now = self.now.max(deadline.unwrap_or(self.now));
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }

    fn now(&self) -> Time {
        self.now
    }

    fn waker(&self) -> Waker {
        Waker::from(Arc::clone(&self.wakes))
    }
}

fn scripted(script: impl IntoIterator<Item = Result<usize, Errno>>) -> Io<Scripted> {
    Io::new(Scripted { script: script.into_iter().collect(), ..Scripted::default() })
}

fn read(len: usize) -> Op<File> {
    Op::read(File, FileOffset(0), AlignedBuf::zeroed(len))
}

fn write(len: usize) -> Op<File> {
    Op::write(File, FileOffset(0), AlignedBuf::zeroed(len))
}

/// The outcome of one operation on the fast path and the attempts it took.
fn outcome(script: &[Result<usize, Errno>], op: Op<File>) -> (Result<usize, Errno>, Vec<usize>) {
    let io = scripted(script.iter().copied());
    io.start(42, op);
    let mut finished = Vec::new();
    for _ in 0..3 * RETRIES_MAX {
        io.poll(&mut finished);
    }
    let (token, outcome) = finished.pop().expect("it ends");
    assert_eq!((token, finished.len(), io.in_flight()), (42, 0, 0));
    (outcome.result, io.with_engine(|engine| engine.attempts.clone()))
}

#[test]
fn short_transfers_go_on() {
    assert_eq!(outcome(&[Ok(100)], read(100)), (Ok(100), vec![0]));
    assert_eq!(outcome(&[Ok(30), Ok(1), Ok(69)], read(100)), (Ok(100), vec![0, 30, 31]));
    assert_eq!(outcome(&[Ok(30), Ok(70)], write(100)), (Ok(100), vec![0, 30]));
    assert_eq!(outcome(&[Ok(0)], read(0)), (Ok(0), vec![0]));
    assert_eq!(outcome(&[Ok(0)], write(0)), (Ok(0), vec![0]));
}

#[test]
fn end_of_file_ends_a_read_and_fails_a_write() {
    assert_eq!(outcome(&[Ok(0)], read(100)), (Ok(0), vec![0]));
    assert_eq!(outcome(&[Ok(60), Ok(0)], read(100)), (Ok(60), vec![0, 60]));
    assert_eq!(outcome(&[Ok(60), Ok(0)], write(100)), (Err(Errno::IO), vec![0, 60]));
}

#[test]
fn interruptions_are_retried_and_bounded() {
    let script = [Err(Errno::INTR), Ok(10), Err(Errno::AGAIN), Ok(90)];
    assert_eq!(outcome(&script, read(100)), (Ok(100), vec![0, 0, 10, 10]));
    let sync = Op::Sync { file: File };
    assert_eq!(outcome(&[Err(Errno::INTR), Ok(0)], sync).0, Ok(0));
    let endless = vec![Err(Errno::AGAIN); 2000];
    let (result, attempts) = outcome(&endless, write(100));
    assert_eq!((result, attempts.len()), (Err(Errno::AGAIN), RETRIES_MAX as usize + 1));
    // In a row: progress starts the count again.
    let mut script = vec![Err(Errno::INTR); RETRIES_MAX as usize];
    script.push(Ok(1));
    script.extend(vec![Err(Errno::INTR); RETRIES_MAX as usize]);
    script.push(Ok(99));
    assert_eq!(outcome(&script, write(100)).0, Ok(100));
}

#[test]
fn errors_are_final() {
    for errno in [Errno::IO, Errno::NOSPC, Errno::INVAL] {
        assert_eq!(outcome(&[Err(errno), Ok(100)], write(100)), (Err(errno), vec![0]));
        assert_eq!(outcome(&[Ok(50), Err(errno)], read(100)), (Err(errno), vec![0, 50]));
    }
}

#[test]
fn memory_comes_back_and_is_zero_filled() {
    let io = scripted([Ok(2), Ok(0)]);
    let shared = SharedBuf::heap(4);
    shared.write_at(0, b"abcd");
    let outcome = block_on(&io, io.run(Op::read(File, FileOffset(0), shared)));
    let memory = outcome.zero_filled().unwrap();
    let mut bytes = [9; 4];
    memory.read_at(0, &mut bytes);
    assert_eq!(&bytes, b"ab\0\0");
}

#[test]
fn futures_run_beside_each_other() {
    let io = scripted([Ok(1), Ok(2), Ok(3)]);
    let inner = io.clone();
    let total = block_on(&io, async move {
        let (a, b) = (inner.run(read(1)), inner.run(read(2)));
        // Awaited in the other order than they finish.
        let b = b.await.result.unwrap();
        let a = a.await.result.unwrap();
        a + b + inner.run(read(3)).await.result.unwrap()
    });
    assert_eq!((total, io.in_flight(), io.tasks()), (6, 0, 0));
}

#[test]
fn a_dropped_future_abandons_its_outcome_only() {
    let io = scripted([]);
    let owner = Arc::new(());
    let shared = SharedBuf::heap(8);
    let lent = {
        let address = std::ptr::NonNull::new(shared.address()).unwrap();
        // The window outlives the operation; the owner only tells when it is let go.
        #[allow(unsafe_code)]
        // SAFETY: `shared` lives to the end of the test.
        unsafe {
            SharedBuf::from_raw(address, 8, Arc::clone(&owner) as _)
        }
    };
    drop(io.run(Op::read(File, FileOffset(0), lent)));
    io.poll(&mut Vec::new());
    assert_eq!((io.in_flight(), Arc::strong_count(&owner)), (1, 2), "the memory stays lent");
    io.with_engine(|engine| engine.script.extend([Ok(4), Ok(4)]));
    let mut finished = Vec::new();
    io.poll(&mut finished);
    io.poll(&mut finished);
    assert!(finished.is_empty());
    assert_eq!((io.in_flight(), Arc::strong_count(&owner)), (0, 1));
    // Dropped when it is ready but was not looked at.
    let ready = io.run(read(1));
    io.with_engine(|engine| engine.script.push_back(Ok(1)));
    io.poll(&mut finished);
    assert_eq!(io.in_flight(), 1);
    drop(ready);
    assert_eq!(io.in_flight(), 0);
}

#[test]
fn timers_fire_in_order_and_bound_the_wait() {
    let io = scripted([]);
    let order = Rc::new(RefCell::new(Vec::new()));
    for (name, ms) in [("c", 30), ("a", 10), ("b", 20), ("b2", 20)] {
        let (io2, order) = (io.clone(), Rc::clone(&order));
        io.spawn(async move {
            io2.sleep_until(Duration::from_millis(ms)).await;
            order.borrow_mut().push((name, io2.now()));
        });
    }
    let inner = io.clone();
    block_on(&io, async move { inner.sleep_until(Duration::from_millis(30)).await });
    let at = Duration::from_millis;
    assert_eq!(*order.borrow(), [("a", at(10)), ("b", at(20)), ("b2", at(20)), ("c", at(30))]);
    io.wait(Some(at(40)));
    let waits = io.with_engine(|engine| engine.waits.clone());
    assert_eq!(waits, [Some(at(10)), Some(at(20)), Some(at(30)), Some(at(40))]);
}

#[test]
fn a_raced_sleep_leaves_one_timer() {
    let io = scripted(vec![Ok(1); 100]);
    let inner = io.clone();
    block_on(&io, async move {
        let mut sleep = Box::pin(inner.sleep_until(Duration::from_secs(1)));
        for _ in 0..100 {
            let mut operation = Box::pin(inner.run(read(1)));
            std::future::poll_fn(|cx| {
                assert!(sleep.as_mut().poll(cx).is_pending());
                operation.as_mut().poll(cx).map(drop)
            })
            .await;
            assert_eq!(inner.0.timers.borrow().len(), 1);
        }
        drop(sleep);
        assert_eq!(inner.0.timers.borrow().len(), 0);
    });
}

#[test]
fn tasks_that_yield_do_not_keep_the_thread() {
    let io = scripted([Ok(1)]);
    io.spawn(std::future::poll_fn(|cx| {
        cx.waker().wake_by_ref();
        Poll::Pending
    }));
    io.start(7, read(1));
    let mut finished = Vec::new();
    io.poll(&mut finished);
    assert_eq!(finished.len(), 1);
    io.wait(None);
    assert!(io.with_engine(|engine| engine.waits.is_empty()), "an awake task is not slept over");
}

#[test]
fn tasks_spawned_by_tasks_run_in_the_same_poll() {
    let io = scripted([]);
    let (inner, ran) = (io.clone(), Rc::new(Cell::new(0)));
    let count = Rc::clone(&ran);
    io.spawn(async move {
        let (inner2, count2) = (inner.clone(), Rc::clone(&count));
        inner.spawn(async move {
            inner2.spawn(async move { count2.set(count2.get() + 1) });
            count.set(count.get() + 1);
        });
    });
    assert_eq!(io.tasks(), 1);
    io.poll(&mut Vec::new());
    assert_eq!((ran.get(), io.tasks()), (2, 0));
}

#[test]
fn a_task_woken_by_another_thread_ends_the_wait() {
    let io = scripted([]);
    let slot = Arc::new(std::sync::Mutex::new(None::<Waker>));
    let shared = Arc::clone(&slot);
    io.spawn(std::future::poll_fn(move |cx| {
        *shared.lock().unwrap() = Some(cx.waker().clone());
        Poll::Pending
    }));
    io.poll(&mut Vec::new());
    let wakes = io.with_engine(|engine| Arc::clone(&engine.wakes));
    let waker = slot.lock().unwrap().take().unwrap();
    waker.wake_by_ref();
    assert_eq!(wakes.0.load(Ordering::Acquire), 0, "a thread that does not wait needs no wake");
    io.poll(&mut Vec::new());
    let waker = slot.lock().unwrap().take().expect("it ran");
    io.wait(Some(Duration::ZERO));
    std::thread::spawn(move || waker.wake()).join().unwrap();
    assert_eq!(wakes.0.load(Ordering::Acquire), 1);
    io.poll(&mut Vec::new());
    assert!(slot.lock().unwrap().is_some(), "it ran again");
}

#[test]
fn abandoned_tasks_let_the_engine_go() {
    let io = scripted([]);
    let reactor: Weak<_> = Rc::downgrade(&io.0);
    for _ in 0..3 {
        let inner = io.clone();
        io.spawn(async move {
            let sleep = inner.sleep_until(Duration::from_secs(1));
            inner.run(read(1)).await;
            sleep.await;
        });
    }
    io.poll(&mut Vec::new());
    let inner = io.clone();
    io.spawn(async move { inner.sleep_until(Duration::from_secs(1)).await });
    assert_eq!((io.tasks(), io.in_flight()), (4, 3));
    io.abandon_tasks();
    assert_eq!((io.tasks(), io.in_flight()), (0, 3));
    io.poll(&mut Vec::new());
    drop(io);
    assert!(reactor.upgrade().is_none());
}

#[test]
fn a_reactor_of_its_own_leaves_nothing_behind() {
    let (io, held) = (scripted([Ok(1)]), Rc::new(()));
    let reactor: Weak<_> = Rc::downgrade(&io.0);
    let read = run_alone(io, |io| {
        let (inner, kept) = (io.clone(), Rc::clone(&held));
        io.spawn(async move {
            inner.sleep_until(Duration::MAX).await;
            drop(kept);
        });
        async move { io.run(read(1)).await.result }
    });
    assert_eq!((read, Rc::strong_count(&held)), (Ok(1), 1));
    assert!(reactor.upgrade().is_none());
}

#[test]
fn one_operation_is_performed_to_its_end() {
    let scripted = |script: &[Result<usize, Errno>]| {
        let script = script.iter().copied().collect();
        let mut engine = Scripted { script, ..Scripted::default() };
        let outcome = perform(&mut engine, read(6));
        (outcome.result, engine.attempts, outcome.memory.map(|memory| memory.len()))
    };
    assert_eq!(scripted(&[Ok(2), Err(Errno::AGAIN), Ok(4)]), (Ok(6), vec![0, 2, 2], Some(6)));
    assert_eq!(scripted(&[Ok(2), Ok(0)]), (Ok(2), vec![0, 2], Some(6)));
    assert_eq!(scripted(&[Err(Errno::IO)]), (Err(Errno::IO), vec![0], Some(6)));
}
