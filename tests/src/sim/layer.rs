//! The layer as what the simulator tests.

use std::ops::ControlFlow;
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, BaseSpec, CreateLayer, Layer, LayerQueue, OpenLayer, Tuning};
use sapwood_image::{ErrorKind, Format, ImageError};

use super::content::base_image;
use super::contract::BLOCK_SECTORS;
use super::engine::SimEngine;
use super::medium::SECTOR;
use super::plan::{Base, Shape};
use super::storage::SimStorage;
use super::subject::{Control, Disk, OpenError, Subject, Task, base_path, disk_path, other_base_path};
use super::world::{Config, World};

/// Bytes beyond the live data from which the cleaner works.
const SPACE_SLACK: u64 = 256 << 10;
/// Size of a block device: nothing in a history makes it run full.
const DEVICE_BYTES: u64 = 16 << 20;
/// What is said of a disk whose commit was interrupted.
const UNFINISHED: &str = "finish that first (sapwood commit";
/// Most bytes of a write while a base is filled.
const FILL_BYTES: usize = 64 << 10;

/// Layers, opened with this tuning but for what a history's shape says.
#[derive(Clone, Debug, Default)]
pub struct LayerSubject {
    /// Where a mutation is set.
    pub tuning: Tuning,
    /// Whether it lies on a block device.
    pub on_device: bool,
}

impl From<ImageError> for OpenError {
    fn from(error: ImageError) -> Self {
        match error.kind {
            ErrorKind::Locked { .. } => Self::Locked,
            ErrorKind::Unfinished(_) => Self::Unfinished,
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl LayerSubject {
    pub(super) fn options(&self, shape: &Shape) -> OpenLayer {
        let tuning = Tuning {
            checkpoint_bytes: shape.checkpoint_bytes,
            checkpoint_interval: shape.checkpoint_interval,
            sync_interval: shape.sync_interval,
            space_slack: Some(SPACE_SLACK),
            // Some histories sort data by age, however little there is.
            lanes_from_segments: if shape.queues > 1 { 0 } else { 64 },
            ..self.tuning
        };
        OpenLayer { tuning, ..OpenLayer::default() }
    }
}

/// The file of a layer that holds what every base holds: made in a world of its own.
fn layer_image(sectors: u64) -> Vec<u8> {
    let world = World::new(Config::blocking(!sectors));
    let process = world.process();
    let (storage, io) = (world.storage(process), Io::new(world.engine(process)));
    let segment_size = 64 << 10;
    let options = CreateLayer { size: Some(sectors * SECTOR), segment_size, ..CreateLayer::default() };
    let (files, inner) = (storage.clone(), io.clone());
    let made = block_on(&io, async move {
        layer::create(&files, &inner, &base_path(), &options).await?;
        Layer::open(&files, &inner, &base_path(), &OpenLayer::default()).await
    });
    let base = made.expect("a new layer");
    let mut queue = base.queue(world.engine(process));
    let bytes = base_image(sectors);
    for (n, chunk) in (0..).zip(bytes.chunks(FILL_BYTES)) {
        let buf = SharedBuf::heap(chunk.len());
        buf.write_at(0, chunk);
        let offset = GuestOffset(n * FILL_BYTES as u64);
        let written = device::run(&mut queue, offset, chunk.len() as u64, Command::Write(buf.into()));
        written.expect("a write without faults");
    }
    drop(queue);
    let inner = io.clone();
    block_on(&io, async move { base.close(&inner).await }).expect("a clean stop");
    world.contents(&base_path()).expect("the file")
}

impl Subject for LayerSubject {
    type Disk = Layer<SimEngine>;

    fn queues_max(&self) -> usize {
        3
    }

    fn spare_sector(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Option<u64>> {
        Box::pin(async move {
            let options = OpenLayer { read_only: true, ..OpenLayer::default() };
            let layer = Layer::open(&storage, &io, &disk_path(), &options).await.ok()?;
            let generation = layer.info().generation;
            // The first checkpoint has no other beside it.
            (generation > 1).then_some(BLOCK_SECTORS * (1 + generation % 2))
        })
    }

    fn create(&self, storage: SimStorage, io: Io<SimEngine>, shape: Shape) -> Task<Result<(), String>> {
        let on_device = self.on_device;
        Box::pin(async move {
            if on_device {
                storage.world().install_device(&disk_path(), DEVICE_BYTES);
            }
            let format = match shape.base {
                Base::Nothing => None,
                Base::Raw(sectors) => {
                    storage.world().install(&base_path(), &base_image(sectors));
                    Some(Format::Raw)
                }
                Base::Layer(sectors) => {
                    storage.world().install(&base_path(), &layer_image(sectors));
                    Some(Format::Layer)
                }
            };
            // As large, and other bytes.
            let other: Vec<u8> = base_image(shape.base.sectors()).iter().map(|byte| !byte).collect();
            storage.world().install(&other_base_path(), &other);
            let base = format.map(|format| BaseSpec::new(base_path(), format));
            let size = Some(shape.sectors * SECTOR);
            let options = CreateLayer { size, base, segment_size: shape.segment_size, overwrite: false };
            layer::create(&storage, &io, &disk_path(), &options).await.map_err(|error| error.to_string())
        })
    }

    fn open(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Task<Result<Arc<Layer<SimEngine>>, OpenError>> {
        let options = self.options(&shape);
        Box::pin(async move {
            let opened = Layer::open(&storage, &io, &disk_path(), &options).await;
            let opened = opened.map_err(OpenError::from);
            if !matches!(opened, Err(OpenError::Unfinished)) {
                return opened;
            }
            layer::commit(&storage, &io, &disk_path(), false, Tuning::default(), &mut |_, _| {}).await?;
            Ok(Layer::open(&storage, &io, &disk_path(), &options).await?)
        })
    }

    fn check(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Result<Vec<String>, OpenError>> {
        Box::pin(async move {
            let errors = layer::check(&storage, &io, &disk_path()).await?.errors;
            match errors.iter().any(|error| error.contains(UNFINISHED)) {
                true => Err(OpenError::Unfinished),
                false => Ok(errors),
            }
        })
    }
}

impl Disk for Layer<SimEngine> {
    fn queue_on(self: &Arc<Self>, io: Io<SimEngine>) -> LayerQueue<SimEngine> {
        Layer::queue_on(self, io)
    }

    fn maintain(self: Arc<Self>, io: Io<SimEngine>) -> Task<()> {
        Box::pin(Layer::maintain(self, io))
    }

    fn control(
        self: Arc<Self>,
        storage: SimStorage,
        io: Io<SimEngine>,
        what: Control,
    ) -> Task<Result<(), String>> {
        Box::pin(async move {
            let mut go_on = |_, _| ControlFlow::Continue(());
            let base = self.info().base;
            let result = match what {
                // Nothing to be done.
                Control::Flatten | Control::Rebase | Control::Commit if base.is_none() => Ok(()),
                Control::Flatten => self.rebase(&storage, &io, None, &mut go_on).await,
                Control::Rebase => {
                    let other = BaseSpec::new(other_base_path(), Format::Raw);
                    self.rebase(&storage, &io, Some(&other), &mut go_on).await
                }
                Control::Commit => match self.commit_online(&storage, &io, &mut go_on).await {
                    // A raw disk cannot have any size.
                    Err(error) if matches!(error.kind, ErrorKind::Invalid(_)) => Ok(()),
                    ended => ended.map(drop),
                },
                Control::Checkpoint => self.checkpoint(&io).await,
                Control::Clean => self.clean(&io).await.map(drop),
                Control::Compact => self.compact(&io, |_, _| {}).await.map(drop),
                Control::Resize(size) => self.resize(&io, size).await,
                // Of a disk that is no volume none is ordered.
                Control::Snapshot(_) | Control::Seal => Ok(()),
                Control::Close => self.close(&io).await,
            };
            result.map_err(|error| error.to_string())
        })
    }
}
