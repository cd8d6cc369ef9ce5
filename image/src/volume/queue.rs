//! A thread's queue on a volume.
//!
//! It passes requests to a queue on the volume's layer. When the volume is being switched to another one,
//! it keeps new requests, in order, until what it has on the old layer has ended; then it leaves that,
//! and goes on when everybody has left.

use std::collections::VecDeque;
use std::sync::Arc;

use sapwood_blockdev::device::{DeviceQueue, Done, Request};
use sapwood_blockdev::engine::{Engine, Time};
use sapwood_blockdev::io::Io;

use super::{Phase, Volume};
use crate::layer::LayerQueue;

/// See the module's documentation. Made by [`Volume::queue_on`].
pub struct VolumeQueue<E: Engine> {
    volume: Arc<Volume<E>>,
    io: Io<E>,
    /// Its number among those who use the volume.
    member: usize,
    /// The phase of the volume that it goes by.
    phase: Phase,
    /// On the layer of that phase; during a switch on the old one, until it has left that.
    inner: Option<LayerQueue<E>>,
    /// What came during a switch.
    held: VecDeque<Request>,
    is_parked: bool,
}

impl<E: Engine> VolumeQueue<E> {
    pub(super) fn new(volume: Arc<Volume<E>>, io: Io<E>) -> Self {
        let waker = io.with_engine(|engine| engine.waker());
        let (member, phase) = volume.join(waker);
        Self { volume, io, member, phase, inner: None, held: VecDeque::new(), is_parked: true }
    }

    /// Goes by the volume's phase: one look when it is the same.
    fn follow(&mut self) {
        if self.is_parked || self.volume.phase() != self.phase || self.inner.is_none() {
            self.catch_up();
        }
    }

    #[cold]
    fn catch_up(&mut self) {
        let was_parked = std::mem::take(&mut self.is_parked);
        let (phase, layer) = self.volume.enter(self.member, was_parked);
        if self.volume.is_ahead(self.phase, phase) {
            return;
        }
        let is_next = phase.number() != self.phase.number();
        let is_new = self.inner.is_none() || is_next;
        self.phase = phase;
        if phase.is_switching() {
            if was_parked {
                // Of a queue that slept through the beginning nobody expects that it leaves.
                self.inner = None;
            } else if self.inner.is_none() && is_next {
                // It slept through the end of the last switch, and has nothing on the layer that is to be left.
                self.pass();
            }
            return;
        }
        if is_new {
            let left = self.inner.as_ref().map_or(0, |inner| inner.outstanding());
            assert_eq!(left, 0, "a switch waits for what is outstanding");
            self.start_on(layer.queue_on(self.io.clone()));
        }
    }

    fn start_on(&mut self, mut inner: LayerQueue<E>) {
        self.held.drain(..).for_each(|request| inner.submit(request));
        self.inner = Some(inner);
    }

    /// Leaves the old layer during a switch when nothing is left there; says whether it did.
    fn leave(&mut self) -> bool {
        let has_ended = self.inner.as_ref().is_some_and(|inner| inner.outstanding() == 0);
        if !has_ended || !self.phase.is_switching() {
            return false;
        }
        self.pass();
        true
    }

    /// Tells that there is nothing of it on the old layer, and goes on if everybody else has left.
    fn pass(&mut self) {
        self.inner = None;
        if let Some((phase, layer)) = self.volume.leave(self.member) {
            self.phase = phase;
            self.start_on(layer.queue_on(self.io.clone()));
        }
    }
}

impl<E: Engine> DeviceQueue for VolumeQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        self.follow();
        match self.inner.as_mut().filter(|_| !self.phase.is_switching()) {
            Some(inner) => inner.submit(request),
            None => self.held.push_back(request),
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        loop {
            self.follow();
            if let Some(inner) = &mut self.inner {
                inner.poll(done);
            } else {
                self.io.poll(&mut Vec::new());
            }
            if !self.leave() {
                return;
            }
        }
    }

    fn wait(&mut self, deadline: Option<Time>) {
        if !self.is_parked && self.outstanding() == 0 {
            self.is_parked = true;
            self.volume.park(self.member);
        }
        self.io.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.held.len() + self.inner.as_ref().map_or(0, |inner| inner.outstanding())
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        self.io.with_engine(f)
    }
}

impl<E: Engine> Drop for VolumeQueue<E> {
    fn drop(&mut self) {
        self.inner = None;
        self.volume.remove(self.member);
    }
}
