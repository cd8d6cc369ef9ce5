//! MSI-X (section 6.8.2): a table of messages, and which of them are pending.
//!
//! A message goes out if MSI-X is enabled and neither the function nor its entry is masked; otherwise its
//! descriptor keeps it (see [`Vector`]), and that it does is what the pending bits show.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::interrupts::{Interrupts, Message, Vector};
use crate::pci::Complaints;

/// The capability's identifier.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bytes in an entry: address (8), data (4), control (4).
pub const ENTRY_BYTES: usize = 16;
/// Entries at most.
pub const ENTRIES_MAX: usize = 2048;

/// MSI-X is on (bit 15 of the message control register).
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// All messages are held back (bit 14).
pub const CONTROL_MASK: u16 = 1 << 14;

/// Offset of an entry's control.
const ENTRY_CONTROL: usize = 12;
/// The entry is held back.
const ENTRY_MASKED: u32 = 1;

/// The interrupts of a function.
pub struct Msix {
    vectors: Vec<Vector>,
    entries: Vec<[u8; ENTRY_BYTES]>,
    enabled: bool,
    masked: bool,
    complaints: Complaints,
}

impl Msix {
    /// A table in which all entries are masked.
    ///
    /// # Errors
    /// The system has no descriptors left.
    ///
    /// # Panics
    /// More than [`ENTRIES_MAX`] entries.
    pub fn new(interrupts: &Interrupts, entries: usize) -> Result<Self, crate::interrupts::Error> {
        assert!((1..=ENTRIES_MAX).contains(&entries), "entries that the capability can tell");
        let vectors = (0..entries).map(|_| interrupts.vector()).collect::<Result<_, _>>()?;
        let mut entry = [0; ENTRY_BYTES];
        entry[ENTRY_CONTROL] = ENTRY_MASKED as u8;
        Ok(Self {
            vectors,
            entries: vec![entry; entries],
            enabled: false,
            masked: false,
            complaints: Complaints::default(),
        })
    }

    /// Entries in the table.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none; there always are.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What raises an entry, if there is such an entry.
    pub fn event(&self, entry: usize) -> Option<&Arc<EventFd>> {
        self.vectors.get(entry).map(Vector::event)
    }

    /// The message control register was written.
    pub fn set_control(&mut self, control: u16) {
        let state = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if state != (self.enabled, self.masked) {
            (self.enabled, self.masked) = state;
            (0..self.len()).for_each(|entry| self.apply(entry));
        }
    }

    /// The guest reads the table. What lies beyond it stays as it is.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.entries.as_flattened();
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// The guest writes the table. Reserved bits stay zero.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.entries.as_flattened_mut();
        for (to, from) in bytes.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        let end = offset.saturating_add(data.len()).div_ceil(ENTRY_BYTES).min(self.len());
        for entry in offset / ENTRY_BYTES..end {
            let control = self.control(entry) & ENTRY_MASKED;
            self.entries[entry][ENTRY_CONTROL..].copy_from_slice(&control.to_le_bytes());
            self.apply(entry);
        }
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset + i) * 8;
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = self.vectors.get(first + bit).is_some_and(Vector::is_pending);
                bits | u8::from(pending) << bit
            });
        }
    }

    fn control(&self, entry: usize) -> u32 {
        u32::from_le_bytes(self.entries[entry][ENTRY_CONTROL..].try_into().expect("four bytes"))
    }

    /// Brings an entry's vector into the state that the registers say.
    fn apply(&mut self, entry: usize) {
        let bytes = &self.entries[entry];
        let message = Message {
            address: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            data: u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
        };
        let through = self.enabled && !self.masked && self.control(entry) & ENTRY_MASKED == 0;
        let vector = &mut self.vectors[entry];
        let applied = if through { vector.unmask(message) } else { vector.mask() };
        // The guest gave a message that cannot be: it is the guest's interrupt that does not come.
        if let Err(error) = applied
            && let Some(n) = self.complaints.count()
        {
            log::warn!("interrupt {entry} of a PCI device (number {n}): {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupts::fake::Remembered;

    fn table(entries: usize) -> (Arc<Remembered>, Msix) {
        let events = Arc::new(Remembered::default());
        let interrupts = Interrupts::with(events.clone()).unwrap();
        (events, Msix::new(&interrupts, entries).unwrap())
    }

    fn entry(address: u64, data: u32, control: u32) -> Vec<u8> {
        [&address.to_le_bytes()[..], &data.to_le_bytes(), &control.to_le_bytes()].concat()
    }

    #[test]
    fn three_masks_hold_a_message_back() {
        let (events, mut msix) = table(3);
        let connected = || events.irqfds.lock().unwrap().len();
        msix.write_table(16, &entry(0xfee0_0000, 0x31, 0));
        assert_eq!(connected(), 0, "MSI-X is not enabled");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        assert_eq!(connected(), 0, "the function is masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(connected(), 1);
        assert_eq!(events.messages.lock().unwrap()[0].2, 0x31);
        msix.write_table(16 + 12, &1u32.to_le_bytes());
        assert_eq!(connected(), 0, "the entry is masked");
        msix.event(1).unwrap().write(1).unwrap();
        let mut pending = [0xff; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(16 + 12, &[0]);
        assert_eq!(connected(), 1);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_table_reads_as_written_less_what_is_reserved() {
        let (_, mut msix) = table(2);
        let mut back = [0; 16];
        msix.read_table(16, &mut back);
        assert_eq!(back[12..], [1, 0, 0, 0], "masked at first");
        msix.write_table(16, &entry(0x1122_3344_5566_7788, 0x99aa_bbcc, 0xffff_ffff));
        msix.read_table(16, &mut back);
        assert_eq!(back[..], entry(0x1122_3344_5566_7788, 0x99aa_bbcc, 1));
        // Across entries and beyond the end.
        msix.write_table(12, &[0; 8]);
        msix.write_table(28, &[0; 8]);
        msix.write_table(4096, &[0; 8]);
        let mut beyond = [0xff; 8];
        msix.read_table(28, &mut beyond);
        assert_eq!(beyond, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert!(msix.event(2).is_none());
    }
}
