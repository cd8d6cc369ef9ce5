//! Tests that need more than one crate, and the tools they share: real guests, and the simulated
//! world.

pub mod guest;
pub mod sim;
