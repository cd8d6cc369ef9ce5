//! The guest's memory: regions mapped from the file descriptors that the frontend sends.
//!
//! - An address is looked up on every use; a range may span regions that touch.
//! - Memory is only ever copied (`SharedBuf`), never borrowed.
//! - A window keeps its mapping alive: a region may be dropped while operations still move bytes
//!   into it (its queues are drained first all the same, or the guest would not know when it may
//!   use the memory again).
//! - A map lent to a queue's thread is a [`GuestMap::private_copy`], whose reference counts no
//!   other thread touches.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::{FileType, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use sapwood_blockdev::buffer::{Memory, Piece, SharedBuf};
use thiserror::Error;

/// Regions in one map; what GET_MAX_MEM_SLOTS answers. As many as QEMU uses at most.
pub const REGIONS_MAX: usize = 512;

/// A guest address range that is not, or not entirely, inside the memory shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("guest memory {address:#x}+{len:#x} is not shared")]
pub struct Outside {
    /// Start of the range.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a region was refused.
#[derive(Debug, Error)]
pub enum RegionError {
    /// Empty, or its end exceeds 2^64.
    #[error("region {address:#x}+{len:#x} is empty or wraps")]
    Range {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// It overlaps a region that is there.
    #[error("region {address:#x}+{len:#x} overlaps another")]
    Overlap {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The file ends before the region does.
    #[error("region of {len:#x} bytes at offset {offset:#x} in a file of {size:#x}")]
    FileTooShort {
        /// Where in the file the region starts.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The file's size.
        size: u64,
    },
    /// There are [`REGIONS_MAX`] already.
    #[error("more than {REGIONS_MAX} regions")]
    TooMany,
    /// No such region.
    #[error("no region {address:#x}+{len:#x}")]
    Unknown {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The system refused to map it.
    #[error("mapping guest memory: {0}")]
    Map(#[from] io::Error),
}

/// Where a region lies for the guest and for the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest physical address.
    pub guest: u64,
    /// Address in the frontend's process, in which ring addresses are given.
    pub user: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A stretch of guest memory.
#[derive(Clone, Debug)]
pub struct Region {
    place: Place,
    window: SharedBuf,
}

impl Region {
    /// A region over memory that is mapped already (for tests and fuzzing: `SharedBuf::heap`).
    ///
    /// # Errors
    /// An empty region, or one that wraps.
    ///
    /// # Panics
    /// If the window is shorter than the region.
    pub fn new(place: Place, window: SharedBuf) -> Result<Self, RegionError> {
        let Place { guest, user, len } = place;
        if len == 0 || guest.checked_add(len).is_none() || user.checked_add(len).is_none() {
            return Err(RegionError::Range { address: guest, len });
        }
        assert!(window.len() as u64 >= len, "a region of {len} bytes over {}", window.len());
        Ok(Self { place, window })
    }

    /// Maps a region from `offset` of a file.
    ///
    /// # Errors
    /// A range that cannot be, a file too short, what mmap(2) says.
    pub fn map(place: Place, file: impl AsFd, offset: u64) -> Result<Self, RegionError> {
        let window = map_file(file, offset, place.len)?;
        Self::new(place, window)
    }

    fn end(&self) -> u64 {
        self.place.guest + self.place.len
    }
}

/// Maps `len` bytes from `offset` of a file, shared.
///
/// # Errors
/// A range that cannot be, a file too short, what mmap(2) says.
pub(crate) fn map_file(file: impl AsFd, offset: u64, len: u64) -> Result<SharedBuf, RegionError> {
    let stat = fstat(&file).map_err(io::Error::from)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let wraps = RegionError::Range { address: offset, len };
    let Some(end) = offset.checked_add(len) else { return Err(wraps) };
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && size < end {
        return Err(RegionError::FileTooShort { offset, len, size });
    }
    // Huge pages (hugetlbfs tells them as the block size) can only be mapped whole.
    let unit = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096).next_power_of_two();
    let lead = offset % unit;
    let whole = (lead + len)
        .checked_next_multiple_of(unit)
        .and_then(|len| usize::try_from(len).ok())
        .filter(|len| isize::try_from(*len).is_ok());
    let Some(whole) = whole else { return Err(wraps) };
    let mapping = Mapping::new(&file, offset - lead, whole)?;
    // SAFETY: the mapping is readable and writable for `whole` bytes until its last owner is
    // gone, `lead + len` of which are used; nothing borrows from it.
    Ok(unsafe { SharedBuf::from_raw(mapping.start.add(lead as usize), len as usize, Arc::new(mapping)) })
}

/// A shared mapping, undone on drop.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; only its address and length are kept.
unsafe impl Send for Mapping {}
// SAFETY: as above; it gives no access by itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so nothing that is mapped changes.
        let raw = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, file, offset)? };
        let start = NonNull::new(raw.cast()).expect("mmap without a hint does not return null");
        Ok(Self { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this address and length, and no window is left.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len) } {
            log::error!("unmapping shared memory: {error}");
        }
    }
}

/// The guest's memory: regions in order of guest address, which do not overlap.
#[derive(Clone, Debug, Default)]
pub struct GuestMap {
    regions: Vec<Region>,
}

impl GuestMap {
    /// Adds a region.
    ///
    /// # Errors
    /// Too many regions, or an overlap.
    pub fn add(&mut self, region: Region) -> Result<(), RegionError> {
        if self.regions.len() == REGIONS_MAX {
            return Err(RegionError::TooMany);
        }
        let at = self.regions.partition_point(|other| other.place.guest < region.place.guest);
        let Place { guest, len, .. } = region.place;
        let after_previous = at == 0 || self.regions[at - 1].end() <= guest;
        let before_next = self.regions.get(at).is_none_or(|next| region.end() <= next.place.guest);
        if !after_previous || !before_next {
            return Err(RegionError::Overlap { address: guest, len });
        }
        self.regions.insert(at, region);
        Ok(())
    }

    /// Removes the region that lies exactly there.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&mut self, place: Place) -> Result<(), RegionError> {
        let at = self.regions.iter().position(|region| region.place == place);
        let at = at.ok_or(RegionError::Unknown { address: place.guest, len: place.len })?;
        self.regions.remove(at);
        Ok(())
    }

    /// The same memory, with reference counts of its own: cloning windows of a copy does not
    /// contend with the users of other copies.
    #[must_use]
    pub fn private_copy(&self) -> Self {
        let copy = |region: &Region| {
            let len = region.window.len();
            let start = NonNull::new(region.window.address()).expect("a window's address");
            // SAFETY: the owner holds a window, which keeps its memory mapped.
            let window = unsafe { SharedBuf::from_raw(start, len, Arc::new(region.window.clone())) };
            Region { place: region.place, window }
        };
        Self { regions: self.regions.iter().map(copy).collect() }
    }

    /// Copies out of guest memory.
    ///
    /// # Errors
    /// A range outside; `to` may be filled in part.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Outside> {
        self.for_each(address, to.len() as u64, |window, at, n, done| {
            window.read_at(at, &mut to[done..done + n]);
        })
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// A range outside; a part may have been written.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), Outside> {
        self.for_each(address, from.len() as u64, |window, at, n, done| {
            window.write_at(at, &from[done..done + n]);
        })
    }

    /// Appends a range of guest memory to a scatter list.
    ///
    /// # Errors
    /// A range outside; a part may have been appended.
    pub fn share(&self, address: u64, len: u64, to: &mut Memory) -> Result<(), Outside> {
        self.for_each(address, len, |window, at, n, _| to.push(Piece::Shared(window.slice(at..at + n))))
    }

    /// A window on a ring, by the frontend's address. A ring lies in one region.
    pub fn ring(&self, user: u64, len: usize) -> Option<SharedBuf> {
        self.regions.iter().find_map(|Region { place, window }| {
            let at = user.checked_sub(place.user).filter(|at| *at < place.len)?;
            (len as u64 <= place.len - at).then(|| window.slice(at as usize..at as usize + len))
        })
    }

    /// Calls `f(window, start, length, bytes before)` for the parts of a range, in order.
    fn for_each(
        &self,
        address: u64,
        len: u64,
        mut f: impl FnMut(&SharedBuf, usize, usize, usize),
    ) -> Result<(), Outside> {
        if len == 0 {
            return Ok(());
        }
        let mut done = 0;
        let first = self.regions.partition_point(|region| region.end() <= address);
        for Region { place, window } in &self.regions[first..] {
            // No region wraps, so neither does an address that one of them ends at.
            let Some(at) = (address + done).checked_sub(place.guest) else { break };
            let n = (place.len - at).min(len - done);
            f(window, at as usize, n as usize, done as usize);
            done += n;
            if done == len {
                return Ok(());
            }
        }
        Err(Outside { address, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, len: usize) -> Region {
        let place = Place { guest, user: guest + 0x7000_0000, len: len as u64 };
        Region::new(place, SharedBuf::heap(len)).unwrap()
    }

    fn map() -> GuestMap {
        let mut map = GuestMap::default();
        for region in [region(0x2000, 0x1000), region(0x1000, 0x1000), region(0x8000, 0x1000)] {
            map.add(region).unwrap();
        }
        map
    }

    #[test]
    fn ranges_cross_regions_that_touch() {
        let map = map();
        map.write(0x1ffe, b"abcd").unwrap();
        let mut back = [0; 4];
        map.private_copy().read(0x1ffe, &mut back).unwrap();
        assert_eq!(&back, b"abcd");
        let mut memory = Memory::default();
        map.share(0x1ffe, 4, &mut memory).unwrap();
        assert_eq!(memory.pieces().len(), 2);
    }

    #[test]
    fn ranges_outside_are_refused() {
        let map = map();
        for (address, len) in
            [(0, 1), (0xfff, 2), (0x2fff, 2), (0x8fff, 2), (0x9000, 1), (u64::MAX, 1), (u64::MAX - 1, 4)]
        {
            assert_eq!(
                map.share(address, len, &mut Memory::default()),
                Err(Outside { address, len }),
                "{address:#x}+{len}"
            );
        }
        map.share(u64::MAX, 0, &mut Memory::default()).unwrap();
        assert!(map.share(0x1000, u64::MAX, &mut Memory::default()).is_err());
    }

    #[test]
    fn overlaps_and_wraps_are_refused() {
        let mut map = map();
        for (guest, len) in [(0x1000, 0x1000), (0xfff, 2), (0x2fff, 1), (0x7000, 0x3000)] {
            let refused = map.add(region(guest, len)).unwrap_err();
            assert!(matches!(refused, RegionError::Overlap { .. }), "{refused}");
        }
        let wraps = Place { guest: u64::MAX, user: 0, len: 2 };
        assert!(matches!(Region::new(wraps, SharedBuf::heap(2)), Err(RegionError::Range { .. })));
        let place = Place { guest: 0x8000, user: 0x7000_8000, len: 0x1000 };
        map.remove(place).unwrap();
        assert!(matches!(map.remove(place), Err(RegionError::Unknown { .. })));
    }

    #[test]
    fn rings_lie_in_one_region() {
        let map = map();
        assert_eq!(map.ring(0x7000_1ff0, 16).unwrap().len(), 16);
        assert!(map.ring(0x7000_1ff0, 17).is_none());
        assert!(map.ring(u64::MAX, 1).is_none());
    }

    #[test]
    fn files_are_mapped_at_any_offset() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10000).unwrap();
        let place = Place { guest: 0, user: 0, len: 5000 };
        let mut map = GuestMap::default();
        map.add(Region::map(place, &file, 5000).unwrap()).unwrap();
        map.write(4998, b"zz").unwrap();
        let mut byte = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 9998).unwrap();
        assert_eq!(&byte, b"zz");
        assert!(matches!(Region::map(place, &file, 5001), Err(RegionError::FileTooShort { .. })));
        assert!(matches!(Region::map(place, &file, u64::MAX), Err(RegionError::Range { .. })));
    }
}
