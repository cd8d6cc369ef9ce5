//! The runs of the index are kept few: those of a tier are merged when there are enough of them, and all of them when most of what they
//! say is of packs that are gone.
//!
//! Order: the new run, durable with its name; the commit that names it in place of the old ones; the index in memory; then the old
//! files go. A look-up that is under way ends with the files that it has open.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::sealed::index::{MERGED_MAX, Run, WrittenRun, merge, next_merge, run_name};

use crate::catalog::Look;
use crate::catalog::rows::IndexRow;
use crate::directory::sync_directory;
use crate::error::{Result, StoreErrorKind};
use crate::store::Store;

/// Entries below which nobody minds those of packs that are gone.
const STALE_ENTRIES_MIN: u64 = 1 << 16;

/// What [`Store::upkeep`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Layers whose files are gone, because nobody uses them any more.
    pub layers: usize,
    /// Runs of the index that were merged into others.
    pub runs_merged: usize,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// What is to be done now and then, and costs little when there is nothing to do: [`Store::sweep`],
    /// [`Store::merge_runs`], and a look at what guests may still write ([`SpaceSettings`](crate::rows::SpaceSettings)).
    ///
    /// # Errors
    /// What the storage says.
    pub async fn upkeep(&self, io: &Io<E>) -> Result<Upkeep> {
        // Those whose last reader has ended.
        self.prune_unneeded(io).await?;
        self.note_settled(io).await?;
        let layers = self.sweep(io).await;
        self.set_gate()?;
        let runs_merged = self.merge_runs(io).await?;
        Ok(Upkeep { layers, runs_merged })
    }

    /// Merges runs of the index as long as there are too many in a tier, and once when most of what they say is of packs that are
    /// gone. How many were merged; none, when somebody else is at it. An index that is damaged is made again from the packs.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn merge_runs(&self, io: &Io<E>) -> Result<usize> {
        let Some(_merging) = self.usage.job("merge of the index") else { return Ok(0) };
        if self.mend_index(io).await? {
            return Ok(0);
        }
        let mut merged = 0;
        let mut may_be_stale = true;
        loop {
            let runs = self.content.packs().index().runs();
            // After the runs, so that it has all packs that they name and that are there.
            let packs = self.catalog.view()?.packs()?;
            let entries: Vec<u64> = runs.iter().map(|run| run.entries()).collect();
            let of_packs: u64 = packs.iter().map(|(_, row)| row.entries).sum();
            let is_stale = may_be_stale && is_mostly_stale(entries.iter().sum(), of_packs);
            let chosen = match next_merge(&entries) {
                Some(chosen) => chosen,
                None if is_stale => {
                    may_be_stale = false;
                    (0..runs.len().min(MERGED_MAX)).collect()
                }
                None => return Ok(merged),
            };
            let chosen: Vec<Arc<Run<E::File>>> =
                chosen.into_iter().map(|run| Arc::clone(&runs[run])).collect();
            let live: BTreeSet<u32> = packs.into_iter().map(|(number, _)| number).collect();
            match self.merge_some(io, &chosen, &live).await {
                Ok(()) => merged += chosen.len(),
                Err(error) if matches!(&error.kind, StoreErrorKind::Image(kind) if kind.name() == "corrupt") =>
                {
                    log::warn!("{error}: the index is made again from the packs");
                    self.content.is_index_damaged.store(true, Ordering::Release);
                    self.mend_index(io).await?;
                    return Ok(merged);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn merge_some(&self, io: &Io<E>, runs: &[Arc<Run<E::File>>], live: &BTreeSet<u32>) -> Result<()> {
        let folder = self.directory.index();
        let number = self.content.run_numbers.next()?;
        let written = merge(&self.storage, io, &folder, number, runs, |pack| live.contains(&pack)).await?;
        let made = self.name_merged(io, runs, &written).await;
        if made.is_err() && !self.catalog.is_unknown() {
            self.remove_files(io, [written.path]).await;
        }
        made
    }

    /// Puts a new run in the place of others.
    async fn name_merged(&self, io: &Io<E>, old: &[Arc<Run<E::File>>], written: &WrittenRun) -> Result<()> {
        let folder = self.directory.index();
        sync_directory(io, &folder).await?;
        let new = Arc::new(Run::open(&self.storage, io, &folder, written.number).await?);
        let old: Vec<u32> = old.iter().map(|run| run.number()).collect();
        self.catalog.change(|change| {
            let rows = change.index_runs()?.into_iter().filter(|(number, _)| old.contains(number));
            let level = rows.map(|(_, row)| row.level).max().unwrap_or_default() + 1;
            old.iter().try_for_each(|number| change.put_index_run(*number, None))?;
            change.put_index_run(written.number, Some(&IndexRow { level, entries: written.entries }))
        })?;
        self.content.change_runs(&old, [new]);
        self.remove_files(io, old.into_iter().map(|number| folder.join(run_name(number)))).await;
        Ok(())
    }
}

/// Whether less than half of what the runs say can be of packs that are there.
fn is_mostly_stale(entries: u64, of_packs: u64) -> bool {
    entries > STALE_ENTRIES_MIN && entries / 2 > of_packs
}
