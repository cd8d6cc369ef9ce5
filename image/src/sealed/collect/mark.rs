//! What is live: marks over the entries of packs.

use std::collections::BTreeMap;

use super::bits::Bits;
use super::finder::{Finder, Locate, Spot};
use super::walk::{Visit, walk};
use crate::error::ImageError;
use crate::sealed::packs::Root;
use sapwood_blockdev::engine::Engine;

/// How much of a pack is live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Blocks or nodes.
    pub entries: u32,
    /// Stored bytes: of a record that is live in part, the part of its live blocks.
    pub bytes: u64,
    /// Stored bytes of all its records; 0 when nothing in it is live.
    pub of: u64,
}

/// What roots reach: one bit for each block and node that is stored.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    bits: Bits,
    live: BTreeMap<u32, Live>,
}

impl Marks {
    /// Marks what a root reaches. Below what is marked already, nothing is visited again.
    ///
    /// # Errors
    /// When anything that it should reach cannot be read, is damaged or is missing. Then the marks are incomplete, and
    /// nobody may conclude from them that something is dead.
    pub(super) async fn add<E: Engine, L: Locate<E>>(
        &mut self,
        finder: &mut Finder<E, L>,
        root: &Root,
    ) -> Result<(), ImageError> {
        walk(finder, root, self).await
    }

    /// How much of a pack is live.
    pub fn live(&self, pack: u32) -> Live {
        self.live.get(&pack).copied().unwrap_or_default()
    }

    /// Whether an entry of a pack is.
    pub(super) fn is_live(&self, pack: u32, number: u32) -> bool {
        self.bits.is_set(pack, number)
    }

    /// Bytes that the marks take.
    pub fn bytes(&self) -> usize {
        self.bits.bytes()
    }

    fn set(&mut self, spot: &Spot) -> bool {
        let is_new = self.bits.set(spot.pack(), spot.number, spot.entries);
        if is_new {
            let live = self.live.entry(spot.pack()).or_default();
            live.entries += 1;
            live.bytes += u64::from(spot.bytes);
            live.of = spot.pack_bytes;
        }
        is_new
    }
}

impl Visit for Marks {
    fn enter(&mut self, spot: &Spot) -> bool {
        self.set(spot)
    }

    fn block(&mut self, spot: &Spot) {
        self.set(spot);
    }
}

/// Marks what roots reach, on its own: for whoever wants to know and not to collect.
///
/// # Errors
/// As for a collection: what is live and cannot be read ends it.
pub async fn mark<E: Engine, L: Locate<E>>(
    finder: &mut Finder<E, L>,
    roots: &[Root],
) -> Result<Marks, ImageError> {
    let mut marks = Marks::default();
    for root in roots {
        marks.add(finder, root).await?;
    }
    Ok(marks)
}
