//! What the simulator tests: a disk kept in simulated files.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::io::Io;

use super::engine::SimEngine;
use super::plan::Shape;
use super::storage::SimStorage;

/// A boxed future that owns what it needs.
pub type Task<T> = Pin<Box<dyn Future<Output = T>>>;

/// Where the disk is.
pub fn disk_path() -> PathBuf {
    Path::new("/images/disk").to_owned()
}

/// Where its base is.
pub fn base_path() -> PathBuf {
    Path::new("/images/base").to_owned()
}

/// Where another base is, if it can have one.
pub fn other_base_path() -> PathBuf {
    Path::new("/images/other").to_owned()
}

/// Why a disk could not be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// Somebody else uses it.
    Locked,
    /// What was interrupted must be finished first.
    Unfinished,
    /// Anything else.
    Failed(String),
}

/// Work on a disk that no guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A checkpoint, now.
    Checkpoint,
    /// The cleaner moves something.
    Clean,
    /// What is scattered is laid in order.
    Compact,
    /// A new size in bytes.
    Resize(u64),
    /// It has no base any more.
    Flatten,
    /// It gets another base.
    Rebase,
    /// It is merged into its base.
    Commit,
    /// A snapshot is taken, the one with this number.
    Snapshot(u64),
    /// An older snapshot is sealed, in a store, and what lies below is opened again.
    Seal,
    /// A clean stop.
    Close,
}

impl Control {
    /// Whether it is refused while another such command is under way.
    pub fn is_alone(self) -> bool {
        matches!(self, Self::Resize(_) | Self::Flatten | Self::Rebase | Self::Commit | Self::Snapshot(_))
    }
}

/// A kind of disk, and how it is made and opened.
pub trait Subject: Clone + 'static {
    /// An open disk.
    type Disk: Disk;

    /// Most queues that a disk serves.
    fn queues_max(&self) -> usize;

    /// The sector of the disk's file that says where everything is, if the disk claims to be able
    /// to lose it: there is another one that leads to the same state.
    fn spare_sector(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Option<u64>>;

    /// Makes a disk, with its base.
    fn create(&self, storage: SimStorage, io: Io<SimEngine>, shape: Shape) -> Task<Result<(), String>>;

    /// Opens it.
    fn open(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Task<Result<Arc<Self::Disk>, OpenError>>;

    /// Looks for damage in the files of a disk that is not open.
    fn check(&self, storage: SimStorage, io: Io<SimEngine>) -> Task<Result<Vec<String>, OpenError>>;

    /// What the snapshot of this number holds, if it was taken.
    fn snapshot(
        &self,
        _storage: SimStorage,
        _io: Io<SimEngine>,
        _number: u64,
    ) -> Task<Result<Option<Vec<u8>>, OpenError>> {
        Box::pin(async { Ok(None) })
    }
}

/// An open disk.
pub trait Disk: BlockDevice<Engine = SimEngine> {
    /// A queue on a thread's reactor.
    fn queue_on(self: &Arc<Self>, io: Io<SimEngine>) -> Self::Queue;

    /// Background work, until the disk is closed.
    fn maintain(self: Arc<Self>, io: Io<SimEngine>) -> Task<()>;

    /// Does something for the disk's owner.
    fn control(
        self: Arc<Self>,
        storage: SimStorage,
        io: Io<SimEngine>,
        what: Control,
    ) -> Task<Result<(), String>>;
}
