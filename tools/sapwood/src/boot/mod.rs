//! `sapwood boot`: a virtual machine and the servers of its disks.
//!
//! There are three kinds of processes. The *supervisor* is the one that the user started: it starts the others, waits for
//! what happens, and ends when they have ended. The *servers* are `sapwood serve`, one for each disk that is a file. The
//! *worker* has the virtual machine in it and nothing else; it is the one that a guest could break into.
//! The servers and the worker end when the supervisor does, however that ends.
//!
//! When the guest restarts everything but the supervisor is started anew: the guest may have installed another kernel,
//! which is found only on a disk that nobody writes.

mod child;
mod events;
mod kernel;
mod machine;
mod plan;
mod qemu;
mod reader;
mod server;
mod supervisor;
mod terminal;
mod volume;
mod worker;

pub use child::{CHILD_OF, end_with};
pub use machine::probe;
pub use plan::{Boot, ConsoleSpec, DiskSpec, Machine};
pub use qemu::script;
pub use server::{remove_folder_of, with_options};
pub use supervisor::{Outcome, run};
pub use volume::settle;
pub use worker::Worker;
