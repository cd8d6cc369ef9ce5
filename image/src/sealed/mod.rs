//! Sealed snapshots: disks that never change again, deduplicated, compressed and verified.
//!
//! A sealed snapshot is a Merkle tree of hashes over the blocks of a disk; its nodes and data lie in
//! *packs*, files of checksummed records that are written once. `docs/format-sealed.md` is the format's
//! reference.
//!
//! From the bottom up: `hash` and `place` say what a block is and where it may be; `record`, `codec` and `node` are the
//! stored forms, `entries`, `header` and `trailer` the parts of a pack around them; `writer` makes packs and
//! `pack` reads one, and `packs` all of a store. `dedup` says which blocks may be there already.
//!
//! Invariants:
//! - a hash depends on contents alone, so equal contents have equal hashes wherever they are stored;
//! - a place is a hint: what is found there is believed when its hash is the one that was asked for.

mod codec;
mod dedup;
mod entries;
mod hash;
mod header;
mod node;
mod pack;
mod packs;
mod place;
mod record;
#[cfg(test)]
mod tests;
mod trailer;
mod writer;

pub use codec::{Codec, Coder};
pub use dedup::{CONTAINER_ENTRIES_MAX, CONTAINER_PAGES, Container, DedupIndex, Lookup, SEGMENT_BLOCKS};
pub use entries::{Entry, PAGE_ENTRIES_MAX};
pub use hash::{Hash, root_hash};
pub use header::{PackId, PackKind};
pub use node::{Child, FANOUT, Node, height_of};
pub use pack::Pack;
pub use packs::{FoundBlock, Packs, Root};
pub use place::{PACK_BYTES_MAX, Place};
pub use record::{FRAME_BLOCKS_MAX, Frame, NewRecord};
pub use writer::{PACK_BYTES, PackWriter, Written, pack_name};
