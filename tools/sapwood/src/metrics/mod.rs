//! What guests do with served disks, for programs, for Prometheus and for `sapwood top`.
//!
//! - [`Statistics`]: a moment's numbers of all disks that a process serves, and of the groups that they are in, in JSON;
//! - [`Totals`]: what is counted of a disk, and adds up over the disks of a group;
//! - `groups`: what the disks of a group did while they were in it;
//! - `page`: the same, and a store's, as a page for Prometheus;
//! - `listen`: that page over TCP, for this host only.
//!
//! Counting is the business of `sapwood_qos::account` and `sapwood_image::counts`; nothing here is on the way of a guest's data.

pub mod groups;
pub mod listen;
pub mod page;
#[cfg(test)]
mod tests;

use std::time::Duration;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::layer::LayerInfo;
use sapwood_image::{self as image, Disk};
use sapwood_qos::account::Account;
use sapwood_qos::names::Named;
use serde::{Deserialize, Serialize};

use crate::control::Served;
use crate::volumes::answer::Counts;
use crate::volumes::service::now_ms;

/// What guests do with disks, at a moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Statistics {
    /// When that was, in milliseconds since 1970.
    pub time_ms: u64,
    /// All disks that the process serves, by name.
    pub disks: Vec<DiskStatistics>,
    /// The groups of the store, by name.
    #[serde(default)]
    pub groups: Vec<GroupStatistics>,
    /// What seals and imports counted since the process has the store; none where there is none.
    #[serde(default)]
    pub seals: Option<Counts>,
}

/// What guests do with a disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatistics {
    /// `volume` or `volume@snapshot`, or the disk as the server was given it.
    pub name: String,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Whether a virtual machine is connected.
    pub frontend_connected: bool,
    /// The group that it is in.
    #[serde(default)]
    pub group: Option<String>,
    /// What its guest may do, by name.
    #[serde(default)]
    pub limits: Named,
    /// What was counted since it is served.
    #[serde(flatten)]
    pub totals: Totals,
    /// More about a layer.
    pub layer: Option<LayerStatistics>,
}

/// What guests do with the disks of a group, those of groups in it included.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GroupStatistics {
    /// Its name.
    pub name: String,
    /// The group that it is in.
    pub group: Option<String>,
    /// What its disks may do together, by name.
    pub limits: Named,
    /// Disks in it that are served now.
    pub disks: u64,
    /// What was counted of disks while they were in it, since the daemon runs.
    #[serde(flatten)]
    pub totals: Totals,
}

/// What is counted of a disk, or of several together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Totals {
    /// What was done, and is being done.
    pub account: Account,
    /// For how long requests that limits let through had waited for that, all together, in microseconds.
    #[serde(default)]
    pub throttled_us: u64,
    /// What that was for the layer and the caches; none of raw disks.
    #[serde(default)]
    pub data_path: Option<DataPath>,
}

impl Totals {
    /// Those of a disk, at this moment.
    pub fn new(account: Account, throttled: Duration, counts: Option<image::Counts>) -> Self {
        Self { account, throttled_us: micros(throttled), data_path: counts.map(DataPath::from) }
    }

    /// Adds those of others.
    pub fn merge(&mut self, other: &Self) {
        self.account.merge(&other.account);
        self.throttled_us = self.throttled_us.saturating_add(other.throttled_us);
        if let Some(other) = other.data_path {
            let sum = self.data_path.get_or_insert_default();
            *sum = sum.with(&other, u64::saturating_add);
        }
    }

    /// What was counted after `earlier`, an older state of the same. Nothing is in flight in that.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut account = self.account.since(&earlier.account);
        account.in_flight = 0;
        let before = earlier.data_path.unwrap_or_default();
        Self {
            account,
            throttled_us: self.throttled_us.saturating_sub(earlier.throttled_us),
            data_path: self.data_path.map(|now| now.with(&before, u64::saturating_sub)),
        }
    }
}

/// What requests were for the layer and the caches of a disk; `docs/metrics.md` defines each count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataPath {
    /// Blocks that guests wrote and of which the layer held no data until then.
    pub first_writes: u64,
    /// Blocks of which a request had only a part, so that the rest was read first.
    pub merged_blocks: u64,
    /// Writes that went to the layer's file together with an earlier one.
    pub joined_writes: u64,
    /// Flushes that shared a sync with an earlier one.
    pub joined_flushes: u64,
    /// Requests that found in memory what they needed of the layer's map.
    pub map_hits: u64,
    /// Requests for which a part of the map had to be read.
    pub map_misses: u64,
    /// Blocks of sealed snapshots that were read from a frame in memory.
    pub frame_hits: u64,
    /// Blocks for which the frame had to be read and decompressed.
    pub frame_misses: u64,
}

impl DataPath {
    /// Each count made of both.
    fn with(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            first_writes: f(self.first_writes, other.first_writes),
            merged_blocks: f(self.merged_blocks, other.merged_blocks),
            joined_writes: f(self.joined_writes, other.joined_writes),
            joined_flushes: f(self.joined_flushes, other.joined_flushes),
            map_hits: f(self.map_hits, other.map_hits),
            map_misses: f(self.map_misses, other.map_misses),
            frame_hits: f(self.frame_hits, other.frame_hits),
            frame_misses: f(self.frame_misses, other.frame_misses),
        }
    }
}

impl From<image::Counts> for DataPath {
    fn from(counts: image::Counts) -> Self {
        let image::Counts { first_writes, merged_blocks, joined_writes, joined_flushes, map, frames } =
            counts;
        Self {
            first_writes,
            merged_blocks,
            joined_writes,
            joined_flushes,
            map_hits: map.hits,
            map_misses: map.misses,
            frame_hits: frames.hits,
            frame_misses: frames.misses,
        }
    }
}

/// What a layer takes, and what was written to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerStatistics {
    /// Bytes of its file that are in use.
    pub allocated_bytes: u64,
    /// Bytes of the disk that it holds.
    pub live_bytes: u64,
    /// Memory that its map may take while it is not changed, in bytes.
    pub map_cache_bytes: u64,
    /// Memory that its map takes now, in bytes.
    pub map_bytes: u64,
    /// Reads of the map since it was opened: what was not in memory.
    pub map_reads: u64,
    /// What was written since it was made.
    pub written_bytes: Written,
}

/// Bytes that were written to a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Written {
    /// Data of guests.
    pub guest: u64,
    /// Data that the cleaner moved.
    pub moved: u64,
    /// The map.
    pub map: u64,
    /// Heads of records.
    pub log: u64,
}

impl From<LayerInfo> for LayerStatistics {
    fn from(layer: LayerInfo) -> Self {
        let bytes = |blocks: u64| blocks * BLOCK_SIZE;
        Self {
            allocated_bytes: layer.used_bytes,
            live_bytes: bytes(layer.live_blocks),
            map_cache_bytes: layer.map_cache_bytes,
            map_bytes: layer.map_bytes,
            map_reads: layer.map_reads,
            written_bytes: Written {
                guest: bytes(layer.traffic.guest),
                moved: bytes(layer.traffic.moved),
                map: bytes(layer.traffic.nodes),
                log: bytes(layer.traffic.index),
            },
        }
    }
}

/// A time in whole microseconds.
pub fn micros(time: Duration) -> u64 {
    time.as_micros().try_into().unwrap_or(u64::MAX)
}

impl Statistics {
    /// What is so now.
    pub fn now(mut disks: Vec<DiskStatistics>, groups: Vec<GroupStatistics>) -> Self {
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Self { time_ms: now_ms(), disks, groups, seals: None }
    }

    /// Those of the disk of `sapwood serve`.
    pub fn of_served(served: &Served) -> Self {
        let layer = match &*served.disk {
            Disk::Layer(layer) => Some(layer.info().into()),
            _ => None,
        };
        let accounted = &served.accounted;
        let disk = DiskStatistics {
            name: served.path.display().to_string(),
            virtual_size: served.disk.geometry().size,
            frontend_connected: served.server.is_connected(),
            group: None,
            limits: served.limits.get(),
            totals: Totals::new(accounted.account(), accounted.inner().waited(), served.disk.counts()),
            layer,
        };
        Self::now(vec![disk], Vec::new())
    }
}
