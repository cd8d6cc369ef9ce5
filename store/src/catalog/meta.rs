//! What a store is: its id, and the version and features of its format.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::tables::{Look, META, View};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;

/// The version of a store's format that this program reads and writes.
pub(crate) const FORMAT: u32 = 0;
/// The key of the one row.
pub(super) const KEY: &[u8] = b"store";
/// Feature bits that this program knows, of those that forbid opening when they are not known.
const KNOWN: u64 = 0;
/// Reserved: the store is encrypted.
const ENCRYPTED: u64 = 1;

/// The row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Version of the format.
    pub(crate) format: u32,
    /// The store's id.
    pub(crate) store: Id,
    /// Feature bits; an unknown one forbids opening.
    pub(crate) incompatible: u64,
    /// Feature bits that may be ignored.
    pub(crate) compatible: u64,
}

impl Meta {
    pub(super) fn new(store: Id) -> Self {
        Self { format: FORMAT, store, incompatible: 0, compatible: 0 }
    }

    pub(super) fn read(view: &View, path: &Path) -> Result<Self> {
        let row = view.row::<Self>(META, KEY)?;
        let meta = row.ok_or_else(|| {
            let text = "its table meta says nothing: it is not the catalog of a store".to_owned();
            StoreError::new(path.display(), StoreErrorKind::Corrupt(text))
        })?;
        meta.check().map_err(|text| StoreError::new(path.display(), StoreErrorKind::Unsupported(text)))?;
        Ok(meta)
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            let format = self.format;
            return Err(format!("the store has format {format}, this program reads format {FORMAT}"));
        }
        if self.incompatible & ENCRYPTED != 0 {
            return Err("the store is encrypted, which this program does not know yet".to_owned());
        }
        match self.incompatible & !KNOWN {
            0 => Ok(()),
            bits => Err(format!("the store uses features that a newer program knows (bits {bits:#x})")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_refused() {
        let meta = Meta::new(Id([1; 16]));
        assert_eq!(meta.check(), Ok(()));
        assert_eq!(Meta { compatible: u64::MAX, ..meta.clone() }.check(), Ok(()));
        for (meta, why) in [
            (Meta { format: 1, ..meta.clone() }, "format 1"),
            (Meta { incompatible: 1, ..meta.clone() }, "encrypted"),
            (Meta { incompatible: 6, ..meta.clone() }, "bits 0x6"),
        ] {
            assert!(meta.check().unwrap_err().contains(why), "{meta:?}");
        }
    }
}
