//! Scrubbing: everything that the store has written is read and compared, and what is damaged is named by what it touches.
//!
//! Packs are read from their first byte to their last, each once; then the trees of all snapshots are walked, without reading data
//! again, which says what of which snapshot is lost. Layers are checked with the checksums of their data, each once. The index is
//! read as well; if it is damaged, it is made again from the packs. What is damaged in a layer or a sealed snapshot is damaged in all
//! that lies over it and does not cover it (`touch`).

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::layer::check;
use sapwood_image::sealed::Root;
use sapwood_image::sealed::collect::{Bad, Findings, Lost, Pace, Scrub};
use sapwood_image::{ErrorKind, ImageError};

use crate::catalog::rows::NodeState;
use crate::catalog::{Look, View};
use crate::collect::{StoredRoot, roots};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::store::Store;
use crate::touch::{Own, Touched, Touching};

/// How far a scrub is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Bytes of files that were read.
    pub bytes: u64,
    /// Bytes of all files that are to be read.
    pub of: u64,
    /// Damage found so far.
    pub damage: u64,
}

/// A layer in which something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedLayer {
    /// The layer.
    pub id: Id,
    /// Its file.
    pub path: PathBuf,
    /// What is wrong.
    pub errors: Vec<String>,
}

/// What a scrub has found.
#[derive(Clone, Debug, Default)]
pub struct Scrubbed {
    /// What was found in packs.
    pub packs: Findings,
    /// Layers that were checked.
    pub layers: u64,
    /// Layers of volumes that are attached, or were while they were read: not all of them was read.
    pub in_use: Vec<PathBuf>,
    /// Layers in which something is wrong.
    pub damaged_layers: Vec<DamagedLayer>,
    /// Runs of the index that are damaged, and how.
    pub damaged_runs: Vec<String>,
    /// Whether the index was made again from the packs.
    pub mended: bool,
    /// Snapshots and volumes that are touched, and which of their bytes.
    pub touched: Vec<Touched>,
}

impl Scrubbed {
    /// Whether everything is as it was written.
    pub fn is_sound(&self) -> bool {
        self.packs.damage_count == 0
            && self.damaged_layers.is_empty()
            && self.damaged_runs.is_empty()
            && self.touched.is_empty()
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Reads everything, and says what is damaged and which snapshots and volumes that touches. Nothing is changed, but for the
    /// index, which is made again if it is damaged. No collection can begin meanwhile.
    ///
    /// # Errors
    /// Another scrub, an account or a collection is under way; [`Cancelled`](ErrorKind::Cancelled); what the catalog or the
    /// storage says. Damage is no error.
    pub async fn scrub(
        &self,
        io: &Io<E>,
        pace: &Arc<Pace>,
        progress: &mut impl FnMut(ScrubProgress),
    ) -> Result<Scrubbed> {
        let _scrubbing = self.only_one("scrub")?;
        // A pack that goes while it is read would be damage.
        let _still = self.only_one("collection")?;
        // What is sealed or deleted meanwhile keeps its file until it was read.
        let (view, layers, _held) = self.catalog.hold_still(|_| {
            let view = self.catalog.view()?;
            let layers = layers_of(&view)?;
            let held: Vec<_> = layers.iter().map(|(layer, _)| self.usage.keep_layer(*layer)).collect();
            Ok((view, layers, held))
        })?;
        let mut at = ScrubProgress { of: self.bytes_to_scrub(&view, &layers)?, ..ScrubProgress::default() };
        let mut found = Scrubbed::default();
        self.scrub_index(io, &mut found).await?;
        let stored = roots(&view)?;
        let lost = self.scrub_packs(io, pace, &stored, &mut found, &mut at, progress).await?;
        let mut own: BTreeMap<Id, Own> = BTreeMap::new();
        for (layer, size) in &layers {
            if pace.is_stopped() {
                return Err(StoreError::from(ImageError::new(self.directory.root(), ErrorKind::Cancelled)));
            }
            if let Some(damage) = self.scrub_layer(io, *layer, *size, &mut found).await? {
                own.insert(*layer, damage);
            }
            at.bytes += self.allocated(&self.directory.layer(*layer))?;
            at.damage = found.packs.damage_count + found.damaged_layers.len() as u64;
            progress(at);
        }
        let sealed = sealed_damage(&stored, lost);
        found.touched = Touching::new(self, io, &view, &own, &sealed)?.all().await?;
        Ok(found)
    }

    fn bytes_to_scrub(&self, view: &View, layers: &[(Id, u64)]) -> Result<u64> {
        let packs: u64 = view.packs()?.iter().map(|(_, row)| row.bytes).sum();
        layers
            .iter()
            .try_fold(packs, |sum, (layer, _)| Ok(sum + self.allocated(&self.directory.layer(*layer))?))
    }

    async fn scrub_index(&self, io: &Io<E>, found: &mut Scrubbed) -> Result<()> {
        for run in self.content.packs().index().runs().iter() {
            if let Err(error) = run.verify(io).await {
                found.damaged_runs.push(error.to_string());
            }
        }
        if !found.damaged_runs.is_empty() {
            self.content.is_index_damaged.store(true, Ordering::Release);
            found.mended = self.mend_index(io).await.unwrap_or_else(|error| {
                log::warn!("{error}: the index of what is sealed stays damaged");
                false
            });
        }
        Ok(())
    }

    /// Reads all packs, and says what the roots have lost.
    async fn scrub_packs(
        &self,
        io: &Io<E>,
        pace: &Arc<Pace>,
        stored: &[StoredRoot],
        found: &mut Scrubbed,
        at: &mut ScrubProgress,
        progress: &mut impl FnMut(ScrubProgress),
    ) -> Result<Vec<Option<Lost>>> {
        // What could not be read once may be read now.
        let finder = self.finder(io, pace)?.with_bad(Bad::default());
        let numbers: Vec<u32> = finder.known().collect();
        let mut scrub = Scrub::new(finder);
        for number in numbers {
            scrub.pack(number).await?;
            at.bytes = scrub.findings().bytes;
            at.damage = scrub.findings().damage_count;
            progress(*at);
        }
        let all: Vec<Root> = stored.iter().map(|stored| stored.root).collect();
        let lost = scrub.roots(&all).await?;
        found.packs = scrub.findings().clone();
        // A collection goes by other copies of what is damaged, where there are any.
        self.content.set_bad(scrub.into_bad());
        Ok(lost)
    }

    /// What `examining` the file of a layer gives; none as soon as somebody waits to write the layer.
    pub(crate) async fn unless_wanted<T>(&self, id: Id, examining: impl Future<Output = T>) -> Option<T> {
        let _examined = self.usage.examine(id)?;
        // It ends before others are told. Only reads that are under way keep the file, and its lock, a little longer.
        let mut examining = pin!(examining);
        poll_fn(|cx| match self.usage.is_wanted(id) {
            true => Poll::Ready(None),
            false => examining.as_mut().poll(cx).map(Some),
        })
        .await
    }

    /// Checks a layer of a disk of `size` bytes: what of it is damaged, if anything.
    async fn scrub_layer(&self, io: &Io<E>, id: Id, size: u64, found: &mut Scrubbed) -> Result<Option<Own>> {
        let path = self.directory.layer(id);
        let report = match self.unless_wanted(id, check(&self.storage, io, &path)).await {
            Some(Ok(report)) => report,
            None | Some(Err(ImageError { kind: ErrorKind::Locked { .. }, .. })) => {
                found.in_use.push(path);
                return Ok(None);
            }
            Some(Err(error)) => {
                // It is no layer, or cannot be read: all of it is lost.
                let why = error.to_string();
                found.damaged_layers.push(DamagedLayer { id, path, errors: vec![why.clone()] });
                return Ok(Some(Own { ranges: whole_disk(size), is_exact: false, why }));
            }
        };
        found.layers += 1;
        let Some(why) = report.errors.first().cloned() else { return Ok(None) };
        let is_exact = !report.lost.is_empty();
        let ranges = if is_exact { bytes_of(&report.lost, size) } else { whole_disk(size) };
        let why = format!("{}: {why}", path.display());
        found.damaged_layers.push(DamagedLayer { id, path, errors: report.errors });
        Ok(Some(Own { ranges, is_exact, why }))
    }
}

/// The layers that the catalog names, and the sizes of their disks.
pub(crate) fn layers_of(view: &View) -> Result<Vec<(Id, u64)>> {
    let of_node = |(_, row): (Id, crate::rows::NodeRow)| match row.state {
        NodeState::Frozen { layer, .. } => Some((layer, row.size)),
        NodeState::Bare | NodeState::Sealed(_) => None,
    };
    let mut layers: Vec<(Id, u64)> = view.nodes()?.into_iter().filter_map(of_node).collect();
    layers.extend(view.volumes()?.into_iter().filter_map(|(_, row)| Some((row.layer?, row.size))));
    Ok(layers)
}

/// What nodes have lost that are sealed: of what is sealed in part the layer is there.
fn sealed_damage(stored: &[StoredRoot], lost: Vec<Option<Lost>>) -> BTreeMap<Id, Own> {
    let of_root = |(stored, lost): (&StoredRoot, Option<Lost>)| {
        let lost = lost.filter(|_| stored.is_whole)?;
        let ranges = bytes_of(&lost.ranges, stored.root.size);
        Some((stored.node, Own { ranges, is_exact: lost.is_exact, why: lost.why }))
    };
    stored.iter().zip(lost).filter_map(of_root).collect()
}

/// All bytes of a disk, as a list of ranges.
fn whole_disk(size: u64) -> Vec<Range<u64>> {
    std::iter::once(0..size).collect()
}

/// Ranges of blocks as bytes of a disk.
fn bytes_of(blocks: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let bytes = |range: &Range<u64>| (range.start * BLOCK_SIZE).min(size)..(range.end * BLOCK_SIZE).min(size);
    blocks.iter().map(bytes).filter(|range| !range.is_empty()).collect()
}
