//! Values found by 32 bits of a hash, 8 bytes for each, in buckets of 8.
//!
//! The bits name two buckets, and a value goes into the emptier one. So nearly all of the table can be used, nothing is
//! ever moved, and a search looks at 16 places.

/// Places in a bucket.
const BUCKET: usize = 8;
/// Values for which there is memory are at least so many eighths of the places.
pub(super) const USABLE_EIGHTHS: usize = 7;

/// Marks with values. A value is never 0.
#[derive(Debug)]
pub(super) struct Marks(Vec<u64>);

impl Marks {
    /// An empty table of at most `budget` bytes.
    pub(super) fn new(budget: usize) -> Self {
        Self(vec![0; budget / size_of::<u64>() / BUCKET * BUCKET])
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<u64>()
    }

    /// Places in it.
    pub(super) fn places(&self) -> usize {
        self.0.len()
    }

    /// All marks and values.
    pub(super) fn into_values(mut self) -> impl Iterator<Item = (u32, u32)> {
        self.0.retain(|place| *place != 0);
        self.0.shrink_to_fit();
        self.0.into_iter().map(|place| (mark_of(place), place as u32))
    }

    /// The value of a mark that `is_valid`.
    pub(super) fn find(&self, mark: u32, is_valid: impl Fn(u32) -> bool) -> Option<u32> {
        let fits = |place: &&u64| **place != 0 && mark_of(**place) == mark && is_valid(**place as u32);
        self.buckets(mark)?
            .iter()
            .flat_map(|at| &self.0[*at..at + BUCKET])
            .find(fits)
            .map(|place| *place as u32)
    }

    /// Sets the value of a mark, in a place that has the mark, or else in one that is free or whose value is not valid.
    /// Says what was there before (0 if nothing), or None when there is no place.
    pub(super) fn put(&mut self, mark: u32, value: u32, is_valid: impl Fn(u32) -> bool) -> Option<u32> {
        let [a, b] = self.buckets(mark)?;
        let is_free = |at: &usize| self.0[*at] == 0 || !is_valid(self.0[*at] as u32);
        let has_mark = |at: &usize| self.0[*at] != 0 && mark_of(self.0[*at]) == mark;
        let free = |at: usize| (at..at + BUCKET).filter(is_free).count();
        let known = (a..a + BUCKET).chain(b..b + BUCKET).find(has_mark);
        let at = known.or_else(|| {
            let bucket = if free(a) < free(b) { b } else { a };
            (bucket..bucket + BUCKET).find(is_free)
        })?;
        let before = self.0[at] as u32;
        self.0[at] = entry(mark, value);
        Some(before)
    }

    /// Puts a value where another one was, which it returns.
    pub(super) fn replace(&mut self, mark: u32, value: u32) -> Option<u32> {
        let [at, _] = self.buckets(mark)?;
        let before = self.0[at] as u32;
        self.0[at] = entry(mark, value);
        Some(before)
    }

    /// Forgets what `is_lost`, by mark and value; says how many that were.
    pub(super) fn forget(&mut self, is_lost: impl Fn(u32, u32) -> bool) -> usize {
        let mut lost = 0;
        for place in self.0.iter_mut().filter(|place| **place != 0) {
            if is_lost(mark_of(*place), *place as u32) {
                *place = 0;
                lost += 1;
            }
        }
        lost
    }

    /// Where the two buckets of a mark begin; none if there is no memory.
    fn buckets(&self, mark: u32) -> Option<[usize; 2]> {
        let count = (self.0.len() / BUCKET) as u64;
        let begin = |mark: u32| ((u64::from(mark) * count) >> 32) as usize * BUCKET;
        let other = mark.wrapping_mul(0x9E37_79B1).rotate_left(16).wrapping_mul(0x85EB_CA6B);
        (count > 0).then(|| [begin(mark), begin(other)])
    }
}

fn entry(mark: u32, value: u32) -> u64 {
    assert_ne!(value, 0, "0 is no value");
    u64::from(mark) << 32 | u64::from(value)
}

fn mark_of(place: u64) -> u32 {
    (place >> 32) as u32
}
