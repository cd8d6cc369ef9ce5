//! The configuration space of a function (section 6.1): 256 bytes, of which a mask says what may be written.

use std::ops::Range;

use crate::layout::PCI_WINDOW;

/// Bytes in a configuration space.
pub const CONFIG_BYTES: usize = 256;

/// Offset of the command register.
const COMMAND: usize = 0x04;
/// The function answers accesses to its memory.
const COMMAND_MEMORY: u16 = 1 << 1;
/// The function may access memory and send messages.
const COMMAND_MASTER: u16 = 1 << 2;
/// The function must not raise its interrupt line. It has none, but drivers set the bit and look.
const COMMAND_NO_INTX: u16 = 1 << 10;
/// Offset of the status register.
const STATUS: usize = 0x06;
/// There is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Offset of the revision; the class (3 bytes) follows it.
const REVISION: usize = 0x08;
/// Offset of the first BAR.
const BAR: usize = 0x10;
/// Offset of the subsystem's vendor and, behind it, number.
const SUBSYSTEM: usize = 0x2c;
/// Offset of the pointer to the first capability.
const CAPABILITIES: usize = 0x34;
/// Offset of the interrupt line, which software keeps for itself.
const INTERRUPT_LINE: usize = 0x3c;
/// Where capabilities begin.
const CAPABILITIES_START: usize = 0x40;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub device: (u16, u16),
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
    /// Revision.
    pub revision: u8,
    /// Class code: class, subclass, interface, from the highest byte.
    pub class: u32,
}

/// A configuration space.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits that may be written.
    writable: [u8; CONFIG_BYTES],
    /// Size of the memory behind the BAR; zero: there is none.
    bar_bytes: u32,
    /// Where the next capability goes, and where the pointer to it is.
    next: (usize, usize),
}

impl ConfigSpace {
    /// A function without capabilities and without memory.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar_bytes: 0,
            next: (CAPABILITIES_START, CAPABILITIES),
        };
        space.set(0, &identity.device.0.to_le_bytes());
        space.set(2, &identity.device.1.to_le_bytes());
        space.set(REVISION, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(SUBSYSTEM, &identity.subsystem.0.to_le_bytes());
        space.set(SUBSYSTEM + 2, &identity.subsystem.1.to_le_bytes());
        space.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX).to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function memory (32-bit, not prefetchable: section 6.2.5.1), and turns it on, as firmware would.
    ///
    /// # Panics
    /// `bytes` is no power of two of at least 16, or the address is no multiple of it.
    pub fn set_bar(&mut self, address: u32, bytes: u32) {
        assert!(bytes.is_power_of_two() && bytes >= 16 && address.is_multiple_of(bytes), "a BAR is aligned");
        self.bar_bytes = bytes;
        self.set(BAR, &address.to_le_bytes());
        // All ones read back as the size, since the bits below it stay zero.
        self.allow(BAR, &(!(bytes - 1)).to_le_bytes());
        self.set(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Appends a capability (section 6.7): its identifier and what follows the pointer to the next one. Returns its
    /// offset.
    ///
    /// # Panics
    /// There is no space left.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let (at, pointer) = self.next;
        let end = at + 2 + body.len();
        assert!(end <= CONFIG_BYTES, "capabilities fit");
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(pointer, &[at as u8]);
        self.set(at, &[id]);
        self.set(at + 2, body);
        self.next = (end.next_multiple_of(4), at + 1);
        at
    }

    /// Lets bits be written.
    pub fn allow(&mut self, offset: usize, bits: &[u8]) {
        self.writable[offset..offset + bits.len()].copy_from_slice(bits);
    }

    /// Changes bytes, writable or not.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Four bytes, at most `CONFIG_BYTES - 4` from the start.
    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes[offset..offset + 4].try_into().expect("four bytes"))
    }

    /// Two bytes, at most `CONFIG_BYTES - 2` from the start.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes[offset..offset + 2].try_into().expect("two bytes"))
    }

    /// The guest reads. Bytes beyond the end stay as they are.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((to, writable), from) in bytes.zip(data) {
            *to = *to & !writable | from & writable;
        }
    }

    /// Where the function's memory is, if it answers at all.
    pub fn memory(&self) -> Option<Range<u64>> {
        let start = u64::from(self.u32_at(BAR));
        let end = start + u64::from(self.bar_bytes);
        let on = self.bar_bytes != 0 && self.u16_at(COMMAND) & COMMAND_MEMORY != 0;
        (on && PCI_WINDOW.start <= start && end <= PCI_WINDOW.end).then_some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity =
            Identity { device: (0x1af4, 0x1042), subsystem: (0x1af4, 2), revision: 1, class: 0x01_8000 };
        ConfigSpace::new(identity)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0; 16]);
        assert_eq!(space.u32_at(0), 0x1042_1af4);
        assert_eq!(space.u32_at(8), 0x0180_0001);
        assert_eq!(space.u32_at(0x2c), 0x0002_1af4);
        assert_eq!(space.u16_at(STATUS), 0);
    }

    #[test]
    fn a_bar_is_sized_and_moved() {
        let mut space = space();
        assert_eq!(space.memory(), None);
        space.set_bar(0xc000_8000, 0x8000);
        assert_eq!(space.memory(), Some(0xc000_8000..0xc001_0000));
        space.write(COMMAND, &0u16.to_le_bytes());
        assert_eq!(space.memory(), None, "memory is off");
        space.write(BAR, &u32::MAX.to_le_bytes());
        assert_eq!(space.u32_at(BAR), 0xffff_8000);
        space.write(BAR + 4, &u32::MAX.to_le_bytes());
        assert_eq!(space.u32_at(BAR + 4), 0, "there is no second one");
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.u16_at(COMMAND), 0x0406);
        assert_eq!(space.memory(), None, "it is outside the window");
        space.write(BAR + 2, &[0x12, 0xd0]);
        assert_eq!(space.memory(), Some(0xd012_8000..0xd013_0000));
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[1, 2, 3]);
        let second = space.add_capability(0x09, &[4; 14]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.u16_at(STATUS), STATUS_CAPABILITIES);
        assert_eq!(space.u32_at(CAPABILITIES), 0x40);
        assert_eq!(space.u32_at(0x40), 0x0201_4811);
        assert_eq!(space.u16_at(0x48), 0x0009);
    }
}
