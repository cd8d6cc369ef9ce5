//! New packs of one publication: one of each kind at a time, and the next when it is full.

use std::path::PathBuf;

use super::hash::Hash;
use super::header::PackKind;
use super::place::Place;
use super::record::NewRecord;
use super::writer::{PackWriter, Written, pack_name};
use crate::error::ImageError;
use futures_util::future::join_all;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;

/// Where a record was put.
pub(super) struct Put {
    /// The place of its first block.
    pub(super) place: Place,
    /// For each block, the page of the pack's entries that it will be in.
    pub(super) pages: Vec<u32>,
}

/// Where records go.
pub(super) trait RecordSink {
    /// Appends a record to the open pack of its kind.
    fn push(
        &mut self,
        kind: PackKind,
        record: NewRecord,
        hashes: &[Hash],
    ) -> impl Future<Output = Result<Put, ImageError>>;
}

/// See the module's documentation.
pub(super) struct Output<E: Engine, S, N> {
    storage: S,
    io: Io<E>,
    directory: PathBuf,
    /// Bytes of records after which a pack is finished.
    pack_bytes: u64,
    /// Says the number of the next pack.
    numbers: N,
    data: Option<PackWriter<E>>,
    nodes: Option<PackWriter<E>>,
    finished: Vec<Written>,
    /// All packs begun.
    begun: Vec<PathBuf>,
}

impl<E, S, N> Output<E, S, N>
where
    E: Engine,
    S: Storage<File = E::File>,
    N: FnMut() -> Result<u32, ImageError>,
{
    pub(super) fn new(storage: &S, io: &Io<E>, directory: PathBuf, pack_bytes: u64, numbers: N) -> Self {
        let storage = storage.clone();
        let (data, nodes, finished, begun) = (None, None, Vec::new(), Vec::new());
        Self { storage, io: io.clone(), directory, pack_bytes, numbers, data, nodes, finished, begun }
    }

    /// Finishes the open packs: all packs, whole and synced. Their names are durable when the directory has been synced.
    pub(super) async fn finish(&mut self) -> Result<Vec<Written>, ImageError> {
        // At once: each waits for a sync.
        let open = [self.data.take(), self.nodes.take()].into_iter().flatten();
        for pack in join_all(open.map(PackWriter::finish)).await {
            self.finished.push(pack?);
        }
        Ok(std::mem::take(&mut self.finished))
    }

    /// Removes all packs, finished or not: nobody knows of them.
    pub(super) async fn abandon(mut self) {
        for pack in [self.data.take(), self.nodes.take()].into_iter().flatten() {
            pack.abandon().await;
        }
        for path in self.begun {
            // What cannot be removed is found as garbage later.
            let _ = self.io.run(Op::Unlink { path: path.with_extension("pack.tmp") }).await;
            let _ = self.io.run(Op::Unlink { path }).await;
        }
    }
}

impl<E, S, N> RecordSink for Output<E, S, N>
where
    E: Engine,
    S: Storage<File = E::File>,
    N: FnMut() -> Result<u32, ImageError>,
{
    async fn push(&mut self, kind: PackKind, record: NewRecord, hashes: &[Hash]) -> Result<Put, ImageError> {
        let slot = match kind {
            PackKind::Data => &mut self.data,
            PackKind::Nodes => &mut self.nodes,
        };
        let pack = match slot {
            Some(pack) => pack,
            None => {
                let number = (self.numbers)()?;
                let pack = PackWriter::create(&self.storage, &self.io, &self.directory, number, kind)?;
                self.begun.push(self.directory.join(pack_name(number)));
                slot.insert(pack)
            }
        };
        let place = pack.push(record, hashes);
        let put = Put { place, pages: (0..hashes.len()).map(|index| pack.page_of(index)).collect() };
        pack.write_out().await?;
        if let Some(full) = slot.take_if(|pack| pack.is_full_at(self.pack_bytes)) {
            self.finished.push(full.finish().await?);
        }
        Ok(put)
    }
}
