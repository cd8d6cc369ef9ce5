//! Judges a layer without changing it.
//!
//! Everything that opening checks, and: the usage of segments is what the map says, no two entries share a
//! block, no entry points at what the log has not written, every mapped block lies in a record and has the
//! checksum stated there, the log goes on where a record ends.
//!
//! The map is read once and every segment once, in order, whatever their size (`places` says how). Where
//! something is wrong both are read once more to say what.

mod places;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use self::places::{Held, Places};
use super::OpenLayer;
use super::base::OpenBase;
use super::device::Layer;
use super::load::Reader;
use super::map::{BRANCH_BLOCKS, LEAF_BLOCKS, pieces};
use super::record::{Index, Run};
use super::tuning::Tuning;
use crate::error::{ErrorKind, ImageError};
use crate::findings;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_BYTES;

/// Memory for nodes of the map, which are read in order.
const MAP_CACHE_BYTES: u64 = 4 << 20;
/// Segments in which something is wrong that are looked at in detail.
const DETAILED_MAX: usize = 64;

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// What is wrong: data is lost or would read wrong.
    pub errors: Vec<String>,
    /// What is odd and does no harm.
    pub warnings: Vec<String>,
    /// Mapped blocks of 4 KiB.
    pub mapped_blocks: u64,
    /// Mapped blocks whose checksum was verified.
    pub verified_blocks: u64,
    /// Guest blocks that errors are about, in order; where there are more than a thousand ranges, the last one reaches over the
    /// rest. None when the layer cannot be opened.
    pub lost: Vec<Range<u64>>,
}

/// Ranges of guest blocks that are listed.
const LOST_MAX: usize = 1000;

impl CheckReport {
    fn error(&mut self, text: String) {
        findings::add(&mut self.errors, text);
    }

    /// Notes guest blocks that an error is about.
    fn lose(&mut self, blocks: Range<u64>) {
        match self.lost.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.lost.push(blocks),
        }
        if self.lost.len() >= 2 * LOST_MAX {
            self.join_lost();
        }
    }

    fn join_lost(&mut self) {
        self.lost.sort_unstable_by_key(|range| (range.start, range.end));
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(self.lost.len());
        for range in self.lost.drain(..) {
            let is_full = joined.len() == LOST_MAX;
            match joined.last_mut() {
                Some(last) if is_full || range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        self.lost = joined;
    }
}

/// Checks the layer at `path`, its data included. Damage that keeps it from being opened is an
/// entry of the report, too.
///
/// # Errors
/// When the file cannot be read, is in use for writing, or is no layer at all.
pub async fn check<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<CheckReport, ImageError> {
    let mut report = CheckReport::default();
    let tuning = Tuning { map_cache_bytes: MAP_CACHE_BYTES, ..Tuning::default() };
    let options = OpenLayer { read_only: true, tuning };
    let layer = match Layer::open_with(storage, io, path, &options, OpenBase::UnlessInStore, None).await {
        Ok(layer) => layer,
        Err(ImageError { kind: kind @ (ErrorKind::Corrupt { .. } | ErrorKind::Base(_)), .. }) => {
            report.error(kind.to_string());
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    if !layer.core().was_clean {
        report.warnings.push("it was not closed properly; opening it for writing recovers it".to_owned());
    }
    let mut key = [0; 8];
    storage.random(&mut key).map_err(|e| ImageError::io(path, "make random numbers for", e))?;
    Check { layer, io, report }.run(u64::from_le_bytes(key)).await
}

struct Check<'a, E: Engine> {
    layer: Arc<Layer<E>>,
    io: &'a Io<E>,
    report: CheckReport,
}

impl<E: Engine> Check<'_, E> {
    async fn run(mut self, key: u64) -> Result<CheckReport, ImageError> {
        let (count, segment_blocks, head) = {
            let core = self.layer.core();
            (core.segments.count(), core.segments.segment_blocks(), core.log.head)
        };
        let mut places = Places::new(key, count, segment_blocks);
        let (mut unwritten, mut ahead_of_log) = (Vec::new(), Vec::new());
        self.for_each_place(|place, block| {
            places.add(place, block);
            let (segment, inside) = places.split(place);
            let ahead = head.lanes().any(|(_, lane)| {
                segment == lane.segment && inside >= lane.block || segment == lane.next_segment
            });
            if ahead {
                findings::add(&mut unwritten, format!("guest block {block} is mapped to segment {segment}, block {inside}, which the log has not written"));
                ahead_of_log.push(block);
            }
        })
        .await?;
        unwritten.into_iter().for_each(|text| self.report.error(text));
        ahead_of_log.into_iter().for_each(|block| self.report.lose(block..block + 1));
        self.report.mapped_blocks = places.mapped_blocks();
        if self.report.errors.is_empty() {
            self.check_usage(&places);
        }
        let mut suspects = Vec::new();
        for segment in 0..count {
            let held = places.held(segment);
            let lane = head.lanes().find(|(_, lane)| lane.segment == segment && lane.block > 0);
            let log_end = lane.map(|(_, lane)| lane.block);
            if held == Held::default() && log_end.is_none() {
                continue;
            }
            let contents = Contents::read(&self.layer, self.io, segment).await?;
            if let Some(end) = log_end.filter(|end| !contents.ends.contains(end)) {
                let text = format!("the log ends in segment {segment} at block {end}, where no record ends");
                self.report.error(text);
            }
            match contents.held(&places, segment) == held {
                true => self.report.verified_blocks += u64::from(held.blocks),
                false => suspects.push(segment),
            }
        }
        if !suspects.is_empty() {
            self.explain(&places, &suspects).await?;
        }
        self.report.join_lost();
        Ok(self.report)
    }

    /// Calls `f` for all places and their guest blocks, in the order of the disk; what of the map cannot be
    /// read is an error of the report.
    async fn for_each_place(&mut self, mut f: impl FnMut(u32, u64)) -> Result<(), ImageError> {
        let branches = self.layer.core().map.branch_count();
        let mut last = String::new();
        for branch in (0..branches).map(u64::from) {
            if self.layer.core().map.uniform_branch(branch as u32).is_some() {
                continue;
            }
            for (leaf, _) in pieces(branch * BRANCH_BLOCKS..(branch + 1) * BRANCH_BLOCKS, LEAF_BLOCKS) {
                let start = u64::from(leaf) * LEAF_BLOCKS;
                let runs = match self.layer.runs(self.io, start..start + LEAF_BLOCKS).await {
                    Ok(runs) => runs,
                    Err(ImageError { kind: kind @ ErrorKind::Corrupt { .. }, .. }) => {
                        self.report.lose(start..start + LEAF_BLOCKS);
                        // A damaged branch is one error, not one for each of its leaves.
                        let text = kind.to_string();
                        if text != last {
                            self.report.error(text.clone());
                            last = text;
                        }
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                for run in runs {
                    let Some(first) = run.entry.place() else { continue };
                    (first..first + run.count as u32).zip(run.start..).for_each(|(p, b)| f(p, b));
                }
            }
        }
        Ok(())
    }

    /// Compares what the usage nodes, and the log since, say of the segments with what the map says. A
    /// segment that seems emptier than it is would be used again under the eyes of the map.
    fn check_usage(&mut self, places: &Places) {
        let layer = Arc::clone(&self.layer);
        let core = layer.core();
        for segment in 0..core.segments.count() {
            let mapped = places.held(segment).blocks;
            let counted = core.segments.live_blocks_in(segment);
            if mapped != counted {
                self.report.error(format!(
                    "segment {segment} is said to hold {counted} mapped blocks and holds {mapped}"
                ));
            }
        }
    }

    /// Says what is wrong in segments: in detail of the first ones.
    async fn explain(&mut self, places: &Places, suspects: &[u32]) -> Result<(), ImageError> {
        let (detailed, others) = suspects.split_at(suspects.len().min(DETAILED_MAX));
        let mut mapped: BTreeMap<u32, Vec<(u32, u64)>> =
            detailed.iter().map(|&segment| (segment, Vec::new())).collect();
        // What of the map cannot be read was said the first time.
        let known = std::mem::take(&mut self.report);
        let (others_too, mut undetailed) = (others.iter().copied().collect::<BTreeSet<u32>>(), Vec::new());
        let walked = self
            .for_each_place(|place, block| {
                let (segment, inside) = places.split(place);
                if let Some(mapped) = mapped.get_mut(&segment) {
                    mapped.push((inside, block));
                } else if others_too.contains(&segment) {
                    undetailed.push(block);
                }
            })
            .await;
        self.report = known;
        undetailed.into_iter().for_each(|block| self.report.lose(block..block + 1));
        walked?;
        for (segment, mut mapped) in mapped {
            mapped.sort_unstable();
            let contents = Contents::read(&self.layer, self.io, segment).await?;
            contents.explain(segment, &mapped, &mut self.report);
        }
        for segment in others {
            self.report.error(format!(
                "segment {segment}: mapped blocks are damaged, or not those that its records speak of"
            ));
        }
        Ok(())
    }
}

/// A data block of a segment, by the record that it lies in.
struct DataBlock {
    /// Block of the segment.
    inside: u32,
    sum: u32,
    /// The guest block.
    block: u64,
}

/// A segment as it lies in the file.
struct Contents {
    bytes: AlignedBuf,
    offset: u64,
    /// In order.
    data: Vec<DataBlock>,
    /// The blocks at which records end.
    ends: Vec<u32>,
}

impl Contents {
    async fn read<E: Engine>(layer: &Layer<E>, io: &Io<E>, segment: u32) -> Result<Self, ImageError> {
        let (offset, len) = {
            let core = layer.core();
            (core.segments.offset(segment).0, core.segments.bytes())
        };
        let (file, path) = (layer.file(), layer.path());
        let bytes = Reader { io, file: &file, path }.read(offset, len).await?;
        let (data, ends) = parse(&bytes);
        Ok(Self { bytes, offset, data, ends })
    }

    fn is_whole(&self, data: &DataBlock) -> bool {
        let at = data.inside as usize * BLOCK_BYTES;
        data.sum == crc32fast::hash(&self.bytes[at..at + BLOCK_BYTES])
    }

    /// What the segment holds of what is mapped to it, by its records.
    fn held(&self, places: &Places, segment: u32) -> Held {
        let mut held = Held::default();
        let mapped = |data: &&DataBlock| places.is_mapped(segment, data.inside);
        for data in self.data.iter().filter(mapped).filter(|data| self.is_whole(data)) {
            held.add(places.tag(places.join(segment, data.inside), data.block));
        }
        held
    }

    /// Compares with the blocks that are mapped to the segment, which are in order.
    fn explain(&self, segment: u32, mapped: &[(u32, u64)], report: &mut CheckReport) {
        for pair in mapped.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            let (a, b) = (pair[0].1, pair[1].1);
            report
                .error(format!("guest blocks {a} and {b} are mapped to the same block of segment {segment}"));
        }
        for &(inside, block) in mapped {
            let verified = report.verified_blocks;
            let place = self.offset + u64::from(inside) * BLOCK_BYTES as u64;
            let found = self.data.binary_search_by_key(&inside, |data| data.inside);
            match found.map(|at| &self.data[at]) {
                Err(_) => report.error(format!("guest block {block}: no record covers offset {place:#x}")),
                Ok(data) if data.block != block => report.error(format!(
                    "guest block {block}: the record at offset {place:#x} is of block {}",
                    data.block
                )),
                Ok(data) if !self.is_whole(data) => report.error(format!(
                    "guest block {block}: the data at offset {place:#x} has another checksum"
                )),
                Ok(_) => report.verified_blocks += 1,
            }
            if report.verified_blocks == verified {
                report.lose(block..block + 1);
            }
        }
    }
}

/// The data blocks that the records of a segment speak of, and where those records end.
fn parse(contents: &[u8]) -> (Vec<DataBlock>, Vec<u32>) {
    let (mut data, mut ends) = (Vec::new(), Vec::new());
    let mut at = 0;
    let blocks = (contents.len() / BLOCK_BYTES) as u32;
    while at < blocks {
        let index_at = at as usize * BLOCK_BYTES;
        let Ok((index, _)) = Index::decode(&contents[index_at..index_at + BLOCK_BYTES]) else { break };
        // Behind the end of the log may lie anything, a guest's copy of an index block, too.
        if index.data_blocks >= blocks - at {
            break;
        }
        let mut rest = index.checksums.iter();
        let mut inside = at + 1;
        for run in &index.runs {
            for i in 0..run.data_blocks() {
                let Some(&sum) = rest.next() else { break };
                if let Run::Data { start, .. } = *run {
                    data.push(DataBlock { inside: inside + i, sum, block: start + u64::from(i) });
                }
            }
            inside += run.data_blocks();
        }
        at += 1 + index.data_blocks;
        ends.push(at);
    }
    (data, ends)
}
