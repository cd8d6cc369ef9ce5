//! Test support: the simulated world.

pub mod sim;
