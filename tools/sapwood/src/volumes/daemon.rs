//! The daemon's process: the control socket, and the orderly end.
//!
//! Order at the start: the store is opened, so that nobody else has it; what was attached is attached again; the control
//! socket; only then is it said to be ready. At the end: jobs are cancelled, nobody can ask any more, jobs end, everything is detached, the store is closed.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use super::access::{Access, socket_of};
use super::attached::check_socket;
use super::background::Background;
use super::service::Service;
use super::{CONNECTION_TIME_MAX, look, routes};
use crate::control::http::HasJobs;
use crate::control::listen::Listener;
use crate::host::Host;
use crate::metrics::{self, listen::Loopback};

/// The environment variable that names the socket of whoever supervises this process (`sd_notify(3)`).
const NOTIFY_VARIABLE: &str = "NOTIFY_SOCKET";

/// What a daemon is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The store's directory.
    pub store: PathBuf,
    /// The control socket; by default in the store.
    pub socket: Option<PathBuf>,
    /// The folder for sockets of volumes; by default in the store.
    pub sockets: Option<PathBuf>,
    /// Where this host's Prometheus gets its page.
    pub metrics: Option<Loopback>,
    /// Whether what was attached is attached again.
    pub restore: bool,
    /// Whether anything is done without being asked for.
    pub background: bool,
    /// Requests under way at most, of all disks, while they share by weight or reservation.
    pub in_flight: usize,
    /// The weight of what is done in the background while they do.
    pub background_weight: u32,
}

/// A running daemon.
pub struct Daemon {
    service: Arc<Service>,
    listener: Listener,
    metrics: Option<Listener>,
    link: Option<Link>,
    background: Option<Background>,
    socket: PathBuf,
}

/// A link to a control socket that is elsewhere, so that commands find it; removed when dropped.
struct Link(PathBuf);

impl Drop for Link {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

impl Daemon {
    /// Opens the store and listens.
    pub fn start(host: Host, options: &Options) -> anyhow::Result<Self> {
        let sockets = options.sockets.clone().unwrap_or_else(|| options.store.join("sockets"));
        let folder = absolute(&sockets)?;
        let service = match Access::open(host, &options.store, Some(&folder))? {
            Access::Direct(service) => service,
            // There is one already.
            Access::Daemon(_) => Service::open(host, &options.store, Some(folder))?,
        };
        fs::create_dir_all(&sockets).with_context(|| sockets.display().to_string())?;
        let begun = Self::begin(&service, options);
        if begun.is_err() {
            service.close()?;
        }
        begun
    }

    /// Attaches everything again, and listens.
    fn begin(service: &Arc<Service>, options: &Options) -> anyhow::Result<Self> {
        service.throttle().share(options.in_flight, options.background_weight);
        match service.memory() {
            Some(memory) if options.restore => memory.restore(service),
            _ => service.remember()?,
        }
        let known = socket_of(&options.store);
        let socket = options.socket.clone().unwrap_or_else(|| known.clone());
        check_socket(&socket)?;
        // What a killed daemon has left: the store is ours, so nobody answers there.
        let is_elsewhere = socket != known;
        if is_elsewhere || known.is_symlink() {
            remove(&known);
        }
        let router = routes::router(Arc::clone(service));
        let listener = Listener::start(&socket, router, CONNECTION_TIME_MAX)?;
        let link = match is_elsewhere {
            true => {
                symlink(absolute(&socket)?, &known).with_context(|| known.display().to_string())?;
                Some(Link(known))
            }
            false => None,
        };
        let metrics = options.metrics.map(|address| {
            let service = Arc::clone(service);
            metrics::listen::start(address, Arc::new(move || look::page(&service)))
        });
        let metrics = metrics.transpose()?;
        let background = options.background.then(|| Background::start(service)).transpose()?;
        Ok(Self { service: Arc::clone(service), listener, metrics, link, background, socket })
    }

    /// What is served.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends everything; what guests wrote is durable then.
    pub fn stop(self) -> anyhow::Result<()> {
        let Self { service, listener, metrics, link, background, .. } = self;
        drop(link);
        // First: the listener waits for what is being answered, which may wait for these.
        service.background().stop();
        service.jobs().stop();
        drop(listener);
        drop(metrics);
        drop(background);
        Ok(service.close()?)
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

/// Removes what may not be there.
fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => log::warn!("{}: {error}", path.display()),
        _ => {}
    }
}

/// Tells whoever supervises this process how far it is, as in `READY=1`; nobody may.
pub fn notify(state: &str) {
    if let Some(socket) = std::env::var_os(NOTIFY_VARIABLE).filter(|name| !name.is_empty())
        && let Err(error) = send(&socket, state)
    {
        log::warn!("cannot notify {}: {error}", socket.to_string_lossy());
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}
