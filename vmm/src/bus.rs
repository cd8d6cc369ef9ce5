//! What an access of the guest to a port or to memory that is no RAM reaches.
//!
//! A guest may touch anything: what nobody has claimed reads as all ones and swallows writes, as on a real bus.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that is reached through a range of a [`Bus`].
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (at most 8; KVM splits at pages) at an offset into the range; `data` comes filled with ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` (at most 8 bytes) at an offset into the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// The ports, or the memory that is no RAM.
#[derive(Clone, Default)]
pub struct Bus {
    /// By their first address.
    devices: BTreeMap<u64, (u64, Arc<Mutex<dyn BusDevice>>)>,
}

impl Bus {
    /// Gives a range of addresses to a device.
    ///
    /// # Panics
    /// The range is empty or overlaps another one: ranges are ours to choose.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<Mutex<dyn BusDevice>>) {
        assert!(range.start < range.end, "a device has addresses");
        let before = self.devices.range(..range.end).next_back();
        assert!(before.is_none_or(|(_, (end, _))| *end <= range.start), "ranges do not overlap");
        self.devices.insert(range.start, (range.end, device));
    }

    /// The guest reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// The device that has all of an access.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (start, (end, device)) = self.devices.range(..=address).next_back()?;
        let last = address.checked_add(len as u64)?;
        (last <= *end).then(|| (address - start, &**device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its offset; remembers what was written.
    #[derive(Default)]
    struct Probe(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn only_what_lies_in_a_range_reaches_its_device() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x60..0x64, probe.clone());
        bus.insert(0x64..0x65, Arc::new(Mutex::new(Probe::default())));
        let read = |address, len| {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x62, 2), [2, 2]);
        assert_eq!(read(0x63, 2), [0xff; 2], "it crosses the end");
        assert_eq!(read(0x5f, 2), [0xff; 2]);
        assert_eq!(read(0x65, 1), [0xff]);
        assert_eq!(read(u64::MAX, 8), [0xff; 8]);
        bus.write(0x61, &[7]);
        bus.write(0x65, &[8]);
        bus.write(u64::MAX, &[9; 8]);
        assert_eq!(probe.lock().unwrap().0, [(1, vec![7])]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x60..0x64, Arc::new(Mutex::new(Probe::default())));
        bus.insert(0x63..0x70, Arc::new(Mutex::new(Probe::default())));
    }
}
