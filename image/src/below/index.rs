//! One index over the maps of many frozen layers: for each stretch of the disk the uppermost layer
//! that says anything about it, and what. Looking a block up is one binary search, however many
//! layers there are.

use crate::layer::frozen::{FrozenRun, Holds};

/// A stretch of blocks that one layer answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first block, and in the lowest 16 bits the number of the layer, from the top of the index.
    at: u64,
    /// Where in its file the first block lies; 0: they are zeroes.
    place: u32,
    count: u32,
}

/// Memory that a run takes, in bytes.
pub(super) const RUN_BYTES: usize = size_of::<Run>();

const LINK_BITS: u32 = 16;

impl Run {
    fn new(start: u64, count: u32, place: u32, link: u16) -> Self {
        Self { at: start << LINK_BITS | u64::from(link), place, count }
    }

    fn link(&self) -> u16 {
        self.at as u16
    }

    fn start(&self) -> u64 {
        self.at >> LINK_BITS
    }

    fn end(&self) -> u64 {
        self.start() + u64::from(self.count)
    }

    /// The part of it before block `end`, which lies inside.
    fn until(&self, end: u64) -> Self {
        Self { count: (end - self.start()) as u32, ..*self }
    }

    /// The part of it from block `start` on, which lies inside.
    fn from(&self, start: u64) -> Self {
        let skipped = (start - self.start()) as u32;
        let place = if self.place == 0 { 0 } else { self.place + skipped };
        Self::new(start, self.count - skipped, place, self.link())
    }
}

/// What the index says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// This layer answers, for so many blocks from this one on.
    Layer { link: usize, holds: Holds, blocks: u64 },
    /// No layer does, for so many blocks.
    Nothing { blocks: u64 },
}

/// See the module's documentation.
pub(super) struct Index {
    /// In order and apart.
    runs: Vec<Run>,
}

impl Index {
    /// Looks a block up.
    pub(super) fn find(&self, block: u64) -> Answer {
        let after = self.runs.partition_point(|run| run.start() <= block);
        if let Some(run) = after.checked_sub(1).map(|i| self.runs[i]).filter(|run| block < run.end()) {
            let rest = run.from(block);
            let holds = if rest.place == 0 { Holds::Zero } else { Holds::Place(rest.place) };
            return Answer::Layer { link: run.link().into(), holds, blocks: rest.count.into() };
        }
        let next = self.runs.get(after).map_or(u64::MAX, Run::start);
        Answer::Nothing { blocks: next - block }
    }

    /// Runs in it.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }
}

/// An index being made, from the top down.
///
/// What was added last is merged when as many layers were added before it, so that a run is copied
/// as often as the number of layers has binary digits.
#[derive(Default)]
pub(super) struct Builder {
    /// How many layers went into each list, and the list; the uppermost first.
    lists: Vec<(u32, Vec<Run>)>,
}

impl Builder {
    /// Runs that the index may come to have: every run of a layer can split one below it once.
    pub(super) fn len_max(&self) -> usize {
        2 * self.lists.iter().map(|(_, list)| list.len()).sum::<usize>()
    }

    /// Adds a layer below those that were added before.
    pub(super) fn add(&mut self, link: u16, runs: &[FrozenRun]) {
        let mut list = Vec::with_capacity(runs.len());
        for run in runs {
            let place = match run.holds {
                Holds::Nothing => continue,
                Holds::Zero => 0,
                Holds::Place(place) => place,
            };
            let mut start = run.start;
            let end = run.start + run.count;
            while start < end {
                // Only zeroes go on for longer than that.
                let count = (end - start).min(u32::MAX.into()) as u32;
                list.push(Run::new(start, count, place, link));
                start += u64::from(count);
            }
        }
        let mut layers = 1;
        while let Some((_, upper)) = self.lists.pop_if(|(others, _)| *others <= layers) {
            list = overlay(&upper, &list);
            layers *= 2;
        }
        self.lists.push((layers, list));
    }

    /// Adds what lies below everything else, `above` layers down; nothing can be added after it.
    pub(super) fn add_index(&mut self, above: u16, below: &Index) {
        let runs = below.runs.iter().map(|run| Run { at: run.at + u64::from(above), ..*run });
        self.lists.push((1, runs.collect()));
    }

    /// Merges all that was added, so that [`len_max`](Self::len_max) is as small as it can be.
    pub(super) fn settle(&mut self) {
        let mut lists = std::mem::take(&mut self.lists);
        let Some((mut layers, mut merged)) = lists.pop() else { return };
        while let Some((others, upper)) = lists.pop() {
            merged = overlay(&upper, &merged);
            layers += others;
        }
        self.lists.push((layers, merged));
    }

    /// The index.
    pub(super) fn finish(mut self) -> Index {
        self.settle();
        let mut runs = self.lists.pop().map(|(_, list)| list).unwrap_or_default();
        runs.shrink_to_fit();
        Index { runs }
    }
}

/// What `upper` says, and in its gaps what `lower` says.
fn overlay(upper: &[Run], lower: &[Run]) -> Vec<Run> {
    let mut merged = Vec::with_capacity(upper.len() + lower.len());
    let mut upper = upper.iter().peekable();
    for run in lower {
        let mut rest = Some(*run);
        while let Some(part) = rest.take() {
            merged.extend(std::iter::from_fn(|| upper.next_if(|above| above.end() <= part.start())));
            let Some(above) = upper.peek().filter(|above| above.start() < part.end()) else {
                merged.push(part);
                continue;
            };
            if part.start() < above.start() {
                merged.push(part.until(above.start()));
            }
            if above.end() < part.end() {
                rest = Some(part.from(above.end()));
            }
        }
    }
    merged.extend(upper);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator: SplitMix64.
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// What each block of a small disk is said to hold by the uppermost layer.
    fn model(layers: &[Vec<FrozenRun>], blocks: u64) -> Vec<Option<(usize, Holds)>> {
        let mut model = vec![None; blocks as usize];
        for (link, runs) in layers.iter().enumerate() {
            for run in runs {
                for i in 0..run.count {
                    let holds = match run.holds {
                        Holds::Place(place) => Holds::Place(place + i as u32),
                        other => other,
                    };
                    model[(run.start + i) as usize].get_or_insert((link, holds));
                }
            }
        }
        model
    }

    fn layer(state: &mut u64, blocks: u64) -> Vec<FrozenRun> {
        let (mut runs, mut at) = (Vec::new(), random(state) % 20);
        while at < blocks {
            let count = (1 + random(state) % 9).min(blocks - at);
            let place = Holds::Place(16 + (random(state) % 1000) as u32);
            let holds = if random(state).is_multiple_of(3) { Holds::Zero } else { place };
            runs.push(FrozenRun { start: at, count, holds });
            at += count + random(state) % 40;
        }
        runs
    }

    #[test]
    fn the_uppermost_layer_answers() {
        for seed in 0..200 {
            let mut state = seed;
            let blocks = 1 + random(&mut state) % 300;
            let layers: Vec<_> = (0..random(&mut state) % 40).map(|_| layer(&mut state, blocks)).collect();
            let mut builder = Builder::default();
            for (link, runs) in layers.iter().enumerate() {
                builder.add(link as u16, runs);
                if random(&mut state).is_multiple_of(5) {
                    builder.settle();
                }
            }
            let len_max = builder.len_max();
            let index = builder.finish();
            assert!(index.len() <= len_max, "seed {seed}: {} runs, {len_max} at most", index.len());
            let model = model(&layers, blocks);
            let mut at = 0;
            while at < blocks {
                let (count, answer) = match index.find(at) {
                    Answer::Layer { link, holds, blocks } => (blocks, Some((link, holds))),
                    Answer::Nothing { blocks: count } => (count.min(blocks - at), None),
                };
                for i in 0..count {
                    let expected = answer.map(|(link, holds)| match holds {
                        Holds::Place(place) => (link, Holds::Place(place + i as u32)),
                        other => (link, other),
                    });
                    assert_eq!(model[(at + i) as usize], expected, "seed {seed}, block {}", at + i);
                }
                at += count;
            }
        }
    }

    #[test]
    fn zeroes_may_go_on_for_the_whole_of_the_largest_disk() {
        let blocks = crate::layer::SIZE_MAX / 4096;
        let mut builder = Builder::default();
        builder.add(7, &[FrozenRun { start: 0, count: blocks, holds: Holds::Zero }]);
        let index = builder.finish();
        let Answer::Layer { link: 7, holds: Holds::Zero, blocks: 1 } = index.find(blocks - 1) else {
            panic!("{:?}", index.find(blocks - 1))
        };
        assert_eq!(index.find(blocks), Answer::Nothing { blocks: u64::MAX - blocks });
    }
}
