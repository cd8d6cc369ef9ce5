//! The devices that are no PCI devices: the serial port, and the ports through which a guest ends.

pub mod escape;
pub mod power;
pub mod serial;
