//! Exporting: a snapshot becomes one file, an archive, which any other store can import.
//!
//! What is exported is sealed: a snapshot that is not is sealed first. It stays until the export ends, also when its name
//! goes meanwhile. Nothing in the store changes but for that; how the archive is written is said in `docs/format-sealed.md`.

use std::path::Path;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::ErrorKind;
use sapwood_image::sealed::collect::Pin;
use sapwood_image::sealed::{
    DESCRIPTION_BYTES_MAX, Export, Exported, NAME_BYTES_MAX, Root, Watch, Workers, export,
};

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::SnapshotName;
use crate::resolve::sealed_root;
use crate::store::{Store, snapshot};
use crate::usage::Hold;

/// What is exported.
#[derive(Clone, Copy, Debug)]
pub struct Exporting<'a> {
    /// The snapshot.
    pub of: &'a SnapshotName,
    /// For an increment: a snapshot that the other side has. What is as there is left out.
    pub since: Option<&'a SnapshotName>,
    /// Who hashes and compresses.
    pub workers: &'a Workers,
}

/// A snapshot that stays, whatever becomes of its name.
struct Held<'a> {
    name: &'a SnapshotName,
    id: Id,
    description: String,
    _node: Hold,
}

/// A sealed disk that a collection leaves alone.
struct Pinned {
    root: Root,
    _pin: Pin,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Writes a snapshot into a new archive at `path`, whole or as an increment. Snapshots that are not sealed are sealed
    /// before. The archive has the snapshot's name and description, as far as there is room for them: of the longest ones
    /// the ends are left out.
    ///
    /// # Errors
    /// No such snapshot, a file that exists, what sealing, reading or writing says;
    /// [`Cancelled`](sapwood_image::ErrorKind::Cancelled), also when `watch` says to stop: then there is no archive, and what
    /// was sealed until then stays so.
    pub async fn export_archive(
        &self,
        io: &Io<E>,
        exporting: &Exporting<'_>,
        path: &Path,
        watch: &mut impl Watch,
    ) -> Result<Exported> {
        let Exporting { of, since, workers } = *exporting;
        let held = self.hold(of)?;
        let since = since.map(|since| self.hold(since)).transpose()?;
        let base = match &since {
            Some(since) => Some(self.pin_sealed(io, since, workers, watch).await?),
            None => None,
        };
        let disk = self.pin_sealed(io, &held, workers, watch).await?;
        let name = of.to_string();
        let source = Export {
            storage: &self.storage,
            io,
            packs: self.content.packs(),
            workers,
            root: disk.root,
            base: base.as_ref().map(|base| base.root),
            name: start_of(&name, NAME_BYTES_MAX),
            description: start_of(&held.description, DESCRIPTION_BYTES_MAX),
        };
        Ok(export(source, path, watch).await?)
    }

    /// Lets a snapshot stay.
    fn hold<'a>(&self, name: &'a SnapshotName) -> Result<Held<'a>> {
        self.catalog.hold_still(|look| {
            let (id, row) = snapshot(look, name)?;
            Ok(Held { name, id, description: row.notes.description, _node: self.usage.pin(id) })
        })
    }

    /// Seals a snapshot, if it is not, and pins what it is then.
    async fn pin_sealed(
        &self,
        io: &Io<E>,
        held: &Held<'_>,
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<Pinned> {
        let sealed = self.seal_line(io, (held.name, held.id), workers, watch).await?;
        if sealed.iter().any(|node| !node.is_whole) {
            return Err(StoreError::new(held.name, StoreErrorKind::Image(ErrorKind::Cancelled)));
        }
        let pinned = self.catalog.hold_still(|look| {
            let root = sealed_root(look, held.id)?;
            Ok(root.map(|root| Pinned { root, _pin: self.content.pins().pin(&[root]) }))
        })?;
        let text = "it could not be sealed, since others are at work on it: try again";
        pinned.ok_or_else(|| StoreError::new(held.name, StoreErrorKind::InUse(text.to_owned())))
    }
}

/// As much of a text as has room in `max` bytes.
fn start_of(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(start_of("", 3), "");
        assert_eq!(start_of("abc", 3), "abc");
        assert_eq!(start_of("abcd", 3), "abc");
        assert_eq!(start_of("abåd", 3), "ab");
    }
}
