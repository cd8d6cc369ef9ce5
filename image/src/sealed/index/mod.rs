//! The exact index: where everything is that packs hold.
//!
//! It is a set of *runs*, files of sorted entries: the first 8 bytes of a hash, and a place. Each publication of packs comes with
//! a run; runs are merged in tiers (`tiers`), and what is said of packs that are gone is dropped then. The fences of a run,
//! the first prefix of each page, are in memory, so that a look-up in a run costs one page, and two where a page begins with
//! what was looked for. What is found there is a candidate: the whole hash decides.
//!
//! There are no filters over runs: see `docs/format-sealed-index.md` for what they would save and cost.
//!
//! `layout` is the stored form, `run` reads a file, `write` makes them.

mod layout;
mod run;
mod tiers;
mod write;

pub use run::{Run, run_name};
pub use tiers::{TIER_RUNS, next_merge};
pub use write::{MERGED_MAX, RUN_ENTRIES_MAX, WrittenRun, merge, write_run};

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use super::hash::Hash;
use super::place::Place;
use crate::error::ImageError;
use layout::EntryPage;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Memory for pages of runs in bytes, unless something else is said.
const CACHE_BYTES: u64 = 4 << 20;
/// Places in packs that are there that a run is believed for one prefix, at most; the newest count.
pub const CANDIDATES_MAX: usize = 64;
/// Pages read for one look-up in a run, at most: more than one or two only where a block was stored hundreds of times.
pub const LOOK_UP_PAGES_MAX: usize = 32;

/// What is asked: it is exchanged as a whole.
pub(super) struct Runs<E: Engine> {
    /// The newest first.
    pub(super) runs: Vec<Arc<Run<E::File>>>,
    /// The packs that there are; none: nobody has said it, and all are.
    packs: Option<BTreeSet<u32>>,
}

impl<E: Engine> Runs<E> {
    fn has(&self, pack: u32) -> bool {
        pack > 0 && self.packs.as_ref().is_none_or(|packs| packs.contains(&pack))
    }
}

/// See the module's documentation.
pub struct Index<E: Engine> {
    runs: RwLock<Arc<Runs<E>>>,
    /// Pages by the number of their run and their own.
    pages: Cache<(u32, u32), Arc<EntryPage>>,
}

impl<E: Engine> Default for Index<E> {
    fn default() -> Self {
        Self::new(CACHE_BYTES)
    }
}

impl<E: Engine> Index<E> {
    /// An index without runs, which keeps pages in `cache_bytes` of memory, or 128 KiB at least.
    pub fn new(cache_bytes: u64) -> Self {
        Self {
            runs: RwLock::new(Arc::new(Runs { runs: Vec::new(), packs: None })),
            pages: Cache::new((cache_bytes / BLOCK_SIZE).max(32) as usize),
        }
    }

    /// Takes other runs in place of those it has. Look-ups that are under way end with the old ones.
    pub fn replace(&self, runs: impl IntoIterator<Item = Arc<Run<E::File>>>) {
        self.exchange(runs, |_| {});
    }

    /// The same, and at the same moment packs come and go: from the first call on, only places in packs that have come and
    /// not gone are found. When a store is opened all of its packs come.
    pub fn publish(
        &self,
        runs: impl IntoIterator<Item = Arc<Run<E::File>>>,
        come: impl IntoIterator<Item = u32>,
        gone: &[u32],
    ) {
        self.exchange(runs, |packs| {
            let packs = packs.get_or_insert_default();
            packs.extend(come);
            packs.retain(|pack| !gone.contains(pack));
        });
    }

    fn exchange(
        &self,
        runs: impl IntoIterator<Item = Arc<Run<E::File>>>,
        change: impl FnOnce(&mut Option<BTreeSet<u32>>),
    ) {
        let mut runs: Vec<_> = runs.into_iter().collect();
        runs.sort_by_key(|run| std::cmp::Reverse((run.packs().1, run.number())));
        let mut asked = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        let mut packs = asked.packs.clone();
        change(&mut packs);
        let old = std::mem::replace(&mut *asked, Arc::new(Runs { runs: runs.clone(), packs }));
        drop(asked);
        let is_gone = |number: u32| !runs.iter().any(|run| run.number() == number);
        let gone: Vec<u32> =
            old.runs.iter().map(|run| run.number()).filter(|number| is_gone(*number)).collect();
        self.pages.retain(|(run, _), _| !gone.contains(run));
    }

    /// The runs, those with the newest packs first.
    pub fn runs(&self) -> Vec<Arc<Run<E::File>>> {
        self.asked().runs.clone()
    }

    /// What is asked now.
    pub(super) fn asked(&self) -> Arc<Runs<E>> {
        Arc::clone(&self.runs.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where what has this hash may be, the newest first.
    ///
    /// # Errors
    /// A run cannot be read, or is damaged.
    pub async fn look_up(&self, io: &Io<E>, hash: &Hash) -> Result<Vec<Place>, ImageError> {
        let (asked, mut places) = (self.asked(), Vec::new());
        for run in &asked.runs {
            places.extend(self.look_up_in(io, &asked, run, hash).await?);
        }
        Ok(places)
    }

    /// The same of one run. Page after page is read as long as places are missing: those in packs that are gone hide nothing.
    pub(super) async fn look_up_in(
        &self,
        io: &Io<E>,
        asked: &Runs<E>,
        run: &Run<E::File>,
        hash: &Hash,
    ) -> Result<Vec<Place>, ImageError> {
        let prefix = hash.prefix();
        // The page before the first one that begins with it may end with it.
        let first = run.fences.partition_point(|fence| *fence < prefix).saturating_sub(1);
        let mut places = Vec::new();
        let fences = run.fences.iter().enumerate().skip(first).take(LOOK_UP_PAGES_MAX);
        for (page, _) in fences.take_while(|(_, fence)| **fence <= prefix) {
            let page = self.page(io, run, page as u32).await?;
            places.extend(page.places(prefix).filter(|place| asked.has(place.pack())));
            if places.len() >= CANDIDATES_MAX {
                break;
            }
        }
        places.truncate(CANDIDATES_MAX);
        Ok(places)
    }

    async fn page(&self, io: &Io<E>, run: &Run<E::File>, page: u32) -> Result<Arc<EntryPage>, ImageError> {
        let read = async {
            let bytes = run.read(io, page, 1).await?;
            Ok(Arc::new(run.decode(page, &bytes)?))
        };
        self.pages.get_or_insert_async(&(run.number(), page), read).await
    }
}
