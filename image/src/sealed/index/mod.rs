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
#[cfg(test)]
mod tests;
mod tiers;
mod write;

pub use run::{Run, run_name};
pub use tiers::{TIER_RUNS, next_merge};
pub use write::{MERGED_MAX, RUN_ENTRIES_MAX, WrittenRun, merge, write_run};

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
/// Places that a run is believed for one prefix, at most; the newest count.
pub const CANDIDATES_MAX: usize = 64;
/// Pages read for one look-up in a run, at most. The second holds more than [`CANDIDATES_MAX`] entries, if it holds any.
const LOOK_UP_PAGES: usize = 2;

/// Runs, the newest first.
type Runs<E> = Arc<[Arc<Run<<E as Engine>::File>>]>;

/// See the module's documentation.
pub struct Index<E: Engine> {
    runs: RwLock<Runs<E>>,
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
            runs: RwLock::new(Arc::new([])),
            pages: Cache::new((cache_bytes / BLOCK_SIZE).max(32) as usize),
        }
    }

    /// Takes other runs in place of those it has. Look-ups that are under way end with the old ones.
    pub fn replace(&self, runs: impl IntoIterator<Item = Arc<Run<E::File>>>) {
        let mut runs: Vec<_> = runs.into_iter().collect();
        runs.sort_by_key(|run| std::cmp::Reverse((run.packs().1, run.number())));
        let old = std::mem::replace(
            &mut *self.runs.write().unwrap_or_else(PoisonError::into_inner),
            runs.iter().cloned().collect(),
        );
        let is_gone = |number: u32| !runs.iter().any(|run| run.number() == number);
        let gone: Vec<u32> = old.iter().map(|run| run.number()).filter(|number| is_gone(*number)).collect();
        self.pages.retain(|(run, _), _| !gone.contains(run));
    }

    /// The runs, those with the newest packs first.
    pub fn runs(&self) -> Runs<E> {
        Arc::clone(&self.runs.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where what has this hash may be, the newest first.
    ///
    /// # Errors
    /// A run cannot be read, or is damaged.
    pub async fn look_up(&self, io: &Io<E>, hash: &Hash) -> Result<Vec<Place>, ImageError> {
        let mut places = Vec::new();
        for run in self.runs().iter() {
            places.extend(self.look_up_in(io, run, hash).await?);
        }
        Ok(places)
    }

    /// The same of one run.
    pub(super) async fn look_up_in(
        &self,
        io: &Io<E>,
        run: &Run<E::File>,
        hash: &Hash,
    ) -> Result<Vec<Place>, ImageError> {
        let prefix = hash.prefix();
        // The page before the first one that begins with it may end with it.
        let first = run.fences.partition_point(|fence| *fence < prefix).saturating_sub(1);
        let mut places = Vec::new();
        let fences = run.fences.iter().enumerate().skip(first).take(LOOK_UP_PAGES);
        for (page, _) in fences.take_while(|(_, fence)| **fence <= prefix) {
            places.extend(self.page(io, run, page as u32).await?.places(prefix));
        }
        places.truncate(CANDIDATES_MAX);
        places.retain(|place| !place.is_none());
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
