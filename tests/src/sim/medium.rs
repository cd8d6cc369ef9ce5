//! One simulated file: what its sectors hold, what of that is durable, and what a power cut
//! leaves.
//!
//! Invariants:
//! - a sector's versions are ordered by stamp, the moment they reached the file;
//! - readers see the last version; a sync makes the last version up to its stamp durable;
//! - a power cut leaves each sector with its durable content or any later version, and each
//!   sector decides for itself. A sector is never torn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::persist::Draw;
use super::rng::Rng;

/// Bytes in a sector: what a disk writes atomically.
pub const SECTOR: u64 = 512;

/// Bytes in a page: the unit in which a simulated file takes up space.
const PAGE: u64 = 4096;

/// A moment in the order of everything that happens to the files of one world.
pub type Stamp = u64;

/// The bytes of one sector.
#[derive(Clone, Debug, Default)]
pub enum Content {
    /// A hole, or zeroes.
    #[default]
    Zero,
    /// 512 bytes of a write's data, from an offset.
    Data(Arc<[u8]>, usize),
}

impl Content {
    /// Copies the sector out.
    pub fn read(&self, to: &mut [u8]) {
        match self {
            Self::Zero => to.fill(0),
            Self::Data(bytes, at) => to.copy_from_slice(&bytes[*at..*at + to.len()]),
        }
    }
}

#[derive(Clone, Debug)]
struct Version {
    stamp: Stamp,
    content: Content,
    /// A failed sync dropped it: readers still see it in the cache, but no sync will ever make
    /// it durable, and it is gone when the file is opened afresh.
    lost: bool,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    durable: Content,
    versions: Vec<Version>,
}

impl Sector {
    fn seen(&self) -> &Content {
        self.versions.last().map_or(&self.durable, |version| &version.content)
    }
}

/// The state of one file.
#[derive(Debug, Default)]
pub struct Medium {
    sectors: BTreeMap<u64, Sector>,
    dirty: BTreeSet<u64>,
    size: u64,
    durable_size: u64,
    sizes: Vec<(Stamp, u64)>,
    pages: BTreeSet<u64>,
}

impl Medium {
    /// A file that holds `bytes`, all durable.
    pub fn of(bytes: &[u8]) -> Self {
        let mut medium = Self::default();
        medium.write(0, 0, &Arc::from(bytes));
        medium.sync(0);
        medium
    }

    /// The size that readers see.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of space taken up.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Bytes of space that writing or allocating a range would take up in addition.
    pub fn missing(&self, offset: u64, len: u64) -> u64 {
        pages_of(offset, len).filter(|page| !self.pages.contains(page)).count() as u64 * PAGE
    }

    /// Copies out what readers see from `offset`, up to the file's end; returns the length.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> usize {
        let len = (self.size.saturating_sub(offset)).min(to.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (sector, skip) = (at / SECTOR, (at % SECTOR) as usize);
            let n = (SECTOR as usize - skip).min(len - done);
            match self.sectors.get(&sector).map(Sector::seen) {
                None | Some(Content::Zero) => to[done..done + n].fill(0),
                Some(Content::Data(bytes, start)) => {
                    to[done..done + n].copy_from_slice(&bytes[start + skip..start + skip + n]);
                }
            }
            done += n;
        }
        len
    }

    /// Lets a write reach the file: readers see it, a power cut may undo it.
    pub fn write(&mut self, stamp: Stamp, offset: u64, data: &Arc<[u8]>) {
        self.write_some(stamp, offset, data, |_| true);
    }

    /// Lets those sectors of a write reach the file that `reaches` chooses, by sector number.
    pub fn write_some(
        &mut self,
        stamp: Stamp,
        offset: u64,
        data: &Arc<[u8]>,
        mut reaches: impl FnMut(u64) -> bool,
    ) {
        let end = offset + data.len() as u64;
        let mut at = offset;
        let mut top = 0;
        while at < end {
            let sector = at / SECTOR;
            let next = ((sector + 1) * SECTOR).min(end);
            if reaches(sector) {
                let content = self
                    .patched(sector, at, &data[(at - offset) as usize..(next - offset) as usize])
                    .unwrap_or_else(|| Content::Data(Arc::clone(data), (at - offset) as usize));
                self.put(stamp, sector, content);
                self.pages.insert(at / PAGE);
                top = next;
            }
            at = next;
        }
        self.grow(stamp, top);
    }

    /// The content after a write of less than the sector, or nothing when it is the whole one.
    fn patched(&self, sector: u64, at: u64, part: &[u8]) -> Option<Content> {
        if part.len() as u64 == SECTOR {
            return None;
        }
        let mut whole = vec![0; SECTOR as usize];
        if let Some(old) = self.sectors.get(&sector) {
            old.seen().read(&mut whole);
        }
        let skip = (at % SECTOR) as usize;
        whole[skip..skip + part.len()].copy_from_slice(part);
        Some(Content::Data(Arc::from(whole), 0))
    }

    fn put(&mut self, stamp: Stamp, number: u64, content: Content) {
        let sector = self.sectors.entry(number).or_default();
        assert!(sector.versions.last().is_none_or(|last| last.stamp <= stamp), "stamps only grow");
        sector.versions.push(Version { stamp, content, lost: false });
        self.dirty.insert(number);
    }

    fn grow(&mut self, stamp: Stamp, end: u64) {
        if end > self.size {
            self.size = end;
            self.sizes.push((stamp, end));
        }
    }

    /// Takes up space and grows the file to the range's end (fallocate(2), mode 0).
    pub fn allocate(&mut self, stamp: Stamp, offset: u64, len: u64) {
        self.pages.extend(pages_of(offset, len));
        self.grow(stamp, offset + len);
    }

    /// Makes a range read as zeroes and gives its whole pages back. Only sectors that `reaches`
    /// chooses change.
    pub fn punch(&mut self, stamp: Stamp, offset: u64, len: u64, mut reaches: impl FnMut(u64) -> bool) {
        let (first, last) = (offset.div_ceil(SECTOR), (offset + len) / SECTOR);
        let touched: Vec<u64> = self.sectors.range(first..last).map(|(sector, _)| *sector).collect();
        for sector in touched {
            if reaches(sector) {
                self.put(stamp, sector, Content::Zero);
            }
        }
        let whole = offset.div_ceil(PAGE)..(offset + len) / PAGE;
        self.pages.retain(|page| !whole.contains(page));
    }

    /// Sets the size (ftruncate(2)); what was cut off is zero when the file grows again.
    pub fn truncate(&mut self, stamp: Stamp, size: u64) {
        if size < self.size {
            let len = self.size - size;
            if !size.is_multiple_of(SECTOR) {
                let rest = SECTOR - size % SECTOR;
                self.write(stamp, size, &Arc::from(vec![0; rest as usize]));
            }
            self.punch(stamp, size, len.next_multiple_of(SECTOR), |_| true);
        }
        self.size = size;
        self.sizes.push((stamp, size));
    }

    /// Makes everything that reached the file up to `covered` durable, except what an earlier
    /// failed sync dropped.
    pub fn sync(&mut self, covered: Stamp) {
        let sectors = &mut self.sectors;
        self.dirty.retain(|number| {
            let sector = sectors.get_mut(number).expect("a dirty sector exists");
            let end = sector.versions.partition_point(|version| version.stamp <= covered);
            if let Some(last) = sector.versions[..end].iter().rposition(|version| !version.lost) {
                sector.durable = sector.versions[last].content.clone();
                // What the failed sync dropped after it stays visible, and stays lost.
                sector.versions.drain(..=last);
            }
            !sector.versions.is_empty()
        });
        let end = self.sizes.partition_point(|(stamp, _)| *stamp <= covered);
        if let Some((_, size)) = self.sizes.drain(..end).next_back() {
            self.durable_size = size;
        }
    }

    /// A sync that failed: what it should have covered may be dropped, although readers go on
    /// seeing it, as Linux does.
    pub fn fail_sync(&mut self, covered: Stamp, rng: &mut Rng) {
        let keep = rng.pick(&[0, 50, 90]);
        for number in &self.dirty {
            let sector = self.sectors.get_mut(number).expect("a dirty sector exists");
            if !rng.percent(keep) {
                sector
                    .versions
                    .iter_mut()
                    .filter(|version| version.stamp <= covered)
                    .for_each(|v| v.lost = true);
            }
        }
    }

    /// The cache was emptied: what failed syncs dropped is no longer seen.
    pub fn forget_lost(&mut self) {
        let sectors = &mut self.sectors;
        self.dirty.retain(|number| {
            let sector = sectors.get_mut(number).expect("a dirty sector exists");
            sector.versions.retain(|version| !version.lost);
            !sector.versions.is_empty()
        });
    }

    /// The medium itself changes a sector.
    pub fn damage(&mut self, number: u64, bytes: &[u8]) {
        let content = Content::Data(Arc::from(bytes), 0);
        self.sectors.insert(number, Sector { durable: content, versions: Vec::new() });
        self.dirty.remove(&number);
    }

    /// The power fails: `draw` decides what of the unsynced state persists.
    pub fn power_cut(&mut self, draw: &mut Draw) {
        for number in std::mem::take(&mut self.dirty) {
            let sector = self.sectors.get_mut(&number).expect("a dirty sector exists");
            for version in std::mem::take(&mut sector.versions) {
                if !version.lost && draw.persists(version.stamp) {
                    sector.durable = version.content;
                }
            }
        }
        for (stamp, size) in std::mem::take(&mut self.sizes) {
            if draw.persists(stamp) {
                self.durable_size = size;
            }
        }
        self.size = self.durable_size;
        self.sectors.split_off(&self.size.div_ceil(SECTOR));
        self.pages.split_off(&self.size.div_ceil(PAGE));
    }

    /// The stamps of everything that is not durable, and how many there are.
    pub fn unsynced(&self) -> impl Iterator<Item = Stamp> {
        let versions = self.dirty.iter().flat_map(|number| &self.sectors[number].versions);
        versions.map(|version| version.stamp).chain(self.sizes.iter().map(|(stamp, _)| *stamp))
    }
}

fn pages_of(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / PAGE..(offset + len).div_ceil(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::persist::Persistence;

    fn bytes(fill: u8, len: usize) -> Arc<[u8]> {
        Arc::from(vec![fill; len])
    }

    fn first_bytes(medium: &Medium) -> Vec<u8> {
        let mut all = vec![0; medium.size() as usize];
        medium.read(0, &mut all);
        all.into_iter().step_by(512).collect()
    }

    fn cut(medium: &mut Medium, mode: Persistence) {
        let stamps: Vec<Stamp> = medium.unsynced().collect();
        medium.power_cut(&mut Draw::new(mode, &stamps, &mut Rng::new(1)));
    }

    #[test]
    fn synced_sectors_survive_and_others_are_drawn() {
        let mut medium = Medium::of(&bytes(1, 2048));
        medium.write(1, 0, &bytes(2, 1024));
        medium.write(2, 512, &bytes(3, 1024));
        medium.sync(1);
        cut(&mut medium, Persistence::Sectors(0));
        assert_eq!(first_bytes(&medium), [2, 2, 1, 1]);
    }

    #[test]
    fn size_and_punch_are_lost_without_sync() {
        let mut medium = Medium::of(&bytes(1, 1024));
        medium.write(1, 1024, &bytes(2, 512));
        medium.punch(2, 0, 512, |_| true);
        assert_eq!(first_bytes(&medium), [0, 1, 2]);
        cut(&mut medium, Persistence::Sectors(0));
        assert_eq!(first_bytes(&medium), [1, 1]);
    }

    #[test]
    fn a_failed_sync_drops_what_a_later_sync_seems_to_cover() {
        let mut medium = Medium::of(&bytes(1, 512));
        medium.write(1, 0, &bytes(2, 512));
        let mut rng = (0..).map(Rng::new).find(|rng| rng.clone().below(3) == 0).expect("some seed");
        medium.fail_sync(1, &mut rng);
        medium.sync(5);
        assert_eq!(first_bytes(&medium), [2], "still cached");
        medium.forget_lost();
        assert_eq!(first_bytes(&medium), [1], "read from the disk");
    }

    #[test]
    fn a_cut_off_tail_reads_as_zeroes_when_it_grows_back() {
        let mut medium = Medium::of(&bytes(1, 1024));
        medium.truncate(1, 100);
        medium.truncate(2, 1024);
        let mut all = vec![9; 1024];
        assert_eq!(medium.read(0, &mut all), 1024);
        assert!(all[..100].iter().all(|byte| *byte == 1) && all[100..].iter().all(|byte| *byte == 0));
    }
}
