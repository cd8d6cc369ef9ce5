//! Collection, accounting and scrubbing: what happens to sealed content after it was written.
//!
//! Packs never change, so space comes back only when whole packs are dropped. A collection finds out what is live, moves
//! what is live out of packs that are mostly dead into new packs, and tells the caller which packs to forget. It deletes
//! nothing itself. `docs/collection.md` is the reference, with the crash table.
//!
//! # The steps of a collection
//!
//! A store drives them one after the other, each of which returns the next; beside them, seals, imports, clones, deletions and
//! reads go on. Giving up between any two of them loses nothing: what was withdrawn is given back when the value is dropped.
//!
//! 1. [`begin`]: marks everything that the catalog's roots reach, and chooses packs of which little is live. This takes the
//!    longest, and withdraws nothing: which packs are worth it is known only afterwards. What is marked stays marked: nodes
//!    do not change, and nobody else drops packs, so all that can be missing later is what came since.
//! 2. [`Survey::withdraw`]: from here on nobody can begin to refer to what is in the chosen packs, but for what a root that
//!    is kept reaches. Without this step a seal could find, by its hash, a block that is dead by the marks, and refer to it. Packs
//!    that a seal begun earlier has referred to are held by its [`Pin`], and are left out; nobody waits for a long
//!    import. Who would rather wait calls [`Withdrawn::again`] as pins end.
//! 3. [`Withdrawn::mark`]: marks what the roots of now reach, pinned ones included; most is marked already. It comes after
//!    the withdrawal, so every reference that was made before is below one of these roots, or in a pack that is held.
//!    The catalog is asked before the pins, since a root is in the catalog before its pin ends; and for its packs last, since they
//!    are listed before a root that needs them is. Now what is unmarked in the withdrawn packs is dead for good.
//! 4. [`Marked::shift`]: copies what is live and in packs that are mostly dead to new packs, and makes these durable, with their
//!    names. Every block and node is compared with its hash before it counts as moved. Where something live is damaged that
//!    nobody knew of, nothing is moved and nothing is dropped: what is dead may hold the other copy of it. The finder knows it then, and the next
//!    collection goes by that copy.
//! 5. The caller commits: the catalog and the exact index get the new packs and lose the dropped ones, in one commit. Before
//!    it the new packs are garbage, after it the dropped ones are: a crash leaves the one or the other, which nobody refers to.
//!    Then it calls [`Shifted::committed`], so that no look-up for duplicates that still remembers a dropped pack is believed.
//! 6. The caller unlinks. A reader that has a dropped pack open reads on; one that opens it later does not find it, and looks the
//!    hash up in the index: a place is a hint. So numbers of packs must never be used again.
//!
//! # Marks and memory
//!
//! Content is identified by where it is stored: a number in the order of the pack's list of entries. Marks are a bit for each: for
//! a TiB of unique blocks 32 MiB, and 2.2 MiB for its nodes. To number a place takes the table of its pack (16 bytes
//! for each entry at most, in the common case 9 for each block): at most 64 MiB of them are kept, whatever the size of the store, and read again where that
//! does not do; trees refer to blocks in the order in which they were stored, mostly. Nodes are read in windows with their neighbours
//! (4 MiB). An account has three such sets of bits. What was moved takes 16 bytes for each block or node, within
//! [`Limits::moved_max`] (64 MiB by default).
//!
//! A place is believed when its pack's list has the hash there (by a keyed fingerprint of 64 bits, so that nobody can make two contents
//! that pass for one another). One that is stale is looked up with [`Locate`]. A node that is live and cannot be
//! read ends a collection with an error that names it: what is below it is not known, and could be freed.

mod account;
mod bits;
mod collection;
mod finder;
mod mark;
mod pace;
mod pins;
mod reached;
mod records;
mod scrub;
mod shift;
mod table;
#[cfg(test)]
mod tests;
mod walk;

pub use account::{Accounts, Amount, Detail, RootAccount, account};
pub use collection::{Catalog, Dropped, Limits, Marked, Shifted, Survey, Withdrawn, begin};
pub use finder::{Bad, Finder, Locate};
pub use mark::{Live, Marks, mark};
pub use pace::Pace;
pub use pins::{Pin, Pins};
pub use reached::Lost;
pub use scrub::{Damage, Findings, Scrub};
pub use shift::{Moved, Moves, Target};
