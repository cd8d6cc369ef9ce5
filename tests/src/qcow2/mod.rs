//! Tools for tests of the qcow2 reader: images made by QEMU or byte by byte, and a disk over them.
//!
//! [`craft`] knows the format a second time, from its specification and not from the program's
//! constants; that QEMU reads what it makes is tested too.

pub mod craft;
pub mod mutate;
pub mod qemu;
pub mod reader;
