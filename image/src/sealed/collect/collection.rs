//! A collection, step by step: see the module's documentation for why there are these steps.

use std::path::PathBuf;
use std::sync::Arc;

use super::finder::{Finder, Locate};
use super::mark::{Live, Marks};
use super::pins::{Collecting, Pins};
use super::shift::{Moved, Mover, Moves, Target};
use crate::error::ImageError;
use crate::sealed::packs::Root;
use crate::sealed::writer::Written;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::storage::Storage;

/// What a collection must know of the store, each time as of that moment.
pub trait Catalog {
    /// The roots that must be kept.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    fn roots(&self) -> Result<Vec<Root>, ImageError>;

    /// The numbers of all packs.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    fn packs(&self) -> Result<Vec<u32>, ImageError>;
}

/// What a collection takes on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Packs are rewritten of which less than this part is live, in percent of their stored bytes.
    pub live_percent: u32,
    /// Blocks and nodes that are moved, at most, as the survey counts them: what was moved takes 16 bytes each in memory. The
    /// rest is left to the next collection.
    pub moved_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { live_percent: 50, moved_max: 4 << 20 }
    }
}

/// The first step: what is live was counted, while seals went on.
pub struct Survey {
    collecting: Collecting,
    marks: Marks,
    limits: Limits,
    candidates: Vec<u32>,
}

/// Begins a collection: marks what is live now, and chooses packs.
///
/// # Errors
/// When something live cannot be read, when the work was stopped, or when another collection runs.
pub async fn begin<E: Engine, L: Locate<E>>(
    finder: &mut Finder<E, L>,
    pins: &Arc<Pins>,
    catalog: &impl Catalog,
    limits: Limits,
) -> Result<Survey, ImageError> {
    let collecting = pins
        .collect()
        .ok_or_else(|| ImageError::invalid(finder.path(), "another collection runs: wait for its end"))?;
    let mut marks = Marks::default();
    let roots = catalog.roots()?;
    // Asked for after the roots: what they refer to is listed.
    finder.know(catalog.packs()?);
    for root in &roots {
        marks.add(finder, root).await?;
    }
    let all = finder.known().map(|number| (number, marks.live(number)));
    let worth: Vec<_> = all.filter(|(_, live)| is_worth_it(*live, limits)).collect();
    // What is damaged and has no other copy cannot be moved.
    let can_move = |(pack, live): &(u32, Live)| live.entries == 0 || !finder.bad().touches(*pack);
    let candidates = choose(worth.into_iter().filter(can_move).collect(), limits);
    Ok(Survey { collecting, marks, limits, candidates })
}

/// Whether enough of a pack is dead.
fn is_worth_it(live: Live, limits: Limits) -> bool {
    live.entries == 0 || live.bytes * 100 < live.of * u64::from(limits.live_percent)
}

/// Those of which the least is live come first, as far as the limit lets them.
fn choose(mut packs: Vec<(u32, Live)>, limits: Limits) -> Vec<u32> {
    packs
        .sort_by_key(|(number, live)| ((u128::from(live.bytes) << 32) / u128::from(live.of.max(1)), *number));
    let mut moved = 0;
    packs.retain(|(_, live)| {
        let sum = moved + u64::from(live.entries);
        let fits = sum <= limits.moved_max;
        moved = if fits { sum } else { moved };
        fits
    });
    packs.sort_unstable_by_key(|(number, _)| *number);
    packs.into_iter().map(|(number, _)| number).collect()
}

impl Survey {
    /// The packs that it chose.
    pub fn candidates(&self) -> &[u32] {
        &self.candidates
    }

    /// How much of a pack is live, as of the survey.
    pub fn live(&self, pack: u32) -> Live {
        self.marks.live(pack)
    }

    /// Withdraws the chosen packs that no pin holds: nobody begins to refer to what is in them any more.
    pub fn withdraw(mut self) -> Withdrawn {
        let held = self.collecting.withdraw(&self.candidates);
        Withdrawn { collecting: self.collecting, marks: self.marks, limits: self.limits, held }
    }
}

/// The second step: packs are withdrawn.
pub struct Withdrawn {
    collecting: Collecting,
    marks: Marks,
    limits: Limits,
    held: Vec<u32>,
}

impl Withdrawn {
    /// The packs that are held by pins, and are left to the next collection, or until [`again`](Self::again).
    pub fn held(&self) -> &[u32] {
        &self.held
    }

    /// Withdraws what was held and is not any more: for whoever waits for pins to end.
    pub fn again(&mut self) {
        self.held = self.collecting.withdraw(&self.held);
    }

    /// Marks what has come since the survey: now whatever stays unmarked in the withdrawn packs is dead for good.
    ///
    /// # Errors
    /// As for [`begin`]. Everything is then as it was before.
    pub async fn mark<E: Engine, L: Locate<E>>(
        mut self,
        finder: &mut Finder<E, L>,
        catalog: &impl Catalog,
    ) -> Result<Marked, ImageError> {
        // In this order: a root is in the catalog before its pin ends, and its packs are before it is.
        let mut roots = catalog.roots()?;
        roots.extend(self.collecting.pinned());
        finder.know(catalog.packs()?);
        for root in &roots {
            self.marks.add(finder, root).await?;
        }
        let (mut dead, mut sparse) = (Vec::new(), Vec::new());
        let withdrawn: Vec<u32> = self.collecting.withdrawn().collect();
        for number in withdrawn {
            let live = self.marks.live(number);
            if live.entries == 0 {
                dead.push(number);
            } else if is_worth_it(live, self.limits) && !finder.bad().touches(number) {
                sparse.push(number);
            } else {
                self.collecting.release(number);
            }
        }
        Ok(Marked { collecting: self.collecting, marks: self.marks, dead, sparse })
    }
}

/// The third step: it is known what is dead.
pub struct Marked {
    collecting: Collecting,
    marks: Marks,
    dead: Vec<u32>,
    sparse: Vec<u32>,
}

impl Marked {
    /// Packs without anything live.
    pub fn dead(&self) -> &[u32] {
        &self.dead
    }

    /// Packs that are to be rewritten.
    pub fn sparse(&self) -> &[u32] {
        &self.sparse
    }

    /// Moves what is live out of the packs that are mostly dead. When the work is stopped, what was moved until then counts.
    /// When something live is damaged, nothing is dropped and nothing was moved: another copy of it may be in what is dead. The finder
    /// knows of it then, so that the next collection with it, or with its [`bad`](Finder::bad), goes by that copy.
    ///
    /// # Errors
    /// When new packs cannot be written; what was written is garbage then, and nothing is lost.
    pub async fn shift<E: Engine, L: Locate<E>, S: Storage<File = E::File>>(
        mut self,
        finder: &mut Finder<E, L>,
        target: &mut Target<S>,
    ) -> Result<Shifted, ImageError> {
        let (mut kept, mut emptied) = (Vec::new(), Vec::new());
        let mut mover = Mover::new(finder, &self.marks, target)?;
        for number in by_kind(mover.finder(), &self.sparse).await? {
            if mover.finder().pace.is_stopped() {
                self.collecting.release(number);
                continue;
            }
            match move_pack(&mut mover, number).await {
                Ok(Ok(())) => emptied.push(number),
                Ok(Err(error)) => kept.push((number, error)),
                Err(error) => {
                    mover.abandon().await;
                    return Err(error);
                }
            }
        }
        if !kept.is_empty() {
            mover.abandon().await;
            self.collecting.release_all();
            let (moves, moved) = (Moves::default(), Moved::default());
            let (written, dropped) = (Vec::new(), Vec::new());
            return Ok(Shifted { collecting: self.collecting, written, dropped, kept, moves, moved });
        }
        let (written, moves, moved) = mover.finish().await?;
        let mut dropped = Vec::new();
        for number in self.dead.into_iter().chain(emptied) {
            dropped.push(Dropped::of(finder, number).await);
        }
        Ok(Shifted { collecting: self.collecting, written, dropped, kept, moves, moved })
    }
}

async fn move_pack<E: Engine, L: Locate<E>, S: Storage<File = E::File>>(
    mover: &mut Mover<'_, E, L, S>,
    number: u32,
) -> Result<Result<(), ImageError>, ImageError> {
    let finder = mover.finder();
    let pack = finder.packs.pack(&finder.io, number).await?;
    mover.pack(&pack).await
}

/// Data before nodes, so that the nodes that are moved learn where their blocks are.
async fn by_kind<E: Engine, L: Locate<E>>(
    finder: &Finder<E, L>,
    numbers: &[u32],
) -> Result<Vec<u32>, ImageError> {
    let mut sorted = Vec::with_capacity(numbers.len());
    for &number in numbers {
        sorted.push((finder.packs.pack(&finder.io, number).await?.kind() as u8, number));
    }
    sorted.sort_unstable();
    Ok(sorted.into_iter().map(|(_, number)| number).collect())
}

/// A pack that is not needed any more once the catalog has forgotten it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Its number.
    pub number: u32,
    /// Length of its file, 0 when it cannot be read.
    pub bytes: u64,
    /// The file, where it can be read.
    pub path: Option<PathBuf>,
}

impl Dropped {
    async fn of<E: Engine, L: Locate<E>>(finder: &Finder<E, L>, number: u32) -> Self {
        match finder.packs.pack(&finder.io, number).await {
            Ok(pack) => Self { number, bytes: pack.bytes(), path: Some(pack.path().to_owned()) },
            Err(_) => Self { number, bytes: 0, path: None },
        }
    }
}

/// The last step: everything that is live is in packs that stay, durably. The caller commits a catalog, and an index, with
/// the new packs and without the dropped ones, calls [`committed`](Self::committed), and unlinks the files.
pub struct Shifted {
    collecting: Collecting,
    /// The new packs.
    pub written: Vec<Written>,
    /// The packs to forget.
    pub dropped: Vec<Dropped>,
    /// Packs that had to stay, because something live in them is damaged or cannot be read. When there are any, nothing else was
    /// done: see [`Marked::shift`].
    pub kept: Vec<(u32, ImageError)>,
    /// What is where now, for the tops of trees in the catalog.
    pub moves: Moves,
    /// How much was moved.
    pub moved: Moved,
}

impl Shifted {
    /// Bytes that files took and will not, once the dropped ones are unlinked.
    pub fn bytes_dropped(&self) -> u64 {
        self.dropped.iter().map(|pack| pack.bytes).sum()
    }

    /// Bytes of the new files.
    pub fn bytes_written(&self) -> u64 {
        self.written.iter().map(|pack| pack.bytes).sum()
    }

    /// Bytes written for each hundred that become free; none when nothing does.
    pub fn write_amplification_percent(&self) -> Option<u64> {
        let freed = self.bytes_dropped().checked_sub(self.bytes_written()).filter(|freed| *freed > 0)?;
        Some(self.bytes_written() * 100 / freed)
    }

    /// The catalog is durable with the new packs and without the dropped ones: everybody may refer to those, and nobody will be
    /// let to refer to these again.
    pub fn committed(self) {
        self.collecting.finish(self.written.iter().map(|pack| pack.number));
    }
}
