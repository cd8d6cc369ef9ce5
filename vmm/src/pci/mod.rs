//! A PCI bus with devices that have no functions but the first, memory but no ports, and messages but no interrupt
//! lines. References are to the PCI Local Bus Specification 3.0.
//!
//! - [`config`]: the configuration space of a function: what may be written of it, and its one BAR;
//! - [`msix`]: interrupts as messages;
//! - [`root`]: the bus as the processors reach it: the configuration ports and the window of memory.

pub mod config;
pub mod msix;
pub mod root;

/// Counts what a guest does wrong, so that it cannot fill the log.
#[derive(Debug, Default)]
pub struct Complaints(u64);

impl Complaints {
    /// The number of this one if it is to be logged: the first, the second, the fourth and so on.
    pub fn count(&mut self) -> Option<u64> {
        self.0 += 1;
        self.0.is_power_of_two().then_some(self.0)
    }
}
