//! Sealed snapshots: disks that never change again, deduplicated, compressed and verified.
//!
//! A sealed snapshot is a Merkle tree of hashes over the blocks of a disk; its nodes and data lie in
//! *packs*, files of checksummed records that are written once. `docs/format-sealed.md` is the format's
//! reference.
//!
//! From the bottom up: `hash` and `place` say what a block is and where it may be; `record`, `codec` and `node` are the
//! stored forms, `entries`, `header` and `trailer` the parts of a pack around them; `writer` makes packs and
//! `pack` reads one, and `packs` all of a store, with the exact `index` beside them. `snapshot` is a disk. `cursor` reads a
//! tree, `tree` makes one, and `diff` compares two. `seal` turns a `source` into packs and a root, with `workers`, through
//! `known` past what is stored already (which `dedup` says in little memory), and `output` holds the new packs. `archive` is a
//! disk in one file.
//!
//! Invariants:
//! - a hash depends on contents alone, so equal contents have equal hashes wherever they are stored;
//! - a place is a hint: what is found there is believed when its hash is the one that was asked for.

mod archive;
mod codec;
pub mod collect;
mod cursor;
mod dedup;
mod diff;
mod entries;
mod hash;
mod header;
pub mod index;
mod known;
mod node;
mod output;
mod pack;
mod packs;
mod place;
mod record;
mod seal;
mod snapshot;
mod source;
#[cfg(test)]
mod tests;
mod trailer;
mod tree;
#[cfg(test)]
mod trial;
mod workers;
mod writer;

pub use archive::{Archive, ArchiveInfo, DESCRIPTION_BYTES_MAX, Export, Exported, NAME_BYTES_MAX, export};
pub use codec::{Codec, Coder};
pub use cursor::SEALED_BYTES_MAX;
pub use dedup::{
    BoundedDedup, CONTAINER_ENTRIES_MAX, CONTAINER_PAGES, Container, DedupIndex, Lookup, SharedDedup,
};
pub use diff::{DiffStats, diff};
pub use entries::{Entry, PAGE_ENTRIES_MAX};
pub use hash::{Hash, root_hash};
pub use header::{PackId, PackKind};
pub use known::{Dedup, ExactMap, Found};
pub use node::{Child, FANOUT, Node, height_of};
pub use pack::Pack;
pub use packs::{FoundBlock, Packs, PacksTuning, Root};
pub use place::{PACK_BYTES_MAX, Place};
pub use record::{FRAME_BLOCKS_MAX, Frame, NewRecord};
pub use seal::{FRAME_BLOCKS, LEVEL, SEGMENT_BLOCKS, SealStats, Sealed, Sealing, Step, Watch, seal};
pub(crate) use snapshot::Lacking;
pub use snapshot::Snapshot;
pub use source::{
    Content, DiskSource, FrozenSource, MemoryBlock, MemorySource, Source, SourceBytes, SourceRun, TreeSource,
};
pub use workers::Workers;
pub use writer::{PACK_BYTES, PackWriter, Written, pack_name};
