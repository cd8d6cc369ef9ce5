//! Collection: packs of which little is needed any more go, and what of them is needed is moved.
//!
//! The steps are those of [`sapwood_image::sealed::collect`]; here is what the store does for them. Order: the survey, the withdrawal,
//! the mark; new packs, durable, with runs of the index ([`super::publish`]); the commit, which names them and forgets the
//! dropped ones; the index and all memory forget these; then their files go. After a commit of which nobody knows whether it
//! was made, nothing is removed: opening the store finds out which packs are orphans.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::ImageError;
use sapwood_image::sealed::collect::{
    Finder, Limits, Live, Locate, Marked, Moved, Moves, Pace, Shifted, Target, begin,
};
use sapwood_image::sealed::index::Index;
use sapwood_image::sealed::{Child, FRAME_BLOCKS, Hash, LEVEL, Place, Root, pack_name};

use crate::catalog::rows::{NodeRow, NodeState, PackRow, Sealing, Top};
use crate::catalog::{Catalog, Change, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::store::{Store, breaks};

/// Bytes that a block or node takes in a new pack and the index, at most.
const MOVED_BYTES_MAX: u64 = 4500;

/// Rounds of a collection that finds damage, at most.
const ROUNDS_MAX: usize = 8;

/// What a collection has done.
#[derive(Debug, Default)]
pub struct Collected {
    /// Packs that are gone, those that were rewritten included.
    pub packs_dropped: u64,
    /// Packs of which something was needed, and was moved.
    pub packs_rewritten: u64,
    /// Bytes of the files that are gone.
    pub bytes_freed: u64,
    /// Bytes of new packs, the index not counted.
    pub bytes_written: u64,
    /// What was moved.
    pub moved: Moved,
    /// Packs that work in progress holds: they are left to the next collection.
    pub held: Vec<u32>,
    /// Packs that had to stay because something in them that is needed is damaged.
    pub kept: Vec<(u32, ImageError)>,
    /// Whether it was told to stop, and left a part of the work to the next one.
    pub is_stopped: bool,
}

/// The exact index, for those who look for content that has moved.
pub(crate) struct ByIndex<E: Engine>(Arc<Index<E>>);

impl<E: Engine> Locate<E> for ByIndex<E> {
    async fn locate(&self, io: &Io<E>, hash: &Hash) -> Result<Vec<Place>, ImageError> {
        self.0.look_up(io, hash).await
    }
}

/// What a collection asks the catalog.
struct Asked<'a> {
    catalog: &'a Catalog,
    /// Whether nodes without a name count.
    with_nameless: bool,
}

impl Asked<'_> {
    fn told(&self, error: StoreError) -> ImageError {
        error.into_image(self.catalog.path())
    }
}

impl sapwood_image::sealed::collect::Catalog for Asked<'_> {
    fn roots(&self) -> Result<Vec<Root>, ImageError> {
        let roots = self.catalog.view().and_then(|view| roots(&view)).map_err(|error| self.told(error))?;
        let is_asked = |root: &&StoredRoot| root.has_name || self.with_nameless;
        Ok(roots.iter().filter(is_asked).map(|root| root.root).collect())
    }

    fn packs(&self) -> Result<Vec<u32>, ImageError> {
        let packs = self.catalog.view().and_then(|view| view.packs()).map_err(|error| self.told(error))?;
        Ok(packs.into_iter().map(|(number, _)| number).collect())
    }
}

/// A sealed disk that a node holds.
pub(crate) struct StoredRoot {
    pub(crate) node: Id,
    pub(crate) root: Root,
    /// Whether it is the node's contents; else a part of them, as far as they are sealed.
    pub(crate) is_whole: bool,
    has_name: bool,
}

/// All sealed disks of the catalog, by their nodes.
pub(crate) fn roots(look: &impl Look) -> Result<Vec<StoredRoot>> {
    let of_node = |(node, row): (Id, NodeRow)| {
        let (top, is_whole) = match row.state {
            NodeState::Sealed(top) => (top, true),
            NodeState::Frozen { sealing: Some(sealing), .. } => (sealing.top, false),
            NodeState::Frozen { .. } | NodeState::Bare => return None,
        };
        Some(StoredRoot { node, root: top.root(row.size), is_whole, has_name: row.name.is_some() })
    };
    Ok(look.nodes()?.into_iter().filter_map(of_node).collect())
}

impl Change {
    /// Writes where the tops of trees are after they were moved. What was sealed meanwhile is where its row says.
    fn refresh_tops(&mut self, moves: &Moves) -> Result<()> {
        let refreshed = |top: Top| {
            let old = Child { hash: top.hash, place: Place::from_bits(top.place) };
            Top::from(moves.refreshed(old))
        };
        for (id, row) in self.nodes()? {
            let state = match row.state {
                NodeState::Sealed(top) => NodeState::Sealed(refreshed(top)),
                NodeState::Frozen { layer, settled, sealing } => {
                    let sealing = sealing.map(|sealing| Sealing { top: refreshed(sealing.top), ..sealing });
                    NodeState::Frozen { layer, settled, sealing }
                }
                NodeState::Bare => NodeState::Bare,
            };
            if state != row.state {
                self.put_node(id, Some(&NodeRow { state, ..row }))?;
            }
        }
        Ok(())
    }

    /// Forgets packs, and writes down how much is needed of the others.
    fn forget_packs(&mut self, dropped: &BTreeSet<u32>, live: &[(u32, Live)]) -> Result<()> {
        dropped.iter().try_for_each(|number| self.put_pack(*number, None))?;
        let live: std::collections::BTreeMap<u32, u64> =
            live.iter().map(|(number, live)| (*number, live.bytes)).collect();
        for (number, row) in self.packs()? {
            let found = live.get(&number).copied();
            if found.is_some() && found != row.live_bytes {
                self.put_pack(number, Some(&PackRow { live_bytes: found, ..row }))?;
            }
        }
        Ok(())
    }
}

/// The numbers of packs that a collection began, so that it can remove them when it fails.
type Begun = Arc<Mutex<Vec<u32>>>;

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Frees what no snapshot needs: packs of which less than `limits` say is needed go, and what of them is needed is moved
    /// to new ones. Seals, imports and readers go on meanwhile. It can be stopped by `pace`; what was moved until then counts, and
    /// the next collection does the rest.
    ///
    /// # Errors
    /// Another collection runs; something that a snapshot needs cannot be read: then nothing is freed, and
    /// [`Store::scrub`] says what is damaged; [`Cancelled`](sapwood_image::ErrorKind::Cancelled); what the storage says.
    pub async fn collect(&self, io: &Io<E>, pace: &Arc<Pace>, limits: Limits) -> Result<Collected> {
        let _collecting = self.only_one("collection")?;
        self.prune_unneeded(io).await?;
        self.take_out_unneeded()?;
        let mut finder = self.finder(io, pace)?;
        let limits = self.within_room(limits)?;
        let mut collected = Collected::default();
        for _ in 0..ROUNDS_MAX {
            let kept = collected.kept.len();
            self.collect_once(io, &mut finder, limits, &mut collected).await?;
            // Of what is damaged there may be another copy, by which the next round goes.
            if collected.kept.len() == kept {
                break;
            }
        }
        collected.is_stopped = pace.is_stopped();
        self.merge_runs(io).await?;
        Ok(collected)
    }

    /// One round: when something that is needed turns out to be damaged, nothing is freed, and the finder knows of it.
    async fn collect_once(
        &self,
        io: &Io<E>,
        finder: &mut Finder<E, ByIndex<E>>,
        limits: Limits,
        collected: &mut Collected,
    ) -> Result<()> {
        let asked =
            Asked { catalog: &self.catalog, with_nameless: !breaks!(self.options, CollectWithoutNameless) };
        let nobody = Arc::default();
        let pins = if breaks!(self.options, CollectWithoutPins) { &nobody } else { self.content.pins() };
        let survey = begin(finder, pins, &asked, limits).await?;
        let live: Vec<(u32, Live)> = finder.known().map(|number| (number, survey.live(number))).collect();
        let withdrawn = survey.withdraw();
        collected.held = withdrawn.held().to_vec();
        let marked = withdrawn.mark(finder, &asked).await?;
        let dead = marked.dead().len() as u64;
        if breaks!(self.options, UnlinkBeforeCommit) {
            self.remove_packs(io, marked.dead()).await;
        }
        let mut shifted = self.shift(io, finder, marked).await?;
        self.content.set_bad(finder.bad().clone());
        collected.kept.append(&mut shifted.kept);
        let (dropped, bytes) =
            (shifted.dropped.len() as u64, (shifted.bytes_dropped(), shifted.bytes_written()));
        let moved = shifted.moved;
        self.commit_collection(io, shifted, &live).await?;
        collected.packs_dropped += dropped;
        collected.packs_rewritten += dropped.saturating_sub(dead);
        collected.bytes_freed += bytes.0;
        collected.bytes_written += bytes.1;
        collected.moved = moved;
        Ok(())
    }

    /// What is moved is there twice for a while: not more than there is room for.
    fn within_room(&self, limits: Limits) -> Result<Limits> {
        let fits = self.left()?.map(|left| left / MOVED_BYTES_MAX);
        Ok(Limits { moved_max: limits.moved_max.min(fits.unwrap_or(u64::MAX)), ..limits })
    }

    /// Whoever finds content in the packs of now, and in others of which it is told.
    pub(crate) fn finder(&self, io: &Io<E>, pace: &Arc<Pace>) -> Result<Finder<E, ByIndex<E>>> {
        let packs = self.catalog.view()?.packs()?.into_iter().map(|(number, _)| number);
        let index = ByIndex(Arc::clone(self.content.packs().index()));
        Ok(Finder::new(io, self.content.packs(), packs, index, pace).with_bad(self.content.bad()))
    }

    /// Takes a job that is done once at a time.
    pub(crate) fn only_one(&self, job: &'static str) -> Result<crate::usage::Hold> {
        self.usage.job(job).ok_or_else(|| {
            let text = format!("another {job} of this store is under way: wait for its end, or stop it");
            StoreError::new(self.directory.root().display(), StoreErrorKind::InUse(text))
        })
    }

    /// Moves what is needed to new packs. When that fails, these are removed.
    async fn shift(&self, io: &Io<E>, finder: &mut Finder<E, ByIndex<E>>, marked: Marked) -> Result<Shifted> {
        let begun = Begun::default();
        let (numbers, list) = (Arc::clone(&self.content.pack_numbers), Arc::clone(&begun));
        let root = self.directory.root().to_owned();
        let next_number = move || {
            let number = numbers.next().map_err(|error| error.into_image(&root))?;
            list.lock().unwrap_or_else(PoisonError::into_inner).push(number);
            Ok(number)
        };
        let mut target =
            Target::new(self.storage.clone(), self.directory.packs(), next_number, LEVEL, FRAME_BLOCKS);
        target.pack_bytes = self.options.pack_bytes;
        match marked.shift(finder, &mut target).await {
            Ok(shifted) => Ok(shifted),
            Err(error) => {
                let begun = std::mem::take(&mut *begun.lock().unwrap_or_else(PoisonError::into_inner));
                let unfinished = |number: &u32| self.directory.packs().join(unfinished_name(*number));
                self.remove_files(io, begun.iter().map(unfinished).collect::<Vec<_>>()).await;
                self.remove_packs(io, &begun).await;
                Err(error.into())
            }
        }
    }

    /// The commit point of a collection, and what follows it.
    async fn commit_collection(&self, io: &Io<E>, shifted: Shifted, live: &[(u32, Live)]) -> Result<()> {
        let dropped: BTreeSet<u32> = shifted.dropped.iter().map(|pack| pack.number).collect();
        self.publish(io, &shifted.written, |change| {
            change.forget_packs(&dropped, live)?;
            change.refresh_tops(&shifted.moves)
        })
        .await?;
        let written: Vec<u32> = shifted.written.iter().map(|pack| pack.number).collect();
        shifted.committed();
        self.content.dropped(&dropped);
        for number in written {
            // What is not learned may be stored again.
            self.content.dedup().learn_pack(io, self.content.packs(), number).await.ok();
        }
        let dropped: Vec<u32> = dropped.into_iter().collect();
        self.remove_packs(io, &dropped).await;
        Ok(())
    }

    /// Removes packs that the catalog does not name.
    async fn remove_packs(&self, io: &Io<E>, numbers: &[u32]) {
        let packs = self.content.packs();
        packs.withdraw(numbers);
        let folder = self.directory.packs();
        self.remove_files(io, numbers.iter().map(|number| folder.join(pack_name(*number)))).await;
        // What was opened between the two is let go.
        packs.withdraw(numbers);
    }
}

/// The name of a pack that is being made.
fn unfinished_name(number: u32) -> String {
    format!("{}.tmp", pack_name(number))
}
