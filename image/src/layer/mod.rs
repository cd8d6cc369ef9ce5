//! Stand-in for the layer format: its interface, and an error instead of everything.
#![allow(missing_docs, clippy::unused_async, clippy::missing_errors_doc)]

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::device::{BlockDevice, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Engine, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

use crate::error::{ErrorKind, ImageError};
use crate::extent::Extent;
use crate::format::Format;

#[derive(Clone, Debug)]
pub struct BaseSpec {
    pub path: PathBuf,
    pub format: Format,
}

#[derive(Clone, Debug, Default)]
pub struct CreateLayer {
    pub size: Option<u64>,
    pub base: Option<BaseSpec>,
}

pub struct OpenLayer {
    pub read_only: bool,
}

pub struct LayerInfo {
    pub size: u64,
    pub id: String,
    pub segment_size: u64,
    pub base: Option<BaseSpec>,
    pub live_blocks: u64,
    pub dead_blocks: u64,
    pub generation: u64,
    pub sequence: u64,
    pub clean: bool,
}

pub struct CheckReport {
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
    pub mapped_blocks: u64,
}

pub struct Layer<E: Engine>(Infallible, PhantomData<fn(E)>);
pub struct LayerQueue<E: Engine>(Infallible, PhantomData<E>);

fn missing<T>(path: &Path) -> Result<T, ImageError> {
    Err(ImageError::new(path, ErrorKind::Unsupported("layers are not there yet".into())))
}

pub async fn create<S: Storage, E: Engine<File = S::File>>(
    _storage: &S,
    _io: &Io<E>,
    path: &Path,
    _options: &CreateLayer,
) -> Result<(), ImageError> {
    missing(path)
}

pub async fn check<S: Storage, E: Engine<File = S::File>>(
    _storage: &S,
    _io: &Io<E>,
    path: &Path,
) -> Result<CheckReport, ImageError> {
    missing(path)
}

impl<E: Engine> Layer<E> {
    pub async fn open<S: Storage<File = E::File>>(
        _storage: &S,
        _io: &Io<E>,
        path: &Path,
        _options: &OpenLayer,
    ) -> Result<Arc<Self>, ImageError> {
        missing(path)
    }

    pub fn queue_on(self: &Arc<Self>, _io: Io<E>) -> LayerQueue<E> {
        match self.0 {}
    }

    pub async fn maintain(self: Arc<Self>, _io: Io<E>) {
        match self.0 {}
    }

    pub async fn resize(self: &Arc<Self>, _io: &Io<E>, _size: u64) -> Result<(), ImageError> {
        match self.0 {}
    }

    pub async fn close(self: &Arc<Self>, _io: &Io<E>) -> Result<(), ImageError> {
        match self.0 {}
    }

    pub fn extents(&self, _range: Range<u64>) -> Vec<Extent> {
        match self.0 {}
    }

    pub fn info(&self) -> LayerInfo {
        match self.0 {}
    }
}

impl<E: Engine> BlockDevice for Layer<E> {
    type Engine = E;
    type Queue = LayerQueue<E>;

    fn geometry(&self) -> Geometry {
        match self.0 {}
    }

    fn queue(self: &Arc<Self>, _engine: E) -> LayerQueue<E> {
        match self.0 {}
    }

    fn set_write_cache(&self, _enabled: bool) {
        match self.0 {}
    }
}

impl<E: Engine> DeviceQueue for LayerQueue<E> {
    type Engine = E;

    fn submit(&mut self, _request: Request) {
        match self.0 {}
    }

    fn poll(&mut self, _done: &mut Vec<Done>) {
        match self.0 {}
    }

    fn wait(&mut self, _deadline: Option<Time>) {
        match self.0 {}
    }

    fn outstanding(&self) -> usize {
        match self.0 {}
    }

    fn with_engine<R>(&mut self, _f: impl FnOnce(&mut E) -> R) -> R {
        match self.0 {}
    }
}
