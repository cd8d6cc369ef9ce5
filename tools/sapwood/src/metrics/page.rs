//! The page that Prometheus asks for. `docs/metrics.md` says what each metric means.

use std::collections::BTreeMap;
use std::fmt;

use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use sapwood_qos::account::{Histogram, Kind};
use sapwood_store::Stat;

use super::{DataPath, DiskStatistics, GroupStatistics, LayerStatistics, Statistics, Totals};
use crate::volumes::answer::Counts;

/// What OpenMetrics is called.
const OPEN_METRICS: &str = "application/openmetrics-text";
/// The bounds of a histogram's buckets are these powers of two, in microseconds: 16 µs to 17 s.
const BOUND_BITS: std::ops::RangeInclusive<u32> = 4..=24;

/// What is on a page.
#[derive(Debug)]
pub struct Page {
    /// What guests do.
    pub disks: Vec<DiskStatistics>,
    /// The same of groups of disks.
    pub groups: Vec<GroupStatistics>,
    /// What their store holds; none of a disk that is served alone.
    pub store: Option<StoreNumbers>,
}

/// What a store holds and takes.
#[derive(Debug, Default)]
pub struct StoreNumbers {
    /// Volumes.
    pub volumes: u64,
    /// Snapshots that hold nothing of their own, those whose contents are a layer, those in packs.
    pub snapshots: [(&'static str, u64); 3],
    /// Bytes that layers, packs, the index and the catalog take.
    pub taken: [(&'static str, u64); 4],
    /// Bytes of packs that are needed, as far as collections have counted.
    pub live: u64,
    /// Bytes of blocks in packs before they were compressed.
    pub blocks: u64,
    /// Bytes that it may still take.
    pub left: Option<u64>,
    /// Bytes that sealed snapshots hold, and of these each block once, by the last account.
    pub referenced: Option<u64>,
    /// See `referenced`.
    pub unique: Option<u64>,
    /// Bytes that these take in packs.
    pub stored: Option<u64>,
    /// When that account was made, in milliseconds since 1970.
    pub account_ms: Option<u64>,
    /// What seals and imports did.
    pub seals: Counts,
    /// Bytes that the files of volumes' layers take, by volume.
    pub allocated: BTreeMap<String, u64>,
    /// Bytes of blocks for each byte of packs.
    pub compression: Option<f64>,
    /// Bytes that snapshots hold for each byte of different blocks.
    pub deduplication: Option<f64>,
}

impl StoreNumbers {
    /// What a store says of itself, and what seals and imports did.
    pub fn new(stat: Stat, seals: Counts) -> Self {
        let (snapshots, taken) = (&stat.snapshots, &stat.taken);
        Self {
            volumes: stat.volumes as u64,
            snapshots: [
                ("bare", snapshots.bare as u64),
                ("frozen", snapshots.frozen as u64),
                ("sealed", snapshots.sealed as u64),
            ],
            taken: [
                ("layers", taken.layers),
                ("packs", taken.packs),
                ("index", taken.index),
                ("catalog", taken.catalog),
            ],
            live: stat.live_bytes,
            blocks: stat.block_bytes,
            left: stat.left,
            referenced: stat.account.as_ref().and_then(|account| account.referenced_bytes),
            unique: stat.account.as_ref().map(|account| account.unique_bytes),
            stored: stat.account.as_ref().map(|account| account.stored_bytes),
            account_ms: stat.account.as_ref().map(|account| account.found_ms),
            seals,
            allocated: stat.volume_bytes,
            compression: stat.compression,
            deduplication: stat.deduplication,
        }
    }
}

impl Page {
    /// A page of one disk.
    pub fn alone(statistics: Statistics) -> Self {
        Self { disks: statistics.disks, groups: statistics.groups, store: None }
    }

    /// The page, as OpenMetrics or in the older format of Prometheus.
    pub fn text(self, is_open_metrics: bool) -> String {
        let mut registry = Registry::with_prefix("sapwood");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        let written = match is_open_metrics {
            true => text::encode(&mut text, &registry),
            false => prometheus_text::encode(&mut text, &registry),
        };
        written.expect("a text takes everything");
        text
    }

    /// The page as whoever asks wants it.
    pub fn response(self, asked: &HeaderMap) -> Response {
        let accepts = asked.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let is_open_metrics = accepts.is_some_and(|accepts| accepts.contains(OPEN_METRICS));
        let kind = match is_open_metrics {
            true => format!("{OPEN_METRICS}; version=1.0.0; charset=utf-8"),
            false => prometheus_text::CONTENT_TYPE.to_owned(),
        };
        ([(CONTENT_TYPE, kind)], self.text(is_open_metrics)).into_response()
    }
}

type Labels<'a> = Vec<(&'static str, &'a str)>;

/// Writes metrics with all their values.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn counter<'a, V: EncodeCounterValue>(
        &mut self,
        (name, unit, help): (&str, Option<Unit>, &str),
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in values {
            let labels = labels.as_slice();
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, V, u64>(&value, None)?;
        }
        Ok(())
    }

    /// Without values there is no metric: what is not known is not 0.
    fn gauge<'a, V: EncodeGaugeValue>(
        &mut self,
        (name, unit, help): (&str, Option<Unit>, &str),
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in values {
            let labels = labels.as_slice();
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histogram<'a>(
        &mut self,
        (name, help): (&str, &str),
        values: impl IntoIterator<Item = (Labels<'a>, &'a Histogram)>,
    ) -> fmt::Result {
        let seconds = Unit::Seconds;
        let mut metric = self.0.encode_descriptor(name, help, Some(&seconds), MetricType::Histogram)?;
        for (labels, histogram) in values {
            let (sum, count, labels) = (histogram.sum().as_secs_f64(), histogram.count(), labels.as_slice());
            let buckets = buckets(histogram, count);
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

/// Coarser buckets: their bounds in seconds, and what each holds beyond those before it.
fn buckets(histogram: &Histogram, count: u64) -> Vec<(f64, u64)> {
    let mut before = 0;
    let mut buckets: Vec<_> = BOUND_BITS
        .map(|bits| {
            let within = histogram.count_within(1 << bits);
            let more = within - before;
            before = within;
            (f64::from(1_u32 << bits) / 1e6, more)
        })
        .collect();
    buckets.push((f64::INFINITY, count - before));
    buckets
}

impl Collector for Page {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        writer.gauge(
            ("build_info", None, "The version of the program, whose value is 1"),
            [(version, 1_u64)],
        )?;
        let disks: Vec<_> = self.disks.iter().map(|disk| (disk.name.as_str(), &disk.totals)).collect();
        totals(&mut writer, ("disk", ""), &disks)?;
        of_disks(&mut writer, &self.disks)?;
        layers(&mut writer, &self.disks)?;
        let groups: Vec<_> = self.groups.iter().map(|group| (group.name.as_str(), &group.totals)).collect();
        if !groups.is_empty() {
            totals(&mut writer, ("group", "group_"), &groups)?;
            of_groups(&mut writer, &self.groups)?;
        }
        self.store.as_ref().map_or(Ok(()), |store| {
            of_store(&mut writer, store)?;
            gains(&mut writer, store)
        })
    }
}

/// What is counted of disks, or of groups: the label that names them, the names of metrics begin with `prefix`.
fn totals(
    writer: &mut Writer<'_>,
    (label, prefix): (&'static str, &str),
    subjects: &[(&str, &Totals)],
) -> fmt::Result {
    requests(writer, (label, prefix), subjects)?;
    let named = |name: &str| format!("{prefix}{name}");
    let all = || subjects.iter().map(|(name, totals)| (vec![(label, *name)], *totals));
    writer.gauge(
        (&named("requests_in_flight"), None, "Requests that were taken and not reported"),
        all().map(|(labels, totals)| (labels, totals.account.in_flight)),
    )?;
    let seconds = Some(Unit::Seconds);
    writer.counter(
        (&named("request_throttled"), seconds, "Time that requests had waited which limits let through"),
        all().map(|(labels, totals)| (labels, totals.throttled_us as f64 / 1e6)),
    )?;
    data_paths(writer, (label, prefix), subjects)
}

fn requests(
    writer: &mut Writer<'_>,
    (label, prefix): (&'static str, &str),
    subjects: &[(&str, &Totals)],
) -> fmt::Result {
    let named = |name: &str| format!("{prefix}{name}");
    let all = || {
        let kinds = |subject| Kind::ALL.into_iter().map(move |kind| (subject, kind));
        subjects.iter().flat_map(kinds).map(|((name, totals), kind)| {
            (vec![(label, *name), ("kind", kind.name())], &totals.account[kind])
        })
    };
    writer.counter(
        (&named("requests"), None, "Requests of guests that have ended, with whatever result"),
        all().map(|(labels, done)| (labels, done.operations())),
    )?;
    writer.counter(
        (&named("request"), Some(Unit::Bytes), "Bytes of requests that succeeded"),
        all().map(|(labels, done)| (labels, done.bytes)),
    )?;
    writer.counter(
        (&named("request_errors"), None, "Requests that failed"),
        all().map(|(labels, done)| (labels, done.errors)),
    )?;
    writer.histogram(
        (&named("request_duration"), "Time from taking a request to reporting it"),
        all().map(|(labels, done)| (labels, &done.latency)),
    )
}

/// What requests were for layers and caches.
fn data_paths(
    writer: &mut Writer<'_>,
    (label, prefix): (&'static str, &str),
    subjects: &[(&str, &Totals)],
) -> fmt::Result {
    let all: Vec<_> = subjects.iter().filter_map(|(name, totals)| Some((*name, totals.data_path?))).collect();
    if all.is_empty() {
        return Ok(());
    }
    let one = |of: fn(&DataPath) -> u64| all.iter().map(move |(name, path)| (vec![(label, *name)], of(path)));
    let two = |key: &'static str, of: fn(&DataPath) -> [(&'static str, u64); 2]| {
        all.iter().flat_map(move |(name, path)| {
            of(path).map(|(part, value)| (vec![(label, *name), (key, part)], value))
        })
    };
    let named = |name: &str| format!("{prefix}{name}");
    writer.counter(
        (
            &named("first_writes"),
            None,
            "Blocks that guests wrote and of which the layer held no data until then",
        ),
        one(|path| path.first_writes),
    )?;
    writer.counter(
        (
            &named("merged_blocks"),
            None,
            "Blocks of which a request had only a part, so that the rest was read first",
        ),
        one(|path| path.merged_blocks),
    )?;
    writer.counter(
        (&named("joined_requests"), None, "Requests that were done together with an earlier one"),
        two("kind", |path| [("write", path.joined_writes), ("flush", path.joined_flushes)]),
    )?;
    writer.counter(
        (&named("cache_hits"), None, "How often a cache held what was needed"),
        two("cache", |path| [("map", path.map_hits), ("frames", path.frame_hits)]),
    )?;
    writer.counter(
        (&named("cache_misses"), None, "How often it had to be read first"),
        two("cache", |path| [("map", path.map_misses), ("frames", path.frame_misses)]),
    )
}

fn of_disks(writer: &mut Writer<'_>, disks: &[DiskStatistics]) -> fmt::Result {
    let all = || disks.iter().map(|disk| (vec![("disk", disk.name.as_str())], disk));
    writer.gauge(
        ("disk_size", Some(Unit::Bytes), "Size of the disk"),
        all().map(|(labels, disk)| (labels, disk.virtual_size)),
    )?;
    writer.gauge(
        ("disk_connected", None, "Whether a virtual machine is connected: 1 or 0"),
        all().map(|(labels, disk)| (labels, u64::from(disk.frontend_connected))),
    )?;
    let grouped = all().filter_map(|(labels, disk)| {
        Some(([labels, vec![("group", disk.group.as_deref()?)]].concat(), 1_u64))
    });
    writer.gauge(("disk_group", None, "The group that a disk is in; its value is 1"), grouped)
}

fn of_groups(writer: &mut Writer<'_>, groups: &[GroupStatistics]) -> fmt::Result {
    let all = || groups.iter().map(|group| (vec![("group", group.name.as_str())], group));
    writer.gauge(
        ("group_disks", None, "Disks in a group that are served"),
        all().map(|(labels, group)| (labels, group.disks)),
    )?;
    let nested = all().filter_map(|(labels, group)| {
        Some(([labels, vec![("parent", group.group.as_deref()?)]].concat(), 1_u64))
    });
    writer.gauge(("group_parent", None, "The group that a group is in; its value is 1"), nested)
}

fn layers(writer: &mut Writer<'_>, disks: &[DiskStatistics]) -> fmt::Result {
    let layers: Vec<(&str, &LayerStatistics)> =
        disks.iter().filter_map(|disk| Some((disk.name.as_str(), disk.layer.as_ref()?))).collect();
    if layers.is_empty() {
        return Ok(());
    }
    let all = || layers.iter().map(|(name, layer)| (vec![("disk", *name)], *layer));
    let bytes = Some(Unit::Bytes);
    writer.gauge(
        ("layer_allocated", bytes.clone(), "Bytes of a layer's file that are in use"),
        all().map(|(labels, layer)| (labels, layer.allocated_bytes)),
    )?;
    writer.gauge(
        ("layer_live", bytes.clone(), "Bytes of the disk that a layer holds"),
        all().map(|(labels, layer)| (labels, layer.live_bytes)),
    )?;
    let written = all().flat_map(|(labels, layer)| {
        let written = &layer.written_bytes;
        let parts =
            [("guest", written.guest), ("moved", written.moved), ("map", written.map), ("log", written.log)];
        parts.map(|(part, value)| ([labels.clone(), vec![("part", part)]].concat(), value))
    });
    writer.counter(
        ("layer_written", bytes.clone(), "Bytes that were written to a layer since it was made"),
        written,
    )?;
    writer.gauge(
        ("map_cache_limit", bytes.clone(), "Memory that a layer's map may take while it is not changed"),
        all().map(|(labels, layer)| (labels, layer.map_cache_bytes)),
    )?;
    writer.gauge(
        ("map", bytes, "Memory that a layer's map takes"),
        all().map(|(labels, layer)| (labels, layer.map_bytes)),
    )?;
    writer.counter(
        ("map_reads", None, "Reads of nodes of a layer's map that were not in memory"),
        all().map(|(labels, layer)| (labels, layer.map_reads)),
    )
}

fn of_store(writer: &mut Writer<'_>, store: &StoreNumbers) -> fmt::Result {
    let alone = |value: u64| [(Vec::new(), value)];
    let known = |value: Option<u64>| value.map(|value| (Vec::new(), value));
    let bytes = Some(Unit::Bytes);
    writer.gauge(("store_volumes", None, "Volumes of the store"), alone(store.volumes))?;
    writer.gauge(
        ("store_snapshots", None, "Snapshots of the store"),
        store.snapshots.map(|(state, value)| (vec![("state", state)], value)),
    )?;
    writer.gauge(
        ("store_files", bytes.clone(), "Bytes that files of the store take"),
        store.taken.map(|(part, value)| (vec![("part", part)], value)),
    )?;
    writer.gauge(
        (
            "store_pack_live",
            bytes.clone(),
            "Bytes of packs that are needed, as far as collections have counted",
        ),
        alone(store.live),
    )?;
    writer.gauge(
        ("store_pack_blocks", bytes.clone(), "Bytes of the blocks in packs before they were compressed"),
        alone(store.blocks),
    )?;
    writer.gauge(("store_left", bytes, "Bytes that the store may still take"), known(store.left))
}

/// What deduplication and compression have gained, and what volumes take.
fn gains(writer: &mut Writer<'_>, store: &StoreNumbers) -> fmt::Result {
    let known = |value: Option<u64>| value.map(|value| (Vec::new(), value));
    let bytes = Some(Unit::Bytes);
    writer.gauge(
        ("store_referenced", bytes.clone(), "Bytes that sealed snapshots hold, by the last account"),
        known(store.referenced),
    )?;
    writer.gauge(
        ("store_unique", bytes.clone(), "Bytes of these, each block counted once"),
        known(store.unique),
    )?;
    writer.gauge(("store_stored", bytes.clone(), "Bytes that these take in packs"), known(store.stored))?;
    writer.gauge(
        ("store_account_timestamp", Some(Unit::Seconds), "When that account was made, since 1970"),
        store.account_ms.map(|ms| (Vec::new(), ms as f64 / 1e3)),
    )?;
    let ratio = |value: Option<f64>| value.map(|value| (Vec::new(), value));
    writer.gauge(
        ("store_compression_ratio", None, "Bytes of blocks for each byte of packs"),
        ratio(store.compression),
    )?;
    writer.gauge(
        ("store_deduplication_ratio", None, "Bytes that snapshots hold for each byte of different blocks"),
        ratio(store.deduplication),
    )?;
    let Counts { zero_bytes, duplicate_bytes, unique_bytes, stored_bytes, .. } = store.seals;
    let results = [("zero", zero_bytes), ("duplicate", duplicate_bytes), ("unique", unique_bytes)];
    writer.counter(
        ("sealed", bytes.clone(), "Bytes of disks that seals and imports have read"),
        results.map(|(result, value)| (vec![("result", result)], value)),
    )?;
    writer.counter(
        ("sealed_stored", bytes.clone(), "Bytes that they have written to packs for what is unique"),
        [(Vec::new(), stored_bytes)],
    )?;
    writer.gauge(
        ("volume_allocated", bytes, "Bytes that the file of a volume's layer takes"),
        store.allocated.iter().map(|(volume, value)| (vec![("volume", volume.as_str())], *value)),
    )
}
