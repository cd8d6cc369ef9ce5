//! A store's volumes: what can be asked of them, by the command line and by other programs, and the daemon that
//! serves them.
//!
//! `docs/daemon.md` describes the daemon, `docs/daemon-api.json` is the OpenAPI document. From the bottom up:
//!
//! - `address`: names of volumes and snapshots on the command line;
//! - `answer`: what is answered;
//! - `operation`: what an operation is; `look`, `change`, `live`, `transfer`, `upkeep`: the operations;
//! - `attached`: a volume that is served to virtual machines;
//! - `events`, `memory`, `service`: what operations run on;
//! - `background`: what the daemon does by itself;
//! - `routes`: from HTTP to an operation;
//! - `daemon`: the process;
//! - `access`: how a command gets at a store.
//!
//! The socket, the jobs and the client are those of `crate::control`.

pub mod access;
pub mod address;
pub mod answer;
pub mod attached;
mod background;
pub mod change;
pub mod daemon;
mod events;
pub mod limit;
pub mod live;
pub mod look;
mod memory;
pub mod operation;
pub mod routes;
pub mod service;
mod throttle;
pub mod transfer;
pub mod upkeep;

use std::time::Duration;

/// Time for a whole connection to the daemon: what is answered at once may have to wait for storage.
pub const CONNECTION_TIME_MAX: Duration = Duration::from_secs(600);
