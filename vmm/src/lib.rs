//! A minimal virtual machine monitor for KVM on x86-64: one guest, its memory shared with the vhost-user
//! backends that serve its disks, a serial console, and nothing else that a Linux kernel can do without.
//!
//! The parts, from below: the machine (`machine/`: memory, processors, interrupts), what the firmware of a real
//! machine would have left in memory (`boot/`: the kernel, its parameters, ACPI tables), the devices that the processors
//! reach through a [`bus`] (`legacy/`, `pci/`, `virtio/`), and the loop that runs it all. `from_disk/` finds the kernel on
//! the guest's own disk.

pub mod boot;
pub mod bus;
pub mod config;
pub mod event;
pub mod from_disk;
pub mod inherited;
pub mod interrupts;
pub mod layout;
pub mod legacy;
pub mod machine;
pub mod pci;
pub mod probe;
pub mod run;
pub mod seccomp;
pub mod virtio;

pub use config::{Config, Console, Disk, Ending};
pub use run::{Error, run};
