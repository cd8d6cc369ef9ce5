//! What is sealed: the packs, the index of what is in them, and who works on them.
//!
//! A pack or a run of the index belongs to the store when the catalog names it. Its number is committed before its file
//! exists, and is never used again, so that nobody takes one pack for another that once had its number.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::ImageError;
use sapwood_image::sealed::collect::{Bad, Pins};
use sapwood_image::sealed::index::{Index, Run};
use sapwood_image::sealed::{DedupIndex, Packs, PacksTuning, SharedDedup, Written, pack_name};

use crate::catalog::rows::PackKind;
use crate::catalog::{Catalog, Look};
use crate::directory::Directory;
use crate::error::{Result, StoreError};
use crate::store::StoreOptions;

/// Numbers that are taken with one commit.
const NUMBERS_AT_ONCE: u64 = 16;
/// The highest number of a pack: a place has 28 bits for it.
const NUMBER_MAX: u64 = (1 << 28) - 1;

/// Numbers for new files of one kind.
pub(crate) struct Numbers {
    catalog: Arc<Catalog>,
    counter: &'static str,
    free: Mutex<Range<u64>>,
    /// Files with lower numbers were begun before the store was opened.
    first: u64,
}

impl Numbers {
    fn new(catalog: &Arc<Catalog>, counter: &'static str) -> Result<Self> {
        let first = catalog.view()?.counter(counter)?.max(1);
        Ok(Self { catalog: Arc::clone(catalog), counter, free: Mutex::new(first..first), first })
    }

    /// A number that was never given out, in this process or before it.
    pub(crate) fn next(&self) -> Result<u32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            let taken = free.start..free.start + NUMBERS_AT_ONCE;
            if taken.end > NUMBER_MAX {
                let text = format!(
                    "all numbers of its {}s are used up: export what it holds into a new one",
                    self.counter
                );
                return Err(StoreError::invalid(self.catalog.path().display(), text));
            }
            self.catalog.change(|change| change.put_counter(self.counter, taken.end))?;
            *free = taken;
        }
        let number = free.start;
        free.start += 1;
        Ok(number as u32)
    }

    /// Whether a file of this number was begun before the store was opened.
    pub(crate) fn is_old(&self, number: u32) -> bool {
        u64::from(number) < self.first
    }
}

/// See the module's documentation.
pub struct Content<E: Engine> {
    packs: Arc<Packs<E>>,
    index: Arc<Index<E>>,
    pins: Arc<Pins>,
    dedup: Arc<SharedDedup>,
    bad: Mutex<Bad>,
    /// Whether the packs that were there when the store was opened have been learned, or somebody is at it.
    has_learned: AtomicBool,
    dedup_bytes: usize,
    /// Who changes the set of runs.
    changing_runs: Mutex<()>,
    /// A run could not be opened: what it says has to be found in the packs again.
    pub(crate) is_index_damaged: AtomicBool,
    pub(crate) pack_numbers: Arc<Numbers>,
    pub(crate) run_numbers: Arc<Numbers>,
}

impl<E: Engine> Content<E> {
    pub(crate) async fn open<S: Storage<File = E::File>>(
        storage: &S,
        io: &Io<E>,
        directory: &Directory,
        catalog: &Arc<Catalog>,
        options: &StoreOptions,
    ) -> Result<Self> {
        let index = Arc::new(Index::default());
        let (storage_of_packs, folder) = (storage.clone(), directory.packs());
        let packs =
            Packs::with_index(&folder.clone(), &PacksTuning::default(), Arc::clone(&index), move |number| {
                let path = folder.join(pack_name(number));
                let file = storage_of_packs
                    .open(&path, OpenOptions::READ)
                    .map_err(|e| ImageError::open(&path, e))?;
                let len = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
                Ok((file, 0..len))
            });
        let (mut runs, mut is_damaged) = (Vec::new(), false);
        for (number, _) in catalog.view()?.index_runs()? {
            match Run::open(storage, io, &directory.index(), number).await {
                Ok(run) => runs.push(Arc::new(run)),
                Err(error) => {
                    log::warn!("{error}: the index will be made again from the packs");
                    is_damaged = true;
                }
            }
        }
        let all: Vec<u32> = catalog.view()?.packs()?.into_iter().map(|(number, _)| number).collect();
        index.publish(runs, all.iter().copied(), &[]);
        let pins = Arc::<Pins>::default();
        pins.published(all);
        Ok(Self {
            packs,
            index,
            pins,
            dedup: SharedDedup::new(options.dedup_bytes),
            bad: Mutex::default(),
            has_learned: AtomicBool::new(false),
            dedup_bytes: options.dedup_bytes,
            changing_runs: Mutex::default(),
            is_index_damaged: AtomicBool::new(is_damaged),
            pack_numbers: Arc::new(Numbers::new(catalog, "pack")?),
            run_numbers: Arc::new(Numbers::new(catalog, "index_run")?),
        })
    }

    /// The packs.
    pub fn packs(&self) -> &Arc<Packs<E>> {
        &self.packs
    }

    /// What work in progress holds against a collection.
    pub(crate) fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    /// What of all that is stored a seal looks for.
    pub(crate) fn dedup(&self) -> &Arc<SharedDedup> {
        &self.dedup
    }

    /// Lets the dedup index know what packs hold that were there when the store was opened, once; whoever comes while that is
    /// under way goes on without. What cannot be read is not known, and may be stored again.
    pub(crate) async fn learn(&self, io: &Io<E>, catalog: &Catalog) -> Result<()> {
        if self.has_learned.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.fit_dedup(catalog)?;
        for (number, row) in catalog.view()?.packs()? {
            if row.kind == PackKind::Data
                && let Err(error) = self.dedup.learn_pack(io, &self.packs, number).await
            {
                log::warn!("{error}: what it holds may be stored again");
            }
        }
        Ok(())
    }

    /// Gives the dedup index as much memory as the store is large: 64 MiB for 1 TiB of different blocks.
    pub(crate) fn fit_dedup(&self, catalog: &Catalog) -> Result<()> {
        let packs = catalog.view()?.packs()?.into_iter();
        let data = packs.filter(|(_, row)| row.kind == PackKind::Data);
        let bytes = data.map(|(_, row)| row.entries.saturating_mul(BLOCK_SIZE)).fold(0, u64::saturating_add);
        let budget = DedupIndex::budget_for(bytes, self.dedup_bytes);
        // Changing it costs what is remembered beside the hooks.
        if budget > self.dedup.budget() / 4 * 5 {
            self.dedup.set_budget(budget);
        }
        Ok(())
    }

    /// Takes runs out of the index and others in.
    pub(crate) fn change_runs(&self, gone: &[u32], new: impl IntoIterator<Item = Arc<Run<E::File>>>) {
        let _changing = self.changing_runs();
        let runs = self.index.runs();
        let stay = runs.iter().filter(|run| !gone.contains(&run.number())).cloned();
        self.index.replace(stay.chain(new).collect::<Vec<_>>());
    }

    /// Takes note of packs that the catalog names now, with runs for them: everybody may find what they hold.
    pub(crate) fn published(&self, packs: &[Written], new: impl IntoIterator<Item = Arc<Run<E::File>>>) {
        let numbers = || packs.iter().map(|pack| pack.number);
        let changing = self.changing_runs();
        self.index.publish(self.index.runs().into_iter().chain(new), numbers(), &[]);
        drop(changing);
        self.pins.published(numbers());
    }

    /// Takes note of packs that the catalog does not name any more: nobody looks there.
    pub(crate) fn dropped(&self, packs: &BTreeSet<u32>) {
        let numbers: Vec<u32> = packs.iter().copied().collect();
        let changing = self.changing_runs();
        self.index.publish(self.index.runs(), [], &numbers);
        drop(changing);
        self.dedup.withdraw(packs);
    }

    /// What is known to be damaged in packs, since the store was opened.
    pub(crate) fn bad(&self) -> Bad {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers what is damaged in packs.
    pub(crate) fn set_bad(&self, bad: Bad) {
        *self.bad.lock().unwrap_or_else(PoisonError::into_inner) = bad;
    }

    fn changing_runs(&self) -> MutexGuard<'_, ()> {
        self.changing_runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
