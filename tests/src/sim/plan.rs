//! A history as data: what the disk is like, and what happens to it, step by step.
//!
//! Everything follows from a seed, and can be shortened step by step while it still fails.

use std::time::Duration;

use super::faults::{Faults, Kind};
use super::persist::Persistence;
use super::rng::Rng;

/// What lies below a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Nothing,
    /// A raw image of so many sectors.
    Raw(u64),
    /// Another layer, of so many sectors.
    Layer(u64),
}

impl Base {
    /// Its size in sectors.
    pub fn sectors(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Raw(sectors) | Self::Layer(sectors) => sectors,
        }
    }
}

/// What a disk is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its size in sectors at first.
    pub sectors: u64,
    /// Its largest size in sectors.
    pub sectors_max: u64,
    /// What lies below.
    pub base: Base,
    /// Bytes in a segment of its log.
    pub segment_size: u32,
    /// Bytes of log after which a checkpoint is due.
    pub checkpoint_bytes: u64,
    /// How long a change may go without a checkpoint.
    pub checkpoint_interval: Duration,
    /// How long a change may go without a sync.
    pub sync_interval: Duration,
    /// Whether writes are reported before they are durable.
    pub write_cache: bool,
    /// Queues.
    pub queues: usize,
    /// What direct I/O must be aligned to, in bytes.
    pub alignment: usize,
    /// Bytes that the host has space for.
    pub capacity: Option<u64>,
}

/// One thing that happens. Positions are taken modulo the disk's size, so that steps keep their
/// meaning when others are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields say what they are: a queue, a sector, so many sectors")]
pub enum Step {
    /// A queue reads sectors.
    Read { queue: usize, at: u64, len: u64 },
    /// A queue writes sectors.
    Write { queue: usize, at: u64, len: u64 },
    /// A queue writes a block that looks like one of the disk's own files' blocks.
    Forge { queue: usize, at: u64, from: u64 },
    /// A queue zeroes sectors.
    Zeroes { queue: usize, at: u64, len: u64 },
    /// A queue discards sectors.
    Discard { queue: usize, at: u64, len: u64 },
    /// A queue flushes.
    Flush { queue: usize },
    /// The owner wants another size.
    Resize { sectors: u64 },
    /// The owner wants a checkpoint.
    Checkpoint,
    /// The cleaner runs.
    Clean,
    /// What is scattered is laid in order: in histories of their own, random ones have none.
    Compact,
    /// The owner wants it to have no base.
    Flatten,
    /// The owner wants it to have another base.
    Rebase,
    /// The owner wants it merged into its base.
    Commit,
    /// The owner wants a snapshot.
    Snapshot,
    /// The store seals a snapshot below it.
    Seal,
    /// Threads and storage go on for so many rounds.
    Run { rounds: u64 },
    /// Time passes, as long as timers may ask for.
    Pass { millis: u64 },
    /// Everything outstanding is reported.
    Drain,
    /// An operation on the storage fails.
    Fail { kind: Kind, skip: u32, no_space: bool },
    /// A clean stop and a new start.
    Reopen,
    /// The process dies and a new one starts.
    Kill,
    /// The power fails, and comes back.
    Power { persistence: Persistence },
    /// The process dies or the power fails, and the sector that says where everything is goes bad:
    /// the other one must do.
    DamageSlot { power: Option<Persistence> },
    /// The same, and a block of the log goes bad, too: the disk must refuse, or be right.
    DamageLog { block: u64 },
}

/// A whole history.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What chose it, and chooses everything that is not said here.
    pub seed: u64,
    /// The disk.
    pub shape: Shape,
    /// Faults during the whole history.
    pub faults: Faults,
    /// What happens.
    pub steps: Vec<Step>,
}

impl Shape {
    /// A small disk without a base.
    pub fn small() -> Self {
        Self {
            sectors: 16 * 8,
            sectors_max: 24 * 8,
            base: Base::Nothing,
            segment_size: 64 << 10,
            checkpoint_bytes: 1 << 20,
            checkpoint_interval: Duration::from_secs(30),
            sync_interval: Duration::from_secs(5),
            write_cache: true,
            queues: 1,
            alignment: 512,
            capacity: None,
        }
    }

    fn random(rng: &mut Rng, style: Style) -> Self {
        let blocks = if style == Style::Mixed { rng.between(1, 40) } else { rng.between(4, 16) };
        let sectors = blocks * 8 + rng.pick(&[0, 0, 0, 3]);
        let base_sectors = rng.between(1, sectors + 16);
        let churn = style == Style::Churn;
        let full = style == Style::Failing && rng.percent(30);
        let sectors_max = sectors + rng.between(0, 64);
        let base = rng.pick(&[Base::Nothing, Base::Raw(base_sectors), Base::Layer(base_sectors)]);
        // There is room for the base and for making the disk.
        let room = if matches!(base, Base::Layer(_)) { 512 << 10 } else { 256 << 10 };
        Self {
            sectors,
            sectors_max,
            base,
            segment_size: rng.pick(&[64 << 10, 64 << 10, 128 << 10]),
            checkpoint_bytes: rng.pick(&[64 << 10, 256 << 10, 1 << 20]),
            checkpoint_interval: Duration::from_millis(if churn {
                30_000
            } else {
                rng.pick(&[5, 100, 30_000])
            }),
            sync_interval: Duration::from_millis(if churn { 5_000 } else { rng.pick(&[2, 50, 5_000]) }),
            write_cache: churn || !rng.percent(20),
            queues: rng.pick(&[1, 2, 2, 3]),
            alignment: rng.pick(&[512, 4096]),
            capacity: full.then(|| rng.between(base_sectors * 512 + room, 2 << 20)),
        }
    }
}

/// What a history is after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// A bit of everything.
    Mixed,
    /// A small disk written over and over, so that the log comes back to where it was.
    Churn,
    /// Records that fail, around checkpoints.
    Failing,
}

impl Plan {
    /// The history of a seed.
    pub fn random(seed: u64, queues_max: usize) -> Self {
        let mut rng = Rng::new(seed);
        let style = match rng.below(10) {
            0..=2 => Style::Churn,
            3 => Style::Failing,
            _ => Style::Mixed,
        };
        let mut shape = Shape::random(&mut rng.fork(1), style);
        shape.queues = shape.queues.min(queues_max);
        let mut rng = rng.fork(2);
        let faults = match rng.below(10) {
            _ if shape.capacity.is_some() => Faults::benign(),
            _ if style == Style::Failing => Faults { write_error: 500, ..Faults::default() },
            0 => Faults { write_error: 100, ..Faults::benign() },
            1 => Faults { sync_error: 200, read_error: 50, ..Faults::benign() },
            2 => Faults { no_space: 500, ..Faults::benign() },
            3..=6 => Faults::benign(),
            _ => Faults::default(),
        };
        let mix = Mix::random(&mut rng, &shape, style);
        let count = if style == Style::Churn { rng.pick(&[100, 250]) } else { rng.pick(&[15, 40, 80, 160]) };
        let steps = (0..count).map(|_| mix.step(&mut rng)).collect();
        Self { seed, shape, faults, steps }
    }
}

impl Plan {
    /// The history of a seed, with changes of what lies below the disk.
    pub fn with_bases(seed: u64, queues_max: usize) -> Self {
        let mut plan = Self::random(seed, queues_max);
        let mut rng = Rng::new(!seed);
        let sectors = rng.between(1, plan.shape.sectors + 16);
        plan.shape.base = rng.pick(&[Base::Raw(sectors), Base::Layer(sectors)]);
        for _ in 0..rng.between(1, 8) {
            let at = rng.below(plan.steps.len() as u64 + 1) as usize;
            let step = rng.pick(&[Step::Commit, Step::Commit, Step::Commit, Step::Rebase, Step::Rebase]);
            plan.steps.insert(at, step);
        }
        if rng.percent(30) {
            plan.steps.insert(plan.steps.len() * 3 / 4, Step::Flatten);
        }
        plan
    }
}

impl Plan {
    /// The history of a seed, with snapshots of the running disk.
    pub fn with_snapshots(seed: u64, queues_max: usize) -> Self {
        let mut plan = Self::random(seed, queues_max);
        let mut rng = Rng::new(!seed);
        for _ in 0..rng.between(1, 8) {
            let at = rng.below(plan.steps.len() as u64 + 1) as usize;
            let steps = Self::snapshot(&mut rng, &plan.shape);
            drop(plan.steps.splice(at..at, steps));
        }
        plan
    }

    /// The history of a seed, with snapshots of the running disk that are sealed under it, in a store.
    pub fn with_seals(seed: u64, queues_max: usize) -> Self {
        let mut plan = Self::with_snapshots(seed, queues_max);
        plan.shape.base = Base::Nothing;
        let mut rng = Rng::new(seed ^ 0x7365_616c);
        for _ in 0..rng.between(4, 24) {
            let at = rng.below(plan.steps.len() as u64 + 1) as usize;
            plan.steps.insert(at, if rng.percent(25) { Step::Snapshot } else { Step::Seal });
        }
        plan
    }

    /// A snapshot, perhaps with a guest that is busy meanwhile, and perhaps with a crash before its end.
    fn snapshot(rng: &mut Rng, shape: &Shape) -> Vec<Step> {
        let mut steps = vec![Step::Snapshot];
        for _ in 0..rng.pick(&[0, 8, 24]) {
            let queue = rng.below(shape.queues as u64) as usize;
            steps.push(match rng.below(3) {
                0 => Step::Flush { queue },
                _ => Step::Write { queue, at: rng.below(shape.sectors), len: rng.between(1, 16) },
            });
            steps.push(Step::Run { rounds: rng.between(0, 6) });
        }
        match rng.below(4) {
            0 => steps.push(Step::Power { persistence: rng.pick(&Persistence::ALL) }),
            1 => steps.push(Step::Kill),
            _ => {}
        }
        steps
    }
}

/// How often each kind of step comes, and where on the disk.
struct Mix {
    style: Style,
    weights: Vec<(u64, Choice)>,
    hot: u64,
    queues: usize,
    sectors_max: u64,
}

#[derive(Clone, Copy, Debug)]
enum Choice {
    Read,
    Write,
    Forge,
    Zeroes,
    Discard,
    Flush,
    Resize,
    Checkpoint,
    Clean,
    Run,
    Pass,
    Drain,
    Fail,
    Reopen,
    Kill,
    Power,
    DamageSlot,
    DamageLog,
}

impl Mix {
    fn random(rng: &mut Rng, shape: &Shape, style: Style) -> Self {
        let (weights, hot) = match style {
            Style::Mixed => (Self::mixed(rng), rng.pick(&[8, 24, 64, u64::MAX])),
            Style::Churn => (Self::churn(rng), u64::MAX),
            Style::Failing => (Self::failing(rng), u64::MAX),
        };
        Self { style, weights, hot, queues: shape.queues, sectors_max: shape.sectors_max }
    }

    fn mixed(rng: &mut Rng) -> Vec<(u64, Choice)> {
        vec![
            (30, Choice::Write),
            (8, Choice::Read),
            (rng.pick(&[0, 2, 8]), Choice::Flush),
            (rng.pick(&[0, 3]), Choice::Forge),
            (rng.pick(&[0, 4]), Choice::Zeroes),
            (rng.pick(&[0, 4]), Choice::Discard),
            (rng.pick(&[0, 0, 2]), Choice::Resize),
            (rng.pick(&[0, 2, 8]), Choice::Checkpoint),
            (rng.pick(&[0, 3]), Choice::Clean),
            (rng.pick(&[10, 30]), Choice::Run),
            (rng.pick(&[0, 2]), Choice::Pass),
            (rng.pick(&[1, 6]), Choice::Drain),
            (rng.pick(&[0, 0, 0, 2]), Choice::Fail),
            (rng.pick(&[0, 1]), Choice::Reopen),
            (rng.pick(&[0, 1, 3]), Choice::Kill),
            (rng.pick(&[1, 1, 3]), Choice::Power),
            (rng.pick(&[0, 0, 1]), Choice::DamageSlot),
            (rng.pick(&[0, 1, 3]), Choice::DamageLog),
        ]
    }

    fn churn(rng: &mut Rng) -> Vec<(u64, Choice)> {
        vec![
            (60, Choice::Write),
            (rng.pick(&[2, 8]), Choice::Read),
            (rng.pick(&[0, 0, 2]), Choice::Flush),
            (rng.pick(&[0, 2]), Choice::Forge),
            (rng.pick(&[0, 2]), Choice::Discard),
            (rng.pick(&[3, 6, 12]), Choice::Checkpoint),
            (rng.pick(&[0, 3]), Choice::Clean),
            (rng.pick(&[20, 40]), Choice::Run),
            (rng.pick(&[0, 0, 1]), Choice::Drain),
            (rng.pick(&[0, 0, 1]), Choice::Kill),
            (rng.pick(&[0, 0, 1]), Choice::Power),
            (rng.pick(&[0, 2]), Choice::DamageSlot),
        ]
    }

    fn failing(rng: &mut Rng) -> Vec<(u64, Choice)> {
        vec![
            (40, Choice::Write),
            (rng.pick(&[0, 8]), Choice::Read),
            (rng.pick(&[1, 4]), Choice::Flush),
            (rng.pick(&[0, 4]), Choice::Discard),
            (rng.pick(&[8, 20]), Choice::Checkpoint),
            (rng.pick(&[0, 4]), Choice::Clean),
            (rng.pick(&[10, 30]), Choice::Run),
            (rng.pick(&[0, 4]), Choice::Drain),
            (rng.pick(&[1, 4]), Choice::Fail),
            (2, Choice::Kill),
            (2, Choice::Power),
            (rng.pick(&[0, 1]), Choice::DamageSlot),
        ]
    }

    /// Where, and how many sectors: often few and hot ones, often whole blocks.
    fn place(&self, rng: &mut Rng) -> (u64, u64) {
        let at = rng.below(self.sectors_max.min(self.hot));
        if self.style == Style::Churn && rng.percent(70) {
            return (at / 8 * 8, rng.between(2, 8) * 8);
        }
        match rng.below(10) {
            0..=4 => (at / 8 * 8, rng.between(1, 3) * 8),
            5 => (at / 8 * 8, rng.between(1, 20) * 8),
            _ => (at, rng.between(1, 12)),
        }
    }

    fn step(&self, rng: &mut Rng) -> Step {
        let total: u64 = self.weights.iter().map(|(weight, _)| weight).sum();
        let mut left = rng.below(total);
        let (_, choice) = self
            .weights
            .iter()
            .find(|(weight, _)| {
                let here = left < *weight;
                left = left.saturating_sub(*weight);
                here
            })
            .expect("a weight");
        let queue = rng.below(self.queues as u64) as usize;
        let (at, len) = self.place(rng);
        match choice {
            Choice::Read => Step::Read { queue, at, len },
            Choice::Write => Step::Write { queue, at, len },
            Choice::Forge => Step::Forge { queue, at, from: rng.next() },
            Choice::Zeroes => Step::Zeroes { queue, at, len },
            Choice::Discard => Step::Discard { queue, at, len: rng.pick(&[len, len * 4]) },
            Choice::Flush => Step::Flush { queue },
            Choice::Resize => Step::Resize { sectors: rng.between(1, self.sectors_max) },
            Choice::Checkpoint => Step::Checkpoint,
            Choice::Clean => Step::Clean,
            Choice::Run => Step::Run { rounds: rng.pick(&[1, 4, 16, 64]) },
            Choice::Pass => Step::Pass { millis: rng.pick(&[1, 10, 200, 40_000]) },
            Choice::Drain => Step::Drain,
            Choice::Fail => fail(rng),
            Choice::Reopen => Step::Reopen,
            Choice::Kill => Step::Kill,
            Choice::Power => Step::Power { persistence: rng.pick(&Persistence::ALL) },
            Choice::DamageSlot => {
                let modes = [Persistence::Suffix, Persistence::Sectors(50), Persistence::Writes(50)];
                let power = rng.percent(70).then(|| rng.pick(&modes));
                Step::DamageSlot { power }
            }
            Choice::DamageLog => Step::DamageLog { block: rng.next() },
        }
    }
}

fn fail(rng: &mut Rng) -> Step {
    let (kind, no_space) = rng.pick(&[
        (Kind::Write, false),
        (Kind::Write, false),
        (Kind::Write, true),
        (Kind::Allocate, true),
        (Kind::Read, false),
        (Kind::Sync, false),
    ]);
    Step::Fail { kind, skip: rng.pick(&[0, 0, 1, 3]), no_space }
}
