//! What guests do with served disks, for programs, for Prometheus and for `sapwood top`.
//!
//! - [`Statistics`]: a moment's numbers of all disks that a process serves, in JSON;
//! - `page`: the same, and a store's, as a page for Prometheus;
//! - `listen`: that page over TCP, for this host only.
//!
//! Counting is the business of `sapwood_qos::account`; nothing here is on the way of a guest's data.

pub mod listen;
pub mod page;
#[cfg(test)]
mod tests;

use std::time::Duration;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::Disk;
use sapwood_image::layer::LayerInfo;
use sapwood_qos::account::Account;
use serde::{Deserialize, Serialize};

use crate::control::Served;
use crate::volumes::service::now_ms;

/// What guests do with disks, at a moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Statistics {
    /// When that was, in milliseconds since 1970.
    pub time_ms: u64,
    /// All disks that the process serves, by name.
    pub disks: Vec<DiskStatistics>,
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
    /// What was done since it is served.
    pub account: Account,
    /// For how long requests that limits let through had waited for that since then, all together, in microseconds.
    #[serde(default)]
    pub throttled_us: u64,
    /// More about a layer.
    pub layer: Option<LayerStatistics>,
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
    pub fn now(mut disks: Vec<DiskStatistics>) -> Self {
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Self { time_ms: now_ms(), disks }
    }

    /// Those of the disk of `sapwood serve`.
    pub fn of_served(served: &Served) -> Self {
        let layer = match &*served.disk {
            Disk::Layer(layer) => Some(layer.info().into()),
            _ => None,
        };
        Self::now(vec![DiskStatistics {
            name: served.path.display().to_string(),
            virtual_size: served.disk.geometry().size,
            frontend_connected: served.server.is_connected(),
            account: served.accounted.account(),
            throttled_us: micros(served.accounted.inner().waited()),
            layer,
        }])
    }
}
