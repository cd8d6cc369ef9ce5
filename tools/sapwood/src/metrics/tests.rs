//! The page, against the formats' rules and against the documents that name its metrics.

use std::collections::{BTreeMap, BTreeSet};

use sapwood_qos::account::{Account, Histogram, Kind};
use sapwood_qos::names::Named;

use super::page::{Page, StoreNumbers};
use super::{DataPath, DiskStatistics, GroupStatistics, LayerStatistics, Totals, Written};

use crate::volumes::answer::Counts;

const TABLE: &str = include_str!("../../../../docs/metrics.md");
const DASHBOARD: &str = include_str!("../../../../docs/grafana.json");

/// Requests that took so many microseconds.
pub fn histogram(micros: &[u64]) -> Histogram {
    let buckets: Vec<(u64, u64)> = micros.iter().map(|micros| (micros * 1000, 1)).collect();
    let (sum, max) = (micros.iter().sum::<u64>() as f64, micros.iter().copied().max().unwrap_or(0) as f64);
    let written = serde_json::json!({
        "count": 0, "sum-us": sum, "p50-us": 0.0, "p99-us": 0.0, "p999-us": 0.0, "max-us": max, "buckets": buckets,
    });
    serde_json::from_value(written).unwrap()
}

/// A page with everything.
fn page() -> Page {
    let mut account = Account::default();
    account.in_flight = 3;
    account[Kind::Read].bytes = 1 << 40;
    account[Kind::Read].latency = histogram(&[10, 16, 17, 5000, 20_000_000, 90_000_000]);
    account[Kind::Write].errors = 2;
    let layer = LayerStatistics {
        allocated_bytes: 1,
        live_bytes: 2,
        map_cache_bytes: 3,
        map_bytes: 4,
        map_reads: 5,
        written_bytes: Written { guest: 6, moved: 7, map: 8, log: 9 },
    };
    let path = DataPath {
        first_writes: 1,
        merged_blocks: 2,
        joined_writes: 3,
        joined_flushes: 4,
        map_hits: 5,
        map_misses: 6,
        frame_hits: 7,
        frame_misses: 8,
    };
    let totals = |path| Totals { account: account.clone(), throttled_us: 1_500_000, data_path: path };
    let disk = |name: &str, group: Option<&str>, layer: Option<LayerStatistics>| DiskStatistics {
        name: name.to_owned(),
        virtual_size: 1 << 30,
        frontend_connected: true,
        group: group.map(str::to_owned),
        limits: Named::new(),
        totals: totals(layer.as_ref().map(|_| path)),
        layer,
    };
    let group = |name: &str, parent: Option<&str>| GroupStatistics {
        name: name.to_owned(),
        group: parent.map(str::to_owned),
        limits: Named::new(),
        disks: 1,
        totals: totals(Some(path)),
    };
    let store = StoreNumbers {
        volumes: 2,
        snapshots: [("bare", 1), ("frozen", 2), ("sealed", 3)],
        taken: [("layers", 10), ("packs", 20), ("index", 30), ("catalog", 40)],
        left: Some(5),
        referenced: Some(6),
        unique: Some(7),
        stored: Some(8),
        account_ms: Some(1500),
        seals: Counts {
            zero_bytes: 11,
            duplicate_bytes: 12,
            unique_bytes: 13,
            stored_bytes: 14,
            ..Counts::default()
        },
        allocated: [("web".to_owned(), 15), ("db".to_owned(), 0)].into(),
        compression: Some(1.5),
        deduplication: Some(2.5),
        ..StoreNumbers::default()
    };
    Page {
        disks: vec![disk("a \"quoted\\\n name", None, None), disk("web", Some("in"), Some(layer))],
        groups: vec![group("in", Some("out")), group("out", None)],
        store: Some(store),
    }
}

/// The metrics of a page in Prometheus' own format, with their types.
fn types(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect()
}

/// Checks what the text format and Prometheus' rules for names ask for; gives all series with their values.
fn check(text: &str) -> BTreeMap<String, f64> {
    let types = types(text);
    let mut series = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (labelled, value) = line.rsplit_once(' ').unwrap();
        let name = labelled.split('{').next().unwrap();
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        assert!(name.starts_with("sapwood_"), "{line}");
        let whole = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end).filter(|name| types.get(name) == Some(&"histogram")));
        let metric = whole.unwrap_or(name);
        let kind = *types.get(metric).unwrap_or_else(|| panic!("no type: {line}"));
        assert_eq!(kind == "histogram", whole.is_some(), "{line}");
        assert_eq!(kind == "counter", metric.ends_with("_total"), "{line}");
        assert!(text.contains(&format!("# HELP {metric} ")), "no help: {line}");
        let value = value.parse().unwrap();
        assert_eq!(series.insert(labelled.to_owned(), value), None, "twice: {line}");
    }
    series
}

#[test]
fn the_page_keeps_the_rules_of_its_format() {
    let text = page().text(false);
    let series = check(&text);
    let value = |name: &str| *series.get(name).unwrap_or_else(|| panic!("no {name} in {text}"));
    let read = "disk=\"web\",kind=\"read\"";
    assert_eq!(value(&format!("sapwood_requests_total{{{read}}}")), 6.0);
    assert_eq!(value(&format!("sapwood_request_bytes_total{{{read}}}")), (1_u64 << 40) as f64);
    assert_eq!(value("sapwood_request_errors_total{disk=\"web\",kind=\"write\"}"), 2.0);
    assert_eq!(value("sapwood_request_errors_total{disk=\"a \\\"quoted\\\\\\n name\",kind=\"write\"}"), 2.0);
    let buckets = [
        ("1.6e-05", 2.0),
        ("3.2e-05", 3.0),
        ("0.004096", 3.0),
        ("0.008192", 4.0),
        ("16.777216", 4.0),
        ("+Inf", 6.0),
    ];
    for (bound, count) in buckets {
        assert_eq!(
            value(&format!("sapwood_request_duration_seconds_bucket{{{read},le=\"{bound}\"}}")),
            count,
            "{bound}"
        );
    }
    assert_eq!(value(&format!("sapwood_request_duration_seconds_count{{{read}}}")), 6.0);
    assert_eq!(value(&format!("sapwood_request_duration_seconds_sum{{{read}}}")), 110.005_043);
    assert_eq!(value("sapwood_store_account_timestamp_seconds"), 1.5);
    assert_eq!(value("sapwood_sealed_bytes_total{result=\"duplicate\"}"), 12.0);
    assert_eq!(value("sapwood_sealed_stored_bytes_total"), 14.0);
    assert_eq!(value("sapwood_volume_allocated_bytes{volume=\"web\"}"), 15.0);
    assert_eq!(value("sapwood_store_files_bytes{part=\"packs\"}"), 20.0);
    assert_eq!(value("sapwood_request_throttled_seconds_total{disk=\"web\"}"), 1.5);
    assert_eq!(value("sapwood_layer_written_bytes_total{disk=\"web\",part=\"log\"}"), 9.0);
    for (name, labels, expected) in [
        ("first_writes", "", 1.0),
        ("merged_blocks", "", 2.0),
        ("joined_requests", ",kind=\"write\"", 3.0),
        ("joined_requests", ",kind=\"flush\"", 4.0),
        ("cache_hits", ",cache=\"map\"", 5.0),
        ("cache_misses", ",cache=\"map\"", 6.0),
        ("cache_hits", ",cache=\"frames\"", 7.0),
        ("cache_misses", ",cache=\"frames\"", 8.0),
    ] {
        assert_eq!(value(&format!("sapwood_{name}_total{{disk=\"web\"{labels}}}")), expected);
        assert_eq!(value(&format!("sapwood_group_{name}_total{{group=\"in\"{labels}}}")), expected);
    }
    assert!(!text.contains("sapwood_first_writes_total{disk=\"a"), "a raw disk has none");
    assert_eq!(value("sapwood_group_requests_total{group=\"out\",kind=\"read\"}"), 6.0);
    assert_eq!(value("sapwood_disk_group{disk=\"web\",group=\"in\"}"), 1.0);
    assert_eq!(value("sapwood_group_parent{group=\"in\",parent=\"out\"}"), 1.0);
    let open = page().text(true);
    assert!(open.ends_with("# EOF\n"), "{open}");
    assert!(open.contains("# UNIT sapwood_request_duration_seconds seconds\n"), "{open}");
}

#[test]
fn what_is_not_known_is_not_there() {
    let page = Page { store: Some(StoreNumbers::default()), ..page() };
    let text = page.text(false);
    for name in ["store_left", "store_referenced", "store_unique", "store_stored", "account", "_ratio"] {
        assert!(!text.contains(name), "{name}");
    }
    let empty = Page { disks: Vec::new(), groups: Vec::new(), store: None }.text(false);
    assert!(!empty.contains("layer") && !empty.contains("group"), "{empty}");
}

/// The words in text that are names of metrics, each without what a histogram's series have besides.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let whole = |word: &str| {
        let ends = ["_seconds_bucket", "_seconds_sum", "_seconds_count"];
        let is_series = ends.iter().any(|end| word.ends_with(end));
        if is_series {
            word.rsplit_once('_').map_or(word, |(whole, _)| whole).to_owned()
        } else {
            word.to_owned()
        }
    };
    words.filter(|word| word.starts_with("sapwood_")).map(whole).collect()
}

#[test]
fn the_documents_table_is_the_page() {
    let text = page().text(false);
    let rows = TABLE.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let documented: BTreeMap<&str, &str> =
        rows.map(|(name, rest)| (name, rest.split(" | ").next().unwrap())).collect();
    assert_eq!(documented, types(&text));
}

#[test]
fn the_dashboard_names_metrics_that_there_are() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{panel}");
        expressions.extend(targets.iter().map(|target| target["expr"].as_str().unwrap()));
    }
    let text = page().text(false);
    let there = types(&text);
    let named = named(DASHBOARD);
    assert!(named.len() >= 8 && expressions.len() >= 8, "{named:?}");
    for name in &named {
        assert!(there.contains_key(name.as_str()), "there is no {name}");
    }
    for expression in expressions {
        assert!(named.iter().any(|name| expression.contains(name)), "{expression}");
    }
}
