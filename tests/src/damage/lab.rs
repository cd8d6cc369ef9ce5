//! Layers made, opened and driven, on the host's files or in memory.

use std::path::Path;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceError, run};
use sapwood_blockdev::engine::{BlockingEngine, Engine};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, Storage};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::ImageError;
use sapwood_image::layer::{self, CheckReport, CreateLayer, Layer, LayerQueue, OpenLayer, Tuning};

use super::memory::{MemoryEngine, MemoryStorage};

/// Where layers live and what moves their bytes.
pub trait Lab: Clone + 'static {
    /// The storage.
    type Storage: Storage<File = <Self::Engine as Engine>::File>;
    /// Its engine.
    type Engine: Engine;

    /// The storage.
    fn storage(&self) -> Self::Storage;

    /// A new engine.
    fn engine(&self) -> Self::Engine;
}

/// The host's files and the blocking engine.
#[derive(Clone, Copy, Debug)]
pub struct HostLab;

impl Lab for HostLab {
    type Storage = HostStorage;
    type Engine = BlockingEngine;

    fn storage(&self) -> HostStorage {
        HostStorage
    }

    fn engine(&self) -> BlockingEngine {
        BlockingEngine::new().expect("an eventfd")
    }
}

impl Lab for MemoryStorage {
    type Storage = Self;
    type Engine = MemoryEngine;

    fn storage(&self) -> Self {
        self.clone()
    }

    fn engine(&self) -> MemoryEngine {
        Self::engine(self)
    }
}

/// Runs a future of a lab to its end.
pub fn wait<L: Lab, T: 'static>(lab: &L, f: impl AsyncFnOnce(L::Storage, Io<L::Engine>) -> T + 'static) -> T {
    let (io, storage) = (Io::new(lab.engine()), lab.storage());
    block_on(&io.clone(), async move { f(storage, io).await })
}

/// Makes a layer.
///
/// # Errors
/// Those of [`layer::create`].
pub fn create<L: Lab>(lab: &L, path: &Path, options: &CreateLayer) -> Result<(), ImageError> {
    let (path, options) = (path.to_owned(), options.clone());
    wait(lab, async move |storage, io| layer::create(&storage, &io, &path, &options).await)
}

/// Judges a layer.
///
/// # Errors
/// Those of [`layer::check`].
pub fn check<L: Lab>(lab: &L, path: &Path) -> Result<CheckReport, ImageError> {
    let path = path.to_owned();
    wait(lab, async move |storage, io| layer::check(&storage, &io, &path).await)
}

/// An open layer with a queue.
pub struct Bench<L: Lab> {
    lab: L,
    /// The layer.
    pub layer: Arc<Layer<L::Engine>>,
    queue: LayerQueue<L::Engine>,
}

impl<L: Lab> Bench<L> {
    /// Opens a layer.
    ///
    /// # Errors
    /// Those of [`Layer::open`].
    pub fn open(lab: &L, path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let tuning = Tuning { space_slack: Some(256 << 10), ..Tuning::default() };
        Self::open_tuned(lab, path, read_only, tuning)
    }

    /// Opens a layer.
    ///
    /// # Errors
    /// Those of [`Layer::open`].
    pub fn open_tuned(lab: &L, path: &Path, read_only: bool, tuning: Tuning) -> Result<Self, ImageError> {
        let (path, options) = (path.to_owned(), OpenLayer { read_only, tuning });
        let layer = wait(lab, async move |storage, io| Layer::open(&storage, &io, &path, &options).await)?;
        Ok(Self::over(lab, layer))
    }

    /// A layer that is open.
    pub fn over(lab: &L, layer: Arc<Layer<L::Engine>>) -> Self {
        let queue = layer.queue_on(Io::new(lab.engine()));
        Self { lab: lab.clone(), layer, queue }
    }

    /// Guest-visible size in bytes.
    pub fn size(&self) -> u64 {
        self.layer.geometry().size
    }

    /// Reads a range.
    ///
    /// # Errors
    /// What the device reports.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let buf = SharedBuf::heap(len);
        self.command(offset, len as u64, Command::Read(buf.clone().into()))?;
        let mut bytes = vec![0; len];
        buf.read_at(0, &mut bytes);
        Ok(bytes)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// What the device reports.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let buf = SharedBuf::heap(bytes.len());
        buf.write_at(0, bytes);
        self.command(offset, bytes.len() as u64, Command::Write(buf.into()))
    }

    /// Performs one request.
    ///
    /// # Errors
    /// What the device reports.
    pub fn command(&mut self, offset: u64, len: u64, command: Command) -> Result<(), DeviceError> {
        run(&mut self.queue, GuestOffset(offset), len, command)
    }

    /// Changes the size.
    ///
    /// # Errors
    /// Those of [`Layer::resize`].
    pub fn resize(&self, size: u64) -> Result<(), ImageError> {
        let layer = Arc::clone(&self.layer);
        wait(&self.lab, async move |_, io| layer.resize(&io, size).await)
    }

    /// What a range of the disk holds.
    ///
    /// # Errors
    /// What the layer says.
    pub fn extents(&self, range: std::ops::Range<u64>) -> Result<Vec<sapwood_image::Extent>, ImageError> {
        let layer = Arc::clone(&self.layer);
        wait(&self.lab, async move |_, io| layer.extents(&io, range).await)
    }

    /// Makes a checkpoint.
    ///
    /// # Errors
    /// Those of [`Layer::checkpoint`].
    pub fn checkpoint(&self) -> Result<(), ImageError> {
        let layer = Arc::clone(&self.layer);
        wait(&self.lab, async move |_, io| layer.checkpoint(&io).await)
    }

    /// Cleans a segment.
    ///
    /// # Errors
    /// Those of [`Layer::clean`].
    pub fn clean(&self) -> Result<bool, ImageError> {
        let layer = Arc::clone(&self.layer);
        wait(&self.lab, async move |_, io| layer.clean(&io).await)
    }

    /// Ends its use in order.
    ///
    /// # Errors
    /// Those of [`Layer::close`].
    pub fn close(self) -> Result<(), ImageError> {
        let Self { lab, layer, queue } = self;
        drop(queue);
        wait(&lab, async move |_, io| layer.close(&io).await)
    }
}
