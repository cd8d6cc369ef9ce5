//! Storage that lacks what not every file system has: an engine that refuses some operations as the
//! kernel does there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::{Completion, Engine, Op, Time};

/// An engine that neither allocates space ahead nor gives any back.
#[derive(Debug)]
pub struct LackingEngine<E: Engine> {
    inner: E,
    refused: Vec<Completion<E::File>>,
    count: Arc<AtomicU64>,
}

impl<E: Engine> LackingEngine<E> {
    /// Over `inner`; `count` counts what was refused.
    pub fn new(inner: E, count: Arc<AtomicU64>) -> Self {
        Self { inner, refused: Vec::new(), count }
    }
}

impl<E: Engine> Engine for LackingEngine<E> {
    type File = E::File;

    fn submit(&mut self, token: u64, op: Op<E::File>) {
        if matches!(op, Op::Allocate { .. } | Op::Punch { .. } | Op::Discard { .. }) {
            self.count.fetch_add(1, Ordering::Relaxed);
            self.refused.push(Completion { token, result: Err(Errno::OPNOTSUPP), op });
        } else {
            self.inner.submit(token, op);
        }
    }

    fn collect(&mut self, done: &mut Vec<Completion<E::File>>) {
        done.append(&mut self.refused);
        self.inner.collect(done);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        if self.refused.is_empty() {
            self.inner.wait(deadline);
        }
    }

    fn in_flight(&self) -> usize {
        self.refused.len() + self.inner.in_flight()
    }

    fn now(&self) -> Time {
        self.inner.now()
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }
}
