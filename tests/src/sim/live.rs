//! A disk in use of which snapshots are taken, as what the simulator tests.
//!
//! The first layer is where other disks have theirs; snapshot number *n* puts layer *n* over what the disk
//! was then, and is committed by the durable name of a file: the disk is the layer with the largest number
//! that has such a name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::engine::Op;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_image::below::{Chain, Held, Piece};
use sapwood_image::layer::{self, Layer};
use sapwood_image::volume::{Successor, Volume, VolumeQueue};
use sapwood_image::{ErrorKind, Format, ImageError, OpenBelow};

use super::engine::SimEngine;
use super::layer::LayerSubject;
use super::plan::Shape;
use super::storage::SimStorage;
use super::subject::{Control, Disk, OpenError, Subject, Task, disk_path};

/// Snapshots that one history orders, at most.
pub const SNAPSHOTS_MAX: u64 = 64;
/// Attempts to take a commit back that could not be made durable.
const ATTEMPTS_MAX: usize = 1000;

/// Layers as [`LayerSubject`] has them, behind a volume.
#[derive(Clone, Debug, Default)]
pub struct LiveSubject {
    /// How they are made and opened.
    pub layers: LayerSubject,
}

pub(super) fn layer_path(number: u64) -> PathBuf {
    match number {
        0 => disk_path(),
        number => Path::new("/images").join(format!("layer.{number}")),
    }
}

pub(super) fn name_path(number: u64) -> PathBuf {
    Path::new("/images").join(format!("is-{number}"))
}

/// The numbers of the layers that are, or were, the disk.
pub(super) fn committed(storage: &SimStorage) -> Vec<u64> {
    let is_named = |number: &u64| storage.world().contents(&name_path(*number)).is_some();
    [0].into_iter().chain((1..=SNAPSHOTS_MAX).filter(is_named)).collect()
}

pub(super) async fn sync_names(io: &Io<SimEngine>) -> Result<(), ImageError> {
    let folder = Path::new("/images");
    let sync = io.run(Op::SyncDirectory { path: folder.to_owned() }).await;
    sync.result.map(drop).map_err(|errno| ImageError::errno(folder, "sync", errno))
}

/// Makes a layer the disk.
async fn commit_layer(storage: &SimStorage, io: &Io<SimEngine>, number: u64) -> Result<(), ImageError> {
    let (new, path) = (name_path(number).with_extension("new"), name_path(number));
    storage.open(&new, OpenOptions::CREATE).map_err(|e| ImageError::io(&new, "create", e))?;
    commit(storage, io, &new, &path).await
}

/// Gives the file `new` the name `path`, which none has, durably. When that fails, none has it, durably.
pub(super) async fn commit(
    storage: &SimStorage,
    io: &Io<SimEngine>,
    new: &Path,
    path: &Path,
) -> Result<(), ImageError> {
    let file = storage.open(new, OpenOptions::WRITE).map_err(|e| ImageError::io(new, "open", e))?;
    let synced = io.run(Op::Sync { file }).await.result;
    let renamed = match synced {
        Ok(_) => io.run(Op::Rename { from: new.to_owned(), to: path.to_owned() }).await.result,
        failed => failed,
    };
    let named = match renamed {
        Ok(_) => sync_names(io).await,
        Err(errno) => Err(ImageError::errno(new, "rename", errno)),
    };
    let Err(error) = named else { return Ok(()) };
    for _ in 0..ATTEMPTS_MAX {
        let _ = io.run(Op::Unlink { path: path.to_owned() }).await;
        if storage.world().contents(path).is_none() && sync_names(io).await.is_ok() {
            return Err(error);
        }
    }
    panic!("a commit can be taken back");
}

pub(super) fn open_error(error: ImageError) -> OpenError {
    match &error.kind {
        // The base may still be locked by operations of a dead process.
        ErrorKind::Base(detail) if detail.contains("in use by") => OpenError::Locked,
        _ => OpenError::from(error),
    }
}

/// The whole contents of a layer's disk, read as a layer over it reads it.
async fn read_all(storage: &SimStorage, io: &Io<SimEngine>, path: &Path) -> Result<Vec<u8>, ImageError> {
    let chain = Chain::open(storage, io, path, Format::Layer, &OpenBelow::default()).await?;
    read_chain(&chain, io).await
}

pub(super) async fn read_chain(chain: &Chain<SimEngine>, io: &Io<SimEngine>) -> Result<Vec<u8>, ImageError> {
    let size = chain.size();
    let buf = SharedBuf::heap(size as usize);
    let failed = |error| ImageError::new(chain.path(), error);
    let (mut held, mut pieces, mut at) = (Held::default(), Vec::new(), 0);
    while at < size {
        let stop = chain.plan(at..size, &held, &mut pieces).err();
        for Piece { range, source } in pieces.drain(..) {
            at = range.end;
            let memory = buf.slice(range.start as usize..range.end as usize).into();
            chain.read_piece(io, source, memory).await.map_err(failed)?;
        }
        if let Some(stop) = stop {
            chain.load(io, stop, &mut held).await.map_err(failed)?;
        }
    }
    let mut bytes = vec![0; size as usize];
    buf.read_at(0, &mut bytes);
    Ok(bytes)
}

impl Subject for LiveSubject {
    type Disk = Volume<SimEngine>;

    fn queues_max(&self) -> usize {
        3
    }

    fn spare_sector(&self, _: SimStorage, _: Io<SimEngine>) -> Task<Option<u64>> {
        Box::pin(async { None })
    }

    fn create(&self, storage: SimStorage, io: Io<SimEngine>, shape: Shape) -> Task<Result<(), String>> {
        self.layers.create(storage, io, shape)
    }

    fn open(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Task<Result<Arc<Volume<SimEngine>>, OpenError>> {
        let options = self.layers.options(&shape);
        Box::pin(async move {
            // What a process that died had named is the disk only if it stays that.
            sync_names(&io).await.map_err(open_error)?;
            let number = committed(&storage).pop().unwrap_or(0);
            let layer = Layer::open(&storage, &io, &layer_path(number), &options).await;
            layer.map(Volume::new).map_err(open_error)
        })
    }

    fn check(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Result<Vec<String>, OpenError>> {
        Box::pin(async move {
            let mut errors = Vec::new();
            for number in committed(&storage) {
                let path = layer_path(number);
                let found = layer::check(&storage, &io, &path).await.map_err(open_error)?.errors;
                if found.iter().any(|error| error.contains("in use by")) {
                    return Err(OpenError::Locked);
                }
                errors.extend(found.iter().map(|error| format!("{}: {error}", path.display())));
            }
            Ok(errors)
        })
    }

    fn snapshot(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        number: u64,
    ) -> Task<Result<Option<Vec<u8>>, OpenError>> {
        Box::pin(async move {
            let below = committed(&storage).into_iter().rev().skip_while(|other| *other != number).nth(1);
            let Some(below) = below else { return Ok(None) };
            read_all(&storage, &io, &layer_path(below)).await.map(Some).map_err(open_error)
        })
    }
}

impl Disk for Volume<SimEngine> {
    fn queue_on(self: &Arc<Self>, io: Io<SimEngine>) -> VolumeQueue<SimEngine> {
        Volume::queue_on(self, io)
    }

    fn maintain(self: Arc<Self>, io: Io<SimEngine>) -> Task<()> {
        Box::pin(Volume::maintain(self, io))
    }

    fn control(
        self: Arc<Self>,
        storage: SimStorage,
        io: Io<SimEngine>,
        what: Control,
    ) -> Task<Result<(), String>> {
        Box::pin(async move {
            let layer = self.layer();
            let result = match what {
                Control::Flatten | Control::Rebase | Control::Commit | Control::Seal => Ok(()),
                Control::Checkpoint => layer.checkpoint(&io).await,
                Control::Clean => layer.clean(&io).await.map(drop),
                Control::Compact => layer.compact(&io, |_, _| {}).await.map(drop),
                Control::Resize(size) => self.resize(&io, size).await,
                Control::Snapshot(number) => {
                    drop(layer);
                    let next = Successor::New { path: layer_path(number), base: self.path() };
                    self.snapshot(&storage, &io, &next, async || commit_layer(&storage, &io, number).await)
                        .await
                }
                Control::Close => self.close(&io).await,
            };
            result.map_err(|error| error.to_string())
        })
    }
}
