//! Bounds and intervals of a layer's background work.

use std::time::Duration;

#[cfg(feature = "mutations")]
use super::mutation::Mutation;

/// When background work is due. The defaults suit disks of any size; tests make them small.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// A checkpoint is due when the log has grown by this many bytes since the last one, or up to four times as
    /// many if it has much of the map to store: it bounds what a recovery replays.
    pub checkpoint_bytes: u64,
    /// A checkpoint is due when something has changed and the last one is this old.
    pub checkpoint_interval: Duration,
    /// A sync is due when something written has not been durable for this long.
    pub sync_interval: Duration,
    /// The file may take this share of the live data, in percent, and `space_slack` bytes; the cleaner sees to
    /// that.
    pub space_percent: u64,
    /// See `space_percent`. `None`: a tenth of the disk, at least 64 MiB and at most 2 GiB.
    pub space_slack: Option<u64>,
    /// Data is sorted by its age when so many segments are live; with 0 at the first opportunity.
    pub lanes_from_segments: u64,
    /// Memory for nodes of the map that can be dropped, in bytes, and at most as much again (1 MiB at
    /// least) for those that a checkpoint has yet to store.
    pub map_cache_bytes: u64,
    /// Memory for one index over the maps of the layers below, in bytes; as much again for nodes of those
    /// maps that do not fit into it.
    pub index_bytes: u64,
    /// Files of layers below that are open at a time.
    pub files_max: usize,
    /// The rule that this layer breaks.
    #[cfg(feature = "mutations")]
    pub mutation: Option<Mutation>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            checkpoint_bytes: 64 << 20,
            checkpoint_interval: Duration::from_secs(30),
            sync_interval: Duration::from_secs(5),
            space_percent: 130,
            space_slack: None,
            lanes_from_segments: 64,
            map_cache_bytes: 64 << 20,
            index_bytes: 64 << 20,
            files_max: 128,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }
}

/// Whether `$tuning` breaks rule `$mutation`; constantly false without the feature.
macro_rules! breaks {
    ($tuning:expr, $mutation:ident) => {{
        #[cfg(feature = "mutations")]
        let broken = $tuning.mutation == Some($crate::layer::mutation::Mutation::$mutation);
        #[cfg(not(feature = "mutations"))]
        let broken = {
            let _ = &$tuning;
            false
        };
        broken
    }};
}
pub(crate) use breaks;
