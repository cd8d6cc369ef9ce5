//! Judges a layer without changing it.
//!
//! Everything that opening checks, and: the usage of segments is what the map says, no two entries share a block, no entry points at what the
//! log has not written, every mapped block lies in a record and has the checksum stated there, the log
//! goes on where a record ends.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::OpenLayer;
use super::device::Layer;
use super::extents::MapRun;
use super::load::Reader;
use super::map::{BRANCH_BLOCKS, LEAF_BLOCKS, by_branch, pieces};
use super::record::{Index, Run};
use crate::error::{ErrorKind, ImageError};
use crate::findings;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_BYTES;

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
}

impl CheckReport {
    fn error(&mut self, text: String) {
        findings::add(&mut self.errors, text);
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
    let options = OpenLayer { read_only: true, ..OpenLayer::default() };
    let layer = match Layer::open(storage, io, path, &options).await {
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
    let mut places = mapped_places(&layer, io, &mut report).await?;
    if report.errors.is_empty() {
        check_usage(&layer, &places, &mut report);
    }
    let file = layer.file();
    let reader = Reader { io, file: &file, path };
    let (count, head) = {
        let core = layer.core();
        (core.segments.count(), core.log.head)
    };
    for segment in 0..count {
        let mapped = places.remove(&segment).unwrap_or_default();
        let lane = head.lanes().find(|(_, lane)| lane.segment == segment && lane.block > 0);
        let log_end = lane.map(|(_, lane)| lane.block);
        if !mapped.is_empty() || log_end.is_some() {
            check_segment(&layer, &reader, segment, mapped, log_end, &mut report).await?;
        }
    }
    Ok(report)
}

/// The mapped blocks of each segment: place in the segment and guest block.
type Mapped = HashMap<u32, Vec<(u32, u64)>>;

/// Compares what the usage nodes, and the log since, say of the segments with what the map says. A
/// segment that seems emptier than it is would be used again under the eyes of the map.
fn check_usage<E: Engine>(layer: &Layer<E>, places: &Mapped, report: &mut CheckReport) {
    let core = layer.core();
    for segment in 0..core.segments.count() {
        let mapped = places.get(&segment).map_or(0, Vec::len);
        let counted = core.segments.live_blocks_in(segment);
        if mapped != counted as usize {
            report.error(format!(
                "segment {segment} is said to hold {counted} mapped blocks and holds {mapped}"
            ));
        }
    }
}

/// What the map says of blocks of one branch; what it cannot say is an error of the report.
async fn readable_runs<E: Engine>(
    layer: &Arc<Layer<E>>,
    io: &Io<E>,
    blocks: Range<u64>,
    report: &mut CheckReport,
) -> Result<Vec<MapRun>, ImageError> {
    let mut runs = Vec::new();
    let mut last = String::new();
    for (leaf, part) in pieces(blocks, LEAF_BLOCKS) {
        let base = u64::from(leaf) * LEAF_BLOCKS;
        match layer.runs(io, base + part.start..base + part.end).await {
            Ok(found) => runs.extend(found),
            Err(ImageError { kind: kind @ ErrorKind::Corrupt { .. }, .. }) => {
                // A damaged branch is one error, not one for each of its leaves.
                let text = kind.to_string();
                if text != last {
                    report.error(text.clone());
                    last = text;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(runs)
}

async fn mapped_places<E: Engine>(
    layer: &Arc<Layer<E>>,
    io: &Io<E>,
    report: &mut CheckReport,
) -> Result<Mapped, ImageError> {
    let mut places = Mapped::new();
    let end = u64::from(layer.core().map.branch_count()) * BRANCH_BLOCKS;
    for blocks in by_branch(0..end) {
        for MapRun { start, count, entry } in readable_runs(layer, io, blocks, report).await? {
            let Some(first) = entry.place() else { continue };
            let core = layer.core();
            for i in 0..count as u32 {
                let segment = core.segments.of_place(first + i);
                let inside = first + i - core.segments.first_block(segment);
                places.entry(segment).or_default().push((inside, start + u64::from(i)));
                report.mapped_blocks += 1;
            }
        }
    }
    let head = layer.core().log.head;
    let ends = head.lanes().flat_map(|(_, lane)| [(lane.segment, lane.block), (lane.next_segment, 0)]);
    for (segment, limit) in ends {
        for (inside, block) in places.get(&segment).into_iter().flatten() {
            if *inside >= limit {
                report.error(format!("guest block {block} is mapped to segment {segment}, block {inside}, which the log has not written"));
            }
        }
    }
    Ok(places)
}

async fn check_segment<E: Engine>(
    layer: &Layer<E>,
    reader: &Reader<'_, E>,
    segment: u32,
    mut mapped: Vec<(u32, u64)>,
    log_end: Option<u32>,
    report: &mut CheckReport,
) -> Result<(), ImageError> {
    mapped.sort_unstable();
    for pair in mapped.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        let (a, b) = (pair[0].1, pair[1].1);
        report.error(format!("guest blocks {a} and {b} are mapped to the same block of segment {segment}"));
    }
    let (offset, bytes) = {
        let core = layer.core();
        (core.segments.offset(segment).0, core.segments.bytes())
    };
    let contents = reader.read(offset, bytes).await?;
    let (sums, ends) = checksums(&contents);
    if let Some(end) = log_end.filter(|end| !ends.contains(end)) {
        report.error(format!("the log ends in segment {segment} at block {end}, where no record ends"));
    }
    for (inside, block) in mapped {
        let at = inside as usize * BLOCK_BYTES;
        let place = offset + at as u64;
        match sums.get(&inside) {
            None => report.error(format!("guest block {block}: no record covers offset {place:#x}")),
            Some((_, stated)) if *stated != block => {
                report.error(format!(
                    "guest block {block}: the record at offset {place:#x} is of block {stated}"
                ));
            }
            Some((sum, _)) if *sum != crc32fast::hash(&contents[at..at + BLOCK_BYTES]) => {
                report.error(format!(
                    "guest block {block}: the data at offset {place:#x} has another checksum"
                ));
            }
            Some(_) => report.verified_blocks += 1,
        }
    }
    Ok(())
}

/// For each data block of a segment, by the records in it: checksum and guest block; and the blocks
/// at which records end.
fn checksums(contents: &[u8]) -> (HashMap<u32, (u32, u64)>, Vec<u32>) {
    let (mut sums, mut ends) = (HashMap::new(), Vec::new());
    let mut at = 0;
    let blocks = (contents.len() / BLOCK_BYTES) as u32;
    while at < blocks {
        let index_at = at as usize * BLOCK_BYTES;
        let Ok((index, _)) = Index::decode(&contents[index_at..index_at + BLOCK_BYTES]) else { break };
        let mut rest = index.checksums.iter();
        let mut inside = at + 1;
        for run in &index.runs {
            for i in 0..run.data_blocks() {
                let Some(&sum) = rest.next() else { break };
                if let Run::Data { start, .. } = *run {
                    sums.insert(inside + i, (sum, start + u64::from(i)));
                }
            }
            inside += run.data_blocks();
        }
        at += 1 + index.data_blocks;
        ends.push(at);
    }
    (sums, ends)
}
