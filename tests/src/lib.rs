//! Tests that need more than one crate, and the tools they share: real guests, a vhost-user client,
//! a model of a disk, counters, and the simulated world.

pub mod counting;
pub mod frontend;
pub mod guest;
pub mod model;
pub mod sim;
