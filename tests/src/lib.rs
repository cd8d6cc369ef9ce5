//! Test support: damaged images, and the simulated world.

pub mod damage;
pub mod sim;
