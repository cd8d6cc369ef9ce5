//! Finding the bytes of a range, through a whole chain, in memory alone.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

use super::cache::{PAGE_BYTES, Page};
use super::index::{Answer, Index};
use super::pool::{Opened, Permit};
use super::{Chain, LayerLink, Link, Stage};
use crate::error::{ErrorKind, ImageError};
use crate::layer::Layer;
use crate::layer::frozen::Holds;
use crate::layer::paging::{Pins, device_error};
use crate::qcow2::{Mapping, image};
use crate::sealed::{Child, Hash, Lacking, Node};

/// A stretch of a disk whose bytes are in one place.
#[derive(Debug)]
pub struct Piece<F> {
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// Where they are.
    pub source: Source<F>,
}

/// Where bytes are.
#[derive(Debug)]
pub enum Source<F> {
    /// Nowhere: they are zeroes.
    Zero,
    /// In a file, as they are.
    File {
        /// The file.
        file: F,
        /// Where in it.
        offset: FileOffset,
        /// What lies past the end of the file reads as zeroes. A layer that ends before a block that
        /// its map names is damaged.
        may_end: bool,
    },
    /// In a compressed cluster.
    Compressed(Compressed),
    /// In the packs of a sealed snapshot.
    Sealed(SealedPart),
}

/// A part of a sealed snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedPart {
    /// The number of the snapshot in the chain.
    pub(super) link: usize,
    /// Its first byte on the disk.
    pub(super) start: u64,
}

/// A part of a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The number of the image in the chain.
    pub(super) link: usize,
    /// Where in the image's file the compressed bytes start.
    pub(super) offset: u64,
    /// How many bytes they are at most.
    pub(super) len: u32,
    /// Bytes of the cluster before the part.
    pub(super) skip: usize,
}

/// Why planning stopped.
#[derive(Debug)]
pub enum Stop {
    /// Something is not in memory: [`Chain::load`] it and go on.
    Miss(Miss),
    /// The tables of an image are damaged.
    Damage(ImageError),
}

/// What is not in memory.
#[derive(Debug)]
pub struct Miss {
    position: Position,
    /// The number of the image in the chain.
    link: usize,
    part: Part,
}

/// A part of an image.
#[derive(Debug)]
enum Part {
    /// The page of its file with this number.
    Page(u64),
    /// The file: it is closed.
    File,
    /// The nodes of a layer's map for these blocks.
    Nodes(Range<u64>),
    /// This node of a sealed snapshot.
    SealedNode(Child),
}

/// How far looking a byte up has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    at: u64,
    /// The number of the stage that is asked, after all above it have said that it is not there.
    stage: usize,
    /// For how many bytes they say so.
    len: u64,
}

/// What was just loaded: it counts even when the caches have no room for it, and looking up goes on
/// with it where it stopped. Not kept for longer than that.
pub struct Held<E: Engine> {
    position: Position,
    pages: Vec<((usize, u64), Page)>,
    opened: Option<(usize, Opened<E>)>,
    pins: Vec<Pins<E>>,
    sealed: Vec<(Hash, Arc<Node>)>,
    /// Goes with a file that is open beside the pool.
    permit: Option<Permit>,
}

impl<E: Engine> Default for Held<E> {
    fn default() -> Self {
        Self {
            position: Position::default(),
            pages: Vec::new(),
            opened: None,
            pins: Vec::new(),
            sealed: Vec::new(),
            permit: None,
        }
    }
}

/// Where in a chain bytes are: the number of the image that answers, and the place in it.
pub(super) struct Found {
    pub(super) link: usize,
    pub(super) mapping: Mapping,
    pub(super) len: u64,
    /// The stage that answered.
    stage: usize,
}

impl<E: Engine> Chain<E> {
    /// Appends to `pieces` where the bytes of `range` are, which must lie inside the disk, in order and
    /// without gaps. When it stops, the pieces up to there have been appended.
    ///
    /// # Errors
    /// Something is not in memory, or damaged.
    pub fn plan(
        &self,
        range: Range<u64>,
        held: &Held<E>,
        pieces: &mut Vec<Piece<E::File>>,
    ) -> Result<(), Stop> {
        let mut at = range.start;
        while at < range.end {
            let found = self.find(at, range.end, held)?;
            let next = at..at + found.len;
            let source = self.source(&next, &found, held)?;
            at = next.end;
            push(pieces, Piece { range: next, source });
        }
        Ok(())
    }

    /// Where the byte `at` is, through the chain, and for how many bytes that goes on.
    pub(super) fn find(&self, at: u64, end: u64, held: &Held<E>) -> Result<Found, Stop> {
        let mut position = match held.position {
            held if held.at == at && held.len > 0 => held,
            _ => Position { at, stage: 0, len: u64::MAX },
        };
        position.len = position.len.min(end - at);
        while let Some(stage) = self.stages.get(position.stage) {
            // What an image lacks at its end reads as zeroes above, whatever lies below it.
            let limit = self.limits[stage.first()];
            if at >= limit {
                return Ok(self.nothing(&position));
            }
            position.len = position.len.min(limit - at);
            let found = match stage {
                Stage::Index { first, index } => self.find_in_index(*first, index, &mut position),
                Stage::Link(link) => self.find_in(*link, &mut position, held)?,
            };
            if let Some(found) = found {
                return Ok(found);
            }
            position.stage += 1;
        }
        Ok(self.nothing(&position))
    }

    /// No image says anything about where looking up has come to.
    fn nothing(&self, position: &Position) -> Found {
        let seen = self.limits.partition_point(|limit| *limit > position.at);
        let link = seen.saturating_sub(1);
        Found { link, mapping: Mapping::Unallocated, len: position.len, stage: position.stage }
    }

    fn find_in_index(&self, first: usize, index: &Index, position: &mut Position) -> Option<Found> {
        let Position { at, stage, .. } = *position;
        let inside = at % BLOCK_SIZE;
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_SIZE).saturating_sub(inside);
        match index.find(at / BLOCK_SIZE) {
            Answer::Nothing { blocks } => {
                position.len = position.len.min(bytes(blocks));
                None
            }
            Answer::Layer { link, holds, blocks } => {
                position.len = position.len.min(bytes(blocks));
                let link = first + link;
                let limit = self.limits[link];
                if at >= limit {
                    return Some(self.nothing(position));
                }
                let mapping = mapping(holds, inside);
                Some(Found { link, mapping, len: position.len.min(limit - at), stage })
            }
        }
    }

    /// Asks one link; `None` when it says nothing about the byte.
    fn find_in(&self, link: usize, position: &mut Position, held: &Held<E>) -> Result<Option<Found>, Stop> {
        let Position { at, stage, len } = *position;
        let miss = |part| Stop::Miss(Miss { position: Position { at, stage, len }, link, part });
        let (mapping, known) = match &*self.links[link] {
            Link::Raw { .. } => (Mapping::Data(at), len),
            Link::Qcow2(image) => {
                let page =
                    |page| held.page((link, page)).or_else(|| self.tables.get(&(self.height(link), page)));
                image.find(at, at + len, page).map_err(|stop| match stop {
                    image::Stop::Miss(page) => miss(Part::Page(page)),
                    image::Stop::Flaw(flaw) => Stop::Damage(flaw.of(image.path())),
                })?
            }
            Link::Layer(layer) => {
                let blocks = at / BLOCK_SIZE..(at + len).div_ceil(BLOCK_SIZE);
                let opened = held.opened(link).or_else(|| self.pool.get(layer.id()));
                let Some(Opened::Layer(layer)) = opened else { return Err(miss(Part::File)) };
                let Some(run) = layer.first_run(blocks.clone()) else {
                    return Err(miss(Part::Nodes(blocks.start..blocks.start + 1)));
                };
                let known = ((run.start + run.count) * BLOCK_SIZE - at).min(len);
                (mapping(run.holds, at % BLOCK_SIZE), known)
            }
            Link::Sealed(snapshot) => {
                let node = |child: &Child| held.node(child).or_else(|| snapshot.packs().cached_node(child));
                let run = snapshot.run(at / BLOCK_SIZE, (at + len).div_ceil(BLOCK_SIZE), node);
                let (is_stored, end) = run.map_err(|lacking| match lacking {
                    Lacking::Node(child) => miss(Part::SealedNode(child)),
                    Lacking::Damage(error) => Stop::Damage(error),
                })?;
                let mapping = if is_stored { Mapping::Sealed } else { Mapping::Zero };
                (mapping, (end * BLOCK_SIZE - at).min(len))
            }
        };
        position.len = known;
        let is_here = mapping != Mapping::Unallocated;
        Ok(is_here.then_some(Found { link, mapping, len: known, stage }))
    }

    fn source(&self, range: &Range<u64>, found: &Found, held: &Held<E>) -> Result<Source<E::File>, Stop> {
        let link = found.link;
        let offset = match found.mapping {
            Mapping::Unallocated | Mapping::Zero => return Ok(Source::Zero),
            Mapping::Data(offset) => offset,
            Mapping::Compressed { offset, len } => {
                let skip = self.cluster_size(link).map_or(0, |size| range.start % size) as usize;
                return Ok(Source::Compressed(Compressed { link, offset, len, skip }));
            }
            Mapping::Sealed => return Ok(Source::Sealed(SealedPart { link, start: range.start })),
        };
        let (file, len) = match &*self.links[link] {
            Link::Raw { file, identity, .. } => (file.clone(), identity.size),
            Link::Qcow2(image) => {
                let (file, len) = image.data();
                (file.clone(), len)
            }
            Link::Layer(layer) => {
                let Some(opened) = held.opened(link).or_else(|| self.pool.get(layer.id())) else {
                    let position =
                        Position { at: range.start, stage: found.stage, len: range.end - range.start };
                    return Err(Stop::Miss(Miss { position, link, part: Part::File }));
                };
                let file = opened.file();
                return Ok(Source::File { file, offset: FileOffset(offset), may_end: false });
            }
            // It has no bytes in a file of its own.
            Link::Sealed(_) => return Ok(Source::Zero),
        };
        // As QEMU does. Nothing that is not in the file needs to be read.
        Ok(match offset < len {
            true => Source::File { file, offset: FileOffset(offset), may_end: true },
            false => Source::Zero,
        })
    }

    fn cluster_size(&self, link: usize) -> Option<u64> {
        match &**self.links.get(link)? {
            Link::Qcow2(image) => Some(image.cluster_size()),
            _ => None,
        }
    }

    /// Brings what planning stopped for into memory, and into `held` until planning has come further.
    /// What was planned before must have been read, so that not too many files are open.
    ///
    /// # Errors
    /// The file cannot be read, or is not what it was; or nothing was missing, but there is damage. That
    /// is logged.
    pub async fn load(&self, io: &Io<E>, stop: Stop, held: &mut Held<E>) -> Result<(), DeviceError> {
        let Miss { position, link, part } = match stop {
            Stop::Miss(miss) => miss,
            Stop::Damage(error) => return Err(self.complain(&error)),
        };
        if (position.at, position.stage) != (held.position.at, held.position.stage) {
            *held = Held::default();
        }
        held.position = position;
        match (part, &*self.links[link]) {
            (Part::Page(page), Link::Qcow2(image)) => {
                let loaded = self.load_page(io, (self.height(link), page), image.file.clone()).await?;
                held.pages.push(((link, page), loaded));
            }
            (Part::File, Link::Layer(layer)) => {
                // Given back first, since others may wait for it, too.
                (held.opened, held.permit) = (None, None);
                let permit = self.pool.permit().await;
                let opened = match self.pool.get(layer.id()) {
                    Some(opened) => opened,
                    None => self.open_again(io, layer).await.map_err(|error| self.complain(&error))?,
                };
                held.permit = (!self.pool.keep(layer.id(), &opened)).then_some(permit);
                held.opened = Some((link, opened));
            }
            (Part::Nodes(blocks), Link::Layer(layer)) => {
                let opened = held.opened(link).or_else(|| self.pool.get(layer.id()));
                let Some(Opened::Layer(layer)) = opened else { return Ok(()) };
                let pins = layer.pin(io, &blocks).await.map_err(|error| {
                    self.complain(&error);
                    device_error(&error)
                })?;
                held.pins.push(pins);
                held.opened.get_or_insert((link, Opened::Layer(layer)));
            }
            (Part::SealedNode(child), Link::Sealed(snapshot)) => {
                let loaded = snapshot.packs().node(io, &child).await;
                held.sealed.push((child.hash, loaded.map_err(|error| self.complain(&error))?));
            }
            _ => return Err(DeviceError::Corrupt),
        }
        Ok(())
    }

    async fn load_page(&self, io: &Io<E>, key: (usize, u64), file: E::File) -> Result<Page, DeviceError> {
        let brought = self.tables.get_or_insert_async(&key, async {
            let buf = AlignedBuf::zeroed(PAGE_BYTES);
            let offset = FileOffset(key.1 * PAGE_BYTES as u64);
            let memory = io.run(Op::read(file, offset, buf)).await.zero_filled()?;
            Ok::<_, DeviceError>(Arc::new(memory.into_buf()))
        });
        brought.await
    }

    /// Keeps the image at the top open until the answer is dropped, for whoever is going to write it.
    pub(crate) async fn hold_top(&self, io: &Io<E>) -> Result<Opened<E>, ImageError> {
        let refuse =
            |detail: &str| Err(ImageError::new(self.path(), ErrorKind::Unsupported(detail.to_owned())));
        let link = match &*self.links[0] {
            Link::Raw { file, .. } => return Ok(Opened::File(file.clone())),
            Link::Qcow2(_) => return refuse("qcow2 images are read, not written"),
            Link::Sealed(_) => return refuse("a sealed snapshot never changes"),
            Link::Layer(link) => link,
        };
        if let Some(opened) = self.pool.get(link.id()) {
            return Ok(opened);
        }
        let opened = self.open_again(io, link).await?;
        match self.pool.keep(link.id(), &opened) {
            true => Ok(opened),
            false => refuse("too many files of the chain are open"),
        }
    }

    /// Opens the file of a layer again, which must be what it was.
    async fn open_again(&self, io: &Io<E>, link: &LayerLink) -> Result<Opened<E>, ImageError> {
        let file = (self.reopen)(&link.path)?;
        Layer::check_seal(io, &link.path, file.clone(), &link.seal).await?;
        if !link.is_paged {
            return Ok(Opened::File(file));
        }
        let opening = Layer::open_frozen(io, &link.path, file, self.paged_tuning, true);
        Ok(Opened::Layer(Box::pin(opening).await?.0))
    }

    /// Logs damage, the first time.
    pub(super) fn complain(&self, error: &ImageError) -> DeviceError {
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::error!("{error}; what else is found damaged while this disk is open is not logged");
        }
        device_error(error)
    }
}

fn mapping(holds: Holds, inside: u64) -> Mapping {
    match holds {
        Holds::Nothing => Mapping::Unallocated,
        Holds::Zero => Mapping::Zero,
        Holds::Place(place) => Mapping::Data(Holds::offset(place) + inside),
    }
}

impl<E: Engine> Held<E> {
    fn page(&self, key: (usize, u64)) -> Option<Page> {
        self.pages.iter().find(|(held, _)| *held == key).map(|(_, page)| Arc::clone(page))
    }

    fn node(&self, child: &Child) -> Option<Arc<Node>> {
        self.sealed.iter().find(|(held, _)| *held == child.hash).map(|(_, node)| Arc::clone(node))
    }

    fn opened(&self, link: usize) -> Option<Opened<E>> {
        self.opened.as_ref().filter(|(held, _)| *held == link).map(|(_, opened)| opened.clone())
    }
}

/// Appends a piece, joined to the one before where the file goes on.
pub(crate) fn push<F: StorageFile>(pieces: &mut Vec<Piece<F>>, next: Piece<F>) {
    if let Some(last) = pieces.last_mut() {
        let len = last.range.end - last.range.start;
        let joins = match (&last.source, &next.source) {
            (Source::Zero, Source::Zero) => true,
            (
                Source::File { file: a, offset: at, may_end: may_a },
                Source::File { file: b, offset, may_end },
            ) => at.plus(len) == *offset && may_a == may_end && a.path() == b.path(),
            (Source::Sealed(a), Source::Sealed(b)) => a.link == b.link && a.start + len == b.start,
            _ => false,
        };
        if joins && last.range.end == next.range.start {
            last.range.end = next.range.end;
            return;
        }
    }
    pieces.push(next);
}
