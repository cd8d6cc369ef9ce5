//! What is done with a store, and what the model says of it.

use std::collections::BTreeMap;

use super::model::{Content, Model, Snapshot, Volume, either, zeroes};
use crate::sim::rng::Rng;

/// Names that volumes can have.
pub(super) const VOLUMES: u64 = 5;
/// Names that snapshots of one volume can have.
pub(super) const SNAPSHOTS: u64 = 4;

/// Blocks and the marks that they get, in order.
pub type Writes = Vec<(usize, u32)>;

/// One thing that is done.
#[derive(Clone, Debug)]
pub enum Action {
    /// A new volume.
    Create(String),
    /// A volume is attached, written, flushed and detached; its layer is closed properly, or dropped.
    Write(String, Writes, bool),
    /// A snapshot of an attached volume, with writes before and after it.
    Live(String, String, Writes, Writes),
    /// A snapshot of a detached one.
    Snapshot(String, String),
    /// Volumes over a snapshot.
    Clone(String, String, Vec<String>),
    /// A volume goes on from a snapshot.
    Switch(String, (String, String), bool),
    /// The same, from the newest one below it.
    Rollback(String, bool),
    /// A volume gets another name.
    RenameVolume(String, String),
    /// A snapshot gets another name.
    RenameSnapshot(String, String, String),
    /// A volume goes, with its snapshots or not.
    DeleteVolume(String, bool),
    /// A snapshot goes.
    DeleteSnapshot(String, String),
    /// Protection of a volume.
    ProtectVolume(String, bool),
    /// Protection of a snapshot.
    ProtectSnapshot(String, String, bool),
    /// Snapshots are sealed, as far as so many segments go.
    Seal(u64),
    /// What nobody needs goes, with packs of which less than so many percent are needed.
    Collect(u32),
    /// A disk with these marks is imported.
    Import(String, String, Vec<u32>),
    /// The store is closed and opened.
    Reopen,
    /// A snapshot is exported, whole or as an increment over another, as the archive of this number.
    Export((String, String), Option<(String, String)>, u64),
    /// An archive is imported as this snapshot.
    ImportArchive(String, String, u64),
    /// A snapshot is read.
    Read((String, String)),
}

pub(super) fn writes(rng: &mut Rng, mark: u64) -> Writes {
    let count = rng.between(1, 5) as usize;
    let block = |_| rng.below(super::model::BLOCKS as u64) as usize;
    (0..count).map(block).enumerate().map(|(i, block)| (block, (mark * 16) as u32 + i as u32 + 1)).collect()
}

/// What an imported disk holds: marks of a few, so that disks share blocks.
pub(super) fn marks(rng: &mut Rng) -> Vec<u32> {
    (0..super::model::BLOCKS)
        .map(|_| rng.below(12) as u32)
        .map(|mark| if mark < 4 { 0 } else { mark })
        .collect()
}

impl Action {
    /// Something at random; `mark` is unlike that of every other action.
    pub fn random(rng: &mut Rng, model: &Model, mark: u64) -> Self {
        // Mostly what is there; sometimes what may not be.
        let any = |rng: &mut Rng| format!("v{}", rng.below(VOLUMES));
        let names: Vec<&String> = model.volumes.keys().collect();
        let volume = match names.is_empty() || rng.percent(10) {
            true => any(rng),
            false => rng.pick(&names).clone(),
        };
        let snapshot = |rng: &mut Rng| format!("s{}", rng.below(SNAPSHOTS));
        let there: Vec<&(String, String)> = model.snapshots.keys().collect();
        let old = match there.is_empty() || rng.percent(10) {
            true => (volume.clone(), snapshot(rng)),
            false => rng.pick(&there).clone(),
        };
        match rng.below(100) {
            0..6 => Self::Create(any(rng)),
            6..12 => Self::Import(any(rng), snapshot(rng), marks(rng)),
            12..18 => Self::Seal(rng.between(1, 6)),
            18..21 => Self::Collect(rng.pick(&[1, 50, 100])),
            21..34 => Self::Write(volume, writes(rng, mark), rng.percent(60)),
            34..44 => {
                let (before, after) = (writes(rng, 2 * mark), writes(rng, 2 * mark + 1));
                Self::Live(volume, snapshot(rng), before, after)
            }
            44..58 => Self::Snapshot(volume, snapshot(rng)),
            58..65 => {
                let count = rng.between(1, 3);
                Self::Clone(old.0, old.1, (0..count).map(|_| any(rng)).collect())
            }
            65..72 => Self::Switch(volume, old, rng.percent(60)),
            72..75 => Self::Rollback(volume, rng.percent(60)),
            75..79 => Self::RenameVolume(volume, any(rng)),
            79..82 => Self::RenameSnapshot(old.0, old.1, snapshot(rng)),
            82..86 => Self::DeleteVolume(volume, rng.percent(50)),
            86..94 => Self::DeleteSnapshot(old.0, old.1),
            94..95 => Self::ProtectVolume(volume, true),
            95..96 => Self::ProtectVolume(volume, false),
            96..97 => Self::ProtectSnapshot(old.0, old.1, true),
            97..98 => Self::ProtectSnapshot(old.0, old.1, false),
            _ => Self::Reopen,
        }
    }
}

/// What the store must say: the kind of the error.
pub type Outcome = Result<(), &'static str>;

fn write(content: &mut Content, writes: &Writes) {
    for (block, mark) in writes {
        content[*block] = [*mark].into();
    }
}

impl Model {
    pub(super) fn volume(&mut self, name: &str) -> Result<&mut Volume, &'static str> {
        self.volumes.get_mut(name).ok_or("not-found")
    }

    pub(super) fn snapshot(&self, volume: &str, name: &str) -> Result<&Snapshot, &'static str> {
        self.snapshots.get(&(volume.to_owned(), name.to_owned())).ok_or("not-found")
    }

    pub(super) fn add_volume(&mut self, name: &str, content: Content, line: Vec<u64>) -> Outcome {
        if self.volumes.contains_key(name) {
            return Err("exists");
        }
        let (unsynced, is_dirty, protected) = (Default::default(), Some(false), false);
        self.volumes.insert(name.to_owned(), Volume { content, unsynced, is_dirty, line, protected });
        Ok(())
    }

    fn freeze(&mut self, name: &str, snapshot: String) -> Outcome {
        self.volume(name)?;
        let key = (name.to_owned(), snapshot);
        if self.snapshots.contains_key(&key) {
            return Err("exists");
        }
        let number = self.number();
        let volume = self.volume(name)?;
        volume.unsynced.clear();
        let (content, line) = (volume.content.clone(), volume.line.clone());
        volume.line.push(number);
        volume.is_dirty = Some(false);
        self.snapshots.insert(key, Snapshot { content, number, line, protected: false });
        Ok(())
    }

    fn import(&mut self, name: &str, snapshot: &str, marks: &[u32]) -> Outcome {
        if self.volumes.contains_key(name) {
            return Err("exists");
        }
        let content: Content = marks.iter().map(|mark| [*mark].into()).collect();
        let number = self.number();
        self.add_volume(name, content.clone(), vec![number])?;
        let key = (name.to_owned(), snapshot.to_owned());
        self.snapshots.insert(key, Snapshot { content, number, line: Vec::new(), protected: false });
        Ok(())
    }

    fn switch(&mut self, name: &str, to: &(String, String), discard: bool) -> Outcome {
        if self.volume(name)?.is_dirty == Some(true) && !discard {
            return Err("unsaved");
        }
        let target = self.snapshot(&to.0, &to.1)?;
        let (content, line) = (target.content.clone(), target.line_over());
        let volume = self.volume(name)?;
        *volume = Volume {
            content,
            line,
            is_dirty: Some(false),
            unsynced: Default::default(),
            protected: volume.protected,
        };
        Ok(())
    }

    fn delete_volume(&mut self, name: &str, with_snapshots: bool) -> Outcome {
        if self.volume(name)?.protected {
            return Err("protected");
        }
        let mut own = self.snapshots.iter().filter(|((volume, _), _)| volume == name).peekable();
        if own.peek().is_some() && !with_snapshots {
            return Err("has-snapshots");
        }
        if own.any(|(_, snapshot)| snapshot.protected) {
            return Err("protected");
        }
        self.volumes.remove(name);
        let (gone, left) =
            std::mem::take(&mut self.snapshots).into_iter().partition(|((volume, _), _)| volume == name);
        self.snapshots = left;
        self.deleted.extend(BTreeMap::into_values(gone));
        Ok(())
    }

    fn rename_volume(&mut self, from: &str, to: &str) -> Outcome {
        self.volume(from)?;
        if from == to {
            return Ok(());
        }
        if self.volumes.contains_key(to) {
            return Err("exists");
        }
        let volume = self.volumes.remove(from).expect("looked at above");
        self.volumes.insert(to.to_owned(), volume);
        let snapshots = std::mem::take(&mut self.snapshots).into_iter();
        let renamed = |(volume, name): (String, String)| match volume == from {
            true => (to.to_owned(), name),
            false => (volume, name),
        };
        self.snapshots = snapshots.map(|(key, snapshot)| (renamed(key), snapshot)).collect();
        Ok(())
    }

    fn rename_snapshot(&mut self, volume: &str, from: &str, to: &str) -> Outcome {
        self.snapshot(volume, from)?;
        let key = |name: &str| (volume.to_owned(), name.to_owned());
        if from != to && self.snapshots.contains_key(&key(to)) {
            return Err("exists");
        }
        let snapshot = self.snapshots.remove(&key(from)).expect("looked at above");
        self.snapshots.insert(key(to), snapshot);
        Ok(())
    }

    /// What the store must say to an action; and when it is done, the model is as the store.
    ///
    /// # Errors
    /// The kind of the store's error; nothing is changed then.
    pub fn apply(&mut self, action: &Action) -> Outcome {
        let before = self.clone();
        let outcome = self.try_apply(action);
        if outcome.is_err() {
            *self = before;
        }
        outcome
    }

    fn try_apply(&mut self, action: &Action) -> Outcome {
        match action {
            Action::Create(name) => self.add_volume(name, zeroes(), Vec::new()),
            Action::Write(name, writes, _) => {
                let volume = self.volume(name)?;
                volume.unsynced.clear();
                volume.is_dirty = Some(true);
                write(&mut volume.content, writes);
                Ok(())
            }
            Action::Live(name, snapshot, before, after) => {
                write(&mut self.volume(name)?.content, before);
                self.freeze(name, snapshot.clone())?;
                let volume = self.volume(name)?;
                volume.is_dirty = Some(true);
                write(&mut volume.content, after);
                Ok(())
            }
            Action::Snapshot(name, snapshot) => self.freeze(name, snapshot.clone()),
            Action::Clone(volume, name, names) => {
                let of = self.snapshot(volume, name)?;
                let (content, line) = (of.content.clone(), of.line_over());
                names.iter().try_for_each(|name| self.add_volume(name, content.clone(), line.clone()))
            }
            Action::Switch(name, to, discard) => self.switch(name, to, *discard),
            Action::Rollback(name, discard) => {
                let line = self.volume(name)?.line.clone();
                let to = self.topmost(&line).ok_or("not-found")?;
                self.switch(name, &to, *discard)
            }
            Action::RenameVolume(from, to) => self.rename_volume(from, to),
            Action::RenameSnapshot(volume, from, to) => self.rename_snapshot(volume, from, to),
            Action::DeleteVolume(name, with_snapshots) => self.delete_volume(name, *with_snapshots),
            Action::DeleteSnapshot(volume, name) => {
                if self.snapshot(volume, name)?.protected {
                    return Err("protected");
                }
                self.deleted.extend(self.snapshots.remove(&(volume.clone(), name.clone())));
                Ok(())
            }
            Action::ProtectVolume(name, protected) => {
                self.volume(name)?.protected = *protected;
                Ok(())
            }
            Action::ProtectSnapshot(volume, name, protected) => {
                self.snapshot(volume, name)?;
                let key = (volume.clone(), name.clone());
                self.snapshots.get_mut(&key).expect("looked at above").protected = *protected;
                Ok(())
            }
            Action::Import(name, snapshot, marks) => self.import(name, snapshot, marks),
            Action::Export(of, since, archive) => self.export(of, since.as_ref(), *archive),
            Action::ImportArchive(..) => unreachable!("what it does the model alone does not know"),
            Action::Read((volume, name)) => self.snapshot(volume, name).map(drop),
            Action::Seal(_) | Action::Collect(_) | Action::Reopen => Ok(()),
        }
    }
}

/// How far a write had come when it was cut off.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Writes that were reported.
    pub reported: usize,
    /// Whether a flush after them was.
    pub is_flushed: bool,
}

/// The states that a store may be in after `action` was cut off; with `power`, what was not durable may
/// be lost.
pub fn cut_off(model: &Model, action: &Action, progress: Progress, power: bool) -> Vec<Model> {
    if let Action::ImportArchive(..) = action {
        let done = model.outcomes(action).into_iter().filter(|(outcome, _)| outcome.is_ok());
        return std::iter::once(model.clone()).chain(done.map(|(_, after)| after)).collect();
    }
    let mut before = model.clone();
    let mut after = model.clone();
    let applies = after.apply(action).is_ok();
    match action {
        Action::Write(name, writes, _) => {
            if let Some(volume) = before.volumes.get_mut(name) {
                cut_writes(volume, writes, progress, power);
            }
            return vec![before];
        }
        Action::Live(name, snapshot, writes, later) => {
            if let Some(volume) = before.volumes.get_mut(name) {
                may_have_written(&mut volume.content, writes);
                volume.is_dirty = None;
            }
            if let (true, Some(before)) = (applies, before.volumes.get(name)) {
                let frozen = after.snapshots.get_mut(&(name.clone(), snapshot.clone()));
                frozen.expect("it applies").content.clone_from(&before.content);
                let volume = after.volumes.get_mut(name).expect("it applies");
                volume.content.clone_from(&before.content);
                may_have_written(&mut volume.content, later);
                volume.is_dirty = None;
            }
        }
        Action::Export(.., archive) => {
            after.archives.entry(*archive).and_modify(|archive| archive.is_durable = false);
        }
        Action::Switch(name, ..) | Action::Rollback(name, _)
            if applies && before.summary() == after.summary() =>
        {
            let (old, new) = (&model.volumes[name], after.volumes.get_mut(name).expect("it applies"));
            new.content = either(&old.content, &new.content);
            new.is_dirty = None;
            return vec![after];
        }
        _ => {}
    }
    if applies { vec![before, after] } else { vec![before] }
}

fn may_have_written(content: &mut Content, writes: &Writes) {
    for (block, mark) in writes {
        content[*block].insert(*mark);
    }
}

fn cut_writes(volume: &mut Volume, writes: &Writes, progress: Progress, power: bool) {
    // It was opened, if anything was written.
    if progress.reported > 0 {
        volume.unsynced.clear();
    }
    volume.is_dirty = None;
    for (n, (block, mark)) in writes.iter().enumerate() {
        let old = volume.content[*block].clone();
        if progress.is_flushed {
            volume.content[*block] = [*mark].into();
        } else if n < progress.reported && !power {
            volume.unsynced.entry(*block).or_default().extend(old);
            volume.content[*block] = [*mark].into();
        } else {
            volume.content[*block].insert(*mark);
        }
    }
}
