//! What goes wrong besides crashes: which operations fail, and how.

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::Op;

use super::rng::Rng;
use super::storage::SimFile;

/// Kinds of operations that faults distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Syncs of a file.
    Sync,
    /// Allocations.
    Allocate,
    /// Everything else.
    Other,
}

impl Kind {
    /// The kind of an operation.
    pub fn of(op: &Op<SimFile>) -> Self {
        match op {
            Op::Read(_) => Self::Read,
            Op::Write(_) => Self::Write,
            Op::Sync { .. } | Op::SyncAll { .. } => Self::Sync,
            Op::Allocate { .. } => Self::Allocate,
            _ => Self::Other,
        }
    }
}

/// One failure that a history asks for.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    /// The kind of operation that fails.
    pub kind: Kind,
    /// How many operations of the kind still succeed before.
    pub skip: u32,
    /// What the operation reports.
    pub errno: Errno,
}

/// The faults of a world. Numbers are parts of 10,000 operations.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Reads that fail with EIO.
    pub read_error: u32,
    /// Writes that fail with EIO; each of their sectors may have been written all the same.
    pub write_error: u32,
    /// Syncs that fail with EIO; what they should have covered may be dropped for good.
    pub sync_error: u32,
    /// Allocations and writes into holes that fail with ENOSPC.
    pub no_space: u32,
    /// Reads and writes that move only a part.
    pub short: u32,
    /// Operations interrupted (EINTR) or put off (EAGAIN).
    pub interrupted: u32,
    /// Syncs that report success and do nothing: a broken disk. No engine survives it; it is
    /// there to show that the checker notices.
    pub lost_sync: u32,
    /// Failures asked for one by one.
    pub planned: Vec<Planned>,
}

/// What happens to one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It works.
    Done,
    /// It moves only this many bytes.
    Short(usize),
    /// It fails.
    Failed(Errno),
    /// A sync that does nothing and says it worked.
    Ignored,
}

impl Faults {
    /// Faults that an engine has to hide completely: short transfers and interruptions.
    pub fn benign() -> Self {
        Self { short: 500, interrupted: 200, ..Self::default() }
    }

    /// Decides about an operation; `unit` is what transfers are a multiple of, `needs_space`
    /// whether it takes up space that the file does not have yet.
    pub fn draw(&mut self, op: &Op<SimFile>, unit: usize, needs_space: bool, rng: &mut Rng) -> Fate {
        let kind = Kind::of(op);
        if let Some(errno) = self.planned_failure(kind) {
            return Fate::Failed(errno);
        }
        if rng.chance(self.interrupted) && kind != Kind::Sync {
            return Fate::Failed(rng.pick(&[Errno::INTR, Errno::AGAIN]));
        }
        let error = match kind {
            Kind::Read => self.read_error,
            Kind::Write => self.write_error,
            Kind::Sync => self.sync_error,
            Kind::Allocate | Kind::Other => 0,
        };
        if rng.chance(error) {
            return Fate::Failed(Errno::IO);
        }
        if needs_space && rng.chance(self.no_space) {
            return Fate::Failed(Errno::NOSPC);
        }
        if kind == Kind::Sync && rng.chance(self.lost_sync) {
            return Fate::Ignored;
        }
        match op {
            Op::Read(transfer) | Op::Write(transfer) if rng.chance(self.short) => {
                let units = transfer.wanted() / unit;
                if units > 1 {
                    Fate::Short(rng.between(1, units as u64 - 1) as usize * unit)
                } else {
                    Fate::Done
                }
            }
            _ => Fate::Done,
        }
    }

    fn planned_failure(&mut self, kind: Kind) -> Option<Errno> {
        let at = self.planned.iter().position(|planned| planned.kind == kind)?;
        if self.planned[at].skip == 0 {
            return Some(self.planned.remove(at).errno);
        }
        self.planned[at].skip -= 1;
        None
    }
}
