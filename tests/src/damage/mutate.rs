//! Damage by seed: changes to what matters in an image.

use super::format::{BLOCK, base, bases, header, put, put_u32, put_u64, record, slot, slots, u32_at, u64_at};
use super::seal::Seal;
use super::walk::{nodes, records};
use crate::sim::rng::Rng;

/// Numbers on the edges of what fields can hold.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    15,
    16,
    17,
    255,
    256,
    511,
    512,
    4096,
    0xffff,
    1 << 20,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 56,
    u64::MAX / 2,
    u64::MAX,
];

/// Stretches of the image where fields are.
fn fields(b: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut found: Vec<_> = std::iter::once(0..header::END).collect();
    found.extend(bases(b).into_iter().map(|at| at..at + base::PATH + 16));
    found.extend(slots(b).into_iter().map(|at| at..at + slot::CHECKSUM));
    for at in slots(b) {
        found.extend(nodes(b, at).into_iter().map(|node| node.at..node.at + node.len));
    }
    for r in records(b) {
        let runs = (u32_at(b, r.at + record::RUN_COUNT) as usize).min(200);
        found.push(r.at..r.at + record::RUNS + runs * record::RUN_BYTES);
    }
    found.retain(|range| range.end <= b.len() && !range.is_empty());
    found
}

/// Changes a few fields, or a stretch of the file. With `seal`, the checksums hold afterwards.
pub fn mutate(b: &mut Vec<u8>, rng: &mut Rng, seal: Option<Seal>) {
    for _ in 0..rng.between(1, 4) {
        mutate_once(b, rng);
    }
    if let Some(seal) = seal {
        seal.apply(b);
    }
}

fn mutate_once(b: &mut Vec<u8>, rng: &mut Rng) {
    let fields = fields(b);
    let range = fields[rng.below(fields.len() as u64) as usize].clone();
    let at = range.start + rng.below(range.len() as u64) as usize;
    let edge = rng.pick(&EDGES);
    match rng.below(12) {
        0..=2 => b[at] ^= 1 << rng.below(8),
        3 => put(b, at, &[rng.next() as u8]),
        4 => put(b, at & !1, &(edge as u16).to_le_bytes()),
        5..=6 => put_u32(b, at & !3, edge as u32),
        7 => put_u64(b, at & !7, edge),
        8 => {
            let near = u64_at(b, at & !7).wrapping_add(rng.between(1, 8)).wrapping_sub(4);
            put_u64(b, at & !7, near);
        }
        9 => {
            let other = fields[rng.below(fields.len() as u64) as usize].clone();
            let len = range.len().min(other.len());
            b.copy_within(other.start..other.start + len, range.start);
        }
        10 => {
            let blocks = (b.len() / BLOCK) as u64;
            let (from, to) = (rng.below(blocks) as usize * BLOCK, rng.below(blocks) as usize * BLOCK);
            b.copy_within(from..from + BLOCK, to);
        }
        _ => {
            let keep = rng.below(b.len() as u64 + 1) as usize;
            b.truncate(keep.max(BLOCK));
        }
    }
}
