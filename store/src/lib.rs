//! A store: a directory that holds many volumes and the trees of their snapshots.
//!
//! A *volume* is a named disk that a guest writes; a *snapshot* is a moment of one, and never changes. What a
//! guest writes is in a layer (`sapwood-image`), whose base is a snapshot of the store by its id; the
//! catalog knows what that snapshot is. `docs/store.md` says what lies where and in which order it is
//! changed. One process has a store open at a time.
//!
//! - [`directory`]: the files of a store, making one, the lock;
//! - [`catalog`]: volumes, snapshots and the rest, changed by transactions;
//! - [`name`]: `volume` and `volume@snapshot`;
//! - [`Store`]: everything that is done, in `store`, `volume`, `snapshot`, `switch`, `attach`, `live` and
//!   `notes`;
//! - [`limits`]: what guests may do;
//! - [`Content`]: what is sealed; `publish` makes new packs a part of the store, for `seal`, `import` and `archive`;
//!   `export` writes archives, `diff` says what two snapshots do not have in common;
//! - `collect` frees what nobody needs, `merge` keeps the index short;
//! - [`tree`]: what there is, for people and programs to read;
//! - `resolve` answers what a snapshot is, `tidy` takes away what a crash has left.
#![forbid(unsafe_code)]

mod account;
mod archive;
mod attach;
mod backup;
pub mod catalog;
mod check;
mod collect;
mod content;
mod diff;
pub mod directory;
mod error;
mod export;
mod id;
mod import;
pub mod limits;
mod live;
mod merge;
#[cfg(feature = "mutations")]
pub mod mutation;
pub mod name;
mod notes;
mod prune;
mod publish;
mod resolve;
mod scrub;
mod seal;
mod snapshot;
mod space;
mod store;
mod switch;
mod tidy;
mod touch;
pub mod tree;
mod usage;
mod volume;

pub use account::Account;
pub use attach::{Attachment, SnapshotReader};
pub use backup::BackedUp;
pub use catalog::rows;
pub use check::{Problem, Severity};
pub use collect::Collected;
pub use content::Content;
pub use diff::Diff;
pub use error::{Result, StoreError, StoreErrorKind};
pub use export::Exporting;
pub use id::Id;
pub use import::{Imported, Importing};
pub use limits::{AllLimits, LimitsChange};
pub use live::Prepared;
pub use merge::Upkeep;
#[cfg(feature = "mutations")]
pub use mutation::Mutation;
pub use name::{Name, SnapshotName};
pub use notes::NotesChange;
pub use scrub::{DamagedLayer, ScrubProgress, Scrubbed};
pub use seal::SealedNode;
pub use space::{Snapshots, Stat, Taken};
pub use store::{Store, StoreOptions};
pub use tidy::Tidied;
pub use touch::Touched;
