//! What users say of volumes and snapshots: protection, description, labels.

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;

use crate::catalog::rows::{NodeRow, Notes, VolumeRow};
use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::store::{Store, snapshot, volume};

/// Longest description in bytes.
pub const DESCRIPTION_MAX: usize = 4096;
/// Longest key of a label in bytes.
pub const LABEL_KEY_MAX: usize = 128;
/// Longest value of a label in bytes.
pub const LABEL_VALUE_MAX: usize = 1024;
/// Labels of one volume or snapshot.
pub const LABELS_MAX: usize = 64;

/// A change of notes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotesChange {
    /// It may be deleted, or not.
    Protect(bool),
    /// Its description; an empty one is none.
    Describe(String),
    /// A label by key, and its value.
    Label(String, String),
    /// A label by key goes.
    Unlabel(String),
}

impl NotesChange {
    fn check(&self) -> Result<(), String> {
        match self {
            Self::Protect(_) | Self::Unlabel(_) => Ok(()),
            Self::Describe(text) if text.len() > DESCRIPTION_MAX => {
                Err(format!("a description has at most {DESCRIPTION_MAX} bytes"))
            }
            Self::Describe(_) => Ok(()),
            Self::Label(key, value) => {
                let is_key = (1..=LABEL_KEY_MAX).contains(&key.len());
                if !is_key || key.chars().any(|c| c == '=' || c.is_control()) {
                    return Err(format!(
                        "the key of a label has 1 to {LABEL_KEY_MAX} bytes, without '=' and control characters"
                    ));
                }
                match value.len() > LABEL_VALUE_MAX {
                    true => Err(format!("the value of a label has at most {LABEL_VALUE_MAX} bytes")),
                    false => Ok(()),
                }
            }
        }
    }

    fn apply(&self, notes: &mut Notes) -> Result<(), String> {
        match self {
            Self::Protect(protected) => notes.protected = *protected,
            Self::Describe(text) => notes.description.clone_from(text),
            Self::Label(key, value) => {
                notes.labels.insert(key.clone(), value.clone());
            }
            Self::Unlabel(key) => {
                notes.labels.remove(key).ok_or_else(|| format!("it has no label {key}"))?;
            }
        }
        Ok(())
    }
}

/// Notes with all changes made.
fn changed(notes: &Notes, changes: &[NotesChange]) -> Result<Notes, String> {
    let mut notes = notes.clone();
    changes.iter().try_for_each(|change| change.apply(&mut notes))?;
    match notes.labels.len() > LABELS_MAX {
        true => Err(format!("there are at most {LABELS_MAX} labels")),
        false => Ok(notes),
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Changes what is said of a volume or snapshot: makes all changes, or none.
    ///
    /// # Errors
    /// There is none of that name, it would be too long or too much, what the catalog says.
    pub fn note(&self, name: &Name, changes: &[NotesChange]) -> Result<()> {
        let refuse = |text: String| StoreError::invalid(name, text);
        changes.iter().try_for_each(NotesChange::check).map_err(refuse)?;
        self.catalog.change(|change| match name {
            Name::Volume(name) => {
                let (id, row) = volume(change, name)?;
                let notes = changed(&row.notes, changes).map_err(refuse)?;
                change.put_volume(id, Some(&VolumeRow { notes, ..row }))
            }
            Name::Snapshot(name) => {
                let (id, row) = snapshot(change, name)?;
                let notes = changed(&row.notes, changes).map_err(refuse)?;
                change.put_node(id, Some(&NodeRow { notes, ..row }))
            }
        })
    }
}
