//! Damage by seed to what matters in an image: the header, its extensions, tables, entries of
//! snapshots, the starts of compressed clusters.

use std::ops::Range;

use super::craft::{field, get32, get64, put32, put64};
use crate::sim::rng::Rng;

/// Numbers on the edges of what fields can hold.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    7,
    9,
    21,
    63,
    511,
    512,
    513,
    4096,
    0xffff,
    1 << 20,
    1 << 31,
    u32::MAX as u64,
    1 << 55,
    1 << 62 | 512,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Stretches of the file where fields are.
fn fields(b: &[u8]) -> Vec<Range<usize>> {
    let bits = get32(b, field::CLUSTER_BITS).clamp(9, 21);
    let l1 = get64(b, field::L1_OFFSET);
    let entries = u64::from(get32(b, field::L1_SIZE)).min(64);
    let mut found = vec![0..112, 0..112, 112..160];
    let mut add = |at: u64, len: u64| {
        if at.saturating_add(len) <= b.len() as u64 {
            found.push(at as usize..(at + len) as usize);
        }
    };
    add(l1, entries * 8);
    add(get64(b, field::SNAPSHOTS_OFFSET), 128);
    for at in
        (0..entries).map(|i| l1.saturating_add(i * 8)).filter(|at| at.saturating_add(8) <= b.len() as u64)
    {
        let l2 = get64(b, at as usize) & 0x00ff_ffff_ffff_fe00;
        add(l2, 1 << bits.min(12));
        for at in
            (0..40).map(|i| l2.saturating_add(i * 8)).filter(|at| at.saturating_add(8) <= b.len() as u64)
        {
            let entry = get64(b, at as usize);
            if l2 > 0 && entry >> 62 & 1 == 1 {
                add(entry & ((1 << 40) - 1), 64);
            }
        }
    }
    found.retain(|range| range.end <= b.len() && !range.is_empty());
    found
}

/// Changes a few fields, or cuts the file.
pub fn mutate(b: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..rng.between(1, 4) {
        let fields = fields(b);
        let range = rng.pick(&fields.iter().map(|r| (r.start, r.len())).collect::<Vec<_>>());
        let at = range.0 + rng.below(range.1 as u64) as usize;
        let edge = rng.pick(&EDGES);
        match rng.below(10) {
            0..=2 => b[at] ^= 1 << rng.below(8),
            3 => b[at] = rng.next() as u8,
            4..=5 => put32(b, at & !3, edge as u32),
            6 => put64(b, at & !7, edge),
            7 => {
                let near = get64(b, at & !7).wrapping_add(rng.between(0, 1024)).wrapping_sub(512);
                put64(b, at & !7, near);
            }
            8 => {
                // Somewhere in the file, or a little beyond.
                let place = rng.below(b.len() as u64 + 8192) & !511;
                put64(
                    b,
                    at & !7,
                    place | u64::from(rng.percent(50)) << 63 | u64::from(rng.percent(20)) << 62,
                );
            }
            _ if rng.percent(30) => {
                let keep = rng.below(b.len() as u64 + 1) as usize;
                b.truncate(keep.max(1024));
            }
            _ => b[at] = !b[at],
        }
    }
}
