//! A store in the simulated world: random histories of volumes and snapshots, a model of what each of them
//! holds, and ends at any moment, in the middle of a commit of the catalog too.
//!
//! - [`model`]: what is there, by name, block by block;
//! - [`action`]: what is done, and what the model says of it;
//! - `archives`: the same of archives;
//! - [`setup`]: what stores and disks are like;
//! - [`rig`]: a process that has a store open, and does it; `inspect` is what it finds there;
//! - [`history`]: random actions, ends, and the comparison;
//! - `accounts`: what snapshots take, by what `reached` finds in packs;
//! - [`together`]: several at a time.

mod accounts;
pub mod action;
mod archives;
pub mod history;
mod inspect;
pub mod model;
mod reached;
pub mod rig;
pub mod setup;
pub mod together;
