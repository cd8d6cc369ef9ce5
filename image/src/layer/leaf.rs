//! What a leaf of the map says, in memory: 512 entries, kept as runs where that is shorter.

use std::ops::Range;
use std::sync::Arc;

use super::node::{Entry, LEAF_ENTRIES, run_length};

/// The 512 entries of one leaf.
pub(super) type LeafTable = [Entry; LEAF_ENTRIES];

/// Most runs that a leaf is kept as: a quarter of the table's memory, and few enough to search.
const RUNS_MAX: usize = 64;

/// Entries of a leaf from `start` to the next run: one uniform value, or rising places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeafRun {
    start: u16,
    first: Entry,
}

/// A leaf. Clones share its entries until one of them changes.
#[derive(Clone, Debug)]
pub(super) enum Leaf {
    /// All entries are the same one, which is no place.
    Uniform(Entry),
    /// Runs that cover the leaf, in order.
    Runs(Arc<[LeafRun]>),
    /// All entries.
    Table(Arc<LeafTable>),
}

impl Leaf {
    /// A leaf with these entries, in the form that takes the least memory.
    pub(super) fn new(table: LeafTable) -> Self {
        let mut runs = Vec::new();
        let mut at = 0;
        while at < LEAF_ENTRIES {
            if runs.len() == RUNS_MAX {
                return Self::Table(Arc::new(table));
            }
            runs.push(LeafRun { start: at as u16, first: table[at] });
            at += run_length(&table[at..]);
        }
        match runs[..] {
            [LeafRun { first, .. }] if first.place().is_none() => Self::Uniform(first),
            _ => Self::Runs(runs.into()),
        }
    }

    /// Memory that it takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Uniform(_) => 0,
            Self::Runs(runs) => std::mem::size_of_val(&**runs),
            Self::Table(_) => size_of::<LeafTable>(),
        }
    }

    /// One entry.
    pub(super) fn entry(&self, index: usize) -> Entry {
        match self {
            Self::Uniform(entry) => *entry,
            Self::Runs(runs) => {
                let run = runs[runs.partition_point(|run| usize::from(run.start) <= index) - 1];
                run.first.plus(index as u32 - u32::from(run.start))
            }
            Self::Table(table) => table[index],
        }
    }

    /// Calls `f(start, count, first)` for the runs that cover `range`, in order.
    pub(super) fn for_each_run(&self, range: Range<usize>, mut f: impl FnMut(usize, usize, Entry)) {
        match self {
            Self::Uniform(entry) => f(range.start, range.len(), *entry),
            Self::Runs(runs) => {
                let ends = runs.iter().skip(1).map(|run| usize::from(run.start)).chain([LEAF_ENTRIES]);
                for (run, end) in runs.iter().zip(ends) {
                    let start = usize::from(run.start);
                    let part = start.max(range.start)..end.min(range.end);
                    if !part.is_empty() {
                        f(part.start, part.len(), run.first.plus((part.start - start) as u32));
                    }
                }
            }
            Self::Table(table) => {
                let mut at = range.start;
                while at < range.end {
                    let count = run_length(&table[at..range.end]);
                    f(at, count, table[at]);
                    at += count;
                }
            }
        }
    }

    /// Calls `f` for every place in `range`.
    pub(super) fn for_each_place(&self, range: Range<usize>, mut f: impl FnMut(u32)) {
        self.for_each_run(range, |_, count, first| {
            if let Some(place) = first.place() {
                (place..place + count as u32).for_each(&mut f);
            }
        });
    }

    /// All entries.
    pub(super) fn to_table(&self) -> Arc<LeafTable> {
        if let Self::Table(table) = self {
            return Arc::clone(table);
        }
        let mut table = [Entry::ABSENT; LEAF_ENTRIES];
        self.for_each_run(0..LEAF_ENTRIES, |start, count, first| {
            for (entry, i) in table[start..start + count].iter_mut().zip(0..) {
                *entry = first.plus(i);
            }
        });
        Arc::new(table)
    }

    /// All entries, to be changed; copied when a clone still uses them.
    pub(super) fn table_mut(&mut self) -> &mut LeafTable {
        if !matches!(self, Self::Table(_)) {
            *self = Self::Table(self.to_table());
        }
        match self {
            Self::Table(table) => Arc::make_mut(table),
            _ => unreachable!("made a table above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_tables_say_the_same() {
        let few: LeafTable = std::array::from_fn(|i| match i {
            0..=99 => Entry::ABSENT,
            100..=299 => Entry(5000 + i as u32),
            300..=310 => Entry::ZERO,
            _ => Entry(100 + i as u32),
        });
        let many: LeafTable = std::array::from_fn(|i| Entry(16 + (i as u32 * 7919) % 4000));
        for (table, is_short) in [(few, true), (many, false)] {
            let leaf = Leaf::new(table);
            assert_eq!(matches!(leaf, Leaf::Runs(_)), is_short);
            assert_eq!(leaf.bytes() < size_of::<LeafTable>(), is_short);
            assert_eq!(*leaf.to_table(), table);
            for range in [0..LEAF_ENTRIES, 99..101, 305..306, 511..512] {
                let mut seen = Vec::new();
                leaf.for_each_run(range.clone(), |start, count, first| {
                    seen.extend((start..start + count).zip((0..).map(|i| first.plus(i))));
                });
                let expected: Vec<_> = range.map(|i| (i, table[i])).collect();
                assert_eq!(seen, expected);
                assert!(expected.iter().all(|(i, entry)| leaf.entry(*i) == *entry));
            }
        }
        assert!(matches!(Leaf::new([Entry::ZERO; LEAF_ENTRIES]), Leaf::Uniform(Entry::ZERO)));
    }
}
