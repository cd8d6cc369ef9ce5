//! What happened between two moments, and in which order it is shown.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use sapwood_qos::account::{Account, Done, Kind};
use sapwood_qos::names::Named;
use serde::Serialize;

use crate::metrics::{DiskStatistics, GroupStatistics, Statistics};

/// Intervals that a small chart shows.
const HISTORY: usize = 20;

/// Requests of one kind in an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rate {
    /// Requests each second.
    pub operations: f64,
    /// Bytes each second.
    pub bytes: f64,
    /// Half of them were at least as fast, in microseconds; none if there were none.
    pub p50_us: Option<f64>,
    /// 99 of a hundred were.
    pub p99_us: Option<f64>,
}

/// What a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A disk.
    Disk,
    /// A group of disks.
    Group,
}

/// Who has an account: a disk and a group may have the same name.
type Key = (Subject, String);

/// A disk or group in an interval.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// Which of these it is.
    pub kind: Subject,
    /// Its name.
    pub name: String,
    /// Reads.
    pub read: Rate,
    /// Writes.
    pub write: Rate,
    /// All other requests.
    pub other: Rate,
    /// Requests in flight at the end.
    pub in_flight: u64,
    /// Requests that failed since the disk is served, or the daemon runs.
    pub errors: u64,
    /// Whether a virtual machine is connected; of a group, whether a disk of it is served.
    pub frontend_connected: bool,
    /// The group that it is in.
    pub group: Option<String>,
    /// What it may do, by name.
    pub limits: Named,
    /// Requests each second in the last intervals, the newest last.
    #[serde(skip)]
    pub history: Vec<u64>,
}

/// A column by which rows can be sorted, the largest first but for names.
pub const COLUMNS: [&str; 12] = [
    "NAME",
    "READ/S",
    "READ B/S",
    "P50",
    "P99",
    "WRITE/S",
    "WRITE B/S",
    "P50",
    "P99",
    "OTHER/S",
    "FLIGHT",
    "ERRORS",
];

impl Rate {
    fn of(done: &Done, seconds: f64) -> Self {
        let micros = |time: Duration| time.as_nanos() as f64 / 1000.0;
        Self {
            operations: done.operations() as f64 / seconds,
            bytes: done.bytes as f64 / seconds,
            p50_us: done.latency.quantile(0.5).map(micros),
            p99_us: done.latency.quantile(0.99).map(micros),
        }
    }
}

impl Row {
    /// By what it is sorted in a column.
    fn key(&self, column: usize) -> f64 {
        let (read, write) = (&self.read, &self.write);
        match column {
            1 => read.operations,
            2 => read.bytes,
            3 => read.p50_us.unwrap_or(-1.0),
            4 => read.p99_us.unwrap_or(-1.0),
            5 => write.operations,
            6 => write.bytes,
            7 => write.p50_us.unwrap_or(-1.0),
            8 => write.p99_us.unwrap_or(-1.0),
            9 => self.other.operations,
            10 => self.in_flight as f64,
            11 => self.errors as f64,
            _ => 0.0,
        }
    }
}

/// What is known of a disk or group at a moment.
struct Now {
    key: Key,
    account: Account,
    frontend_connected: bool,
    group: Option<String>,
    limits: Named,
}

impl From<DiskStatistics> for Now {
    fn from(disk: DiskStatistics) -> Self {
        let DiskStatistics { name, frontend_connected, group, limits, totals, .. } = disk;
        Self { key: (Subject::Disk, name), account: totals.account, frontend_connected, group, limits }
    }
}

impl From<GroupStatistics> for Now {
    fn from(found: GroupStatistics) -> Self {
        let GroupStatistics { name, group, limits, disks, totals } = found;
        let (key, account) = ((Subject::Group, name), totals.account);
        Self { key, account, frontend_connected: disks > 0, group, limits }
    }
}

/// What is shown.
#[derive(Default)]
pub struct Board {
    last: Option<(Instant, BTreeMap<Key, Account>)>,
    rows: Vec<Row>,
    history: BTreeMap<Key, VecDeque<u64>>,
    column: usize,
    chosen: usize,
    failure: Option<String>,
}

impl Board {
    /// Takes the numbers of a moment. Rates are there from the second one on.
    pub fn update(&mut self, at: Instant, now: Statistics) {
        self.failure = None;
        let now: Vec<Now> =
            now.disks.into_iter().map(Now::from).chain(now.groups.into_iter().map(Now::from)).collect();
        let accounts = now.iter().map(|now| (now.key.clone(), now.account.clone())).collect();
        if let Some((before, accounts)) = self.last.replace((at, accounts)) {
            let seconds = at.saturating_duration_since(before).as_secs_f64().max(1e-3);
            self.rows = now.into_iter().map(|now| self.row(now, &accounts, seconds)).collect();
            let rows = &self.rows;
            self.history.retain(|key, _| rows.iter().any(|row| (row.kind, &row.name) == (key.0, &key.1)));
        }
        self.sort();
    }

    fn row(&mut self, now: Now, before: &BTreeMap<Key, Account>, seconds: f64) -> Row {
        let Now { key, account, frontend_connected, group, limits } = now;
        // A disk that was not there has done all of it since.
        let done = before.get(&key).map_or_else(|| account.clone(), |before| account.since(before));
        let mut other = Done::default();
        [Kind::Flush, Kind::Discard, Kind::WriteZeroes].iter().for_each(|kind| other.merge(&done[*kind]));
        let history = self.history.entry(key.clone()).or_default();
        history.push_back((done.operations() as f64 / seconds) as u64);
        while history.len() > HISTORY {
            history.pop_front();
        }
        let (kind, name) = key;
        Row {
            kind,
            name,
            read: Rate::of(&done[Kind::Read], seconds),
            write: Rate::of(&done[Kind::Write], seconds),
            other: Rate::of(&other, seconds),
            in_flight: account.in_flight,
            errors: account.errors(),
            frontend_connected,
            group,
            limits,
            history: history.iter().copied().collect(),
        }
    }

    /// Says that there are no new numbers, and why.
    pub fn fail(&mut self, why: String) {
        self.failure = Some(why);
    }

    /// Goes on to another column.
    pub fn sort_by(&mut self, step: isize) {
        self.column = self.column.saturating_add_signed(step).min(COLUMNS.len() - 1);
        self.sort();
    }

    fn sort(&mut self) {
        let column = self.column;
        // Groups below disks.
        let order =
            |a: &Row, b: &Row| a.kind.cmp(&b.kind).then_with(|| b.key(column).total_cmp(&a.key(column)));
        self.rows.sort_by(|a, b| order(a, b).then_with(|| a.name.cmp(&b.name)));
        self.choose(0);
    }

    /// Goes on to another row.
    pub fn choose(&mut self, step: isize) {
        let last = self.rows.len().saturating_sub(1);
        self.chosen = self.chosen.saturating_add_signed(step).min(last);
    }

    /// The rows in order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The column that they are sorted by.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The row that is chosen.
    pub fn chosen(&self) -> usize {
        self.chosen
    }

    /// Why the numbers are old.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Whether there are no rates yet.
    pub fn is_new(&self) -> bool {
        self.history.is_empty()
    }
}
