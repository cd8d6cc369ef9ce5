//! The host's files and the engine that this process uses on them.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::task::Waker;
use std::thread::{self, JoinHandle};

use anyhow::Context;
use clap::ValueEnum;
use rustix::process::{Resource, getrlimit};
use sapwood_blockdev::engine::{BlockingEngine, Completion, Engine, Op, Time, UringEngine, WatchFd};
use sapwood_blockdev::io::{Io, block_on, run_alone};
use sapwood_blockdev::storage::{HostFile, HostStorage};
use sapwood_image::layer::Tuning;
use sapwood_image::{ImageError, OpenDisk, Side};
use sapwood_qos::background::BackgroundEngine;
use sapwood_qos::governor::Background;

/// How one of so many disks is opened that this process may have to serve. A read of a layer whose file is closed has to open it
/// first, so as many stay open as the limit of open files allows all of them.
pub fn serving(disks: u64) -> Tuning {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / disks;
    Tuning { files_max: files.clamp(128, 1024) as usize, ..Tuning::default() }
}

/// A way to move bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineKind {
    /// io_uring.
    Uring,
    /// System calls that block.
    Blocking,
}

/// Either engine, chosen when the process starts.
pub enum HostEngine {
    /// io_uring.
    Uring(Box<UringEngine>),
    /// System calls that block.
    Blocking(BlockingEngine),
    /// One of these, of which reads and writes wait for those of guests.
    Background(Box<BackgroundEngine<HostEngine>>),
}

/// The host as the commands use it.
#[derive(Clone, Copy)]
pub struct Host {
    kind: EngineKind,
}

impl Host {
    /// Uses the engine asked for, or io_uring where the kernel lets us, or else system calls.
    pub fn new(asked: Option<EngineKind>) -> Self {
        let kind = asked.unwrap_or_else(|| match UringEngine::new() {
            Ok(_) => EngineKind::Uring,
            Err(error) => {
                log::info!("no io_uring ({error}): using system calls that block");
                EngineKind::Blocking
            }
        });
        Self { kind }
    }

    /// An engine for the calling thread.
    pub fn engine(&self) -> io::Result<HostEngine> {
        Ok(match self.kind {
            EngineKind::Uring => HostEngine::Uring(Box::new(UringEngine::new()?)),
            EngineKind::Blocking => HostEngine::Blocking(BlockingEngine::new()?),
        })
    }

    /// A reactor for the calling thread.
    pub fn io(&self) -> anyhow::Result<Io<HostEngine>> {
        let engine = self.engine().with_context(|| match self.kind {
            EngineKind::Uring => "cannot use io_uring (--engine blocking does without)",
            EngineKind::Blocking => "cannot make an engine",
        });
        Ok(Io::new(engine?))
    }

    /// A reactor for work of the calling thread that no guest waits for.
    pub fn background_io(&self, background: &Background) -> anyhow::Result<Io<HostEngine>> {
        let engine = self.engine().context("cannot make an engine")?;
        Ok(Io::new(HostEngine::Background(Box::new(BackgroundEngine::new(engine, background)))))
    }

    /// The host's files.
    pub fn storage(&self) -> HostStorage {
        HostStorage
    }

    /// Runs what `task` makes of a new reactor until it is done.
    pub fn block_on<T, F>(&self, task: impl FnOnce(Io<HostEngine>) -> F) -> anyhow::Result<T>
    where
        T: 'static,
        F: Future<Output = Result<T, ImageError>> + 'static,
    {
        Ok(run_alone(self.io()?, task)?)
    }

    /// Starts a thread for a disk's work in the background, with a reactor of its own: `work` ends when the disk is closed.
    pub fn maintain<F>(
        self,
        work: impl FnOnce(Io<HostEngine>) -> F + Send + 'static,
    ) -> anyhow::Result<JoinHandle<()>>
    where
        F: Future<Output = ()> + 'static,
    {
        let (ready, is_ready) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("maintenance".into()).spawn(move || {
            let io = match self.io() {
                Ok(io) => io,
                // The receiver waits.
                Err(error) => return drop(ready.send(Err(error))),
            };
            drop(ready.send(Ok(())));
            block_on(&io, work(io.clone()));
        })?;
        is_ready.recv().context("the maintenance thread ended")??;
        Ok(thread)
    }

    /// Opens a disk for a copy or comparison.
    pub fn side(&self, path: &Path, options: OpenDisk) -> anyhow::Result<Side<HostEngine>> {
        Ok(Side::open(&self.storage(), self.io()?, path, options)?)
    }
}

/// Evaluates an expression for whichever engine there is.
macro_rules! dispatch {
    ($self:expr, $engine:ident => $body:expr) => {
        match $self {
            HostEngine::Uring($engine) => $body,
            HostEngine::Blocking($engine) => $body,
            HostEngine::Background($engine) => $body,
        }
    };
}

impl Engine for HostEngine {
    type File = HostFile;

    fn submit(&mut self, token: u64, op: Op<HostFile>) {
        dispatch!(self, engine => engine.submit(token, op));
    }

    fn collect(&mut self, done: &mut Vec<Completion<HostFile>>) {
        dispatch!(self, engine => engine.collect(done));
    }

    fn wait(&mut self, deadline: Option<Time>) {
        dispatch!(self, engine => engine.wait(deadline));
    }

    fn in_flight(&self) -> usize {
        dispatch!(self, engine => engine.in_flight())
    }

    fn now(&self) -> Time {
        dispatch!(self, engine => engine.now())
    }

    fn waker(&self) -> Waker {
        dispatch!(self, engine => engine.waker())
    }
}

impl WatchFd for HostEngine {
    fn watch(&mut self, fd: Option<Arc<OwnedFd>>) {
        dispatch!(self, engine => engine.watch(fd));
    }
}
