//! What stores and disks of a history are like.

use sapwood_store::StoreOptions;

/// Packs are small, so that a disk has several.
const PACK_BYTES: u64 = 512;
/// Disks of several segments, so that a seal can be published between two of them.
const SPREAD: usize = 200;

/// What is done in a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// One thing after the other, with disks of one segment.
    Small,
    /// The same with large disks, seals that are published in parts, and archives.
    Large,
    /// Several things at a time.
    Together,
}

impl Course {
    pub(super) fn setup(self, seed: u64, options: &StoreOptions) -> Setup {
        let setup = Setup::from(options.clone());
        let is_large = self == Self::Large || self == Self::Together && seed % 4 == 3;
        if !is_large {
            return setup;
        }
        let options = StoreOptions { publish_bytes: 1 << (seed % 12), ..setup.options };
        Setup { options, spread: SPREAD }
    }
}

/// What a store and its disks are like.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How the store is used.
    pub options: StoreOptions,
    /// Disks are so many times as large as the model's. Of its blocks each is the first of so many.
    pub spread: usize,
}

impl From<StoreOptions> for Setup {
    fn from(options: StoreOptions) -> Self {
        let options = StoreOptions { segment_size: 64 << 10, pack_bytes: PACK_BYTES, clock: || 1, ..options };
        Self { options, spread: 1 }
    }
}
