//! Tests that need more than one crate, and the tools they share: real guests, a vhost-user client,
//! a model of a disk, damaged images and large ones, counters, a client that keeps a pace, mounted file systems, and the simulated world.

pub mod corpus;
pub mod counting;
pub mod damage;
pub mod frontend;
pub mod guest;
pub mod lacking;
pub mod load;
pub mod model;
pub mod mounts;
pub mod pace;
pub mod qcow2;
pub mod sealed;
pub mod sim;
pub mod stack;
pub mod synthetic;
