//! A thread's queue on a disk that is a chain and nothing above it.
//!
//! - Fast: every table and node is in memory; each stretch is zeroed, or read straight into the caller's memory.
//! - Slow, as tasks: tables that must be read first (then the request goes on as if they had been
//!   there), compressed clusters, memory that direct I/O cannot reach.
//!
//! How much memory compressed clusters take at a time is bounded; beyond that, parts wait.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use sapwood_blockdev::buffer::Memory;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Done, Request};
use sapwood_blockdev::engine::{Engine, Op, Time};
use sapwood_blockdev::io::{Io, Outcome};
use sapwood_blockdev::units::SECTOR_SIZE;
use slab::Slab;

use super::{Chain, Compressed, Held, Piece, Source, reaches};
use crate::counts::Hits;

/// Bytes that parts being decompressed may take on one queue; one may always go on.
const DECOMPRESSING_MAX: usize = 16 << 20;

type Result<T = ()> = std::result::Result<T, DeviceError>;

/// A request that was accepted and not yet reported.
struct Pending {
    tag: u64,
    /// Parts of it still under way.
    remaining: usize,
    result: Result,
}

/// What a task leaves for its queue.
enum Message<F> {
    /// A request was planned, after its tables were read.
    Planned { key: usize, memory: Memory, pieces: Result<Vec<Piece<F>>> },
    /// A part of a request has ended, and gives back what it took of [`DECOMPRESSING_MAX`].
    Ended { key: usize, result: Result, cost: usize },
}

/// One thread's access to a [`ChainDisk`](super::ChainDisk), which makes it.
pub struct ChainQueue<E: Engine> {
    chain: Arc<Chain<E>>,
    frames: Arc<Hits>,
    io: Io<E>,
    pending: Slab<Pending>,
    ready: Vec<Done>,
    inbox: Rc<RefCell<Vec<Message<E::File>>>>,
    /// Parts in compressed clusters that wait for others to end.
    compressed: VecDeque<(usize, Compressed, Memory)>,
    /// What those under way take.
    decompressing: usize,
    /// Scratch, kept for its capacity.
    pieces: Vec<Piece<E::File>>,
    finished: Vec<(u64, Outcome)>,
}

impl<E: Engine> ChainQueue<E> {
    pub(super) fn new(chain: Arc<Chain<E>>, frames: Arc<Hits>, io: Io<E>) -> Self {
        Self {
            chain,
            frames,
            io,
            pending: Slab::new(),
            ready: Vec::new(),
            inbox: Rc::default(),
            compressed: VecDeque::new(),
            decompressing: 0,
            pieces: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// Refuses what cannot be; otherwise starts the request.
    fn start(&mut self, request: Request) -> Result {
        let Request { tag, offset, len, command } = request;
        let memory = match command {
            Command::Flush => None,
            Command::Read(memory) => Some(memory),
            Command::Write(_) | Command::WriteZeroes | Command::Discard => return Err(DeviceError::ReadOnly),
        };
        let Some(memory) = memory.filter(|memory| !memory.is_empty()) else {
            self.ready.push(Done { tag, result: Ok(()) });
            return Ok(());
        };
        let end = offset.0.checked_add(len).ok_or(DeviceError::OutOfRange)?;
        let on_sectors = (offset.0 | len).is_multiple_of(SECTOR_SIZE);
        if !on_sectors || end > self.chain.size() || memory.len() as u64 != len {
            return Err(DeviceError::OutOfRange);
        }
        let key = self.pending.insert(Pending { tag, remaining: 1, result: Ok(()) });
        let mut pieces = std::mem::take(&mut self.pieces);
        match self.chain.plan(offset.0..end, &Held::default(), &mut pieces) {
            Ok(()) => self.read(key, memory, &mut pieces),
            // What was planned is planned again: tables are read at most once for that.
            Err(_) => self.plan_slowly(key, offset.0..end, memory),
        }
        pieces.clear();
        self.pieces = pieces;
        Ok(())
    }

    fn plan_slowly(&self, key: usize, range: std::ops::Range<u64>, memory: Memory) {
        let (chain, io, inbox) = (Arc::clone(&self.chain), self.io.clone(), Rc::clone(&self.inbox));
        self.io.spawn(async move {
            let mut pieces = Vec::new();
            let planned = chain.plan_all(&io, range, &mut pieces).await;
            inbox.borrow_mut().push(Message::Planned { key, memory, pieces: planned.map(|()| pieces) });
        });
    }

    /// Reads the pieces of a request into its memory.
    fn read(&mut self, key: usize, mut memory: Memory, pieces: &mut Vec<Piece<E::File>>) {
        let start = pieces.first().map_or(0, |piece| piece.range.start);
        let len = memory.len();
        self.pending[key].remaining += pieces.len();
        for Piece { range, source } in pieces.drain(..) {
            let (at, part_len) = ((range.start - start) as usize, (range.end - range.start) as usize);
            if matches!(source, Source::Zero) {
                memory.zero_at(at, part_len);
                self.ended(key, Ok(()));
                continue;
            }
            let part = if part_len == len { std::mem::take(&mut memory) } else { memory.share(at, part_len) };
            let mut part = part;
            match source {
                Source::Sealed(sealed) if self.chain.read_cached(sealed, &mut part, &self.frames) => {
                    self.ended(key, Ok(()));
                }
                Source::Compressed(compressed) => self.compressed.push_back((key, compressed, part)),
                Source::File { file, offset, .. } if reaches(&file, offset, &part) => {
                    self.io.start(key as u64, Op::read(file, offset, part));
                }
                source => self.read_slowly(key, source, part, 0),
            }
        }
        self.start_compressed();
        self.ended(key, Ok(()));
    }

    fn read_slowly(&self, key: usize, source: Source<E::File>, memory: Memory, cost: usize) {
        let (chain, io, inbox) = (Arc::clone(&self.chain), self.io.clone(), Rc::clone(&self.inbox));
        let frames = Arc::clone(&self.frames);
        self.io.spawn(async move {
            let result = chain.read_counted(&io, source, memory, &frames).await;
            inbox.borrow_mut().push(Message::Ended { key, result, cost });
        });
    }

    /// Starts parts in compressed clusters, as many as there is room for.
    fn start_compressed(&mut self) {
        while let Some((_, part, _)) = self.compressed.front() {
            let cost = self.chain.cost(*part);
            if self.decompressing > 0 && self.decompressing + cost > DECOMPRESSING_MAX {
                return;
            }
            let Some((key, part, memory)) = self.compressed.pop_front() else { return };
            self.decompressing += cost;
            self.read_slowly(key, Source::Compressed(part), memory, cost);
        }
    }

    /// One part of a request has ended.
    fn ended(&mut self, key: usize, result: Result) {
        let pending = &mut self.pending[key];
        pending.remaining -= 1;
        if result.is_err() {
            pending.result = result;
        }
        if pending.remaining == 0 {
            let Pending { tag, result, .. } = self.pending.remove(key);
            self.ready.push(Done { tag, result });
        }
    }

    fn receive(&mut self, message: Message<E::File>) {
        match message {
            Message::Planned { key, memory, pieces: Ok(mut pieces) } => self.read(key, memory, &mut pieces),
            Message::Planned { key, pieces: Err(error), .. } => self.ended(key, Err(error)),
            Message::Ended { key, result, cost } => {
                self.decompressing -= cost;
                self.ended(key, result);
            }
        }
    }
}

impl<E: Engine> DeviceQueue for ChainQueue<E> {
    type Engine = E;

    fn submit(&mut self, request: Request) {
        let tag = request.tag;
        if let Err(error) = self.start(request) {
            self.ready.push(Done { tag, result: Err(error) });
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        loop {
            let mut finished = std::mem::take(&mut self.finished);
            self.io.poll(&mut finished);
            let inbox = self.inbox.take();
            let any = !finished.is_empty() || !inbox.is_empty();
            for (key, outcome) in finished.drain(..) {
                self.ended(key as usize, outcome.zero_filled().map(drop).map_err(DeviceError::from));
            }
            self.finished = finished;
            inbox.into_iter().for_each(|message| self.receive(message));
            self.start_compressed();
            if !any {
                break;
            }
        }
        done.append(&mut self.ready);
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.io.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.pending.len() + self.ready.len()
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut E) -> R) -> R {
        self.io.with_engine(f)
    }
}
