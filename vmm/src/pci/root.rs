//! The bus as the processors reach it: configuration mechanism 1 (section 3.2.2.3.2) and the window of memory in
//! which the devices have their BARs.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{Bus, BusDevice};
use crate::layout::{PCI_CONFIG_PORTS, PCI_WINDOW};
use crate::pci::config::{ConfigSpace, Identity};

/// Devices on the bus, the host bridge among them.
pub const SLOTS: usize = 32;

/// Bytes of the address register; the data register follows it.
const ADDRESS_BYTES: u64 = 4;
/// The address register says that data accesses mean configuration spaces.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Bits of the address register that are not reserved.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// QEMU's generic PCIe host bridge (its docs/specs/pci-ids.rst): nothing but an identity.
const HOST_BRIDGE: Identity =
    Identity { device: (0x1b36, 0x0008), subsystem: (0, 0), revision: 0, class: 0x06_0000 };

/// A device on the bus; it has one function.
pub trait Function: Send {
    /// The guest reads 1, 2 or 4 bytes of the configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// The guest writes 1, 2 or 4 bytes of the configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// Where its memory is now, if it answers.
    fn memory(&self) -> Option<Range<u64>>;
    /// The guest reads the memory, any number of bytes up to 8 inside it; `data` comes filled with ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes the memory.
    fn write(&mut self, offset: u64, data: &[u8]);
}

struct HostBridge(ConfigSpace);

impl Function for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn memory(&self) -> Option<Range<u64>> {
        None
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// The bus.
pub struct Root {
    address: u32,
    functions: Vec<Box<dyn Function>>,
}

impl Default for Root {
    fn default() -> Self {
        Self { address: 0, functions: vec![Box::new(HostBridge(ConfigSpace::new(HOST_BRIDGE)))] }
    }
}

impl Root {
    /// Puts a device into the next slot.
    ///
    /// # Panics
    /// All [`SLOTS`] are taken.
    pub fn add(&mut self, function: Box<dyn Function>) {
        assert!(self.functions.len() < SLOTS, "there is a slot");
        self.functions.push(function);
    }

    /// The function that the address register selects, and the offset in its configuration space.
    fn selected(&mut self) -> Option<(&mut (dyn Function + 'static), usize)> {
        let [register, device, bus, _] = self.address.to_le_bytes();
        let (slot, function) = (usize::from(device >> 3), device & 7);
        if self.address & ADDRESS_ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        Some((&mut **self.functions.get_mut(slot)?, usize::from(register)))
    }

    fn read_ports(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(byte) = offset.checked_sub(ADDRESS_BYTES) {
            let inside = byte + data.len() as u64 <= 4;
            if let Some((function, register)) = self.selected().filter(|_| inside) {
                function.read_config(register + byte as usize, data);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        }
    }

    fn write_ports(&mut self, offset: u64, data: &[u8]) {
        if let Some(byte) = offset.checked_sub(ADDRESS_BYTES) {
            let inside = byte + data.len() as u64 <= 4;
            if let Some((function, register)) = self.selected().filter(|_| inside) {
                function.write_config(register + byte as usize, data);
            }
        } else if let (0, Ok(address)) = (offset, data.try_into()) {
            // Only a full word is the register; other accesses would be ports behind it.
            self.address = u32::from_le_bytes(address) & ADDRESS_BITS;
        }
    }

    /// The function whose memory has all of an access, and the offset there.
    fn at(&mut self, offset: u64, len: usize) -> Option<(&mut (dyn Function + 'static), u64)> {
        let address = PCI_WINDOW.start + offset;
        let end = address + len as u64;
        self.functions.iter_mut().find_map(|function| {
            let memory = function.memory()?;
            (memory.start <= address && end <= memory.end).then(|| (&mut **function, address - memory.start))
        })
    }

    /// Puts the bus where the processors reach it.
    pub fn attach(root: &Arc<Mutex<Self>>, ports: &mut Bus, memory: &mut Bus) {
        ports.insert(PCI_CONFIG_PORTS, Arc::new(Mutex::new(Ports(Arc::clone(root)))));
        memory.insert(PCI_WINDOW, Arc::new(Mutex::new(Window(Arc::clone(root)))));
    }
}

fn lock(root: &Mutex<Root>) -> MutexGuard<'_, Root> {
    root.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The configuration ports.
struct Ports(Arc<Mutex<Root>>);

impl BusDevice for Ports {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read_ports(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.0).write_ports(offset, data);
    }
}

/// The window of memory.
struct Window(Arc<Mutex<Root>>);

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((function, offset)) = lock(&self.0).at(offset, data.len()) {
            function.read(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = lock(&self.0).at(offset, data.len()) {
            function.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that reads as the offset.
    struct Probe(ConfigSpace);

    impl Function for Probe {
        fn read_config(&mut self, offset: usize, data: &mut [u8]) {
            self.0.read(offset, data);
        }

        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.0.write(offset, data);
        }

        fn memory(&self) -> Option<Range<u64>> {
            self.0.memory()
        }

        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    fn buses() -> (Bus, Bus) {
        let mut space = ConfigSpace::new(Identity { device: (0x1234, 0x5678), ..HOST_BRIDGE });
        space.set_bar(0xc000_1000, 0x1000);
        let mut root = Root::default();
        root.add(Box::new(Probe(space)));
        let (mut ports, mut memory) = (Bus::default(), Bus::default());
        Root::attach(&Arc::new(Mutex::new(root)), &mut ports, &mut memory);
        (ports, memory)
    }

    fn read<const N: usize>(bus: &Bus, address: u64) -> [u8; N] {
        let mut data = [0; N];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn configuration_is_read_in_any_width() {
        let (ports, _) = buses();
        assert_eq!(read(&ports, 0xcfc), [0xff; 4], "nothing is selected");
        ports.write(0xcf8, &0x8000_0803u32.to_le_bytes());
        assert_eq!(read(&ports, 0xcf8), 0x8000_0800u32.to_le_bytes());
        assert_eq!(read(&ports, 0xcfc), 0x5678_1234u32.to_le_bytes());
        assert_eq!(read(&ports, 0xcfe), 0x5678u16.to_le_bytes());
        assert_eq!(read(&ports, 0xcfd), [0x12]);
        // Linux looks whether a byte write leaves the address register alone.
        ports.write(0xcfb, &[1]);
        assert_eq!(read(&ports, 0xcf8), 0x8000_0800u32.to_le_bytes());
        assert_eq!(read(&ports, 0xcf9), [0xff]);
        assert_eq!(read(&ports, 0xcfa), [0xff; 4], "an access to both registers");
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let (ports, _) = buses();
        for (address, what) in [
            (0x8000_1000u32, "a slot"),
            (0x8000_0100, "a function"),
            (0x8001_0800, "a bus"),
            (0x0000_0800, "the address is not enabled"),
        ] {
            ports.write(0xcf8, &address.to_le_bytes());
            ports.write(0xcfc, &[0; 4]);
            assert_eq!(read(&ports, 0xcfc), [0xff; 4], "{what}");
        }
        ports.write(0xcf8, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&ports, 0xcfc), 0x0008_1b36u32.to_le_bytes());
    }

    #[test]
    fn memory_follows_the_bar() {
        let (ports, memory) = buses();
        assert_eq!(read(&memory, 0xc000_1042), [0x42]);
        assert_eq!(read(&memory, 0xc000_0042), [0xff]);
        assert_eq!(read(&memory, 0xc000_1ffe), [0xff; 4], "across the end");
        ports.write(0xcf8, &0x8000_0810u32.to_le_bytes());
        ports.write(0xcfc, &0xdfff_f000u32.to_le_bytes());
        assert_eq!(read(&memory, 0xc000_1042), [0xff]);
        assert_eq!(read(&memory, 0xdfff_ff42), [0x42]);
        assert_eq!(read(&memory, 0xdfff_ffff), [0xff]);
    }
}
