//! The control socket of a server: HTTP and JSON over a unix socket.
//!
//! `docs/control.md` describes it, `docs/control-api.json` is the OpenAPI document. From the bottom up:
//!
//! - `wire`: what requests and answers look like, for both ends;
//! - `jobs`: work on the disk, one piece at a time, each on a thread of its own;
//! - `disk`: what can be asked of a served disk;
//! - `routes`: from a request to an answer;
//! - `listen`: the socket, one thread, and the bounds that a peer cannot pass;
//! - `client`: the other end, for the command line.
//!
//! Nothing here is on the way of a guest's data.

pub mod client;
mod disk;
mod jobs;
mod listen;
mod routes;
pub mod wire;

use std::path::Path;
use std::sync::Arc;

pub use disk::Served;
use jobs::Jobs;
use listen::Listener;

/// What the handlers share.
struct Shared {
    served: Served,
    jobs: Arc<Jobs>,
}

/// A control socket with its thread. Dropping it stops it.
pub struct Control {
    shared: Arc<Shared>,
    listener: Option<Listener>,
}

impl Control {
    /// Listens at `socket` for what is to be done with a disk.
    pub fn start(socket: &Path, served: Served) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared { served, jobs: Arc::default() });
        let listener = Listener::start(socket, routes::router(Arc::clone(&shared)))?;
        Ok(Self { shared, listener: Some(listener) })
    }
}

impl Drop for Control {
    /// Nobody can ask for anything more, and what runs is cancelled and has ended.
    fn drop(&mut self) {
        self.listener = None;
        self.shared.jobs.close();
    }
}
