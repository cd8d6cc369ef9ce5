//! Collections over small packs on a real file system.

mod account;
mod collection;
mod model;
mod scrub;
mod store;
