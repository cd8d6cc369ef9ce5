//! Which runs are merged next.

/// Runs in a tier that are merged into one.
pub const TIER_RUNS: usize = 8;
/// Entries of a run in the lowest tier, at most.
const LOWEST_ENTRIES: u64 = 1 << 20;

/// The tier of a run: each holds runs up to eight times as long as the one below.
fn tier_of(entries: u64) -> u32 {
    entries.div_ceil(LOWEST_ENTRIES).next_power_of_two().ilog2().div_ceil(TIER_RUNS.ilog2())
}

/// Which of the runs with so many entries are to be merged next, by their numbers in the list: those of the lowest tier that
/// has eight. None when no tier has as many.
///
/// So an entry is written once for each tier, and there are less than eight runs in each: 27 for 16 TiB of different blocks.
pub fn next_merge(entries: &[u64]) -> Option<Vec<usize>> {
    let tiers: Vec<u32> = entries.iter().map(|entries| tier_of(*entries)).collect();
    let is_full = |tier: &u32| tiers.iter().filter(|other| *other == tier).count() >= TIER_RUNS;
    let full = tiers.iter().copied().filter(is_full).min()?;
    Some((0..tiers.len()).filter(|run| tiers[*run] == full).take(super::write::MERGED_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_stay_few_and_entries_are_rarely_written_again() {
        let (mut runs, mut added, mut written) = (Vec::new(), 0, 0);
        for publication in 0..20_000u64 {
            let entries = 1 + publication * 7919 % 200_000;
            (added, written) = (added + entries, written + entries);
            runs.push(entries);
            while let Some(merged) = next_merge(&runs) {
                assert!(merged.len() >= TIER_RUNS);
                let sum: u64 = merged.iter().map(|run| runs[*run]).sum();
                merged.iter().rev().for_each(|run| drop(runs.remove(*run)));
                runs.push(sum);
                written += sum;
            }
            let tiers = 1 + tier_of(added) as usize;
            assert!(runs.len() <= tiers * (TIER_RUNS - 1), "{} runs for {added} entries", runs.len());
        }
        assert_eq!(runs.iter().sum::<u64>(), added);
        assert!(written <= added * 8, "each entry was written {} times", written / added);
    }

    #[test]
    fn few_runs_are_left_alone() {
        assert_eq!(next_merge(&[]), None);
        assert_eq!(next_merge(&[5; 7]), None);
        assert_eq!(next_merge(&[5; 8]), Some((0..8).collect()));
        assert_eq!(next_merge(&[5, 5, 5, 1 << 30, 5, 5, 5, 5, 5]).map(|runs| runs.contains(&3)), Some(false));
    }
}
