//! New packs become a part of the store.
//!
//! Order: the packs are whole and synced; their directory is synced; runs of the index with what is in them are made, and
//! durable with their names; then the commit, which names packs and runs and the root that needs them. A crash before the commit
//! leaves files that nothing names.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::ImageError;
use sapwood_image::sealed::index::{RUN_ENTRIES_MAX, Run, WrittenRun, run_name, write_run};
use sapwood_image::sealed::{Entry, PackKind as Kind, Written};

use crate::catalog::rows::{IndexRow, PackKind, PackRow};
use crate::catalog::{Change, Look};
use crate::directory::sync_directory;
use crate::error::Result;
use crate::store::{Store, breaks};

/// A pack by number, and how many entries it has.
type Indexed = (u32, u64);

/// Runs that belong to new packs.
struct NewRuns<F> {
    written: Vec<WrittenRun>,
    open: Vec<Arc<Run<F>>>,
}

impl Change {
    fn put_written(&mut self, packs: &[Written], runs: &[WrittenRun]) -> Result<()> {
        for pack in packs {
            let kind = match pack.kind {
                Kind::Data => PackKind::Data,
                Kind::Nodes => PackKind::Nodes,
            };
            let row = PackRow { kind, bytes: pack.bytes, entries: u64::from(pack.entries), live_bytes: None };
            self.put_pack(pack.number, Some(&row))?;
        }
        self.put_runs(runs)
    }

    fn put_runs(&mut self, runs: &[WrittenRun]) -> Result<()> {
        runs.iter().try_for_each(|run| {
            self.put_index_run(run.number, Some(&IndexRow { level: 0, entries: run.entries }))
        })
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Makes new packs count, with `change`, which makes somebody need them. When that fails they are removed, unless nobody
    /// knows whether the change was made.
    pub(crate) async fn publish<T>(
        &self,
        io: &Io<E>,
        packs: &[Written],
        change: impl FnOnce(&mut Change) -> Result<T>,
    ) -> Result<T> {
        let prepared = self.prepare_runs(io, packs).await;
        let runs = match prepared {
            Ok(runs) => runs,
            Err(error) => {
                self.withdraw(io, packs, &[]).await;
                return Err(error);
            }
        };
        let committed = self.catalog.change(|row| {
            row.put_written(packs, &runs.written)?;
            change(row)
        });
        match committed {
            Ok(value) => {
                self.content.published(packs, runs.open);
                if let Err(error) = self.content.fit_dedup(&self.catalog) {
                    log::warn!("{error}: the index of what is stored keeps its size");
                }
                Ok(value)
            }
            Err(error) => {
                if !self.catalog.is_unknown() {
                    self.withdraw(io, packs, &runs.written).await;
                }
                Err(error)
            }
        }
    }

    /// Makes the names of new packs durable, and runs of the index for them.
    async fn prepare_runs(&self, io: &Io<E>, packs: &[Written]) -> Result<NewRuns<S::File>> {
        let mut runs = NewRuns { written: Vec::new(), open: Vec::new() };
        if packs.is_empty() {
            return Ok(runs);
        }
        if !breaks!(self.options, PublishWithoutSync) {
            sync_directory(io, &self.directory.packs()).await?;
        }
        let indexed: Vec<Indexed> = packs.iter().map(|pack| (pack.number, u64::from(pack.entries))).collect();
        let made = self.write_runs(io, &indexed, false, &mut runs).await;
        if made.is_err() {
            self.remove_files(io, runs.written.iter().map(|run| run.path.clone())).await;
        }
        made.map(|()| runs)
    }

    /// Makes runs of what packs hold; `tolerant`: without those that cannot be read.
    async fn write_runs(
        &self,
        io: &Io<E>,
        packs: &[Indexed],
        tolerant: bool,
        runs: &mut NewRuns<S::File>,
    ) -> Result<()> {
        let folder = self.directory.index();
        let mut entries: Vec<Entry> = Vec::new();
        for (n, (number, _)) in packs.iter().enumerate() {
            match self.entries_of(io, *number).await {
                Ok(found) => entries.extend(found),
                Err(error) if tolerant => log::warn!("{error}: the index does without it"),
                Err(error) => return Err(error.into()),
            }
            let next = packs.get(n + 1).map_or(usize::MAX, |(_, entries)| *entries as usize);
            if entries.len().saturating_add(next) > RUN_ENTRIES_MAX {
                let number = self.content.run_numbers.next()?;
                let entries = std::mem::take(&mut entries);
                runs.written.push(write_run(&self.storage, io, &folder, number, entries).await?);
            }
        }
        sync_directory(io, &folder).await?;
        for run in &runs.written {
            runs.open.push(Arc::new(Run::open(&self.storage, io, &folder, run.number).await?));
        }
        Ok(())
    }

    async fn entries_of(&self, io: &Io<E>, pack: u32) -> Result<Vec<Entry>, ImageError> {
        self.content.packs().pack(io, pack).await?.entries_in(io, 0..u32::MAX).await
    }

    /// Makes the index again from the packs, if a part of it could not be opened. Packs whose lists cannot be
    /// read are left out: what they hold is found by places that hold.
    pub(crate) async fn mend_index(&self, io: &Io<E>) -> Result<bool> {
        if !self.content.is_index_damaged.load(Ordering::Acquire) {
            return Ok(false);
        }
        let view = self.catalog.view()?;
        let old: Vec<u32> = view.index_runs()?.into_iter().map(|(number, _)| number).collect();
        let packs: Vec<Indexed> =
            view.packs()?.into_iter().map(|(number, row)| (number, row.entries)).collect();
        drop(view);
        let mut runs = NewRuns { written: Vec::new(), open: Vec::new() };
        let mut made = self.write_runs(io, &packs, true, &mut runs).await;
        if made.is_ok() {
            made = self.catalog.change(|change| {
                old.iter().try_for_each(|number| change.put_index_run(*number, None))?;
                change.put_runs(&runs.written)
            });
        }
        if made.is_err() && !self.catalog.is_unknown() {
            self.remove_files(io, runs.written.iter().map(|run| run.path.clone())).await;
        }
        made?;
        self.content.change_runs(&old, runs.open);
        self.content.is_index_damaged.store(false, Ordering::Release);
        let folder = self.directory.index();
        self.remove_files(io, old.into_iter().map(|number| folder.join(run_name(number)))).await;
        Ok(true)
    }

    /// Removes what was not published.
    async fn withdraw(&self, io: &Io<E>, packs: &[Written], runs: &[WrittenRun]) {
        let numbers: Vec<u32> = packs.iter().map(|pack| pack.number).collect();
        self.content.packs().withdraw(&numbers);
        let paths = packs.iter().map(|pack| pack.path.clone()).chain(runs.iter().map(|run| run.path.clone()));
        self.remove_files(io, paths).await;
    }

    /// Removes files that nothing names. What stays behind is found when the store is opened again.
    pub(crate) async fn remove_files(&self, io: &Io<E>, paths: impl IntoIterator<Item = PathBuf>) {
        for path in paths {
            if let Err(errno) = io.run(Op::Unlink { path: path.clone() }).await.result
                && errno != sapwood_blockdev::Errno::NOENT
            {
                log::warn!("{}: cannot remove it ({errno}): it is not needed any more", path.display());
            }
        }
    }
}
