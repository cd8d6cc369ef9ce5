//! What a disk did for its guest's requests, beside what the guest sees. `docs/metrics.md` defines each count.
//!
//! What happens under a layer's lock is counted there in plain numbers ([`Counts`] in its shared state); only frames are found in memory
//! by threads that hold no lock, so these have atomic counters ([`Hits`]) of the disk's own, changed once for each stretch that is read.

use std::sync::atomic::{AtomicU64, Ordering};

/// How often something was found in memory, and how often not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    /// It was there.
    pub hits: u64,
    /// It had to be read first, by this reader or another one.
    pub misses: u64,
}

impl Lookups {
    pub(crate) fn count(&mut self, is_there: bool) {
        *(if is_there { &mut self.hits } else { &mut self.misses }) += 1;
    }
}

/// What was counted since a disk was opened. A snapshot, which gives the disk another layer, does not change it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks of 4 KiB that guests wrote and of which the layer held no data until then.
    pub first_writes: u64,
    /// Blocks of which a write or a write-zeroes had only a part, so that the rest was read first.
    pub merged_blocks: u64,
    /// Writes whose data went to the layer's file together with that of an earlier one, in one record.
    pub joined_writes: u64,
    /// Flushes that shared a sync of the layer's file with an earlier one.
    pub joined_flushes: u64,
    /// Requests by whether what they needed of the layer's map was in memory.
    pub map: Lookups,
    /// Blocks that were read of a sealed snapshot, by whether the frame in which they are was in memory.
    pub frames: Lookups,
}

/// [`Lookups`] that several threads count.
#[derive(Debug, Default)]
pub(crate) struct Hits {
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Hits {
    pub(crate) fn add(&self, Lookups { hits, misses }: Lookups) {
        for (counter, more) in [(&self.hits, hits), (&self.misses, misses)] {
            if more > 0 {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn get(&self) -> Lookups {
        Lookups { hits: self.hits.load(Ordering::Relaxed), misses: self.misses.load(Ordering::Relaxed) }
    }
}
