//! What is measured, and who takes part.

use super::load::{Load, Order};

/// Who serves what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// `sapwood serve` of a raw file.
    SapwoodRaw,
    /// `sapwood serve` of a layer.
    SapwoodLayer,
    /// `qemu-storage-daemon` on a raw file.
    QemuRaw,
    /// `qemu-storage-daemon` on a qcow2 file as `qemu-img` makes it.
    Qcow2,
    /// The same with extended L2 entries: clusters of 128 KiB in parts of 4 KiB.
    Qcow2Extended,
}

impl Contestant {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::SapwoodRaw => "sapwood raw",
            Self::SapwoodLayer => "sapwood layer",
            Self::QemuRaw => "qemu raw",
            Self::Qcow2 => "qemu qcow2",
            Self::Qcow2Extended => "qemu qcow2 ext. L2",
        }
    }

    /// For names of files.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::SapwoodRaw => "sapwood.raw",
            Self::SapwoodLayer => "sapwood.layer",
            Self::QemuRaw => "qemu.raw",
            Self::Qcow2 => "qemu.qcow2",
            Self::Qcow2Extended => "qemu-extended.qcow2",
        }
    }
}

/// What the disks are like at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// Every block was written.
    Written,
    /// Nothing was written, over a raw base in which every block was.
    OverBase,
}

/// One measurement.
pub struct Case {
    /// For tables and `--only`.
    pub name: &'static str,
    /// What the client does.
    pub load: Load,
    /// What it does that to.
    pub disk: DiskState,
    /// Ours, then the peers.
    pub contestants: &'static [Contestant],
}

const RAW: &[Contestant] = &[Contestant::SapwoodRaw, Contestant::QemuRaw];
const LAYER: &[Contestant] = &[Contestant::SapwoodLayer, Contestant::Qcow2];
const LAYER_AND_RAW: &[Contestant] = &[Contestant::SapwoodLayer, Contestant::Qcow2, Contestant::QemuRaw];
const FIRST_WRITE: &[Contestant] = &[Contestant::SapwoodLayer, Contestant::Qcow2, Contestant::Qcow2Extended];

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Operations of a turn of first writes: one for each 64 KiB of the disk.
const FIRST_WRITES: u64 = 16 << 10;

const fn load(writes: bool, order: Order, bytes: usize, depth: usize) -> Load {
    Load { writes, order, bytes, depth, flush_every: None, operations_max: u64::MAX }
}

/// All cases.
pub fn all() -> Vec<Case> {
    use DiskState::{OverBase, Written};
    let case = |name, load, disk, contestants| Case { name, load, disk, contestants };
    let read = |depth| load(false, Order::Random, BLOCK, depth);
    let write = |depth| load(true, Order::Random, BLOCK, depth);
    let first = Load { operations_max: FIRST_WRITES, ..load(true, Order::EachOnce, BLOCK, 32) };
    vec![
        case("read-raw-qd1", read(1), Written, RAW),
        case("read-raw-qd32", read(32), Written, RAW),
        case("read-layer-qd1", read(1), Written, LAYER),
        case("read-layer-qd32", read(32), Written, LAYER),
        case("first-write-qd32", first, OverBase, FIRST_WRITE),
        case("overwrite-qd1", write(1), Written, LAYER_AND_RAW),
        case("overwrite-qd32", write(32), Written, LAYER_AND_RAW),
        case("flush-each-32", Load { flush_every: Some(32), ..write(32) }, Written, LAYER_AND_RAW),
        case("sequential-write-1m", load(true, Order::Sequential, MIB, 4), Written, LAYER_AND_RAW),
        case("sequential-read-1m", load(false, Order::Sequential, MIB, 4), Written, LAYER_AND_RAW),
    ]
}
