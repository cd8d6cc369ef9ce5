//! A copy of a store that is in use, which is a store itself.
//!
//! Order: under the catalog's lock, a view of it is taken, and all that it names is held where it is; packs, runs of the index and the
//! layers of snapshots are copied, none of which changes any more; the copy's catalog is made of the view, and gets its name, which is
//! the commit point: before it the copy is no store. What guests have written since the newest snapshot of their volume is not in it: in the
//! copy each volume is what that snapshot is.

use std::path::{Path, PathBuf};

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;
use sapwood_image::sealed::collect::Pace;
use sapwood_image::sealed::index::run_name;
use sapwood_image::sealed::pack_name;
use sapwood_image::{ErrorKind, ImageError};

use crate::catalog::rows::{NodeState, VolumeRow};
use crate::catalog::{Change, Look, View};
use crate::directory::{self, Directory, remove, sync_directory};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::Store;
use crate::usage::Hold;

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// What a backup holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackedUp {
    /// Files that were copied.
    pub files: u64,
    /// Bytes that were copied.
    pub bytes: u64,
    /// Volumes that hold more than their newest snapshot, perhaps: that is not in the backup.
    pub without_heads: Vec<String>,
}

/// What is to be copied, as of one moment, and stays until this is dropped.
struct Moment {
    view: View,
    layers: Vec<Id>,
    _holds: Vec<Hold>,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Copies the store to a directory that is empty or does not exist, or in which an earlier backup was cut off, while it is used. The
    /// copy is a store with the same id. No collection can begin meanwhile; `engine` is for the copy's catalog alone.
    ///
    /// # Errors
    /// The directory holds something else; a collection is under way; a snapshot was just taken whose layer is still being
    /// closed; [`Cancelled`](ErrorKind::Cancelled); what the storage says. There is no store in the directory then.
    pub async fn backup<C: Engine<File = S::File> + Send>(
        &self,
        io: &Io<E>,
        engine: C,
        to: &Path,
        pace: &Pace,
    ) -> Result<BackedUp> {
        // Packs go by collections alone, and runs by merges.
        let _still = self.only_one("collection")?;
        let _unmerged = self.only_one("merge of the index")?;
        let moment = self.catalog.hold_still(|change| self.moment(change))?;
        let (target, _lock) = directory::begin(&self.storage, to)?;
        let mut done = BackedUp::default();
        let files = self.files_of(&moment, &target)?;
        let sizes = files.iter().map(|(from, _)| self.data_bytes(from));
        pace.expect(sizes.sum::<Result<u64>>()?);
        for (from, to) in files {
            done.bytes += self.copy_file(io, &from, &to, pace).await?;
            done.files += 1;
        }
        for folder in [target.layers(), target.packs(), target.index()] {
            sync_directory(io, &folder).await?;
        }
        let fill = |change: &mut Change| {
            change.copy(&moment.view)?;
            done.without_heads = change.forget_heads()?;
            Ok(())
        };
        directory::end(&self.storage, io, engine, &target, self.id(), &self.options, fill).await?;
        Ok(done)
    }

    /// Takes a view, and holds what it names.
    fn moment(&self, change: &Change) -> Result<Moment> {
        let (mut layers, mut holds) = (Vec::new(), Vec::new());
        for (id, row) in change.nodes()? {
            match row.state {
                NodeState::Frozen { layer, settled: true, .. } => {
                    holds.push(self.usage.keep_layer(layer));
                    layers.push(layer);
                }
                NodeState::Frozen { .. } => {
                    let text = "its layer is still being closed: try again in a moment".to_owned();
                    let name = row.name.unwrap_or_else(|| id.to_string());
                    return Err(StoreError::new(format!("snapshot {name}"), StoreErrorKind::InUse(text)));
                }
                NodeState::Bare | NodeState::Sealed(_) => {}
            }
        }
        Ok(Moment { view: self.catalog.view()?, layers, _holds: holds })
    }

    /// The files to be copied, and where to.
    fn files_of(&self, moment: &Moment, target: &Directory) -> Result<Vec<(PathBuf, PathBuf)>> {
        let own = &self.directory;
        let both = |folder: fn(&Directory) -> PathBuf, name: String| {
            (folder(own).join(&name), folder(target).join(&name))
        };
        let mut files: Vec<_> =
            moment.layers.iter().map(|layer| (own.layer(*layer), target.layer(*layer))).collect();
        let packs = moment.view.packs()?.into_iter();
        files.extend(packs.map(|(number, _)| both(Directory::packs, pack_name(number))));
        let runs = moment.view.index_runs()?.into_iter();
        files.extend(runs.map(|(number, _)| both(Directory::index, run_name(number))));
        Ok(files)
    }

    /// Bytes of a file that are copied: all but its holes.
    fn data_bytes(&self, path: &Path) -> Result<u64> {
        let file = self.storage.open(path, OpenOptions::READ.buffered());
        let file = file.map_err(|error| StoreError::io(path, "open", error))?;
        let size = file.size().map_err(|error| StoreError::io(path, "measure", error))?;
        let (mut at, mut bytes) = (0, 0);
        while at < size {
            let data = file.next_data(at..size).map_err(|error| StoreError::io(path, "look into", error))?;
            let Some(data) = data else { break };
            bytes += data.end - data.start;
            at = data.end;
        }
        Ok(bytes)
    }

    /// Copies a file that nobody writes, without its holes; durable but for its name. How many bytes.
    async fn copy_file(&self, io: &Io<E>, from: &Path, to: &Path, pace: &Pace) -> Result<u64> {
        let source = self.storage.open(from, OpenOptions::READ.buffered());
        let source = source.map_err(|error| StoreError::io(from, "open", error))?;
        let size = source.size().map_err(|error| StoreError::io(from, "measure", error))?;
        remove(io, to).await?;
        let target = self.storage.open(to, OpenOptions::CREATE.buffered());
        let target = target.map_err(|error| StoreError::io(to, "make", error))?;
        let sized = io.run(Op::Truncate { file: target.clone(), size }).await.result;
        sized.map_err(|errno| StoreError::errno(to, "set the size of", errno))?;
        let (mut at, mut copied) = (0, 0);
        while at < size {
            let data =
                source.next_data(at..size).map_err(|error| StoreError::io(from, "look into", error))?;
            let Some(data) = data else { break };
            at = data.start;
            while at < data.end {
                if pace.is_stopped() {
                    return Err(ImageError::new(to, ErrorKind::Cancelled).into());
                }
                let len = COPY_BYTES.min(data.end - at);
                pace.spend(io, len).await;
                self.copy_piece(io, (&source, &target), at, len as usize).await?;
                at += len;
                copied += len;
            }
        }
        let synced = io.run(Op::Sync { file: target }).await.result;
        synced.map_err(|errno| StoreError::errno(to, "sync", errno))?;
        Ok(copied)
    }

    async fn copy_piece(
        &self,
        io: &Io<E>,
        (from, to): (&S::File, &S::File),
        at: u64,
        len: usize,
    ) -> Result<()> {
        let read = io.run(Op::read(from.clone(), FileOffset(at), AlignedBuf::zeroed(len))).await;
        let count = read.result.map_err(|errno| StoreError::errno(from.path(), "read", errno))?;
        if count < len {
            let error = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(StoreError::io(from.path(), "read", error));
        }
        let mut bytes = vec![0; len];
        read.memory.unwrap_or_default().read_at(0, &mut bytes);
        let write = Op::write(to.clone(), FileOffset(at), AlignedBuf::from_slice(&bytes));
        let written = io.run(write).await.result;
        written.map(drop).map_err(|errno| StoreError::errno(to.path(), "write", errno))
    }
}

impl Change {
    /// Makes each volume what its newest snapshot is. The names of those that may hold more.
    fn forget_heads(&mut self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for (id, row) in self.volumes()? {
            if row.layer.is_none() {
                continue;
            }
            let size = match row.parent {
                Some(parent) => self.needed_node(parent)?.size,
                None => row.size,
            };
            names.push(row.name.clone());
            self.put_volume(id, Some(&VolumeRow { layer: None, size, space: None, ..row }))?;
        }
        names.sort();
        Ok(names)
    }
}
