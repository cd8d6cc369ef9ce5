//! The page that Prometheus asks for. `docs/metrics.md` says what each metric means.

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

use super::{DiskStatistics, LayerStatistics, Statistics};

/// What OpenMetrics is called.
const OPEN_METRICS: &str = "application/openmetrics-text";
/// The bounds of a histogram's buckets are these powers of two, in microseconds: 16 µs to 17 s.
const BOUND_BITS: std::ops::RangeInclusive<u32> = 4..=24;

/// What is on a page.
#[derive(Debug)]
pub struct Page {
    /// What guests do.
    pub disks: Vec<DiskStatistics>,
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
    /// Bytes of blocks for each byte of packs.
    pub compression: Option<f64>,
    /// Bytes that snapshots hold for each byte of different blocks.
    pub deduplication: Option<f64>,
}

impl From<Stat> for StoreNumbers {
    fn from(stat: Stat) -> Self {
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
            compression: stat.compression,
            deduplication: stat.deduplication,
        }
    }
}

impl Page {
    /// A page of one disk.
    pub fn alone(statistics: Statistics) -> Self {
        Self { disks: statistics.disks, store: None }
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
        requests(&mut writer, &self.disks)?;
        disks(&mut writer, &self.disks)?;
        layers(&mut writer, &self.disks)?;
        self.store.as_ref().map_or(Ok(()), |store| of_store(&mut writer, store))
    }
}

fn requests(writer: &mut Writer<'_>, disks: &[DiskStatistics]) -> fmt::Result {
    let all = || {
        let kinds = |disk| Kind::ALL.into_iter().map(move |kind| (disk, kind));
        disks.iter().flat_map(kinds).map(|(disk, kind)| {
            (vec![("disk", disk.name.as_str()), ("kind", kind.name())], &disk.account[kind])
        })
    };
    writer.counter(
        ("requests", None, "Requests of guests that have ended, with whatever result"),
        all().map(|(labels, done)| (labels, done.operations())),
    )?;
    writer.counter(
        ("request", Some(Unit::Bytes), "Bytes of requests that succeeded"),
        all().map(|(labels, done)| (labels, done.bytes)),
    )?;
    writer.counter(
        ("request_errors", None, "Requests that failed"),
        all().map(|(labels, done)| (labels, done.errors)),
    )?;
    writer.histogram(
        ("request_duration", "Time from taking a request to reporting it"),
        all().map(|(labels, done)| (labels, &done.latency)),
    )
}

fn disks(writer: &mut Writer<'_>, disks: &[DiskStatistics]) -> fmt::Result {
    let all = || disks.iter().map(|disk| (vec![("disk", disk.name.as_str())], disk));
    writer.gauge(
        ("requests_in_flight", None, "Requests that were taken and not reported"),
        all().map(|(labels, disk)| (labels, disk.account.in_flight)),
    )?;
    writer.counter(
        ("request_throttled", Some(Unit::Seconds), "Time that requests had waited which limits let through"),
        all().map(|(labels, disk)| (labels, disk.throttled_us as f64 / 1e6)),
    )?;
    writer.gauge(
        ("disk_size", Some(Unit::Bytes), "Size of the disk"),
        all().map(|(labels, disk)| (labels, disk.virtual_size)),
    )?;
    writer.gauge(
        ("disk_connected", None, "Whether a virtual machine is connected: 1 or 0"),
        all().map(|(labels, disk)| (labels, u64::from(disk.frontend_connected))),
    )
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
    writer.gauge(("store_left", bytes.clone(), "Bytes that the store may still take"), known(store.left))?;
    writer.gauge(
        ("store_referenced", bytes.clone(), "Bytes that sealed snapshots hold, by the last account"),
        known(store.referenced),
    )?;
    writer.gauge(("store_unique", bytes, "Bytes of these, each block counted once"), known(store.unique))?;
    let ratio = |value: Option<f64>| value.map(|value| (Vec::new(), value));
    writer.gauge(
        ("store_compression_ratio", None, "Bytes of blocks for each byte of packs"),
        ratio(store.compression),
    )?;
    writer.gauge(
        ("store_deduplication_ratio", None, "Bytes that snapshots hold for each byte of different blocks"),
        ratio(store.deduplication),
    )
}
