//! A store in the simulated world: random histories of volumes and snapshots, a model of what each of them
//! holds, and ends at any moment, in the middle of a commit of the catalog too.
//!
//! - [`model`]: what is there, by name, block by block;
//! - [`action`]: what is done, and what the model says of it;
//! - [`rig`]: a process that has a store open, and does it;
//! - [`history`]: random actions, ends, and the comparison.

pub mod action;
pub mod history;
pub mod model;
pub mod rig;
