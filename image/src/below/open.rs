//! Opening a chain, link after link.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{FileIdentity, Lock, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::SECTOR_SIZE;

use super::index::{Builder, RUN_BYTES};
use super::pool::{Opened, Permits, Pool};
use super::{Chain, LINKS_MAX, LayerLink, Link, QCOW2_MAX, Stage, cache};
use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use crate::layer::base::{Named, describe_files};
use crate::layer::base_record::{BaseIdentity, Qcow2Identity};
use crate::layer::frozen::blocks_of;
use crate::layer::in_store::{self, Kept, ResolveBase, Resolved, StoreBase};
use crate::layer::{Layer, LayerId, Tuning, open_file};
use crate::qcow2::image::Image;

/// Layers whose map is asked for every read, open at a time.
const PAGED_MAX: usize = 8;
/// Memory for nodes of the map of a layer while that is read once, in bytes.
const SCAN_CACHE_BYTES: u64 = 64 << 10;
/// What is said of an image that is no file.
pub(crate) const NO_FILE: &str = "a sealed snapshot is no file: it is opened by the store that it is in";
/// Parts of compressed clusters, or frames, that are decompressed at a time for a chain.
pub(super) const DECOMPRESSING_MAX: usize = 4;

/// What may be done when an image is opened for reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenBelow {
    /// Open the files that images name: backing files and external data files. Without it an image
    /// that names one is refused, because it may name any file that this process can read.
    pub allow_backing: bool,
    /// The format of backing files whose image does not state it. It is never guessed.
    pub backing_format: Option<Format>,
    /// Read this snapshot of the image at the top, by id or else by name, not the disk as it is now.
    pub snapshot: Option<String>,
}

/// A backing file by name.
#[derive(Debug)]
pub(crate) struct BackingSpec {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
}

/// The image with which a chain begins or goes on.
pub(crate) struct NextLink<E: Engine> {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) options: OpenBelow,
    /// The layer that names it, and what it was then.
    pub(crate) named: Option<Named>,
    /// Of a snapshot of a store: what it is now.
    pub(crate) resolved: Option<Resolved<E>>,
}

impl<E: Engine> NextLink<E> {
    /// The base of a layer.
    pub(crate) fn named(named: Named, resolver: Option<&dyn ResolveBase<E>>) -> Result<Self, ImageError> {
        let options = named.qcow2().map(Qcow2Identity::options).unwrap_or_default();
        let resolved = match named.base.in_store() {
            Some(base) => Some(in_store::resolve(&named.layer, base, resolver)?),
            None => None,
        };
        let path = resolved.as_ref().map_or_else(|| named.path(), |resolved| path_of(resolved).to_owned());
        Ok(Self { path, format: named.format(), options, named: Some(named), resolved })
    }

    /// A snapshot of a store.
    fn snapshot(resolved: Resolved<E>) -> Self {
        let (path, options) = (path_of(&resolved).to_owned(), OpenBelow::default());
        Self { path, format: Format::Layer, options, named: None, resolved: Some(resolved) }
    }
}

fn path_of<E: Engine>(resolved: &Resolved<E>) -> &Path {
    match resolved {
        Resolved::Frozen { path, .. } => path,
        Resolved::Sealed { packs, .. } => packs.path(),
    }
}

impl<E: Engine> Chain<E> {
    /// Opens an image for reading, with all that lies below it; the files are shared with other
    /// readers.
    ///
    /// # Errors
    /// An image of the chain cannot be opened, is damaged or in use; it names a file that it may not,
    /// or one that is not what it was; the chain is a loop or too long; there is no such snapshot.
    pub async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        path: &Path,
        format: Format,
        options: &OpenBelow,
    ) -> Result<Self, ImageError> {
        let first =
            NextLink { path: path.to_owned(), format, options: options.clone(), named: None, resolved: None };
        Ok(Self::open_below(storage, io, first, None, &Tuning::default(), None, None).await?.0)
    }

    /// Opens a snapshot of a store for reading, with all that lies below it.
    ///
    /// # Errors
    /// As of [`Chain::open`], and what the resolver says.
    pub async fn open_in_store<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        base: &StoreBase,
        resolver: &dyn ResolveBase<E>,
    ) -> Result<Self, ImageError> {
        let resolved = resolver.resolve(base);
        let resolved = resolved.map_err(|text| ImageError::new(base.to_string(), ErrorKind::Base(text)))?;
        let first = NextLink::snapshot(resolved);
        Ok(Self::open_below(storage, io, first, None, &Tuning::default(), Some(resolver), None).await?.0)
    }

    /// As [`Chain::open`], of what lies below a layer whose id is `above`. By what the image at the top
    /// is recognised is the answer, too. `known` is what that image, if it is a layer, has below it, and is open: then the
    /// image is put on it, where that can be.
    pub(crate) async fn open_below<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        first: NextLink<E>,
        above: Option<LayerId>,
        tuning: &Tuning,
        resolver: Option<&dyn ResolveBase<E>>,
        known: Option<&Self>,
    ) -> Result<(Self, BaseIdentity), ImageError> {
        let above = above.or(first.named.as_ref().map(|named| named.id));
        let top = first.named.clone();
        let mut opener = Opener::new(storage, io, above, *tuning);
        opener.resolver = resolver;
        let (mut next, mut identity) = (Some(first), None);
        while let Some(link) = next.take() {
            let is_first = opener.links.is_empty();
            let opened = opener.open(&link).await.map_err(|error| match &link.named {
                // Said about that layer already.
                Some(named) if error.path == named.layer && matches!(error.kind, ErrorKind::Base(_)) => error,
                Some(named) => named.unusable(&error),
                None => error,
            });
            let found = match opened.and_then(|found| opener.check(&link, found)) {
                Ok(found) => found,
                // About a layer further down: the one at the top is what somebody wants to open.
                Err(error) if !is_first => {
                    return Err(top.as_ref().map(|top| top.unusable(&error)).unwrap_or(error));
                }
                Err(error) => return Err(error),
            };
            if let Some(known) = known.filter(|known| is_first && opener.fits_on(known, found.next.as_ref()))
            {
                return Ok((opener.finish_on(known), found.identity));
            }
            next = found.next;
            identity.get_or_insert(found.identity);
        }
        let identity = identity.expect("a chain has a first link");
        Ok((opener.finish(), identity))
    }
}

/// What opening a link has found.
struct Found<E: Engine> {
    identity: BaseIdentity,
    /// The files, from this link on.
    files: Vec<PathBuf>,
    /// What lies below it.
    next: Option<NextLink<E>>,
}

/// A chain that is being opened.
pub(super) struct Opener<'a, S: Storage, E: Engine<File = S::File>> {
    storage: &'a S,
    io: &'a Io<E>,
    tuning: Tuning,
    resolver: Option<&'a dyn ResolveBase<E>>,
    pub(super) links: Vec<Arc<Link<E>>>,
    pub(super) limits: Vec<u64>,
    pub(super) stages: Vec<Stage>,
    /// The index over the layers since the last other stage, and the first of them.
    pub(super) index: Builder,
    index_first: usize,
    /// Runs in the indexes that are complete.
    runs: usize,
    pub(super) pool: Arc<Pool<E>>,
    /// The layers of the chain, and the one above it.
    pub(super) layers: HashSet<LayerId>,
}

impl<'a, S: Storage, E: Engine<File = S::File>> Opener<'a, S, E> {
    fn new(storage: &'a S, io: &'a Io<E>, above: Option<LayerId>, tuning: Tuning) -> Self {
        Self {
            storage,
            io,
            tuning,
            resolver: None,
            links: Vec::new(),
            limits: Vec::new(),
            stages: Vec::new(),
            index: Builder::default(),
            index_first: 0,
            runs: 0,
            pool: Arc::new(Pool::new(tuning.files_max, PAGED_MAX)),
            layers: above.into_iter().collect(),
        }
    }

    /// Opens a link; a qcow2 image with all that it names.
    async fn open(&mut self, link: &NextLink<E>) -> Result<Found<E>, ImageError> {
        if self.links.len() >= LINKS_MAX {
            let detail = format!("more than {LINKS_MAX} bases in a chain");
            return Err(ImageError::new(&link.path, ErrorKind::Base(detail)));
        }
        if let Some(Resolved::Sealed { packs, root }) = &link.resolved {
            self.push_stage(Link::sealed(packs, *root)?);
            let base = StoreBase { store: [0; 16], snapshot: [0; 16], size: root.size };
            return Ok(Found { identity: BaseIdentity::Store(base), files: Vec::new(), next: None });
        }
        match link.format {
            Format::Raw => {
                let (raw, identity) = open_raw(self.storage, &link.path)?;
                let size = raw.size();
                self.push_stage(raw);
                let identity = BaseIdentity::Raw { size, mtime_ns: identity.mtime_ns };
                Ok(Found { identity, files: vec![link.path.clone()], next: None })
            }
            Format::Layer => {
                let is_open = link.named.as_ref().is_some_and(|named| named.base.is_open());
                let is_known = link.named.is_some() && link.resolved.is_none() && !is_open;
                let kept = match &link.resolved {
                    Some(Resolved::Frozen { kept, .. }) => Some(Arc::clone(kept)),
                    _ => None,
                };
                self.open_layer(&link.path, is_known, kept).await
            }
            Format::Qcow2 => self.open_qcow2(link).await,
            Format::Sealed => Err(ImageError::new(&link.path, ErrorKind::Unsupported(NO_FILE.to_owned()))),
        }
    }

    /// Refuses a link that is not what the layer over it has recorded.
    fn check(&self, link: &NextLink<E>, found: Found<E>) -> Result<Found<E>, ImageError> {
        match (&link.named, &link.resolved) {
            (Some(named), Some(Resolved::Frozen { layer, .. })) => {
                named.check_frozen(&found.identity, *layer)?;
            }
            (Some(named), Some(Resolved::Sealed { root, .. })) => named.check_sealed(root.size)?,
            (Some(named), None) => named.check(&found.identity, &found.files)?,
            (None, Some(Resolved::Frozen { path, layer, .. })) => check_id(path, &found.identity, layer)?,
            (None, _) => {}
        }
        Ok(found)
    }

    fn push(&mut self, link: Link<E>) {
        let above = self.limits.last().copied().unwrap_or(u64::MAX);
        self.limits.push(link.size().min(above));
        self.links.push(Arc::new(link));
    }

    fn push_stage(&mut self, link: Link<E>) {
        self.finish_index();
        self.stages.push(Stage::Link(self.links.len()));
        self.push(link);
        self.index_first = self.links.len();
    }

    pub(super) fn finish_index(&mut self) {
        let index = std::mem::take(&mut self.index).finish();
        self.runs += index.len();
        if index.len() > 0 {
            self.stages.push(Stage::Index { first: self.index_first, index: Arc::new(index) });
        }
    }

    /// Runs that all indexes together may have.
    pub(super) fn runs_max(&self) -> usize {
        self.tuning.index_bytes as usize / RUN_BYTES
    }

    /// Runs that the index may still take.
    fn room(&mut self) -> usize {
        // Half of what is free, since each may split another.
        self.runs_max().saturating_sub(self.runs + self.index.len_max()) / 2
    }

    async fn open_layer(
        &mut self,
        path: &Path,
        is_known: bool,
        kept: Option<Kept>,
    ) -> Result<Found<E>, ImageError> {
        // Through the page cache, which reads ahead and may know the file from another disk over it.
        let file = open_file(self.storage, path, OpenOptions::READ.buffered(), Lock::Shared)?;
        let tuning = Tuning { map_cache_bytes: SCAN_CACHE_BYTES, ..self.tuning };
        let (layer, seal) = Box::pin(Layer::open_frozen(self.io, path, file, tuning, is_known)).await?;
        let (record, identity) = (layer.base_record(), layer.frozen_identity());
        if !self.layers.insert(record.layer_id) {
            return Err(ImageError::new(path, ErrorKind::Base("its bases form a loop".to_owned())));
        }
        let above = self.limits.last().copied().unwrap_or(u64::MAX);
        let size = identity.size();
        let runs = self.scan(&layer, blocks_of(size.min(above))).await?;
        let link = Link::Layer(Box::new(LayerLink {
            path: path.into(),
            size,
            segment_blocks: layer.segment_blocks(),
            seal,
            is_paged: runs.is_none(),
            _kept: kept,
        }));
        match runs {
            Some(runs) => {
                self.index.add((self.links.len() - self.index_first) as u16, &runs);
                // Before the other one is closed, so that the lock is never given up.
                if self.pool.has_place() {
                    let file = open_file(self.storage, path, OpenOptions::READ, Lock::Shared)?;
                    self.pool.keep(&record.layer_id, &Opened::File(file));
                }
                self.push(link);
            }
            None => self.push_stage(link),
        }
        let named = Named::of(path, &record)?;
        let next = named.map(|named| NextLink::named(named, self.resolver)).transpose()?;
        Ok(Found { identity, files: vec![path.to_owned()], next })
    }

    /// All that the map of a layer says; `None` when that does not fit into the index, or cannot be
    /// read: then only reads of what is damaged shall fail.
    async fn scan(
        &mut self,
        layer: &Arc<Layer<E>>,
        blocks: u64,
    ) -> Result<Option<Vec<crate::layer::frozen::FrozenRun>>, ImageError> {
        let mut room = self.room();
        for settled in [false, true] {
            match layer.scan(self.io, blocks, room).await {
                Ok(None) if !settled => {
                    self.index.settle();
                    let settled_room = self.room();
                    if settled_room <= room {
                        return Ok(None);
                    }
                    room = settled_room;
                }
                Err(ImageError { kind: ErrorKind::Corrupt { .. }, .. }) => return Ok(None),
                scanned => return scanned,
            }
        }
        Ok(None)
    }

    /// Opens a qcow2 image and its backing files.
    async fn open_qcow2(&mut self, link: &NextLink<E>) -> Result<Found<E>, ImageError> {
        let recorded = link.named.as_ref().and_then(|named| Some((named, named.qcow2()?)));
        let first = self.links.len();
        let mut files: Vec<FileIdentity> = Vec::new();
        let mut paths: Vec<PathBuf> = Vec::new();
        let mut note = |path: &Path, identity| {
            paths.push(path.to_owned());
            files.push(identity);
            // Before anything that it names is opened.
            let Some((named, was)) = recorded else { return Ok(()) };
            describe_files(was, &files, &paths).map_or(Ok(()), |change| Err(named.changed(&change)))
        };
        let mut next = Some(BackingSpec { path: link.path.clone(), format: link.format });
        while let Some(BackingSpec { path, format }) = next.take() {
            self.check_backing(first, &link.path, &path)?;
            if format == Format::Layer {
                let detail = "a layer cannot lie below a qcow2 image".to_owned();
                return Err(ImageError::new(path, ErrorKind::Unsupported(detail)));
            }
            if format == Format::Raw {
                let (raw, identity) = open_raw(self.storage, &path)?;
                note(&path, identity)?;
                self.push_stage(raw);
                continue;
            }
            let mut image = Image::open(self.storage, self.io, &path).await?;
            note(&path, image.identity)?;
            image.open_data(self.storage, link.options.allow_backing)?;
            if let Some((data, identity)) = image.external_data() {
                note(data.path(), *identity)?;
            }
            next = image.backing(&link.options)?;
            if let Some(name) = link.options.snapshot.as_ref().filter(|_| self.links.len() == first) {
                image.use_snapshot(self.io, name).await?;
            }
            self.push_stage(Link::Qcow2(Box::new(image)));
        }
        let identity = Qcow2Identity::new(self.links[first].size(), &files, &link.options);
        Ok(Found { identity: BaseIdentity::Qcow2(identity), files: paths, next: None })
    }

    /// Refuses a chain of backing files, from link `first` on, that goes on at `next` for ever, or for
    /// too long.
    fn check_backing(&self, first: usize, top: &Path, next: &Path) -> Result<(), ImageError> {
        let refuse = |detail: String| Err(ImageError::new(top, ErrorKind::Base(detail)));
        let links = &self.links[first..];
        if let Some(twice) = links.iter().find(|link| link.path() == next) {
            let twice = twice.path().display();
            return refuse(format!("its chain of backing files is a loop: {twice} again"));
        }
        if links.len() > QCOW2_MAX {
            return refuse(format!("its chain has more than {QCOW2_MAX} backing files"));
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Chain<E> {
        self.finish_index();
        let storage = self.storage.clone();
        let reopen = move |path: &Path| open_file(&storage, path, OpenOptions::READ, Lock::Shared);
        Chain {
            links: self.links,
            limits: self.limits,
            stages: self.stages,
            pool: self.pool,
            reopen: Box::new(reopen),
            paged_tuning: Tuning {
                map_cache_bytes: self.tuning.index_bytes / PAGED_MAX as u64,
                ..self.tuning
            },
            tables: Arc::new(cache::tables()),
            clusters: Arc::new(cache::clusters()),
            decompressing: Permits::new(DECOMPRESSING_MAX),
            complained: AtomicBool::new(false),
        }
    }
}

/// Refuses a file that is not the layer that a store says.
fn check_id(path: &Path, found: &BaseIdentity, layer: &LayerId) -> Result<(), ImageError> {
    match found {
        BaseIdentity::Layer { id, .. } if id == layer => Ok(()),
        _ => {
            let detail = "it is not the layer that the catalog names: bring the old file back".to_owned();
            Err(ImageError::new(path, ErrorKind::Base(detail)))
        }
    }
}

fn open_raw<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    path: &Path,
) -> Result<(Link<E>, FileIdentity), ImageError> {
    let (file, identity) = open_shared(storage, path)?;
    let size = identity.size.next_multiple_of(SECTOR_SIZE);
    Ok((Link::Raw { file, identity, size }, identity))
}

/// Opens a file for reading, sharing it with other readers, and tells what it is.
pub(crate) fn open_shared<S: Storage>(
    storage: &S,
    path: &Path,
) -> Result<(S::File, FileIdentity), ImageError> {
    let file = open_file(storage, path, OpenOptions::READ, Lock::Shared)?;
    let identity = file.identity().map_err(|e| ImageError::io(path, "identify", e))?;
    Ok((file, identity))
}
