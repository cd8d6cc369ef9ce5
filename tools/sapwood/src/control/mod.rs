//! The control socket of a server: HTTP and JSON over a unix socket.
//!
//! `docs/control.md` describes it, `docs/control-api.json` is the OpenAPI document. From the bottom up:
//!
//! - `wire`: what requests and answers look like, for both ends;
//! - `jobs`: work that takes long, each on a thread of its own;
//! - `disk`: what can be asked of a served disk;
//! - `limits`: what its guest may do;
//! - `http`: errors, bodies and jobs, as all control sockets have them;
//! - `routes`: from a request about a served disk to an answer;
//! - `listen`: the socket, one thread, and the bounds that a peer cannot pass;
//! - `client`: the other end, for the command line.
//!
//! The daemon of a store (`crate::volumes`) is built on the same.
//!
//! Nothing here is on the way of a guest's data.

pub mod client;
mod disk;
pub mod http;
pub mod jobs;
pub mod limits;
pub mod listen;
mod routes;
pub mod wire;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use disk::Served;
use jobs::Jobs;
use listen::Listener;

/// Jobs that run at a time.
const JOBS_MAX: usize = 1;
/// Time for a whole connection.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);

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
        let shared = Arc::new(Shared { served, jobs: Arc::new(Jobs::new(JOBS_MAX)) });
        let listener = Listener::start(socket, routes::router(Arc::clone(&shared)), CONNECTION_TIME_MAX)?;
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
