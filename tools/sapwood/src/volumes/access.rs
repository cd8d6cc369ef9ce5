//! How a command gets at a store: through the daemon, where one answers, or by opening it itself. What is asked
//! and what is answered are the same in both cases.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

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

/// How long it waits for a store that another process has, or for that to be a daemon that answers.
const LOCKED_TIME_MAX: Duration = Duration::from_secs(10);
/// How often it looks meanwhile.
const PAUSE: Duration = Duration::from_millis(50);

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
    /// The daemon of the store in `root` if it answers, or else the store itself. While another process has that, which may be a
    /// daemon that begins, it waits a little.
    pub fn to(host: Host, root: &Path) -> anyhow::Result<Self> {
        Self::open(host, root, None)
    }

    /// The same for one who opens the store with a folder for sockets.
    pub fn open(host: Host, root: &Path, sockets: Option<&Path>) -> anyhow::Result<Self> {
        let begin = Instant::now();
        // A link may have come here with a copy of another store: it counts only while somebody has this one.
        let is_link = socket_of(root).is_symlink();
        loop {
            if !is_link && let Some(socket) = daemon_of(root)? {
                return Ok(Self::Daemon(socket));
            }
            match Service::open(host, root, sockets.map(Path::to_owned)) {
                Ok(service) => return Ok(Self::Direct(service)),
                Err(error) if error.kind == "locked" => {
                    if is_link && let Some(socket) = daemon_of(root)? {
                        return Ok(Self::Daemon(socket));
                    }
                    if begin.elapsed() > LOCKED_TIME_MAX {
                        return Err(error.into());
                    }
                    sleep(PAUSE);
                }
                Err(error) => return Err(error.into()),
            }
        }
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

/// Where the daemon of the store in `root` answers, if it does.
fn daemon_of(root: &Path) -> anyhow::Result<Option<PathBuf>> {
    let known = socket_of(root);
    // A link may have a path that is too long for a socket.
    let socket = std::fs::read_link(&known).unwrap_or(known);
    match UnixStream::connect(&socket) {
        Ok(_) => Ok(Some(socket)),
        // Of a socket whose path is too long, too: there can be none.
        Err(error) if is_nobody(error.kind()) => Ok(None),
        Err(error) => Err(anyhow::Error::from(error).context(socket.display().to_string())),
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
