//! How a command gets at a store: through the daemon, where one answers, or by opening it itself. What is asked
//! and what is answered are the same in both cases.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::Method as HttpMethod;
use indicatif::ProgressBar;

use super::CONNECTION_TIME_MAX;
use super::operation::{Long, Method, Operation, Quick, request};
use super::service::Service;
use crate::control::client::{Client, follow};
use crate::control::http::HasJobs;
use crate::control::wire::{Failure, Nothing};
use crate::host::Host;

/// How much longer a command waits for an answer than the daemon lets a connection be.
const GRACE: Duration = Duration::from_secs(30);

/// Longest answer in bytes: a list of some hundred thousand volumes.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A store to be asked.
pub enum Access {
    /// By its daemon, at this socket.
    Daemon(PathBuf),
    /// Here.
    Direct(Arc<Service>),
}

/// Where the daemon of the store in `root` listens, or a link to that.
pub fn socket_of(root: &Path) -> PathBuf {
    root.join("daemon.sock")
}

impl Access {
    /// The daemon of the store in `root` if it answers, or else the store itself.
    pub fn to(host: Host, root: &Path) -> anyhow::Result<Self> {
        let known = socket_of(root);
        // A link may have a path that is too long for a socket.
        let socket = std::fs::read_link(&known).unwrap_or(known);
        match UnixStream::connect(&socket) {
            Ok(_) => return Ok(Self::Daemon(socket)),
            // Of a socket whose path is too long, too: there can be none.
            Err(error) if is_nobody(error.kind()) => {}
            Err(error) => return Err(anyhow::Error::from(error).context(socket.display().to_string())),
        }
        Ok(Self::Direct(Service::open(host, root, None)?))
    }

    /// Asks for what is answered at once.
    pub fn ask<O: Quick>(&self, operation: O) -> anyhow::Result<O::Answer> {
        match self {
            Self::Direct(service) => Ok(operation.run(service)?),
            Self::Daemon(socket) => {
                let (path, body) = request(&operation)?;
                client(socket).read(http_method::<O>(), &path, &body)
            }
        }
    }

    /// Has a job done, with a bar. SIGINT and SIGTERM cancel it.
    pub fn run<O: Long>(&self, operation: O, bar: &ProgressBar) -> anyhow::Result<O::Answer> {
        let result = match self {
            Self::Direct(service) => {
                let jobs = service.jobs();
                let look = |id, cancel| {
                    let job = if cancel { jobs.cancel(id) } else { jobs.get(id).map(Ok) };
                    let job = job.ok_or_else(|| anyhow::anyhow!("the job is forgotten"))?;
                    job.map_err(|refused| Failure::from(refused).into())
                };
                let begin = || service.start(operation).map_err(|refused| Failure::from(refused).into());
                follow(begin, look, bar)?
            }
            Self::Daemon(socket) => {
                let (path, body) = request(&operation)?;
                let client = client(socket);
                let look = |id: u64, cancel| {
                    let method = if cancel { HttpMethod::DELETE } else { HttpMethod::GET };
                    client.read(method, &format!("/v1/jobs/{id}"), &Nothing {})
                };
                follow(|| client.read(http_method::<O>(), &path, &body), look, bar)?
            }
        };
        Ok(serde_json::from_str(result.get())?)
    }
}

fn is_nobody(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::ConnectionRefused
            | ErrorKind::InvalidInput
            | ErrorKind::NotADirectory
    )
}

fn client(socket: &Path) -> Client<'_> {
    Client::patient(socket, CONNECTION_TIME_MAX + GRACE, ANSWER_BYTES_MAX)
}

fn http_method<O: Operation>() -> HttpMethod {
    match O::METHOD {
        Method::Get => HttpMethod::GET,
        Method::Post => HttpMethod::POST,
        Method::Delete => HttpMethod::DELETE,
    }
}
