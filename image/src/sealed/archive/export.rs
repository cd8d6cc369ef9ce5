//! Writing an archive.
//!
//! Order: the archive is written under another name, synced, given its name, and its folder is synced. Before the last of
//! these a power cut leaves nothing, an unfinished file, or the archive.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quick_cache::unsync::Cache;

use super::directory::{ArchiveTrailer, SECTIONS_MAX, encode_pages};
use super::header::{ArchiveId, ArchiveInfo, DESCRIPTION_BYTES_MAX, NAME_BYTES_MAX, encode};
use crate::error::{ErrorKind, ImageError};
use crate::sealed::cursor::Cursor;
use crate::sealed::hash::Hash;
use crate::sealed::header::{PackHeader, PackId, PackKind};
use crate::sealed::known::{Dedup, Found};
use crate::sealed::output::{Put, RecordSink};
use crate::sealed::packs::{Packs, Root};
use crate::sealed::place::Place;
use crate::sealed::record::NewRecord;
use crate::sealed::seal::{FRAME_BLOCKS, Gatherer, Line, Means, SealStats, Watch};
use crate::sealed::source::TreeSource;
use crate::sealed::workers::Workers;
use crate::sealed::writer::PackWriter;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

/// Bytes of nodes after which their pack is finished: until then they are in memory, while frames are written.
const NODE_PACK_BYTES: u64 = 4 << 20;

/// Blocks, and nodes, of the archive that are remembered, each; of others a second copy may be stored.
const REMEMBERED: usize = 1 << 20;

/// What is to be exported.
pub struct Export<'a, E: Engine, S> {
    /// Where the archive is made.
    pub storage: &'a S,
    /// The calling thread's reactor.
    pub io: &'a Io<E>,
    /// Where the disk is.
    pub packs: &'a Arc<Packs<E>>,
    /// Who hashes and compresses.
    pub workers: &'a Workers,
    /// The disk.
    pub root: Root,
    /// For an increment: a disk that the other side has.
    pub base: Option<Root>,
    /// A name, for whoever reads the archive.
    pub name: &'a str,
    /// A description, likewise.
    pub description: &'a str,
}

/// What an export gave.
#[derive(Clone, Debug)]
pub struct Exported {
    /// What the archive says of itself.
    pub info: ArchiveInfo,
    /// Its length in bytes.
    pub bytes: u64,
    /// Counts.
    pub stats: SealStats,
}

/// Writes a disk into a new archive. Every block is verified on the way.
///
/// # Errors
/// When the file exists or cannot be written, or the disk cannot be read; [`ErrorKind::Cancelled`], also when `watch`
/// says to stop: half a disk makes no archive.
pub async fn export<E, S>(
    export: Export<'_, E, S>,
    path: &Path,
    watch: &mut impl Watch,
) -> Result<Exported, ImageError>
where
    E: Engine,
    S: Storage<File = E::File>,
{
    let Export { storage, io, root, base, name, description, .. } = &export;
    if name.len() > NAME_BYTES_MAX || description.len() > DESCRIPTION_BYTES_MAX {
        return Err(ImageError::invalid(path, "the name or the description of the disk is too long"));
    }
    if storage.open(path, OpenOptions::READ.buffered()).is_ok() {
        return Err(ImageError::open(path, std::io::ErrorKind::AlreadyExists.into()));
    }
    let info = ArchiveInfo {
        root: root.hash(),
        size: root.size,
        base: base.map(|base| base.hash()),
        name: (*name).to_owned(),
        description: (*description).to_owned(),
    };
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".tmp");
    let unfinished = PathBuf::from(unfinished);
    let file =
        storage.open(&unfinished, OpenOptions::CREATE).map_err(|e| ImageError::open(&unfinished, e))?;
    let written = match write(&export, file, &info, watch).await {
        Ok(written) => publish(io, &unfinished, path).await.map(|()| written),
        Err(error) => Err(error),
    };
    if written.is_err() {
        // What cannot be removed can be seen to be unfinished.
        let _ = io.run(Op::Unlink { path: unfinished }).await;
    }
    written.map(|(bytes, stats)| Exported { info, bytes, stats })
}

/// Writes the file, and syncs it.
async fn write<E, S>(
    export: &Export<'_, E, S>,
    file: E::File,
    info: &ArchiveInfo,
    watch: &mut impl Watch,
) -> Result<(u64, SealStats), ImageError>
where
    E: Engine,
    S: Storage<File = E::File>,
{
    let &Export { storage, io, packs, workers, root, base, .. } = export;
    let mut output = Sections::new(storage, io, file);
    let id: ArchiveId = output.random()?;
    output.write(encode(info, &id)).await?;
    let mut source = TreeSource::new(packs, io, root, base.map(|base| (packs, base)));
    let mut gatherer = Gatherer::new(&mut source, packs, io, base, 0);
    let nodes = base.is_none().then(|| Cache::new(REMEMBERED));
    let mut remembered = Remembered { blocks: Cache::new(REMEMBERED), nodes };
    let means = Means {
        io,
        packs,
        dedup: &mut remembered,
        workers,
        output: &mut output,
        // The other side has the base, and elsewhere.
        base: base.map(|base| Cursor::new(Arc::clone(packs), io, base).without_places()),
        frame_blocks: FRAME_BLOCKS,
    };
    let (made, stats) = Line::new(means, root.size).run(&mut gatherer, watch).await?;
    if gatherer.stopped.is_some() {
        return Err(ImageError::new(packs.path(), ErrorKind::Cancelled));
    }
    let bytes = output.finish(&id, made).await?;
    Ok((bytes, stats))
}

async fn publish<E: Engine>(io: &Io<E>, unfinished: &Path, path: &Path) -> Result<(), ImageError> {
    let rename = Op::Rename { from: unfinished.to_owned(), to: path.to_owned() };
    io.run(rename).await.result.map_err(|e| ImageError::errno(unfinished, "rename", e))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let sync = Op::SyncDirectory { path: folder.to_owned() };
    io.run(sync).await.result.map_err(|e| ImageError::errno(folder, "sync", e))?;
    Ok(())
}

/// The packs of an archive. Frames are written as they come; nodes wait in memory until there is a pack of them.
struct Sections<'a, E: Engine, S> {
    storage: &'a S,
    io: &'a Io<E>,
    file: E::File,
    /// Where the next pack begins.
    end: u64,
    /// By the number of the pack; empty for those that are not finished.
    sections: Vec<Range<u64>>,
    data: Option<PackWriter<E>>,
    nodes: Option<PackWriter<E>>,
}

impl<'a, E: Engine, S: Storage<File = E::File>> Sections<'a, E, S> {
    fn new(storage: &'a S, io: &'a Io<E>, file: E::File) -> Self {
        Self { storage, io, file, end: 0, sections: Vec::new(), data: None, nodes: None }
    }

    fn random(&self) -> Result<[u8; 16], ImageError> {
        let mut id = [0; 16];
        let drawn = self.storage.random(&mut id);
        drawn.map_err(|e| ImageError::io(self.file.path(), "choose an id for", e))?;
        Ok(id)
    }

    /// Appends to the file.
    async fn write(&mut self, bytes: Vec<u8>) -> Result<(), ImageError> {
        let write = Op::write(self.file.clone(), FileOffset(self.end), AlignedBuf::from_slice(&bytes));
        self.end += bytes.len() as u64;
        let done = self.io.run(write).await.result;
        done.map(drop).map_err(|e| ImageError::errno(self.file.path(), "write", e))
    }

    fn begin(&mut self, kind: PackKind) -> Result<PackWriter<E>, ImageError> {
        if self.sections.len() >= SECTIONS_MAX as usize {
            return Err(ImageError::invalid(self.file.path(), "the disk is too large for one archive"));
        }
        self.sections.push(0..0);
        let (id, number) = (PackId(self.random()?), self.sections.len() as u32);
        let mut pack = PackWriter::section(self.io, self.file.clone(), PackHeader { id, kind, number });
        pack.begin_at(self.end);
        Ok(pack)
    }

    /// Finishes a pack, of which nothing was written before byte `end`.
    async fn end_pack(&mut self, mut pack: PackWriter<E>) -> Result<(), ImageError> {
        let written = pack.complete().await?;
        let section = &mut self.sections[written.number as usize - 1];
        *section = self.end..self.end + written.bytes;
        self.end = section.end;
        Ok(())
    }

    /// Finishes both open packs: frames first, since they are where the file goes on.
    async fn end_packs(&mut self) -> Result<(), ImageError> {
        if let Some(data) = self.data.take() {
            self.end_pack(data).await?;
        }
        if let Some(mut nodes) = self.nodes.take() {
            nodes.begin_at(self.end);
            self.end_pack(nodes).await?;
        }
        Ok(())
    }

    /// Completes the archive, with the disk that was made, and syncs it: its length.
    async fn finish(mut self, id: &ArchiveId, root: Root) -> Result<u64, ImageError> {
        self.end_packs().await?;
        let pages = encode_pages(id, &self.sections);
        let sections = self.sections.len() as u32;
        let trailer = ArchiveTrailer { id: *id, tree: root.tree, directory_at: self.end, sections };
        self.write([pages, trailer.encode()].concat()).await?;
        let sync = Op::Sync { file: self.file.clone() };
        let synced = self.io.run(sync).await.result;
        synced.map_err(|e| ImageError::errno(self.file.path(), "sync", e))?;
        Ok(self.end)
    }
}

impl<E: Engine, S: Storage<File = E::File>> RecordSink for Sections<'_, E, S> {
    async fn push(&mut self, kind: PackKind, record: NewRecord, hashes: &[Hash]) -> Result<Put, ImageError> {
        let open = match kind {
            PackKind::Data => self.data.take(),
            PackKind::Nodes => self.nodes.take(),
        };
        let mut pack = match open {
            Some(pack) => pack,
            None => self.begin(kind)?,
        };
        let place = pack.push(record, hashes);
        // Nobody reads pages of an archive that is being made.
        let put = Put { place, pages: vec![0; hashes.len()] };
        match kind {
            PackKind::Data => {
                pack.write_out().await?;
                if pack.is_full() {
                    self.end_pack(pack).await?;
                } else {
                    self.data = Some(pack);
                }
            }
            PackKind::Nodes => {
                let is_full = pack.is_full_at(NODE_PACK_BYTES);
                self.nodes = Some(pack);
                if is_full {
                    self.end_packs().await?;
                }
            }
        }
        Ok(put)
    }
}

/// What the archive holds already, as far as it is remembered.
struct Remembered {
    blocks: Cache<Hash, Place>,
    /// Not in an increment: what lies below a node there is in part where the base is, at that place of the disk only.
    nodes: Option<Cache<Hash, Place>>,
}

impl<E: Engine> Dedup<E> for Remembered {
    async fn look_ahead(&mut self, _: &Io<E>, _: &Packs<E>, _: &[Hash]) -> Result<(), ImageError> {
        Ok(())
    }

    fn find(&mut self, hash: &Hash) -> Option<Found> {
        self.blocks.get(hash).copied().map(Found::Sure)
    }

    fn insert(&mut self, hash: Hash, place: Place, _: u32) {
        self.blocks.insert(hash, place);
    }

    fn find_node(&mut self, hash: &Hash) -> Option<Found> {
        self.nodes.as_ref()?.get(hash).copied().map(Found::Sure)
    }

    fn insert_node(&mut self, hash: Hash, place: Place) {
        if let Some(nodes) = &mut self.nodes {
            nodes.insert(hash, place);
        }
    }
}
