//! How soon data is likely to be overwritten, and where it is put for that.
//!
//! Data that dies together should lie together: then segments empty themselves, and the cleaner has
//! little to move. Nothing is stored for single blocks. A segment knows when, on the layer's clock of
//! blocks written by guests, its data was written on average. When a guest overwrites a block, the
//! time since then says how long such data lives, and moves the estimate for the new version part of the way to
//! the present; data that the cleaner moves keeps the estimate of its segment. So what is overwritten often
//! gathers in segments with a young estimate within a few rounds.
//!
//! The idea of one estimate for each segment, and the cleaner's choice (`Segments::candidates`), are from
//! Lomet and Luo, "Efficiently Reclaiming Space in a Log Structured Store", ICDE 2021.

use super::position::MAIN;

/// The lane for what guests write that is likely to live for long.
const OLD: usize = 2;

/// Data that lives at least as long as it takes to write half, all, and twice the live data
/// goes into the lanes after the main one.
const LANE_BOUNDS_HALVES: [u64; 3] = [1, 2, 4];

/// The write time to assume for a new version of data whose old version was written at `old`, on average: three
/// fifths of the way from there to `now`. Less adapts too slowly, more forgets what is known.
pub(super) fn renewed(old: u64, now: u64) -> u64 {
    old + now.saturating_sub(old) / 5 * 3
}

/// The lane for data that is likely to live for `life` blocks of writing, where `live` blocks are in use.
pub(super) fn lane(life: u64, live: u64) -> usize {
    MAIN + LANE_BOUNDS_HALVES.iter().filter(|&&halves| life / halves > live / 2).count()
}

/// The lane for what a guest writes, of which `renewed` gave the estimate: one of two, since each takes a record
/// of its own.
pub(super) fn lane_of_write(estimate: u64, now: u64, live: u64) -> usize {
    let life = now.saturating_sub(estimate).saturating_mul(2);
    if life > live { OLD } else { MAIN }
}

/// The lane for what the cleaner moves out of a segment.
pub(super) fn lane_of_moved(estimate: u64, now: u64, live: u64) -> usize {
    lane(now.saturating_sub(estimate), live)
}

/// The lane for what is moved into the order of the disk.
pub(super) const ORDERED: usize = 3;

/// The lane for what is moved out of the way of that: what its turn comes for before block `split` lies apart
/// from the rest, which stays for longer.
pub(super) fn lane_of_split(block: u64, split: u64) -> usize {
    if block < split { MAIN + 1 } else { OLD }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_longer_lies_in_a_later_lane() {
        let lanes: Vec<usize> = [0, 400, 600, 900, 1100, 2100, u64::MAX].map(|life| lane(life, 1000)).into();
        assert_eq!(lanes, [0, 0, 1, 1, 2, 3, 3]);
    }

    #[test]
    fn a_block_that_is_overwritten_again_and_again_becomes_young() {
        let (mut estimate, live) = (0, 1000);
        let lanes: Vec<usize> = (1..6)
            .map(|round| {
                let now = 5000 + round * 100;
                estimate = renewed(estimate, now);
                lane_of_write(estimate, now, live)
            })
            .collect();
        assert_eq!(lanes.first(), Some(&OLD));
        assert_eq!(lanes.last(), Some(&MAIN));
    }
}
